"""Thresholds of gates by a text: the one that meets a budget, and one layer after the other set to it.

Axes: T tokens, E routed experts, H hidden size.
"""

from collections.abc import Callable

import torch

from llama_moe.gates import Gate

from ..text.batches import Batch
from .decoder import PreMLP
from .scores import TOKENS_PER_CHUNK, token_stride

THRESHOLD_STEP = 0.3  # how far a threshold moves, each step of a training, to where the step's text would have it


def wanted_threshold(gate: Gate, scores: torch.Tensor, share: float) -> torch.Tensor:
    """The threshold, a scalar, that this share of a text's scores `[T, E]` reaches."""
    candidates = gate.within_bounds(scores).flatten()
    below = round((1 - share) * len(candidates))  # so many do not reach it
    return candidates.kthvalue(min(len(candidates), below + 1)).values


def set_threshold(gate: Gate, scores: torch.Tensor, share: float) -> torch.Tensor:
    """Which experts run, bool `[T, E]`, of a text's scores `[T, E]`. If the gate routes by a threshold, that is set
    first, and the quantiles it comes from, so that this share of all scores reaches it."""
    if gate.routing == "threshold":
        gate.store_score_quantiles(scores[:: token_stride(scores.numel())])
        gate.set_active_share(share)
    return torch.cat([gate.mask(chunk) for chunk in scores.split(TOKENS_PER_CHUNK)])


@torch.no_grad()
def settle_layer(
    half: PreMLP,
    gate: Gate,
    output: Callable[[torch.Tensor], torch.Tensor],
    stream: torch.Tensor,
    batches: list[Batch],
    share: float,
    device: str | torch.device,
) -> float:
    """Set a layer's threshold by a text, and bring the text's residual stream `[tokens, H]` past the layer.

    `output` gives the MoE block's output from its inputs, `[T, H]` each, with the gate as it then is. Returns the share
    of its routed experts that runs. Memory: the text's scores.
    """
    scores = []
    for batch in batches:
        attended, inputs = half(stream[batch.rows].to(device), batch)
        stream[batch.rows] = attended.cpu()
        scores.append(gate.score(inputs))
    runs = set_threshold(gate, torch.cat(scores), share)
    for batch in batches:
        attended = stream[batch.rows].to(device)
        stream[batch.rows] = (attended + output(half.mlp_norm(attended))).cpu()
    return runs.mean(dtype=torch.float64).item()
