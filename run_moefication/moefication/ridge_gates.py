"""Linear gates in closed form: ridge regression of the experts' scores on the MLP's inputs."""

import torch

from llama_moe.gates import LinearGate

from .expert_scores import TOKENS_PER_CHUNK
from .ridge import NormalEquations, best_strength

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # in units of the mean diagonal of the Gram matrix
LARGEST_WEIGHT = 4.0  # in medians


def fit_ridge_gate(gate: LinearGate, inputs: torch.Tensor, scores: torch.Tensor, num_valid: int) -> dict[str, float]:
    """Fit weight and bias in place, the strength chosen on the last `num_valid` tokens, which are not fitted to.

    A gate with a rank gets the nearest map of that rank: the truncated singular value decomposition in the metric of
    the inputs, that is of W L with L L^T their Gram matrix.

    Args:
        inputs: `[tokens, hidden]`, any float dtype. scores: float32 `[tokens, experts]`.

    Returns: the strength, and the share of the held-out scores' (weighted) variance that the gate explains.
    """
    weights = token_weights(scores.square().mean(dim=1))
    train = slice(0, len(inputs) - num_valid)
    hidden_size = inputs.shape[1]
    equations = NormalEquations(hidden_size + 1, scores.shape[1], inputs.device)
    chunks = (tensor[train].split(TOKENS_PER_CHUNK) for tensor in (inputs, scores, weights))
    for x, y, w in zip(*chunks, strict=True):
        equations.add(_with_one(x), y, w)
    held_out = [tensor[-num_valid:] for tensor in (inputs, scores, weights)]
    strength, solution = best_strength(equations, STRENGTHS, lambda b: _mean_square(*held_out, b))
    if gate.rank is not None:
        solution = _truncated(equations, solution, strength, gate)
    with torch.no_grad():
        if gate.rank is None:
            gate.weight.copy_(solution[:-1].T)
        gate.bias.copy_(solution[-1])
    constant = torch.zeros_like(solution)
    constant[-1] = equations.cross[-1] / equations.gram[-1, -1]  # the weighted mean of each score
    explained = 1 - _mean_square(*held_out, solution) / _mean_square(*held_out, constant)
    return {"ridge_strength": strength, "explained_variance": explained}


def token_weights(squares: torch.Tensor) -> torch.Tensor:
    """Weights `[T]` that keep few tokens of massive activations from owning a fit: 1 over a token's squared magnitude
    `[T]`, at most 4 times the median."""
    weights = 1 / squares.clamp(min=torch.finfo(squares.dtype).tiny)
    return weights.clamp(max=LARGEST_WEIGHT * weights.median())


def _truncated(equations: NormalEquations, solution: torch.Tensor, strength: float, gate: LinearGate) -> torch.Tensor:
    """The gate's two factors, written in place; returns the map they make, with the intercept that fits it best."""
    gram = equations.gram[:-1, :-1].clone()
    gram.diagonal().add_(strength * equations.gram.diagonal().mean())
    root = torch.linalg.cholesky(gram)
    left, values, right = torch.linalg.svd(solution[:-1].T @ root, full_matrices=False)
    output_weight = left[:, : gate.rank] * values[: gate.rank]  # [experts, rank]
    # right @ root^-1, without an inverse
    input_weight = torch.linalg.solve_triangular(root, right[: gate.rank], upper=False, left=False)  # [rank, hidden]
    with torch.no_grad():
        gate.output_weight.copy_(output_weight)
        gate.input_weight.copy_(input_weight)
    weight = (output_weight @ input_weight).T
    bias = (equations.cross[-1] - equations.gram[-1, :-1] @ weight) / equations.gram[-1, -1]
    return torch.cat([weight, bias[None]])


def _with_one(inputs: torch.Tensor) -> torch.Tensor:
    """`[x, 1]` in float32."""
    return torch.cat([inputs.float(), torch.ones(len(inputs), 1, device=inputs.device)], dim=1)


def _mean_square(inputs: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor, solution: torch.Tensor) -> float:
    """Weighted mean square error of a solution `[hidden + 1, experts]`."""
    solution = solution.float()
    total = 0.0
    for x, y, w in zip(*(tensor.split(TOKENS_PER_CHUNK) for tensor in (inputs, scores, weights)), strict=True):
        total += ((_with_one(x) @ solution - y).square().mean(dim=1) * w).sum(dtype=torch.float64).item()
    return total / weights.sum(dtype=torch.float64).item()
