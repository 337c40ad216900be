"""LlamaMoE checkpoints that a stage wrote, read tensor by tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import llama_moe
from llama_moe import LlamaMoEConfig
from llama_moe.gates import Gate

from ..errors import MoEficationError, SettingError
from ..progress import progress
from ..storage.artifact import open_finished
from ..storage.manifest import MANIFEST, MOE_STAGES
from .dense import DenseCheckpoint
from .headers import EMBEDDING, HEAD, StoredTensors, map_tensors
from .transformers_library import CONFIG_ERRORS, first_line, quiet_transformers


def experts_per_tok(config: LlamaMoEConfig, threshold_of: Callable[[int], float]) -> list[float]:
    """Routed experts that run per token, by layer; `threshold_of(layer)` is asked where models of version 0.1 may say 1
    for none: there the threshold is out of every score's reach."""
    counts = [float(config.experts_per_tok_of(layer)) for layer in range(config.num_hidden_layers)]
    if config.routing != "threshold" or config.num_experts_per_tok != 1:
        return counts
    return [0.0 if threshold_of(layer) >= -Gate.LOWEST_THRESHOLD else count for layer, count in enumerate(counts)]


def require_num_selects(
    num_selects: int, config: LlamaMoEConfig, least_routed: int = 1, name: str = "num_selects"
) -> None:
    """Raise MoEficationError unless the model can run so many experts per token, shared ones included; `name` is the
    setting's."""
    least = config.num_shared_experts + max(least_routed, config.min_experts_per_tok)
    most = config.num_shared_experts + config.max_routed_experts
    if not least <= num_selects <= most:
        shared = f" (shared ones, which always run: {config.num_shared_experts})" if config.num_shared_experts else ""
        raise SettingError(f"{name} {num_selects} is outside of {least} to {most}, the model's experts{shared}")


def set_num_selects(model: PreTrainedModel, num_selects: int, name: str | Path) -> None:
    """Have a loaded model run so many experts per token, shared ones included; `name` is for the error."""
    try:
        model.set_num_experts_per_tok(num_selects - model.config.num_shared_experts)
    except ValueError as error:  # its thresholds have no quantiles
        raise SettingError(f"{name} cannot run num_selects {num_selects}: {error}") from error


def verify_weights(folder: Path) -> None:
    """Refuse a checkpoint whose weights are not those that its manifest lists, if there is one: transformers would load
    them without a word."""
    if (folder / MANIFEST).exists():
        artifact = open_finished(folder, *MOE_STAGES)
        weights = [file for file in artifact.files if file.endswith(".safetensors")]
        for file in progress(weights, f"check {folder.name}", "file"):
            artifact.verified(file)


class StoredMoE(StoredTensors):
    """A LlamaMoE checkpoint, whatever program saved it. `model_class` is the name of its class in `llama_moe`."""

    def __init__(self, path: Path):
        try:
            fields = json.loads((path / "config.json").read_bytes())
            kind = fields["model_type"]
            if kind == LlamaMoEConfig.model_type:
                self.config = LlamaMoEConfig.from_dict(fields)
                self.model_class = self.config.architectures[0]
        except CONFIG_ERRORS as error:  # it is not JSON, or has values that the config refuses
            raise MoEficationError(f"{path} has no usable config.json ({first_line(error)})") from error
        if kind != LlamaMoEConfig.model_type:
            raise MoEficationError(f"{path} is a {kind} model, not a LlamaMoE")
        prefix = "" if self.model_class == "LlamaMoEModel" else "model."
        super().__init__(path, *map_tensors(path), prefix)
        if self.config.tie_word_embeddings and HEAD in self.tensors:
            # Where the two differ, the tensors decide, as they do in transformers.
            head, embedding = (StoredTensors.tensor(self, name) for name in (HEAD, EMBEDDING))
            self.config.tie_word_embeddings = torch.equal(head, embedding)

    def new_config(self, **changed: Any) -> LlamaMoEConfig:
        """The config with other values for some of its fields."""
        fields = self.config.to_dict() | changed
        fields.pop("transformers_version", None)
        return LlamaMoEConfig.from_dict(fields)

    def load(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The whole model, as a class of the installed `llama_moe`, in its own dtype or another."""
        with quiet_transformers():
            return getattr(llama_moe, self.model_class).from_pretrained(self.path, dtype=dtype or "auto")


class MoECheckpoint(StoredMoE):
    """A finished LlamaMoE checkpoint, checked against the dense model it was made from.

    A file's checksum is compared with the manifest's before its first tensor is read; `verify` does that for all.
    `artifact` is the folder as the manifest describes it.
    """

    def __init__(self, folder: str | Path, checkpoint: DenseCheckpoint):
        self.artifact = open_finished(folder, *MOE_STAGES)
        self.artifact.require_source(checkpoint.fingerprint, checkpoint.name)
        self.artifact.check_sizes()
        super().__init__(self.artifact.folder)
        self._verified: set[str] = set()

    def verify(self) -> None:
        """Raise MoEficationError if the checksum of a file of weights is not the manifest's."""
        for file in progress(sorted(set(self.files.values())), f"check {self.path.name}", "file"):
            self._verify(file)

    def tensor(self, name: str) -> torch.Tensor:
        """As in `StoredTensors`, its file verified."""
        self._verify(self.files[name])
        return super().tensor(name)

    @property
    def experts_per_tok(self) -> list[float]:
        """Routed experts that run per token, by layer."""
        return experts_per_tok(self.config, lambda layer: self.tensor(f"layers.{layer}.mlp.gate.threshold").item())

    def _verify(self, file: str) -> None:
        if file not in self._verified:
            self.artifact.verified(file)
            self._verified.add(file)
