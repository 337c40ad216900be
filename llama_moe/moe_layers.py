"""Experts and the MoE block that stands in for an MLP. Pure torch: nothing here knows about LLaMA.

Axes: T tokens, E routed experts, K slots per token (the experts it may run), H hidden size, W expert width (neurons per
expert). A slot of weight 0 is unused: `Experts` skips it (but see `Experts._runs`), other implementations may compute
it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .gates import Gate, make_gate

# ---------------------------------------------------------------------------------------------------- experts

# Where CPUs change from one way to another, as measured with scripts/bench_moe_layer.py. In a layer that fits into
# caches the calls for few tokens cost more than the arithmetic; in bfloat16 so do those for few token-expert pairs
# anywhere.
SMALL_LAYER_BYTES = 2**24
VERY_FEW_TOKENS, FEW_TOKENS = 24, 128
FEW_PAIRS = 1024
FEW_ROWS = 32  # of one product
FINE_WIDTH = 16  # experts of fewer neurons cost more one by one than all of them at once


@use_experts_implementation
class Experts(nn.Module):
    """The SwiGLU experts of a layer, packed: `gate_up_proj [E, 2W, H]` (gate rows first) and `down_proj [E, H, W]`.

    The decorator sends `forward` to the implementation that `experts_implementation` names (grouped_mm, batched_mm,
    ...). The method below is "eager"; the default, "llama_moe", chooses by device and size.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        width, hidden_size = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the experts of the used slots: `[T, H]`, `[T, K]`, `[T, K]` -> `[T, H]`.

        No weight is copied and, but for `_runs`' exception, none of an expert that no token uses is read. Memory beside
        the output: H + 4W numbers for each token of the expert at work (for few tokens: for each used pair). Experts
        narrower than `FINE_WIDTH` are otherwise on CPUs: see `_all_at_once`.
        """
        return self._eager(hidden_states, top_k_index, top_k_weights)

    def _eager(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
        gate_up_proj, down_proj = self.gate_up_proj, self.down_proj  # once: adapters compute them anew at every access
        weights_of_all = (gate_up_proj, down_proj)
        num_tokens, in_bfloat16 = len(hidden_states), hidden_states.dtype == torch.bfloat16
        on_cpu = hidden_states.device.type == "cpu"
        if on_cpu and down_proj.shape[-1] < FINE_WIDTH:
            return self._all_at_once(*weights_of_all, hidden_states, top_k_index, top_k_weights)
        small = on_cpu and gate_up_proj.nbytes + down_proj.nbytes <= SMALL_LAYER_BYTES
        if small and num_tokens <= (FEW_TOKENS if in_bfloat16 else VERY_FEW_TOKENS):
            return self._few_tokens(*weights_of_all, hidden_states, top_k_index, top_k_weights)
        pairs = _used_pairs(top_k_index, top_k_weights)
        num_pairs = len(pairs[0])
        sparse = 2 * num_pairs < num_tokens * self.num_experts
        groups_pay = on_cpu and num_pairs <= FEW_PAIRS and (in_bfloat16 or (small and sparse))
        # torch 2.10 wants aligned addresses as well, which weights mapped from a file may not have.
        if groups_pay and all(_is_aligned(weight) and weight.data_ptr() % 16 == 0 for weight in weights_of_all):
            return self._grouped(*weights_of_all, hidden_states, *pairs)
        if small and num_tokens <= FEW_TOKENS:
            return self._few_tokens(*weights_of_all, hidden_states, top_k_index, top_k_weights)
        return self._one_by_one(*weights_of_all, hidden_states, *pairs)

    def _one_by_one(self, gate_up_proj, down_proj, hidden_states, tokens, weights, experts) -> torch.Tensor:
        """Expert by expert, given the used pairs: sorted by expert, so each reads one run of tokens."""
        sizes = experts.bincount(minlength=self.num_experts)[: self.num_experts].tolist()
        output = torch.zeros_like(hidden_states)
        start = 0
        for expert, size in enumerate(sizes):
            if size or not len(tokens):  # no pair at all: products of no rows keep the gradient's graph whole
                rows = tokens[start : start + size]
                hidden = _linear(hidden_states.index_select(0, rows), gate_up_proj[expert])
                if self.has_bias:
                    hidden = hidden + self.gate_up_proj_bias[expert]
                hidden = self._apply_gate(hidden) * weights[start : start + size]
                output.index_add_(0, rows, _linear(hidden, down_proj[expert]).to(output.dtype))
            start += size
        return output

    def _few_tokens(self, gate_up_proj, down_proj, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        """The same where calls dominate: every used expert sees all tokens, a run of experts in one batched product."""
        weights = self._weights_of_all(hidden_states, top_k_index, top_k_weights).t()[..., None]  # [E, T, 1]
        # MKL, and oneDNN for very few tokens, prefer the weights on the right; else oneDNN has them on the left.
        by_rows = hidden_states.dtype == torch.float32 or len(hidden_states) < 8
        output = None
        for run in self._runs(weights):
            gate_up, down = gate_up_proj[run], down_proj[run]  # views [n, 2W, H], [n, H, W]
            if by_rows:
                hidden = torch.bmm(hidden_states.expand(len(down), -1, -1), gate_up.transpose(1, 2))  # [n, T, 2W]
            else:
                hidden = (gate_up.flatten(0, 1) @ hidden_states.t()).unflatten(0, (len(down), -1)).transpose(1, 2)
            if self.has_bias:
                hidden = hidden + self.gate_up_proj_bias[run, None]
            hidden = self._apply_gate(hidden) * weights[run]
            if by_rows:
                partial = torch.bmm(hidden, down.transpose(1, 2)).sum(0)
            else:
                partial = torch.bmm(down, hidden.transpose(1, 2)).sum(0).t()
            output = partial if output is None else output + partial
        if output is None:
            return self._one_by_one(gate_up_proj, down_proj, hidden_states, *_used_pairs(top_k_index, top_k_weights))
        return output

    def _all_at_once(self, gate_up_proj, down_proj, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        """The same where experts are fine, or on a GPU: as one MLP, in which a weight of 0 silences an expert.

        Memory: that MLP's, and for more than a few tokens a copy of `down_proj` with its neurons side by side, which
        training keeps.
        """
        weights = self._weights_of_all(hidden_states, top_k_index, top_k_weights)
        gate_up = F.linear(hidden_states, gate_up_proj.flatten(0, 1)).unflatten(-1, (self.num_experts, -1))
        if self.has_bias:
            gate_up = gate_up + self.gate_up_proj_bias
        hidden = self._apply_gate(gate_up) * weights[..., None]  # [T, E, W]
        # A graph is for any number of tokens.
        if not torch.compiler.is_compiling() and len(hidden_states) < VERY_FEW_TOKENS:
            return torch.bmm(down_proj, hidden.permute(1, 2, 0)).sum(0).t()
        return F.linear(hidden.flatten(1), down_proj.transpose(0, 1).flatten(1))

    def _weights_of_all(self, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        """The slots' weights as `[T, E]`: 0 for experts that do not run."""
        # One column more for the slots that expert parallelism marks as another process's.
        weights = hidden_states.new_zeros(hidden_states.shape[0], self.num_experts + 1)
        return weights.scatter_(-1, top_k_index, top_k_weights.to(weights.dtype))[:, :-1]

    def _runs(self, weights: torch.Tensor) -> Iterator[slice]:
        """The used experts (rows of `weights [E, T, 1]` that are not all zero) as few slices of equal steps.

        In bfloat16 one slice of all: a call costs oneDNN more than reading a small layer's other experts."""
        if weights.dtype == torch.bfloat16:
            yield slice(self.num_experts)
            return
        used = [expert for expert, is_used in enumerate(weights[:, :, 0].any(dim=1).tolist()) if is_used]
        start = 0
        while start < len(used):
            step = used[start + 1] - used[start] if start + 1 < len(used) else 1
            end = start + 1
            while end < len(used) and used[end] - used[end - 1] == step:
                end += 1
            yield slice(used[start], used[end - 1] + 1, step)
            start = end

    def fastest(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`forward` on CPUs; elsewhere one grouped product for all experts, where strides allow it and there are tokens
        enough for it to pay, or all experts at once."""
        inputs = (hidden_states, top_k_index, top_k_weights)
        device, is_threshold = hidden_states.device, self.config.routing == "threshold"
        if torch.compiler.is_compiling():  # what eager decides by value would break the graph
            grouped = not is_threshold  # unused slots, under a threshold most, would be computed there
        elif device.type == "cpu":
            return self._eager(*inputs)
        else:  # few tokens are up to three times as fast all at once, on an H200
            can_group = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
            grouped = can_group and len(hidden_states) > FEW_TOKENS
        if not (grouped and _is_aligned(self.down_proj)):
            return self._all_at_once(self.gate_up_proj, self.down_proj, *inputs)
        if is_threshold:
            return self._grouped(self.gate_up_proj, self.down_proj, hidden_states, *_used_pairs(*inputs[1:]))
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, *inputs)

    def _grouped(self, gate_up_proj, down_proj, hidden_states, tokens, weights, experts) -> torch.Tensor:
        """All experts in one grouped product, given the used pairs."""
        ends = torch.searchsorted(experts, torch.arange(self.num_experts, device=experts.device), right=True)
        ends = ends.to(torch.int32)
        rows = hidden_states[tokens].to(gate_up_proj.dtype)  # grouped_mm knows no autocast
        hidden = F.grouped_mm(rows, gate_up_proj.transpose(1, 2), offs=ends)
        if self.has_bias:
            hidden = hidden + self.gate_up_proj_bias[experts]
        hidden = (self._apply_gate(hidden) * weights).to(rows.dtype)
        outputs = F.grouped_mm(hidden, down_proj.transpose(1, 2), offs=ends)
        sums = torch.zeros_like(hidden_states, dtype=torch.float32)
        return sums.index_add_(0, tokens, outputs.float()).to(hidden_states.dtype)


def _is_aligned(weight: torch.Tensor) -> bool:
    """Whether all strides are multiples of 16 bytes, as grouped_mm wants them."""
    return all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])


def _used_pairs(index: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots `[T, K]` -> the used token-expert pairs sorted by expert: tokens `[S]`, weights `[S, 1]`, experts `[S]`."""
    used = weights.flatten().nonzero().squeeze(-1)
    experts, order = index.flatten()[used].sort(stable=True)
    pairs = used[order]
    return pairs // index.shape[-1], weights.flatten()[pairs, None], experts


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x [m, k]`, `weight [n, k]` -> `x @ weight.T`.

    In float32 MKL runs a product of few rows on one core, and faster as a batched product over blocks of the weight's
    rows, two or more for each core; a single row with the weights on the left. Other types and devices need no help.
    """
    n, k = weight.shape
    blocks = min(n & -n, 1 << torch.get_num_threads().bit_length())  # a power of two that divides n
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and type(weight) is torch.Tensor
    if not plain or blocks == 1 or len(x) > FEW_ROWS or n * k < 2**18:
        return F.linear(x, weight)
    weight = weight.unflatten(0, (blocks, -1))
    if len(x) == 1:
        return torch.bmm(weight, x.t().expand(blocks, -1, -1)).flatten(0, 1).t()
    return torch.bmm(x.expand(blocks, -1, -1), weight.transpose(1, 2)).transpose(0, 1).reshape(-1, n)


@use_experts_implementation(has_bias=True)
class BiasedExperts(Experts):
    """Experts of a model with `mlp_bias`: gate and up biases travel with their neurons, `[E, 2W]`."""

    def __init__(self, config):
        super().__init__(config)
        self.gate_up_proj_bias = nn.Parameter(torch.empty(self.num_experts, 2 * config.moe_intermediate_size))

    @property
    def down_proj_bias(self) -> torch.Tensor:
        """Zeros: the down bias belongs to the sum, once, and the block adds it. Asked for by grouped_mm and its kin."""
        return self.down_proj.new_zeros(1, 1).expand(self.num_experts, self.down_proj.shape[1])


ALL_EXPERTS_FUNCTIONS.register("llama_moe", lambda experts, *inputs, **named: experts.fastest(*inputs, **named))


class SharedExperts(nn.Module):
    """The experts that always run: an ordinary SwiGLU MLP. The bias of its `down_proj` is the block's `output_bias`."""

    def __init__(self, config):
        super().__init__()
        width = config.num_shared_experts * config.moe_intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


# ---------------------------------------------------------------------------------------------------- the block


class MoEBlock(nn.Module):
    """Stands in for an MLP: the gate selects, the experts run, shared experts and output bias (if any) are added."""

    def __init__(self, config, layer_idx: int = 0):
        super().__init__()
        self.gate = make_gate(config, layer_idx)
        # This child's name, and its holding 3-D parameters only, is what engines look for.
        self.experts = BiasedExperts(config) if config.mlp_bias else Experts(config)
        self.shared_experts = SharedExperts(config) if config.num_shared_experts else None
        has_bias = config.mlp_bias or config.output_bias
        self.register_parameter("output_bias", nn.Parameter(torch.empty(config.hidden_size)) if has_bias else None)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence, H]` -> the same shape."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(tokens)
        output = self.experts(tokens, index, weights)
        if self.shared_experts is not None:
            output = output + self.shared_experts(tokens)
        if self.output_bias is not None:
            output = output + self.output_bias
        return output.reshape(hidden_states.shape)


# ---------------------------------------------------------------------------------------------------- statistics


class RoutingStatistics:
    """What a gate did while `record_routing` was on. An expert ran for a token if its weight was not 0.

    Attributes:
        num_tokens: tokens that the gate has seen (twice each where gradient checkpointing runs layers again).
        runs: int64 `[E]`, tokens that each expert ran for.
        tokens_by_cost: int64 `[E + 1]`, tokens that ran 0, 1, ... E routed experts.
        score_sum: float64 `[E]`, sums of the gate's scores.
    """

    def __init__(self, num_experts: int):
        self.num_tokens = 0
        self.runs = torch.zeros(num_experts, dtype=torch.int64)
        self.tokens_by_cost = torch.zeros(num_experts + 1, dtype=torch.int64)
        self.score_sum = torch.zeros(num_experts, dtype=torch.float64)

    def add(self, scores: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> None:
        """Count one forward pass, given the gate's output."""
        used = weights != 0
        self.num_tokens += len(scores)
        self.runs += index[used].bincount(minlength=len(self.runs)).cpu()
        self.tokens_by_cost += used.sum(-1).bincount(minlength=len(self.tokens_by_cost)).cpu()
        self.score_sum += scores.detach().sum(0, dtype=torch.float64).cpu()

    @property
    def expert_load(self) -> torch.Tensor:
        """Share of the tokens that each expert ran for, float64 `[E]`."""
        return self.runs.double() / max(self.num_tokens, 1)

    @property
    def experts_per_tok(self) -> float:
        """Routed experts that ran per token, on average."""
        return self.expert_load.sum().item()


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[RoutingStatistics]]:
    """Within the context, every gate of the model is counted: one `RoutingStatistics` per layer, in order.

    Outside of it nothing is counted and nothing costs time. Padding tokens count like others. A compiled model notices
    the recorder only if the context is entered before its first call.
    """
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    statistics = [RoutingStatistics(gate.num_experts) for gate in gates]
    hooks = [
        gate.register_forward_hook(lambda _, __, output, layer=layer: layer.add(*output))
        for gate, layer in zip(gates, statistics, strict=True)
    ]
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()
