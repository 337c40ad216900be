"""The last step of calibration: the weight of the final norm, fitted to the dense model's predictions.

What the layers lack leaves noise in the residual stream, the final norm scales stream and noise up to full size, and
the model is surer of its predictions than it may be. A factor for each channel mends that. Logits are linear in the
factors, so the divergence from the dense model is convex in them.

Axes: T tokens, H hidden size, V vocabulary.
"""

import torch
from torch.nn import functional as F

from ..progress import Progress, no_progress

MOST_PASSES = 16  # over the tokens; more gains nothing on text that was not fitted to
# Of the pull to the original weight: as strong as the curvature that so many tokens give the divergence. With 4,096
# tokens of calibration text, the fit gains a fifth more on other text for it.
PRIOR_TOKENS = 400
TOKENS_PER_CHUNK = 512


class Divergence:
    """KL of a model's next-token distributions from the dense model's, as a function of its final norm's weight.

    With p the dense model's distribution and z = head x the other's logits, KL = sum p log p - sum p z + logsumexp(z),
    and sum p z = x (p head): the dense model's logits are needed once, and of V numbers a token none are kept.

    Memory: beside the head, a few times TOKENS_PER_CHUNK * V numbers.
    """

    @torch.no_grad()
    def __init__(self, head: torch.Tensor, dense: torch.Tensor, normed: torch.Tensor):
        """`head`: `[V, H]`, of both models; `dense`: what enters it in the dense model, `[T, H]`; `normed`: what enters
        it in the other one, but for the norm's weight, `[T, H]`; float32."""
        self.num_tokens = len(dense)
        self._head, self._parts = head, []
        for states, others in zip(dense.split(TOKENS_PER_CHUNK), normed.split(TOKENS_PER_CHUNK), strict=True):
            expected, log_total = self._mean_row(states)
            self._parts.append((others, expected, (states * expected).sum(dim=1) - log_total))

    @torch.no_grad()
    def __call__(self, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
        """`weight [H]` -> the mean divergence in nats a token, and its gradient `[H]`."""
        loss, gradient = 0.0, torch.zeros_like(weight)
        for normed, expected, negative_entropy in self._parts:
            states = normed * weight
            found, log_total = self._mean_row(states)
            divergences = negative_entropy - (states * expected).sum(dim=1) + log_total
            loss += divergences.sum(dtype=torch.float64).item()
            gradient += ((found - expected) * normed).sum(dim=0)
        return loss / self.num_tokens, gradient / self.num_tokens

    def _mean_row(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States `[T, H]` -> the mean of the head's rows as each predicts them `[T, H]`, and its logits' logsumexp."""
        logits = F.linear(states, self._head)
        largest = logits.amax(dim=1, keepdim=True)
        weights = logits.sub_(largest).exp_()
        total = weights.sum(dim=1, keepdim=True)
        return weights @ self._head / total, (largest + total.log()).squeeze(1)


def mean_curvature(divergence: Divergence, weight: torch.Tensor) -> float:
    """The second derivative by a factor of the weight `[H]`, about its mean over channels: that along random signs
    (Hutchinson 1990), by finite differences."""
    signs, step = torch.ones_like(weight), 1e-2
    signs[torch.randperm(len(signs), generator=torch.Generator().manual_seed(0))[::2]] = -1
    (_, here), (_, there) = divergence(weight), divergence(weight * (1 + step * signs))
    return ((there - here) * weight * signs).mean().item() / step


def fit_final_norm(divergence: Divergence, weight: torch.Tensor, progress: Progress = no_progress) -> torch.Tensor:
    """The weight `[H]` of least divergence, pulled a little to the given one, by L-BFGS from there (Liu and Nocedal
    1989)."""
    pull = mean_curvature(divergence, weight) * PRIOR_TOKENS / divergence.num_tokens
    factors = torch.ones_like(weight, requires_grad=True)  # of the weight: of one size, whatever the channels' own
    optimizer = torch.optim.LBFGS([factors], max_iter=MOST_PASSES, max_eval=MOST_PASSES, line_search_fn="strong_wolfe")
    passes = iter(progress(range(MOST_PASSES), "final norm", "pass"))

    def closure() -> float:
        next(passes, None)
        loss, gradient = divergence(factors.detach() * weight)
        change = factors.detach() - 1
        factors.grad = gradient * weight + pull * change
        return loss + pull / 2 * change.square().sum().item()

    optimizer.step(closure)
    return factors.detach() * weight
