"""Blocks of different lengths in one forward pass: the one place where text is padded.

Axes: B blocks of a batch, N positions (of the longest block), T tokens of the batch.
"""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Batch:
    """Consecutive blocks that go through a model together."""

    rows: slice  # where their tokens lie among those of all blocks
    lengths: list[int]  # tokens of each block
    held_out: bool = False  # whether fits leave these blocks out

    def mask(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """bool `[B, N]`: which positions hold text; the others are padding."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(max(self.lengths), device=device) < lengths[:, None]

    def padded(self, rows: torch.Tensor) -> torch.Tensor:
        """`[T, ...]` -> `[B, N, ...]`. Padding follows the text, where causal attention keeps it from changing it."""
        return pad_sequence(rows.split(self.lengths), batch_first=True)

    def flat(self, padded: torch.Tensor) -> torch.Tensor:
        """`[B, N, ...]` -> `[T, ...]`, without the padding."""
        return padded[self.mask(padded.device)]


def batches_of(blocks: list[torch.Tensor], batch_size: int, num_held_out: int = 0) -> list[Batch]:
    """The blocks, `batch_size` at a time, in their order; the last `num_held_out` blocks in batches of their own."""
    batches, start = [], 0
    num_fitted = len(blocks) - num_held_out
    for part, held_out in ((blocks[:num_fitted], False), (blocks[num_fitted:], True)):
        for index in range(0, len(part), batch_size):
            lengths = [len(block) for block in part[index : index + batch_size]]
            batches.append(Batch(slice(start, start := start + sum(lengths)), lengths, held_out))
    return batches
