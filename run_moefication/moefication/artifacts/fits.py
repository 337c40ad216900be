"""What a calibration has fitted so far: tensors and metrics, kept beside the checkpoint until that is written."""

from pathlib import Path
from typing import Any

import torch

from ..storage.files import write_atomically
from ..storage.folder import ArtifactWriter
from ..storage.tensors import load_tensors


class Fits:
    """Named fits in temporary files of a stage's folder, so that an interrupted stage does none of them again."""

    def __init__(self, writer: ArtifactWriter):
        self._writer = writer

    def has(self, name: str) -> bool:
        """Whether this fit has been saved."""
        return self._path(name).is_file()

    def save(self, name: str, tensors: dict[str, torch.Tensor], metrics: Any) -> None:
        """Keep a fit's tensors, by name, its metrics, and how long it took."""
        content = [tensors, metrics, self._writer.lap()]
        write_atomically(self._path(name), lambda file: torch.save(content, file))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a saved fit, memory-mapped, not to be written to."""
        return load_tensors(self._path(name))[0]

    def metrics(self, name: str) -> Any:
        """The metrics of a saved fit."""
        return load_tensors(self._path(name))[1]

    def seconds(self, name: str) -> float:
        """How long a saved fit took."""
        return sum(load_tensors(self._path(name))[2:])  # one begun by version 0.1 does not say

    def _path(self, name: str) -> Path:
        return self._writer.temporary_path(f"{name}.fit")
