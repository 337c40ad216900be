"""How much each expert matters for each token: the scores a gate learns to predict."""

import torch
from torch.nn import functional as F

from .checkpoints import Checkpoint

CRITERIA = {
    "plain": lambda activations: activations,  # |sum a|
    "positive": lambda activations: activations.clamp(min=0),  # sum max(a, 0)
    "l2_norm": lambda activations: activations.square(),  # sum a^2
}
TOKENS_PER_CHUNK = 4096


class ExpertScorer:
    """Scores per expert from the activations of a layer's neurons.

    `plain` is |sum a|, `positive` sum max(a, 0), `l2_norm` sum a^2, over the neurons of one expert, in float32.
    """

    def __init__(self, neurons: torch.Tensor, criterion: str):
        """`neurons`: int64 `[experts, width]`, the neurons of each expert."""
        num_experts, width = neurons.shape
        expert_of_neuron = torch.empty(neurons.numel(), dtype=torch.long, device=neurons.device)
        expert_of_neuron[neurons.flatten()] = torch.arange(num_experts, device=neurons.device).repeat_interleave(width)
        # One column of ones per expert: a matrix product sums the neurons of each.  [neurons, experts]
        self._membership = F.one_hot(expert_of_neuron, num_experts).float()
        self._criterion = criterion

    def __call__(self, activations: torch.Tensor) -> torch.Tensor:
        """`[tokens, neurons]` -> float32 `[tokens, experts]`, none negative."""
        scores = CRITERIA[self._criterion](activations.float()) @ self._membership
        return scores.abs() if self._criterion == "plain" else scores


class LayerActivations:
    """Recomputes the activations of a layer's neurons from the MLP's inputs and weights, as the features hold them."""

    def __init__(self, checkpoint: Checkpoint, layer: int, template: str, device: str):
        projections = ["gate_proj", "up_proj"] if "up_proj" in template else ["gate_proj"]
        self._weights = [checkpoint.mlp_tensor(layer, f"{name}.weight", device) for name in projections]
        self._biases = [
            checkpoint.mlp_tensor(layer, f"{name}.bias", device) if checkpoint.config.mlp_bias else None
            for name in projections
        ]

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]`, not normalised -> SiLU(gate_proj x), times (up_proj x) for that template, float32."""
        gate, *up = (F.linear(inputs.float(), w, b) for w, b in zip(self._weights, self._biases, strict=True))
        return F.silu(gate) * up[0] if up else F.silu(gate)
