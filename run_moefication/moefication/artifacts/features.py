"""What the MLPs saw on text: the shards that the get_hidden_features stage writes, read back layer by layer."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ..checkpoints.dense import DenseCheckpoint
from ..errors import MoEficationError, SettingError
from ..storage.artifact import open_finished
from ..storage.tensors import tensor_sha256
from .split import require_template

INPUTS, GATE_OUTPUTS = "hidden_inputs", "hidden_gate_outputs"


def shard_file(kind: str, rank: int, index: int) -> str:
    """`hidden_inputs/R_I.pth` or `hidden_gate_outputs/R_I.pth`, relative to the features folder."""
    return f"{kind}/{rank}_{index}.pth"


class Features:
    """A finished feature folder, checked against the model; reads one layer of one shard at a time, in global order."""

    def __init__(self, folder: str | Path, checkpoint: DenseCheckpoint, template: str):
        require_template(template)
        self.artifact = open_finished(folder, "hidden_features")
        self.artifact.require_source(checkpoint.fingerprint, checkpoint.name)
        self.has_gate_outputs = self.artifact.options["feature_format"] == "full"
        if self.has_gate_outputs:
            self.artifact.require_option("templates", template)
        self.artifact.check_sizes()
        self._widths = {INPUTS: checkpoint.config.hidden_size, GATE_OUTPUTS: checkpoint.config.intermediate_size}
        self.num_tokens = sum(self.artifact.files[file]["tokens"] for file in self._files(INPUTS))

    def inputs(self, layer: int) -> Iterator[torch.Tensor]:
        """The MLP inputs of a layer, shard by shard: `[tokens, hidden_size]`, memory-mapped."""
        return self._tensors(INPUTS, layer)

    def gate_outputs(self, layer: int) -> Iterator[torch.Tensor]:
        """The recorded activations of a layer, in the order of `inputs`: `[tokens, intermediate_size]`."""
        return self._tensors(GATE_OUTPUTS, layer)

    def _files(self, kind: str) -> list[str]:
        files = [file for file in self.artifact.files if file.startswith(f"{kind}/")]
        return sorted(files, key=lambda file: self.artifact.files[file]["shard"])

    def _tensors(self, kind: str, layer: int) -> Iterator[torch.Tensor]:
        for file in self._files(kind):
            entry, path, shard = self.artifact.files[file], self.artifact.folder / file, self.artifact.map(file)
            tensor = shard.get(layer) if isinstance(shard, dict) else None
            shape = (entry["tokens"], self._widths[kind])
            if not isinstance(tensor, torch.Tensor) or tensor.shape != shape or not tensor.is_contiguous():
                raise MoEficationError(f"{path} has no tensor of shape {list(shape)} for layer {layer}")
            if tensor_sha256(tensor) != entry["layers"][str(layer)]:
                why = f"the checksum of layer {layer} is not the manifest's"
                raise SettingError(f"{path} is damaged: {why}; {self.artifact.cure}")
            yield tensor
