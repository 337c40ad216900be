"""Residual streams of models that are run layer by layer, kept on the disk between layers.

A mapped file holds the streams of every token before a layer, 4 * hidden_size bytes a token and model. They stay there
until the layer's results are written, so an interrupted walk goes on with the layer it was at.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import SettingError
from ..storage.files import sync
from ..storage.folder import ArtifactWriter


class Streams:
    """Residual streams of one or several models, float32 `[models, tokens, H]`, in mapped files of a stage's folder.

    For each layer in turn: fill `filling(layer + 1)` from `before(layer)`, write the layer's results, `remove(layer)`.
    """

    def __init__(self, writer: ArtifactWriter, shape: tuple[int, int, int]):
        self._writer, self._shape = writer, torch.Size(shape)
        writer.begin()  # so that the streams that lie there are this run's

    def before(self, layer: int) -> torch.Tensor:
        """The streams before a layer, not to be written to."""
        if not self.has(layer):
            raise SettingError(f"{self._path(layer)} is missing or cut; run again with overwrite")
        return self._map(self._path(layer))

    def has(self, layer: int) -> bool:
        """Whether the streams before this layer have been committed, and are whole."""
        path = self._path(layer)
        return path.is_file() and path.stat().st_size == 4 * self._shape.numel()

    def layers_to_walk(self, missing: list[int], num_layers: int) -> list[int]:
        """From the first layer whose results are missing to the last one; all layers, if the streams are gone."""
        return list(range(missing[0] if self.has(missing[0]) else 0, num_layers)) if missing else []

    @contextmanager
    def filling(self, layer: int) -> Iterator[torch.Tensor]:
        """Room for the streams before a layer, which are there once the context ends without an error."""
        path = self._path(layer)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.unlink(missing_ok=True)
        with temporary.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a bus error in a mapped file
                os.posix_fallocate(file.fileno(), 0, 4 * self._shape.numel())
        yield self._map(temporary)
        sync(temporary)
        os.replace(temporary, path)

    def remove(self, layer: int) -> None:
        """The streams before this layer are needed no more."""
        self._path(layer).unlink(missing_ok=True)

    def _map(self, path: Path) -> torch.Tensor:
        stored = torch.from_file(str(path), shared=True, size=self._shape.numel(), dtype=torch.float32)
        return stored.view(self._shape)

    def _path(self, layer: int) -> Path:
        return self._writer.temporary_path(f"streams.{layer}")
