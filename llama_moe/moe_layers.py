"""Gates, experts and the MoE block that stands in for an MLP. Pure torch: nothing here knows about LLaMA.

Axes: T tokens, E experts, K experts per token, H hidden size, W expert width (neurons per expert).
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation


class Gate(nn.Module):
    """Scores every expert for every token and selects the K best. Subclasses give `score`.

    Gates hold raw parameters, not `nn.Linear`: tools that quantise or adapt "all linear layers" must leave the
    routing alone.
    """

    def __init__(self, num_experts_per_tok: int, multiply_gate_scores: bool = False):
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.multiply_gate_scores = multiply_gate_scores

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[T, H]`, as the MLP sees it (not normalised) -> raw scores `[T, E]`."""
        raise NotImplementedError

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns scores `[T, E]`, the weights of the selected experts `[T, K]`, and their indices `[T, K]`."""
        scores = self.score(hidden_states)
        top_scores, top_k_index = torch.topk(scores, self.num_experts_per_tok, dim=-1)
        if self.multiply_gate_scores:
            top_k_weights = torch.softmax(top_scores, dim=-1, dtype=torch.float32).to(hidden_states.dtype)
        else:
            top_k_weights = torch.ones_like(top_scores, dtype=hidden_states.dtype)
        return scores, top_k_weights, top_k_index


class LinearGate(Gate):
    """One linear map from hidden state to expert scores."""

    def __init__(self, hidden_size: int, num_experts: int, **routing):
        super().__init__(**routing)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight)


class MLPGate(Gate):
    """Linear-Tanh-Linear without biases, E hidden units (MoEfication, Zhang et al. 2022, section 3.2)."""

    def __init__(self, hidden_size: int, num_experts: int, **routing):
        super().__init__(**routing)
        self.input_weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.output_weight = nn.Parameter(torch.empty(num_experts, num_experts))

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(F.linear(hidden_states, self.input_weight)), self.output_weight)


GATE_CLASSES = {"mlp": MLPGate, "linear": LinearGate}


@use_experts_implementation
class Experts(nn.Module):
    """The SwiGLU experts of a layer, packed: `gate_up_proj [E, 2W, H]` (gate rows first) and `down_proj [E, H, W]`.

    The decorator sends `forward` to the implementation that `experts_implementation` names (grouped_mm, batched_mm,
    ...); the method below is "eager".
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
        """Weighted sum of the selected experts' outputs: `[T, H]`, `[T, K]`, `[T, K]` -> `[T, H]`."""
        # Token-expert pairs sorted by expert: each used expert reads one contiguous run of rows.
        expert_of_pair, pairs = top_k_index.flatten().sort(stable=True)
        token_of_pair = pairs // top_k_index.shape[-1]
        weight_of_pair = top_k_weights.flatten()[pairs, None]
        ends = torch.bincount(expert_of_pair, minlength=self.num_experts).cumsum(0).tolist()

        output = torch.zeros_like(hidden_states)
        start = 0
        for expert, end in enumerate(ends):
            if end > start:
                rows = token_of_pair[start:end]
                expert_output = self._run_expert(expert, hidden_states[rows]) * weight_of_pair[start:end]
                output.index_add_(0, rows, expert_output.to(output.dtype))
            start = end
        return output

    def _run_expert(self, expert: int, hidden_states: torch.Tensor) -> torch.Tensor:
        bias = self.gate_up_proj_bias[expert] if self.has_bias else None
        gate, up = F.linear(hidden_states, self.gate_up_proj[expert], bias).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, self.down_proj[expert])


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


class MoEBlock(nn.Module):
    """Stands in for an MLP: the gate selects, the experts run, the bias of `down_proj` (if any) is added once."""

    def __init__(self, config):
        super().__init__()
        self.gate = GATE_CLASSES[config.gate_network](
            config.hidden_size,
            config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            multiply_gate_scores=config.multiply_gate_scores,
        )
        # This child's name, and its holding 3-D parameters only, is what engines look for.
        self.experts = BiasedExperts(config) if config.mlp_bias else Experts(config)
        if config.mlp_bias:
            self.output_bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence, H]` -> the same shape."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(tokens)
        output = self.experts(tokens, top_k_index, top_k_weights)
        if hasattr(self, "output_bias"):
            output = output + self.output_bias
        return output.reshape(hidden_states.shape)
