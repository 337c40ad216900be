"""LlamaMoE checkpoints that a stage here wrote, read tensor by tensor."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

import llama_moe
from llama_moe import LlamaMoEConfig
from llama_moe.gates import Gate

from ..errors import MoEficationError, SettingError
from ..storage.files import file_sha256
from ..storage.folder import open_finished
from ..storage.manifest import MOE_STAGES
from .dense import DenseCheckpoint
from .transformers_library import CONFIG_ERRORS, first_line, quiet_transformers


def correct_zero_budget(config: LlamaMoEConfig, thresholds: list[float]) -> None:
    """Say in the config that no routed expert runs, where the thresholds are out of every score's reach: checkpoints of
    version 0.1 say 1 there. `thresholds` are those of the layers, if they have any."""
    if thresholds and min(thresholds) >= -Gate.LOWEST_THRESHOLD:
        config.num_experts_per_tok = 0


def require_num_selects(num_selects: int, config: LlamaMoEConfig, least_routed: int = 1) -> None:
    """Raise MoEficationError unless the model can run so many experts per token, shared ones included."""
    least = config.num_shared_experts + max(least_routed, config.min_experts_per_tok)
    most = config.num_shared_experts + config.max_routed_experts
    if not least <= num_selects <= most:
        raise SettingError(f"num_selects {num_selects} is outside of {least} to {most}, the model's experts")


class MoECheckpoint:
    """A finished LlamaMoE checkpoint, checked against the dense model it was made from.

    Attributes:
        artifact: the folder.
        config: its `LlamaMoEConfig`.
        model_class: the name of its class in `llama_moe`.
        tensors: name without the `model.` prefix -> shape and dtype.
    """

    def __init__(self, folder: str | Path, checkpoint: DenseCheckpoint):
        self.artifact = open_finished(folder, *MOE_STAGES)
        self.artifact.require_source(checkpoint.fingerprint, checkpoint.name)
        self.artifact.check_sizes()
        path = self.artifact.folder
        try:
            self.config = LlamaMoEConfig.from_dict(json.loads((path / "config.json").read_bytes()))
        except CONFIG_ERRORS as error:  # not JSON, or values that the config refuses
            raise MoEficationError(f"{path} has no usable config.json ({first_line(error)})") from error
        self.model_class = self.config.architectures[0]
        self.prefix = "" if self.model_class == "LlamaMoEModel" else "model."
        self._file_of, self._open_files, self.tensors = {}, {}, {}
        for file in sorted(name for name in self.artifact.files if name.endswith(".safetensors")):
            opened = self._open(file)
            for stored in opened.keys():  # noqa: SIM118 (not a dict)
                name = stored.removeprefix(self.prefix)
                self._file_of[name] = (file, stored)
                tensor = opened.get_slice(stored)
                self.tensors[name] = (tuple(tensor.get_shape()), opened.get_tensor(stored).dtype)
        correct_zero_budget(self.config, [self.tensor(n).item() for n in self.tensors if n.endswith("gate.threshold")])

    @property
    def path(self) -> Path:
        """The folder."""
        return self.artifact.folder

    def load(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The whole model, of the installed `llama_moe`, in its own dtype or another."""
        with quiet_transformers():
            return getattr(llama_moe, self.model_class).from_pretrained(self.path, dtype=dtype or "auto")

    @property
    def experts_per_tok(self) -> list[float]:
        """Routed experts that run per token, by layer."""
        return [float(self.config.experts_per_tok_of(layer)) for layer in range(self.config.num_hidden_layers)]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its name without `model.` prefix; memory-mapped, not to be written to."""
        file, stored = self._file_of[name]
        return self._open(file).get_tensor(stored)

    def stored_name(self, name: str) -> str:
        """The name under which a tensor lies in the files."""
        return name if name in ("lm_head.weight", "score.weight") else self.prefix + name

    def layer_tensors(self, layer: int) -> list[str]:
        """Names of the tensors of one layer."""
        return [name for name in self.tensors if name.startswith(f"layers.{layer}.")]

    def _open(self, file: str):
        if file not in self._open_files:
            path = self.artifact.folder / file
            if file_sha256(path) != self.artifact.files[file]["sha256"]:
                raise MoEficationError(f"{path} is damaged: its checksum is not the manifest's; make the folder anew")
            try:
                self._open_files[file] = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise MoEficationError(f"{path} is not a whole safetensors file: {error}") from error
        return self._open_files[file]
