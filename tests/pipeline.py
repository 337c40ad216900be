"""The stages as a user types them, for tests: through each script's `main`, with the description's names."""

import itertools
import json
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, VOCABULARY
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama_moe import LlamaMoEConfig, LlamaMoEForCausalLM, record_routing
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.text.corpus import Corpus, training_corpus
from run_moefication.settings import CorpusSettings


def corpus_of(checkpoint: DenseCheckpoint, text: Path, cache: Path | None = None, **settings: Any) -> Corpus:
    """The corpus that these settings choose."""
    return training_corpus(checkpoint, text, cache, CorpusSettings(**settings))


# The scripts, by the stage that each is for.
SCRIPTS = {
    stage: import_module(f"run_moefication.llama_{name}")
    for stage, name in {
        "split": "split_clustering",
        "split_graph": "split_graph",
        "split_random": "split_random",
        "features": "get_hidden_features",
        "select": "select_mlp",
        "convert": "convert",
        "calibrate": "calibrate",
        "distill": "distill",
        "evaluate": "evaluate",
        "report": "report",
    }.items()
}
GATE, UP = "layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.up_proj.weight"
SECONDS = re.compile(rb'("seconds": )[\d.e-]+')
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

    def labels(self, layer: int, template: str = GATE) -> torch.Tensor:
        """The expert of each neuron of a layer, shared ones last: `[I]`."""
        return torch.load(self.split_folder / template.format(layer), weights_only=True)

    def recorded(self, layer: int, kind: str = "hidden_inputs") -> torch.Tensor:
        """What stage 2 recorded of a layer, in global order, in float32: `[tokens, H or I]`."""
        files = json.loads((self.features_folder / "manifest.json").read_text())["files"]
        names = sorted((name for name in files if name.startswith(kind)), key=lambda name: files[name]["shard"])
        shards = [torch.load(self.features_folder / name, weights_only=True)[layer] for name in names]
        return torch.cat(shards).float()

    def feature_arguments(self) -> list[str]:
        paths = ["--model_path", self.model, "--train_data_path", self.text, "--save_path", self.save]
        return [*map(str, [*paths, "--train_data_cache_path", self.save / "cache", *self.feature_options])]

    def split(self) -> int:
        stage = {"Clustering": "split", "Graph": "split_graph", "Random": "split_random"}[self.split_method]
        return self._main(stage, self.split_options, save_path=self.save, num_experts=self.num_experts)

    def features(self) -> int:
        return SCRIPTS["features"].main(self.feature_arguments())

    def select(self) -> int:
        paths = {"split_file_path": self.split_folder, "hidden_features_path": self.features_folder}
        counts = {"num_experts": self.num_experts, "num_selects": self.num_selects}
        return self._main("select", self.select_options, **paths, save_path=self.save, **counts)

    def convert(self) -> int:
        paths = {"split_file_path": self.split_folder, "select_file_path": self.select_folder}
        counts = {"num_experts": self.num_experts, "num_selects": self.num_selects}
        return self._main("convert", self.convert_options, **paths, save_path=self.moe, **counts)

    def calibrate(self) -> int:
        paths = {"moe_path": self.moe, "save_path": self.calibrated, "train_data_path": self.text}
        return self._main("calibrate", self.calibrate_options, **paths)

    def _main(self, stage: str, rest: list[Any], **options: Any) -> int:
        pairs = [part for name, value in options.items() for part in (f"--{name}", value)]
        return SCRIPTS[stage].main([str(part) for part in ("--model_path", self.model, *pairs, *rest)])

    def converted(self, folder: Path, *options: Any, num_selects: int = 4) -> Path:
        """Another conversion from the same split and gates."""
        other = replace(self, moe=folder, convert_options=[*options], num_selects=num_selects)
        assert other.convert() == 0
        return folder

    def run(self) -> "Pipeline":
        """All stages up to the converted model; each must succeed."""
        for stage in (self.split, self.features, self.select, self.convert):
            assert stage() == 0, stage
        return self


def shared_pipeline(model: Path, text: Path, save: Path, num_shared: int | None = 2, **options) -> Pipeline:
    """8 experts, some shared, of a split on activations or their graph; linear gates in closed form; threshold routing
    at 4 of 8. Without a number of shared experts, the description's."""
    if num_shared is None:
        return Pipeline(model, text, save, **options)
    corpus = ["--block_size", 32, "--max_tokens", 512]
    split = ["--num_shared_experts", num_shared, "--train_data_path", text, *corpus]
    split += [] if options.get("split_method") == "Graph" else ["--cluster_on", "activations"]
    features = [*corpus, "--feature_format", "inputs", "--dtype", "float32"]
    stages = {"split_options": split, "feature_options": features, "select_options": LINEAR}
    stages["convert_options"] = ["--routing", "threshold"]
    return Pipeline(model, text, save, **({"num_experts": 8, "num_selects": 4} | stages | options))


def load(folder: Path, num_selects: int | None = None, auto_class: type = AutoModelForCausalLM) -> PreTrainedModel:
    """A checkpoint, dense or not, in float32; `num_selects` replaces the number of routed experts per token."""
    model = auto_class.from_pretrained(folder, dtype=torch.float32).eval()
    if num_selects is not None:
        model.set_num_experts_per_tok(num_selects)
    return model


def make_moe(model_class: type[PreTrainedModel] = LlamaMoEForCausalLM, **config) -> PreTrainedModel:
    """A random tiny MoE model: 2 of 4 experts, unless told otherwise."""
    torch.manual_seed(0)
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
    return model_class(LlamaMoEConfig(**(TINY | fields | config))).eval()


@torch.no_grad()
def with_thresholds(model: PreTrainedModel, fraction: float = 0.5) -> PreTrainedModel:
    """A model with the quantiles of its scores on some text stored, and the active fraction set by them, if it has
    threshold routing."""
    if model.config.routing == "threshold":
        scores = model(some_tokens(4, 20), output_router_logits=True).router_logits
        for layer, layer_scores in zip(model.model.layers, scores, strict=True):
            layer.mlp.gate.store_score_quantiles(layer_scores)
        model.set_active_fraction(fraction)
    return model


def some_tokens(batch: int = 2, length: int = 10) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """What a model says of some tokens."""
    return model(some_tokens(2, 24)).logits


def batches(blocks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Blocks of tokens, `[blocks, length]` for those in succession that are equally long; nothing is padded."""
    return [torch.stack([*group]).long() for _, group in itertools.groupby(blocks, len)]


@torch.no_grad()
def inputs_to(module: nn.Module, model: PreTrainedModel, blocks: list[torch.Tensor]) -> torch.Tensor:
    """What enters a module of the model in plain forward passes: `[tokens, width]`."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    for batch in batches(blocks):
        model(batch)
    hook.remove()
    return torch.cat(seen)


@torch.no_grad()
def logits_of(model: PreTrainedModel, blocks: list[torch.Tensor]) -> torch.Tensor:
    """What a model says of blocks: `[tokens, V]`."""
    return torch.cat([model(batch).logits.flatten(0, 1) for batch in batches(blocks)])


def divergence(model: PreTrainedModel, dense: PreTrainedModel, blocks: list[torch.Tensor]) -> float:
    """KL of the model's next-token distributions from the dense model's, mean over tokens."""
    expected, found = (logits_of(each, blocks).double().log_softmax(-1) for each in (dense, model))
    return nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean").item()


def mlp_inputs(model: PreTrainedModel, layer: int, blocks: list[torch.Tensor]) -> torch.Tensor:
    """What enters the MLP (or MoE block) of a layer: `[tokens, H]`."""
    return inputs_to(model.model.layers[layer].mlp, model, blocks)


@torch.no_grad()
def shares_on(model: PreTrainedModel, blocks: list[torch.Tensor]) -> list[float]:
    """The share of the routed experts that runs on these blocks, by layer."""
    with record_routing(model) as statistics:
        for batch in batches(blocks):
            model(batch)
    return [layer.experts_per_tok / layer.runs.numel() for layer in statistics]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path; the seconds that manifests tell of, which vary, are all 0."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: SECONDS.sub(rb"\g<1>0", data) if name.endswith(".json") else data for name, data in files.items()}


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """A full disk, as far as files larger than `size` bytes go."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, previous)


class Killed(BaseException):
    """Stands in for the end of the process."""


@contextmanager
def renames(fatal: int | str | None = None, error: type[BaseException] = Killed) -> Iterator[list[str]]:
    """The names that files are renamed to while it lasts. The rename of this number (from 1), or to this name, does not
    happen: the process ends instead, or gets the `error`."""
    names: list[str] = []

    def watched(real: Callable) -> Callable:
        def rename(source: Any, target: Any, **options: Any) -> None:
            names.append(Path(target).name)
            if fatal in (len(names), names[-1]):
                raise error
            real(source, target, **options)

        return rename

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename"):
            patch.setattr(os, name, watched(getattr(os, name)))
        yield names
