"""The last step of calibration: the weight of the final norm, fitted to the dense model's predictions.

What the layers lack leaves noise in the residual stream, the final norm scales stream and noise up to full size, and
the model is surer of its predictions than it may be. A factor for each channel mends that. Logits are linear in the
factors, so the divergence from the dense model is convex in them.

Axes: T tokens, H hidden size, V vocabulary.
"""

import torch
from torch.nn import functional as F

from .progress import Progress, no_progress

MOST_PASSES = 16  # over the tokens; more gains nothing on text that was not fitted to
TOKENS_PER_CHUNK = 512


class Divergence:
    """KL of a model's next-token distributions from the dense model's, as a function of its final norm's weight.

    Memory: beside the head, a few times TOKENS_PER_CHUNK * V numbers.
    """

    def __init__(self, head: torch.Tensor, dense: torch.Tensor, normed: torch.Tensor):
        """`head`: `[V, H]`, of both models; `dense`: what enters it in the dense model, `[T, H]`; `normed`: what enters
        it in the other one, but for the norm's weight, `[T, H]`; float32."""
        self._head = head
        self._parts = list(zip(dense.split(TOKENS_PER_CHUNK), normed.split(TOKENS_PER_CHUNK), strict=True))
        self._num_tokens = len(dense)

    @torch.no_grad()
    def __call__(self, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
        """`weight [H]` -> the mean divergence in nats a token, and its gradient `[H]`."""
        loss, gradient = 0.0, torch.zeros_like(weight)
        for dense, normed in self._parts:
            expected = F.linear(dense, self._head).log_softmax(dim=-1)
            found = F.linear(normed * weight, self._head).log_softmax(dim=-1)
            loss += F.kl_div(found, expected, reduction="sum", log_target=True).item()
            gradient += (((found.exp_() - expected.exp_()) @ self._head) * normed).sum(dim=0)
        return loss / self._num_tokens, gradient / self._num_tokens


def fit_final_norm(divergence: Divergence, weight: torch.Tensor, progress: Progress = no_progress) -> torch.Tensor:
    """The weight `[H]` of least divergence, by L-BFGS from the given one (Liu and Nocedal 1989)."""
    factors = torch.ones_like(weight, requires_grad=True)  # of the weight: of one size, whatever the channels' own
    optimizer = torch.optim.LBFGS([factors], max_iter=MOST_PASSES, max_eval=MOST_PASSES, line_search_fn="strong_wolfe")
    passes = iter(progress(range(MOST_PASSES), "final norm", "pass"))

    def closure() -> float:
        next(passes, None)
        loss, gradient = divergence(factors.detach() * weight)
        factors.grad = gradient * weight
        return loss

    optimizer.step(closure)
    return factors.detach() * weight
