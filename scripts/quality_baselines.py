"""What the quality bench compares with: methods that choose neurons of the dense model, run as masks on its MLPs.

Axes: T tokens, I neurons.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from run_moefication.moefication.fitting.balanced_kmeans import balanced_kmeans

# What goes through a module, [T, D] -> which of it is kept, bool [T, D].
Choice = Callable[[torch.Tensor], torch.Tensor]
CMOE_EXPERTS = 8
CMOE_MARKS = 10  # neurons that a token marks: CMoE's ATopK
JITTER = 1e-6  # on the diagonal, over its mean, so that rounding leaves the matrix positive definite
MOST_RANKED = 1 << 24  # values of one module that a threshold is the quantile of


class Mask(NamedTuple):
    """Zeros for all that enters a module (or leaves it) but what is chosen."""

    module: nn.Module
    choose: Choice
    share: float = 1.0  # of the MLP's parameters, that need not be read where nothing is chosen
    of_output: bool = False


@contextmanager
def masked(model: LlamaForCausalLM, masks: list[Mask]) -> Iterator[list[torch.Tensor]]:
    """Within the context the model's MLPs are masked. It gives a list that collects, for each mask and forward pass,
    the share of the MLP's parameters that need not be read for each token `[T]`."""
    unread: list[torch.Tensor] = []

    def apply(mask: Mask, values: torch.Tensor) -> torch.Tensor:
        chosen = mask.choose(values.flatten(0, -2))
        unread.append(mask.share * (1 - chosen.float().mean(dim=1)))
        return values * chosen.view_as(values)

    with ExitStack() as hooks:
        for mask in masks:
            if mask.of_output:
                hook = mask.module.register_forward_hook(lambda _, __, output, mask=mask: apply(mask, output))
            else:
                hook = mask.module.register_forward_pre_hook(lambda _, inputs, mask=mask: (apply(mask, inputs[0]),))
            hooks.enter_context(hook)
        yield unread


def of_neurons(model: LlamaForCausalLM, choices: list[Choice]) -> list[Mask]:
    """Masks on the neurons of each layer, from a choice for each."""
    return [Mask(layer.mlp.down_proj, choose) for layer, choose in zip(model.model.layers, choices, strict=True)]


def oracle(budget: float, model: LlamaForCausalLM) -> list[Mask]:
    """The neurons that add most to each token's output, known by running them all: no router can do better."""

    def choose(norms: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return _largest(hidden.abs() * norms, round(budget * len(norms)))

    return of_neurons(model, [partial(choose, layer.mlp.down_proj.weight.norm(dim=0)) for layer in model.model.layers])


def teal(blocks: list[torch.Tensor], budget: float, model: LlamaForCausalLM, *, weighed: bool = False) -> list[Mask]:
    """TEAL (Liu et al. 2025, "Training-free activation sparsity in large language models") on the MLPs: gate_proj,
    up_proj and down_proj read their largest inputs only, by a threshold a module. If `weighed`, WINA (Chen et al. 2025,
    "Weight informed neuron activation"): an input counts as much as the norm of its column, too."""
    layers = [layer.mlp for layer in model.model.layers]
    masks = [mask for mlp in layers for mask in (Mask(mlp, abs, 2 / 3), Mask(mlp.down_proj, abs, 1 / 3))]
    norms: list[torch.Tensor | float] = [1.0] * len(masks)
    if weighed:
        columns = [(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), mlp.down_proj.weight) for mlp in layers]
        norms = [weight.norm(dim=0) for pair in columns for weight in pair]
    return _with_thresholds(blocks, model, masks, norms, budget)


def cats(blocks: list[torch.Tensor], budget: float, model: LlamaForCausalLM) -> list[Mask]:
    """CATS (Lee et al. 2024, "Contextually-aware thresholding for sparsity in large language models"): gate_proj is
    read whole, and of up_proj and down_proj the neurons of largest SiLU(gate), so many that the sum is the budget."""
    masks = [Mask(layer.mlp.act_fn, abs, 2 / 3, of_output=True) for layer in model.model.layers]
    return _with_thresholds(blocks, model, masks, [1.0] * len(masks), (3 * budget - 1) / 2)


@torch.inference_mode()
def _with_thresholds(
    blocks: list[torch.Tensor],
    model: LlamaForCausalLM,
    masks: list[Mask],
    norms: list[torch.Tensor | float],
    kept: float,
) -> list[Mask]:
    """The masks, each with the threshold that keeps this share of the values on a text read without masks. Values count
    by their size times `norms`, one for each mask. Whole blocks are read, as many as `MOST_RANKED` allows."""
    thresholds: list[torch.Tensor] = []  # in the order of the forward pass, which is that of the masks

    def note(norm: torch.Tensor | float, values: torch.Tensor) -> torch.Tensor:
        sizes = (values.abs() * norm).flatten()
        thresholds.append(sizes.kthvalue(min(len(sizes), round((1 - kept) * len(sizes)) + 1)).values)
        return torch.ones_like(values, dtype=torch.bool)

    def reaches(norm: torch.Tensor | float, threshold: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.abs() * norm >= threshold

    most = MOST_RANKED // (len(blocks[0]) * model.config.intermediate_size)
    tokens = torch.stack([block for block in blocks if len(block) == len(blocks[0])][: max(1, most)])
    noting = [mask._replace(choose=partial(note, norm)) for mask, norm in zip(masks, norms, strict=True)]
    with masked(model, noting):
        model.model(tokens.long().to(model.device), use_cache=False)
    parts = zip(masks, norms, thresholds, strict=True)
    return [mask._replace(choose=partial(reaches, norm, threshold)) for mask, norm, threshold in parts]


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The so many largest of each row, as a mask."""
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, values.topk(count, dim=1).indices, True)


@torch.inference_mode()
def cmoe(blocks: list[torch.Tensor], budget: float, model: LlamaForCausalLM) -> list[Mask]:
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

    with masked(model, of_neurons(model, [partial(count, together) for together in counts])):
        for block in blocks:
            model.model(block[None].long().to(model.device), use_cache=False)
    active = round(budget * CMOE_EXPERTS)
    return of_neurons(model, [_cmoe_choice(together, num_shared=active // 2, active=active) for together in counts])


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


# ---------------------------------------------------------------------------------------------------- fewer bits

GROUP = 32  # weights that share a scale
SCALE_BITS = 16  # of a scale, and of a zero point


def quantized_share(bits: int, quantizer: str = "") -> float:
    """Bytes of quantised weights over those of bfloat16."""
    return 1.0 if bits == 16 else (bits + (2 if quantizer else 1) * SCALE_BITS / GROUP) / 16


def to_nearest(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Weights `[R, D]` rounded to so many bits and back, symmetrically: the largest of a group has the most steps."""
    groups, most = rows.unflatten(1, (-1, GROUP)), 2 ** (bits - 1) - 1
    scales = (groups.abs().amax(2, keepdim=True) / most).half().float()
    return ((groups / scales.clamp(min=1e-20)).round().clamp(-most, most) * scales).flatten(1)


def by_hqq(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """The same by half-quadratic quantization (Badri and Shaji 2023), which gives each group a zero point as well, by
    torchao."""
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq as hqq

    how = dict(nbits=bits, group_size=GROUP, compute_dtype=torch.float32, device=rows.device, raw_output=True)
    steps, scales, zeros, _ = hqq(rows.clone(), **how)
    return ((steps.unflatten(1, (-1, GROUP)) - zeros[..., None]) * scales[..., None]).flatten(1)


QUANTIZERS = {"": to_nearest, " by HQQ": by_hqq}  # by what a row's name says of them


@torch.no_grad()
def quantize_mlps(model: PreTrainedModel, bits: int, quantizer: str = "") -> None:
    """Round the weights of the MLPs, or of the experts, to so many bits by one of `QUANTIZERS`, with a scale for each
    `GROUP` of a row. Gates, norms and biases stay as they are, and so do the tensors that the weights were, which may
    be the checkpoint's own."""
    for name, weight in model.named_parameters():
        if ".mlp." in name and ".gate." not in name and weight.ndim > 1:
            # A row for each neuron of down_proj, too: an expert's part of its own rows is shorter than a group.
            neurons = weight.transpose(-1, -2) if "down_proj" in name else weight
            rounded = QUANTIZERS[quantizer](neurons.reshape(-1, neurons.shape[-1]), bits).view(neurons.shape)
            weight.data = rounded.transpose(-1, -2).contiguous() if "down_proj" in name else rounded
