"""Linear gates in closed form: ridge regression of the experts' scores on the MLP's inputs."""

import torch
from torch.nn import functional as F

from llama_moe.gates import LinearGate

from ..layers.scores import TOKENS_PER_CHUNK
from ..precision import bfloat16_products
from .ridge import NormalEquations, best_strength, low_rank_map, token_weights

# Ridge strengths, in units of the mean diagonal of the Gram matrix.
GATE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


class GateEquations:
    """The normal equations of a gate, `[x, 1]` to scores: of the tokens it is fitted to, and of held-out ones.

    Without a bias, zeros stand in for the constant, and their part of the map is zero.
    """

    def __init__(self, hidden_size: int, num_experts: int, device: str | torch.device, has_bias: bool = True):
        self._constant = float(has_bias)
        self._train, self._held_out = (NormalEquations(hidden_size + 1, num_experts, device) for _ in range(2))

    def add(self, inputs: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor, *, held_out: bool) -> None:
        """Add tokens: `[T, hidden]` in any float dtype, float32 `[T, experts]`, weights `[T]`."""
        features = F.pad(inputs.float(), (0, 1), value=self._constant)
        (self._held_out if held_out else self._train).add(features, scores, weights)

    def fit(self, gate: LinearGate, *, refines: bool, spares: bool) -> dict[str, float]:
        """Fit weight and bias in place, with the strength that does best on the held-out tokens.

        A gate with a rank gets the nearest map of that rank. One that `refines` is pulled to its values instead of to
        zero. Unless it `spares` the held-out tokens, it is fitted to them as well, once the strength is chosen.

        Returns: the strength, and the share of the held-out scores' (weighted) variance that the map explains when
        fitted without them, and before its rank is cut. Without a bias, it is the share of the scores' squares.
        """
        prior = _linear_map(gate) if refines else None
        constant = torch.zeros_like(self._train.cross)
        if gate.bias is not None:
            constant[-1] = self._train.cross[-1] / self._train.gram[-1, -1]  # the weighted mean of each score
        unexplained = self._held_out.error(constant)
        strength, error = best_strength(self._train, self._held_out, GATE_STRENGTHS, prior)
        if not spares:
            self._train += self._held_out
        solution = self._train.solve(strength, prior)
        with torch.no_grad():
            if gate.rank is None:
                gate.weight.copy_(solution[:-1].T)
                if gate.bias is not None:
                    gate.bias.copy_(solution[-1])
            else:
                factors = low_rank_map(self._train, solution, strength, gate.rank)
                for parameter, factor in zip((gate.output_weight, gate.input_weight, gate.bias), factors, strict=True):
                    parameter.copy_(factor)
        return {"ridge_strength": strength, "explained_variance": 1 - error / unexplained if unexplained else 0.0}


@bfloat16_products()
def fit_ridge_gate(gate: LinearGate, inputs: torch.Tensor, scores: torch.Tensor, num_valid: int) -> dict[str, float]:
    """`GateEquations.fit` to inputs `[tokens, hidden]` and scores `[tokens, experts]`; the last `num_valid` test it."""
    weights = token_weights(scores.square().mean(dim=1))
    equations = GateEquations(inputs.shape[1], scores.shape[1], inputs.device, gate.bias is not None)
    num_train = len(inputs) - num_valid
    for held_out, part in ((False, slice(0, num_train)), (True, slice(num_train, None))):
        chunks = (tensor[part].split(TOKENS_PER_CHUNK) for tensor in (inputs, scores, weights))
        for x, y, w in zip(*chunks, strict=True):
            equations.add(x, y, w, held_out=held_out)
    return equations.fit(gate, refines=False, spares=True)


@torch.no_grad()
def _linear_map(gate: LinearGate) -> torch.Tensor:
    """The gate as one map of `[x, 1]` to scores, `[hidden + 1, experts]`."""
    weight = gate.weight if gate.rank is None else gate.output_weight @ gate.input_weight
    bias = weight.new_zeros(len(weight)) if gate.bias is None else gate.bias
    return torch.cat([weight, bias[:, None]], dim=1).T
