"""How the tensors of a new checkpoint fall into safetensors files, known before any of them is made."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .errors import MoEficationError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS}.index.json"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the new checkpoint: known by name, shape and dtype before `make` is called for its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def made(self) -> torch.Tensor:
        """The tensor itself, in its dtype, contiguous; refused where it is not what was planned."""
        tensor = self.make().to(self.dtype).contiguous()
        if tuple(tensor.shape) != self.shape:
            raise MoEficationError(f"{self.name} came out as {list(tensor.shape)}, {list(self.shape)} was planned")
        return tensor


def plan_shards(plan: list[PlannedTensor], max_shard_bytes: int) -> dict[str, list[PlannedTensor]]:
    """File name -> its tensors, in order, each file at most `max_shard_bytes` or one tensor."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for planned in plan:
        if groups[-1] and size + planned.num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(planned)
        size += planned.num_bytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def shard_index(shards: dict[str, list[PlannedTensor]]) -> dict:
    """The content of `WEIGHTS_INDEX`, which goes with more than one file."""
    tensors = [(planned, file) for file, group in shards.items() for planned in group]
    return {
        "metadata": {"total_size": sum(planned.num_bytes for planned, _ in tensors)},
        "weight_map": {planned.name: file for planned, file in tensors},
    }
