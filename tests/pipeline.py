"""The stages as a user types them, for tests: through each script's `main`, with the description's names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import llama_moe  # noqa: F401 (registers LlamaMoE)
from run_moefication import (
    llama_calibrate,
    llama_convert,
    llama_get_hidden_features,
    llama_select_mlp,
    llama_split_clustering,
    llama_split_random,
)
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.text.corpus import Corpus, training_corpus
from run_moefication.settings import CorpusSettings


def corpus_of(checkpoint: DenseCheckpoint, text: Path, cache: Path | None = None, **settings: Any) -> Corpus:
    """The corpus that these settings choose."""
    return training_corpus(checkpoint, text, cache, CorpusSettings(**settings))


LINEAR = ["--gate_network", "linear", "--select_criterion", "output_norm"]  # select options


@dataclass
class Pipeline:
    """Options of every stage; each stage method runs one script and returns its exit status."""

    model: Path
    text: Path
    save: Path
    num_experts: int = 4
    num_selects: int = 2
    split_options: list[Any] = field(default_factory=list)
    feature_options: list[Any] = field(default_factory=lambda: ["--block_size", 32, "--max_tokens", 512])
    select_options: list[Any] = field(default_factory=lambda: ["--epochs", 3, "--use_softmax"])
    convert_options: list[Any] = field(default_factory=list)
    calibrate_options: list[Any] = field(default_factory=lambda: ["--block_size", 32, "--max_tokens", 512])
    split_method: str = "Clustering"
    moe: Path | None = None
    calibrated: Path | None = None

    def __post_init__(self) -> None:
        self.moe = self.moe or self.save / f"{self.model.name}-MoE"
        self.calibrated = self.calibrated or self.save / f"{self.model.name}-MoE-Calibrated"

    @property
    def split_folder(self) -> Path:
        return self.save / f"{self.model.name}-{self.num_experts}Expert-Split-{self.split_method}"

    @property
    def features_folder(self) -> Path:
        return self.save / f"{self.model.name}-Hidden-Features"

    @property
    def select_folder(self) -> Path:
        return self.save / f"{self.model.name}-{self.num_experts}Expert-Select-MLP"

    def split_arguments(self) -> list[Any]:
        paths = ["--model_path", self.model, "--save_path", self.save]
        return [*paths, "--num_experts", self.num_experts, *self.split_options]

    def feature_arguments(self) -> list[Any]:
        paths = ["--model_path", self.model, "--train_data_path", self.text, "--save_path", self.save]
        return [*paths, "--train_data_cache_path", self.save / "cache", *self.feature_options]

    def select_arguments(self) -> list[Any]:
        paths = ["--split_file_path", self.split_folder, "--hidden_features_path", self.features_folder]
        counts = ["--num_experts", self.num_experts, "--num_selects", self.num_selects]
        return ["--model_path", self.model, *paths, "--save_path", self.save, *counts, *self.select_options]

    def convert_arguments(self) -> list[Any]:
        paths = ["--split_file_path", self.split_folder, "--select_file_path", self.select_folder]
        counts = ["--num_experts", self.num_experts, "--num_selects", self.num_selects]
        return ["--model_path", self.model, *paths, "--save_path", self.moe, *counts, *self.convert_options]

    def calibrate_arguments(self) -> list[Any]:
        paths = ["--model_path", self.model, "--moe_path", self.moe, "--save_path", self.calibrated]
        return [*paths, "--train_data_path", self.text, *self.calibrate_options]

    def split(self) -> int:
        script = {"Clustering": llama_split_clustering, "Random": llama_split_random}[self.split_method]
        return script.main([*map(str, self.split_arguments())])

    def features(self) -> int:
        return llama_get_hidden_features.main([*map(str, self.feature_arguments())])

    def select(self) -> int:
        return llama_select_mlp.main([*map(str, self.select_arguments())])

    def convert(self) -> int:
        return llama_convert.main([*map(str, self.convert_arguments())])

    def calibrate(self) -> int:
        return llama_calibrate.main([*map(str, self.calibrate_arguments())])

    def run(self) -> "Pipeline":
        """All stages up to the converted model; each must succeed."""
        for stage in (self.split, self.features, self.select, self.convert):
            assert stage() == 0, stage
        return self


def corpus_options(text: Path, max_tokens: int = 512) -> list[Any]:
    """A small corpus, for stages that may read one."""
    return ["--train_data_path", text, "--block_size", 32, "--max_tokens", max_tokens]


def shared_pipeline(model: Path, text: Path, save: Path, num_shared: int = 2, **options) -> Pipeline:
    """8 experts, some shared, of a split on activations; linear gates in closed form; threshold routing at 4 of 8."""
    split = ["--cluster_on", "activations", "--num_shared_experts", num_shared, *corpus_options(text)]
    features = ["--block_size", 32, "--max_tokens", 512, "--feature_format", "inputs", "--dtype", "float32"]
    stages = {"split_options": split, "feature_options": features, "select_options": LINEAR}
    stages["convert_options"] = ["--routing", "threshold"]
    return Pipeline(model, text, save, **({"num_experts": 8, "num_selects": 4} | stages | options))


def load(folder: Path) -> PreTrainedModel:
    """A checkpoint in float32, as it lies there."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_dense(folder: Path) -> PreTrainedModel:
    """The dense model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_moe(folder: Path, num_selects: int, auto_class: type = AutoModelForCausalLM) -> PreTrainedModel:
    """The converted model in float32, with that many experts per token."""
    model = auto_class.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_num_experts_per_tok(num_selects)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
