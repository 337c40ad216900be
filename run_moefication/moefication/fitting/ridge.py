"""Ridge regression in closed form, from normal equations that are summed up chunk by chunk.

Minimises over the map B of D features to K targets, with token weights w and a prior P (zero unless given):

    sum_t w_t |x_t B - y_t|^2 + strength * mean(diag A) * |B - P|^2,   A = sum_t w_t x_t^T x_t
"""

from collections.abc import Sequence
from functools import cache

import torch

LARGEST_WEIGHT = 4.0  # in medians
LEAST_SQUARES = 1e-20  # so that sums over tokens that are nothing but zeros stay finite
GRAM_BLOCKS = 4  # stripes of a Gram matrix; more save little, and make the products small


class NormalEquations:
    """A `[D, D]`, sum_t w_t x_t^T y_t `[D, K]`, and sum_t w_t |y_t|^2: float32 products of chunks, summed in float64.

    Memory: 8 bytes for each of D * (D + K) sums, whatever the number of tokens, and once more while a chunk is added.
    """

    def __init__(self, num_features: int, num_targets: int, device: str | torch.device = "cpu"):
        self.gram = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(num_features, num_targets, dtype=torch.float64, device=device)
        self.target_squares = 0.0

    def add(self, features: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens: float32 `[T, D]`, `[T, K]` and weights `[T]`."""
        roots = weights.sqrt()[:, None]
        features, targets = features * roots, targets * roots
        self.gram += gram(features)
        self.cross += features.T @ targets
        self.target_squares += targets.square().sum(dim=1).sum(dtype=torch.float64).item()

    def __iadd__(self, other: "NormalEquations") -> "NormalEquations":
        self.gram += other.gram
        self.cross += other.cross
        self.target_squares += other.target_squares
        return self

    def solve(self, strength: float, prior: torch.Tensor | None = None) -> torch.Tensor:
        """The map B, float64 `[D, K]`. A `strength` above 0 makes the system positive definite."""
        penalty = strength * self.gram.diagonal().mean().item() or 1.0  # without any feature the prior is what is left
        system = self.gram.clone()
        system.diagonal().add_(penalty)
        right = self.cross if prior is None else self.cross + penalty * prior.double()
        return torch.cholesky_solve(right, torch.linalg.cholesky(system))

    def error(self, solution: torch.Tensor) -> float:
        """sum_t w_t |x_t B - y_t|^2 of a map B `[D, K]` over the squares of the targets: 0 is perfect, 1 is B = 0."""
        solution = solution.double()
        explained = 2 * (solution * self.cross).sum() - (solution * (self.gram @ solution)).sum()
        return 1 - explained.item() / self.target_squares if self.target_squares else 0.0


def gram(features: torch.Tensor) -> torch.Tensor:
    """`[T, D]` -> X^T X `[D, D]`. What lies below the diagonal is copied, which saves 3 of 8 operations."""
    size = features.shape[1]
    product, width = features.new_empty(size, size), -(-size // GRAM_BLOCKS)
    for start in range(0, size, width):
        end = min(start + width, size)
        product[start:end, start:] = features[:, start:end].T @ features[:, start:]
        product[end:, start:end] = product[start:end, end:].T
    return product


def best_strength(
    train: NormalEquations, held_out: NormalEquations, strengths: Sequence[float], prior: torch.Tensor | None = None
) -> tuple[float, float]:
    """The strength whose map, fitted to `train`, has the least error on held-out tokens; and that error.

    The error falls while a strength curbs what fits the training tokens alone, and rises once it curbs the rest. So the
    search starts in the middle of the strengths, which are in ascending order, and goes downhill.
    """

    @cache
    def error(index: int) -> float:
        return held_out.error(train.solve(strengths[index], prior))

    best, last = len(strengths) // 2, len(strengths) - 1
    while (better := min((best, max(best - 1, 0), min(best + 1, last)), key=error)) != best:
        best = better
    return strengths[best], error(best)


def low_rank_map(
    equations: NormalEquations, solution: torch.Tensor, strength: float, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The map of that rank nearest to a `solution` `[D + 1, K]` whose last feature is the constant 1.

    Nearest in the metric of the ridge fit: the truncated singular value decomposition of W L, with L L^T the covariance
    of the inputs plus `strength` times its mean diagonal (reduced-rank ridge regression, Mukherjee and Zhu 2011). What
    lies between the factors has a variance of at most 1, so both are of a size that training can move.

    Returns: the factors `[K, rank]` and `[rank, D]`, and the bias `[K]` that goes with them, in float64.
    """
    weight, total = solution[:-1].T, equations.gram[-1, -1]
    mean = equations.gram[-1, :-1] / total
    metric = equations.gram[:-1, :-1] / total - torch.outer(mean, mean)
    metric.diagonal().add_(strength * equations.gram.diagonal().mean() / total)
    root = torch.linalg.cholesky(metric)
    product = weight @ root
    # The right singular vectors, or a basis of their space, from the smaller of the two Gram matrices.
    if len(product) < product.shape[1]:
        left = torch.linalg.eigh(product @ product.T).eigenvectors.flip(1)[:, :rank]
        right = torch.linalg.qr(product.T @ left).Q
    else:
        right = torch.linalg.eigh(product.T @ product).eigenvectors.flip(1)[:, :rank]
    output_weight = product @ right
    # right^T @ root^-1, without an inverse
    input_weight = torch.linalg.solve_triangular(root, right.T, upper=False, left=False)
    return output_weight, input_weight, equations.cross[-1] / total - output_weight @ (input_weight @ mean)


def token_weights(squares: torch.Tensor) -> torch.Tensor:
    """Weights `[T]`: 1 over a token's squared magnitude `[T]`, at most 4 times the median of those that have any.

    With equal weights few tokens own every fit (Sun et al. 2024, "Massive activations in large language models").
    """
    weights = 1 / squares.clamp(min=LEAST_SQUARES)
    usual = weights.masked_fill(squares <= LEAST_SQUARES, torch.nan).nanmedian()  # nothing but zeros is not usual
    return weights.clamp(max=LARGEST_WEIGHT * usual.nan_to_num(nan=1.0))
