"""MoE blocks in training: as they run, but a gate also hears of the experts that it did not choose.

Axes: B blocks of a batch, N positions, T tokens, E routed experts, W width of an expert, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from llama_moe import LlamaMoEForCausalLM
from llama_moe.moe_layers import MoEBlock

from ..progress import progress
from ..text.batches import batches_of
from .decoder import PreMLP, embed
from .thresholds import THRESHOLD_STEP, settle_layer, wanted_threshold

TEMPERATURE = 0.5  # of the sigmoid that stands in for the choice, in standard deviations of the layer's scores
MOST_TOKENS = 1 << 16  # that thresholds are set by: to read all of a long training's text takes half as long as it


class StraightThroughBlock(nn.Module):
    """Computes what an `MoEBlock` computes, with that block's own parameters under the same names.

    The difference is the gradient: every expert is computed, and the hard choice among them passes it on as a sigmoid
    around the boundary between running and not would, where the boundary moves with the scores to stay on budget. So a
    gate learns what an expert that did not run would have given (`Experts` leaves those out). While training it also
    notes which threshold the text would have called for. The gate's noise is left out.
    """

    def __init__(self, block: MoEBlock, shares: list[float]):
        """`shares`: the budgets that the block can be set to, of its routed experts that run per token, on average. It
        runs the first as it is; those after it begin with the thresholds that its score quantiles say."""
        super().__init__()
        self.gate, self.experts, self.shared_experts = block.gate, block.experts, block.shared_experts
        self.register_parameter("output_bias", block.output_bias)
        self.train(block.training)
        self.kept: torch.Tensor | None = None  # bool `[B, N]`: positions of the next batch that are text; None: all
        self.shares, self._budget = shares, 0
        if self.gate.routing == "threshold":
            others = [self.gate.quantile_threshold(self.gate.score_quantiles, share) for share in shares[1:]]
            self.register_buffer("thresholds", torch.cat([self.gate.threshold, self.gate.threshold.new_tensor(others)]))
        self._wanted: list[torch.Tensor] = []

    def set_budget(self, index: int) -> None:
        """Have the next batches run this one of `shares`."""
        self._budget = index
        if self.gate.routing == "threshold":
            self.gate.threshold.copy_(self.thresholds[index])
        else:
            self.gate.num_experts_per_tok = round(self.shares[index] * self.gate.num_experts)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[B, N, H]` -> the same shape."""
        tokens = hidden_states.flatten(0, -2)
        with torch.autocast(tokens.device.type, enabled=False):  # a rounded score is on the wrong side of its boundary
            scores = self.gate.score(tokens.float())  # [T, E]
            mask = self._mask(scores)
        experts = self.experts
        gate, up = (F.linear(tokens, weight) for weight in _gate_and_up(experts.gate_up_proj))  # [T, W * E] each
        if experts.has_bias:
            gate, up = (x + bias for x, bias in zip((gate, up), _gate_and_up(experts.gate_up_proj_bias), strict=True))
        hidden = (experts.act_fn(gate) * up).unflatten(-1, (-1, experts.num_experts)) * mask[:, None].to(up.dtype)
        output = F.linear(hidden.flatten(1), experts.down_proj.permute(1, 2, 0).flatten(1))
        if self.shared_experts is not None:
            output = output + self.shared_experts(tokens)
        if self.output_bias is not None:
            output = output + self.output_bias
        return output.reshape(hidden_states.shape)

    def _mask(self, scores: torch.Tensor) -> torch.Tensor:
        """1 for the experts that run, else 0, `[T, E]`, with the gradient of the sigmoid."""
        hard = scores.detach()
        of_text = hard if self.kept is None else hard[self.kept.flatten()]
        share = self.shares[self._budget]
        if self.training and self.gate.routing == "threshold" and 0 < share < 1:
            self._wanted.append(wanted_threshold(self.gate, of_text, share))
        selected = self.gate.mask(hard).to(scores.dtype)
        if not scores.requires_grad:
            return selected
        if self.gate.routing == "threshold":
            boundary, within = self.gate.threshold, (0, 1)
        else:
            boundary, within = hard.topk(self.gate.num_experts_per_tok).values[:, -1:], (1,)
        width = TEMPERATURE * of_text.std().clamp(min=torch.finfo(hard.dtype).eps)
        soft = torch.sigmoid((hard - boundary) / width)
        slope = soft * (1 - soft)
        if self.kept is not None:
            slope = slope * self.kept.view(-1, 1)
        # Raising all scores equally only moves the boundary with them, so that direction gets no gradient.
        total = slope.sum(within, keepdim=True).clamp(min=torch.finfo(hard.dtype).tiny)
        above = (scores - (slope * scores).sum(within, keepdim=True) / total) / width
        return selected + slope * (above - above.detach())

    def wanted_threshold(self) -> torch.Tensor:
        """The threshold `[1]` that meets the budget on the text since the last call; the present one, if it is kept."""
        wanted = torch.stack(self._wanted).mean(0, keepdim=True) if self._wanted else self.gate.threshold.clone()
        self._wanted.clear()
        return wanted

    def move_threshold(self, wanted: torch.Tensor) -> None:
        """Move the budget's threshold towards the wanted one `[1]`."""
        self.gate.threshold.lerp_(wanted, THRESHOLD_STEP)
        self.thresholds[self._budget] = self.gate.threshold.squeeze()


def _gate_and_up(packed: torch.Tensor) -> list[torch.Tensor]:
    """`[E, 2W, ...]` -> the gate's part and up's, `[W * E, ...]` each. Experts are the inner axis: the few neurons of a
    fine one would make short loops of all that is computed element by element."""
    return [part.transpose(0, 1).flatten(0, 1) for part in packed.unflatten(1, (2, -1)).unbind(1)]


@contextmanager
def straight_through(model: LlamaMoEForCausalLM, shares: list[list[float]]) -> Iterator[list[StraightThroughBlock]]:
    """Within the context, a `StraightThroughBlock` stands in for every MoE block of the model. No weight is copied, and
    their names stay; `shares`: those of each layer's block."""
    layers = model.model.layers
    originals = [layer.mlp for layer in layers]
    blocks = [StraightThroughBlock(block, share) for block, share in zip(originals, shares, strict=True)]
    try:
        for layer, block in zip(layers, blocks, strict=True):
            layer.mlp = block
        yield blocks
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.mlp = original


def set_budget(blocks: list[StraightThroughBlock], index: int) -> None:
    """Have all blocks of a model run this budget of theirs."""
    for block in blocks:
        block.set_budget(index)


@torch.no_grad()
def update_thresholds(blocks: list[StraightThroughBlock]) -> None:
    """After a step: move the thresholds towards those that the step's text, of all processes, calls for."""
    blocks = [block for block in blocks if block.gate.routing == "threshold"]
    if not blocks:
        return
    wanted = torch.cat([block.wanted_threshold() for block in blocks])  # [layers]
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(wanted)
        wanted /= torch.distributed.get_world_size()
    for block, threshold in zip(blocks, wanted, strict=True):
        block.move_threshold(threshold)


@torch.no_grad()
def settle_thresholds(
    model: LlamaMoEForCausalLM,
    blocks: list[torch.Tensor],
    shares: list[list[float]],
    batch_size: int,
    device: torch.device,
) -> list[float]:
    """Set thresholds by a text, for the first of each layer's `shares`, and score quantiles that are right for all of
    them. What a layer sees depends on the budget of the layers before it, so the text is read at each budget. Returns
    what `recalibrate_thresholds` does."""
    gates = [layer.mlp.gate for layer in model.model.layers]
    if model.config.routing == "top_k":
        return recalibrate_thresholds(model, blocks, [layer[0] for layer in shares], batch_size, device)
    quantiles = []  # by budget, the first last, at which the thresholds stay
    for budget in reversed(list(zip(*shares, strict=True))):
        active = recalibrate_thresholds(model, blocks, list(budget), batch_size, device)
        quantiles.insert(0, torch.stack([gate.score_quantiles for gate in gates]))
    for gate, layer_shares, layer_quantiles in zip(gates, shares, torch.stack(quantiles, 1), strict=True):
        gate.score_quantiles.copy_(_blended(layer_quantiles, layer_shares))
    return active


def _blended(quantiles: torch.Tensor, shares: list[float]) -> torch.Tensor:
    """Score quantiles at each of several budgets `[budgets, Q]` -> quantiles `[Q]` by which a threshold can be set for
    any: those of a budget where it looks them up, and between two budgets a mean of theirs that moves over."""
    order = np.argsort(shares)[::-1]  # so that the levels at which budgets look up their thresholds rise
    levels, places = np.linspace(0, 1, quantiles.shape[1]), 1 - np.array(shares)[order]
    weights = np.stack([np.interp(levels, places, row) for row in np.eye(len(shares))])  # [budgets, Q]
    blended = (torch.from_numpy(weights) * quantiles.cpu()[order.copy()]).sum(0)
    return blended.cummax(0).values  # quantiles do not fall, and where budgets differ much a mean may


@torch.no_grad()
def recalibrate_thresholds(
    model: LlamaMoEForCausalLM, blocks: list[torch.Tensor], shares: list[float], batch_size: int, device: torch.device
) -> list[float]:
    """Set every layer's threshold and score quantiles by a text, on what the layers before it, already set, produce.

    Memory: the residual stream and the scores of a layer, of at most MOST_TOKENS of the text. `shares`, and what is
    returned: by layer, of the routed experts that run on the text.
    """
    config = model.config
    ends = torch.tensor([len(block) for block in blocks]).cumsum(0)
    blocks = blocks[: max(1, int((ends <= MOST_TOKENS).sum()))]  # with all domains in their shares, as in a corpus
    batches = batches_of(blocks, batch_size)
    stream = torch.empty(sum(map(len, blocks)), config.hidden_size)
    embed(stream, blocks, batches, model.get_input_embeddings().weight.cpu())
    active = []
    # Its blocks compute all experts at once, faster than one by one.
    with straight_through(model, [[share] for share in shares]) as soft:
        layers = list(zip(model.model.layers, soft, shares, strict=True))
        for layer, block, share in progress(layers, "set thresholds", "layer"):
            half = PreMLP(config, layer.state_dict().__getitem__, device)
            active.append(settle_layer(half, block.gate, block, stream, batches, share, device))
    return active
