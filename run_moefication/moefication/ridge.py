"""Ridge regression in closed form, from normal equations that are summed up chunk by chunk.

Minimises over the map B of D features to K targets, with token weights w and a prior P (zero unless given):

    sum_t w_t |x_t B - y_t|^2 + strength * mean(diag A) * |B - P|^2,   A = sum_t w_t x_t^T x_t
"""

from collections.abc import Callable, Sequence

import torch


class NormalEquations:
    """A `[D, D]`, and C = sum_t w_t x_t^T y_t `[D, K]`: float32 products of chunks, summed in float64.

    Memory: 8 bytes for each of D * (D + K) sums, whatever the number of tokens.
    """

    def __init__(self, num_features: int, num_targets: int, device: str | torch.device = "cpu"):
        self.gram = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(num_features, num_targets, dtype=torch.float64, device=device)

    def add(self, features: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens: float32 `[T, D]`, `[T, K]` and weights `[T]`."""
        weighted = (features * weights[:, None]).T
        self.gram += (weighted @ features).double()
        self.cross += (weighted @ targets).double()

    def solve(self, strength: float, prior: torch.Tensor | None = None) -> torch.Tensor:
        """The map B, float64 `[D, K]`. A `strength` above 0 makes the system positive definite."""
        penalty = strength * self.gram.diagonal().mean()
        system = self.gram.clone()
        system.diagonal().add_(penalty)
        right = self.cross if prior is None else self.cross + penalty * prior.double()
        return torch.cholesky_solve(right, torch.linalg.cholesky(system))


def best_strength(
    equations: NormalEquations,
    strengths: Sequence[float],
    error: Callable[[torch.Tensor], float],
    prior: torch.Tensor | None = None,
) -> tuple[float, torch.Tensor]:
    """The strength whose solution has the least `error` (on tokens that are not in the equations), and the solution."""
    solutions = [equations.solve(strength, prior) for strength in strengths]
    errors = [error(solution) for solution in solutions]
    best = min(range(len(strengths)), key=errors.__getitem__)
    return strengths[best], solutions[best]
