"""What the quality bench compares with: methods that choose neurons of the dense model, run as masks on its MLPs.

Axes: T tokens, I neurons, H hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from run_moefication.moefication.fitting.balanced_kmeans import balanced_kmeans
from run_moefication.moefication.stages.split_on_activations import JITTER

# A layer's choice: MLP inputs [T, H] and activations [T, I] -> which neurons run, bool [T, I].
Choice = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CMOE_EXPERTS = 8
CMOE_MARKS = 10  # neurons that a token marks: CMoE's ATopK


@contextmanager
def masked(model: Any, choices: list[Choice]) -> Iterator[list[float]]:
    """Within the context the MLPs run only what their choice says; yields a list that collects the share of neurons
    that ran, one number per layer and forward pass."""
    shares: list[float] = []
    inputs: dict[int, torch.Tensor] = {}

    def mask(index: int, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        chosen = choices[index](inputs.pop(index).flatten(0, 1), hidden.flatten(0, 1))
        shares.append(chosen.float().mean().item())
        return (hidden * chosen.view_as(hidden),)

    hooks = []
    for index, layer in enumerate(model.model.layers):
        hooks.append(layer.mlp.register_forward_pre_hook(lambda _, args, i=index: inputs.update({i: args[0]})))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, i=index: mask(i, args[0])))
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()


def oracle(budget: float, model: Any) -> list[Choice]:
    """The neurons that add most to each token's output, known by running them all: no router can do better."""

    def choice(layer: Any) -> Choice:
        norms = layer.mlp.down_proj.weight.norm(dim=0)

        def choose(_: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
            best = (hidden.abs() * norms).topk(round(budget * len(norms)), dim=1).indices
            return torch.zeros_like(hidden, dtype=torch.bool).scatter_(1, best, True)

        return choose

    return [choice(layer) for layer in model.model.layers]


@torch.inference_mode()
def cmoe(blocks: list[torch.Tensor], budget: float, model: Any) -> list[Choice]:
    """CMoE (Pei et al. 2025, "CMoE: Converting mixture-of-experts from dense to accelerate LLM inference") from its
    paper: 8 experts; the neurons most often among a token's 10 largest activations are shared, as many experts of them
    as are routed; the others are clustered in equal parts by which tokens mark them; the neuron nearest to a cluster's
    centre stands for it, and the clusters whose representative is most active run."""
    # Of tokens that mark both neurons.
    counts = [torch.zeros(width, width, device=model.device) for width in _widths(model)]

    def count(together: torch.Tensor, hidden: torch.Tensor) -> None:
        best = hidden.abs().topk(CMOE_MARKS, dim=1).indices
        marks = torch.zeros_like(hidden).scatter_(1, best, 1.0)
        together += marks.T @ marks

    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, t=together: count(t, args[0].flatten(0, 1)))
        for layer, together in zip(model.model.layers, counts, strict=True)
    ]
    for block in blocks:
        model.model(block[None].long().to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    active = round(budget * CMOE_EXPERTS)
    return [_cmoe_choice(together, num_shared=active // 2, active=active) for together in counts]


def _cmoe_choice(together: torch.Tensor, num_shared: int, active: int) -> Choice:
    """One layer's choice, from how often each pair of neurons was marked by the same token `[I, I]`."""
    width = len(together) // CMOE_EXPERTS
    by_rate = together.diagonal().argsort(descending=True, stable=True)
    shared, rest = by_rate[: num_shared * width], by_rate[num_shared * width :].sort().values
    gram = together[rest][:, rest].double()
    gram.diagonal().add_(JITTER * gram.diagonal().mean())
    rows = torch.linalg.cholesky(gram).float()  # with the distances of the columns of marks
    num_routed = CMOE_EXPERTS - num_shared
    clusters = balanced_kmeans(rows, num_routed, device=str(rows.device))
    members = clusters.labels.argsort(stable=True).view(num_routed, width).to(rows.device)
    distances = (rows[members] - rows[members].mean(dim=1, keepdim=True)).square().sum(dim=2)  # [experts, width]
    experts, representatives = rest[members], rest[members.gather(1, distances.argmin(dim=1)[:, None])[:, 0]]

    def choose(_: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        selected = hidden[:, representatives].abs().topk(active - num_shared, dim=1).indices
        runs = selected.new_zeros(len(hidden), num_routed, dtype=torch.bool).scatter_(1, selected, True)
        chosen = torch.zeros_like(hidden, dtype=torch.bool)
        chosen[:, shared] = True
        chosen[:, experts.flatten()] = runs.repeat_interleave(width, dim=1)
        return chosen

    return choose


def _widths(model: Any) -> list[int]:
    return [layer.mlp.down_proj.in_features for layer in model.model.layers]


@torch.inference_mode()
def block_losses(model: Any, blocks: list[torch.Tensor]) -> list[float]:
    """Mean negative log-likelihood of each block, its first token being context only."""
    losses = []
    for block in blocks:
        tokens = block.long().to(model.device)
        logits = model(tokens[None], use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits.float(), tokens[1:]).item())
    return losses
