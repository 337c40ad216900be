"""Experts and the MoE block that stands in for an MLP. Nothing here knows about LLaMA.

Axes: T tokens, E routed experts, K slots per token (the experts it may run), H hidden size, W expert width (neurons per
expert). A slot of weight 0 is unused: its expert need not run, but an implementation may compute it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .expert_kernels import EXPERTS_FUNCTIONS
from .gates import Gate, make_gate


@use_experts_implementation(experts_interface=EXPERTS_FUNCTIONS)
class Experts(nn.Module):
    """The SwiGLU experts of a layer, packed: `gate_up_proj [E, 2W, H]` (gate rows first) and `down_proj [E, H, W]`.

    The decorator sends `forward` to the implementation that `config._experts_implementation` names. The method below is
    "eager": the reference that all others equal. The default, "llama_moe", is in `expert_kernels`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        width, hidden_size = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden_size, width))
        self.register_parameter("gate_up_proj_bias", None)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the experts of the used slots: `[T, H]`, `[T, K]`, `[T, K]` -> `[T, H]`."""
        gate_up_proj, down_proj = self.gate_up_proj, self.down_proj  # once: adapters compute them anew at every access
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            tokens, slots = torch.where((top_k_index == expert) & (top_k_weights != 0))
            bias = None if self.gate_up_proj_bias is None else self.gate_up_proj_bias[expert]
            gate, up = F.linear(hidden_states[tokens], gate_up_proj[expert], bias).chunk(2, dim=-1)
            hidden = self.act_fn(gate) * up * top_k_weights[tokens, slots, None]
            output.index_add_(0, tokens, F.linear(hidden, down_proj[expert]).to(output.dtype))
        return output


@use_experts_implementation(experts_interface=EXPERTS_FUNCTIONS, has_bias=True)
class BiasedExperts(Experts):
    """Experts of a model with `mlp_bias`: gate and up biases travel with their neurons, `[E, 2W]`."""

    def __init__(self, config):
        super().__init__(config)
        self.gate_up_proj_bias = nn.Parameter(torch.empty(self.num_experts, 2 * config.moe_intermediate_size))

    @property
    def down_proj_bias(self) -> Tensor:
        """Zeros: the down bias belongs to the sum, once, and the block adds it. Asked for by grouped_mm and its kin."""
        return self.down_proj.new_zeros(1, 1).expand(self.num_experts, self.down_proj.shape[1])


class SharedExperts(nn.Module):
    """The experts that always run: an ordinary SwiGLU MLP. The bias of its `down_proj` is the block's `output_bias`."""

    def __init__(self, config):
        super().__init__()
        width = config.num_shared_experts * config.moe_intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


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

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, sequence, H]` -> the same shape."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, index = self.gate(tokens)
        output = self.experts(tokens, index, weights)
        if self.shared_experts is not None:
            output = output + self.shared_experts(tokens)
        if self.output_bias is not None:
            output = output + self.output_bias
        return output.reshape(hidden_states.shape)


class RoutingStatistics:
    """What a gate did while `record_routing` was on. An expert ran for a token if its weight was not 0."""

    def __init__(self, num_experts: int):
        self.num_tokens = 0  # that the gate has seen, twice each where gradient checkpointing runs layers again
        self.runs = torch.zeros(num_experts, dtype=torch.int64)  # tokens that each expert ran for
        self.tokens_by_cost = torch.zeros(num_experts + 1, dtype=torch.int64)  # that ran 0, 1, ... E routed experts
        self.score_sum = torch.zeros(num_experts, dtype=torch.float64)  # over tokens, of each expert

    def add(self, scores: Tensor, weights: Tensor, index: Tensor) -> None:
        """Count one forward pass, given the gate's output."""
        used = weights != 0
        self.num_tokens += len(scores)
        # Weighted counts are exact, and faster than picking the used slots.
        self.runs += index.flatten().bincount(used.flatten(), minlength=len(self.runs)).long().cpu()
        self.tokens_by_cost += used.sum(-1).bincount(minlength=len(self.tokens_by_cost)).cpu()
        self.score_sum += scores.detach().sum(0, dtype=torch.float64).cpu()

    @property
    def expert_load(self) -> Tensor:
        """Share of the tokens that each expert ran for, float64 `[E]`."""
        return self.runs.double() / max(self.num_tokens, 1)

    @property
    def experts_per_tok(self) -> float:
        """Routed experts that ran per token, on average."""
        return self.expert_load.sum().item()


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[RoutingStatistics]]:
    """Within the context, every gate of the model is counted: one `RoutingStatistics` per layer, in order. Outside
    of it nothing costs time. Padding tokens count like others. A compiled model notices the recorder only if the
    context is entered before its first call."""
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    statistics = [RoutingStatistics(gate.num_experts) for gate in gates]
    with ExitStack() as hooks:
        for gate, layer in zip(gates, statistics, strict=True):
            hooks.enter_context(gate.register_forward_hook(lambda _, __, output, layer=layer: layer.add(*output)))
        yield statistics
