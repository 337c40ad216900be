"""What the quality bench compares with: methods that choose neurons of the dense model, run as masks on its MLPs.

Axes: T tokens, I neurons.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from transformers import LlamaForCausalLM

from run_moefication.moefication.fitting.balanced_kmeans import balanced_kmeans

# A layer's choice: the neurons' activations [T, I] -> which neurons run, bool [T, I].
Choice = Callable[[torch.Tensor], torch.Tensor]
CMOE_EXPERTS = 8
CMOE_MARKS = 10  # neurons that a token marks: CMoE's ATopK
JITTER = 1e-6  # on the diagonal, over its mean, so that rounding leaves the matrix positive definite


@contextmanager
def masked(model: LlamaForCausalLM, choices: list[Choice]) -> Iterator[list[torch.Tensor]]:
    """Within the context the MLPs run only the neurons that their choice names. It gives a list that collects, for each
    layer and forward pass, the share of neurons that ran for each token `[T]`."""
    shares: list[torch.Tensor] = []

    def mask(choice: Choice, _: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        chosen = choice(inputs[0].flatten(0, 1))
        shares.append(chosen.float().mean(dim=1))
        return (inputs[0] * chosen.view_as(inputs[0]),)

    with ExitStack() as hooks:
        for layer, choice in zip(model.model.layers, choices, strict=True):
            hooks.enter_context(layer.mlp.down_proj.register_forward_pre_hook(partial(mask, choice)))
        yield shares


def all_neurons(model: LlamaForCausalLM) -> list[Choice]:
    """The dense model as it is."""
    return [lambda hidden: torch.ones_like(hidden, dtype=torch.bool)] * len(model.model.layers)


def oracle(budget: float, model: LlamaForCausalLM) -> list[Choice]:
    """The neurons that add most to each token's output, known by running them all: no router can do better."""

    def choose(norms: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return _largest(hidden.abs() * norms, round(budget * len(norms)))

    return [partial(choose, layer.mlp.down_proj.weight.norm(dim=0)) for layer in model.model.layers]


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The so many largest of each row, as a mask."""
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, values.topk(count, dim=1).indices, True)


@torch.inference_mode()
def cmoe(blocks: list[torch.Tensor], budget: float, model: LlamaForCausalLM) -> list[Choice]:
    """CMoE (Pei et al. 2025, "CMoE: Converting mixture-of-experts from dense to accelerate LLM inference") from its
    paper: 8 experts; the neurons most often among a token's 10 largest activations are shared, as many experts of them
    as are routed; the others are clustered in equal parts by which tokens mark them; the neuron nearest to a cluster's
    centre stands for it, and the clusters whose representative is most active run."""
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    counts = [torch.zeros(width, width, device=model.device) for width in widths]  # tokens that mark both neurons

    def count(together: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        marks = _largest(hidden.abs(), CMOE_MARKS).float()
        together.add_(marks.T @ marks)
        return torch.ones_like(hidden, dtype=torch.bool)

    with masked(model, [partial(count, together) for together in counts]):
        for block in blocks:
            model.model(block[None].long().to(model.device), use_cache=False)
    active = round(budget * CMOE_EXPERTS)
    return [_cmoe_choice(together, num_shared=active // 2, active=active) for together in counts]


def _cmoe_choice(together: torch.Tensor, num_shared: int, active: int) -> Choice:
    """One layer's choice, from how often each pair of neurons was marked by the same token `[I, I]`."""
    width = len(together) // CMOE_EXPERTS
    by_rate = together.diagonal().argsort(descending=True, stable=True)
    shared, rest = by_rate[: num_shared * width], by_rate[num_shared * width :].sort().values
    gram = together[rest][:, rest].double()
    gram.diagonal().add_(JITTER * gram.diagonal().mean())
    rows = torch.linalg.cholesky(gram).float()  # as far from one another as the neurons' columns of marks
    num_routed = CMOE_EXPERTS - num_shared
    clusters = balanced_kmeans(rows, num_routed)
    members = clusters.labels.argsort(stable=True).view(num_routed, width).to(rows.device)
    distances = (rows[members] - rows[members].mean(dim=1, keepdim=True)).square().sum(dim=2)  # [experts, width]
    experts, representatives = rest[members], rest[members.gather(1, distances.argmin(dim=1)[:, None])[:, 0]]

    def choose(hidden: torch.Tensor) -> torch.Tensor:
        runs = _largest(hidden[:, representatives].abs(), active - num_shared)
        chosen = torch.zeros_like(hidden, dtype=torch.bool)
        chosen[:, shared] = True
        chosen[:, experts.flatten()] = runs.repeat_interleave(width, dim=1)
        return chosen

    return choose
