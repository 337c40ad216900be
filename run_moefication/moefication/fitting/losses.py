"""Losses of next-token predictions, computed for a few tokens at a time: logits are larger than all else.

Axes: T tokens, H hidden size, V vocabulary.
"""

import torch
from torch.nn import functional as F

TOKENS_OF_LOGITS = 128  # of larger chunks the memory is new each time, which takes longer than the sums


@torch.no_grad()
def predicted(states: torch.Tensor, tokens: torch.Tensor, head: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Negative log-likelihood of a block's tokens `[T]` but the first, in nats, and the most likely token at the place
    of each, `[T - 1]`; `states [T, H]` enter `head [V, H]`."""
    nll, best = 0.0, []
    for before, targets in zip(states[:-1].split(TOKENS_OF_LOGITS), tokens[1:].split(TOKENS_OF_LOGITS), strict=True):
        logits = F.linear(before, head).float()
        nll += F.cross_entropy(logits, targets, reduction="sum").item()
        best.append(logits.argmax(1))
    return nll, torch.cat(best)


class TeacherKL:
    """KL(teacher || student) of next-token distributions, as a function of the states that enter the student's head.

    With p the teacher's distribution and z = head x the student's logits, KL = sum p log p - sum p z + logsumexp(z),
    and sum p z = x (p head). So the teacher's logits are needed once, and H of their V numbers a token are kept. The
    same formula gives sum p log p, so that equal states have no divergence, however products are rounded.

    Memory: beside the heads, a few times TOKENS_OF_LOGITS * V numbers.
    """

    @torch.no_grad()
    def __init__(self, states: torch.Tensor, head: torch.Tensor):
        """`states [T, H]` enter the head in the teacher; `head [V, H]` is that of both, no gradient goes to it, and its
        dtype is that of all products."""
        self._head = head
        rows, negative_entropies = [], []
        for chunk in states.split(TOKENS_OF_LOGITS):
            logits = logits_of(chunk, self._head)
            log_total = logits.logsumexp(1)
            p = logits.sub_(log_total[:, None]).exp_()
            rows.append(mean_rows(p, self._head))
            negative_entropies.append((chunk * rows[-1]).sum(1) - log_total)
        self._rows, self._negative_entropies = torch.cat(rows), torch.cat(negative_entropies)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """The student's states `[T, H]` -> nats `[T]`, differentiable."""
        return _StudentKL.apply(states, self._head, self._rows, self._negative_entropies)


class _StudentKL(torch.autograd.Function):
    """The gradient is computed along with the values, while a chunk's logits are there: q head - p head."""

    @staticmethod
    def forward(ctx, states, head, rows, negative_entropies):
        """States `[T, H]`, head `[V, H]`, the teacher's mean of the head's rows `[T, H]` and its sum p log p `[T]` ->
        KL `[T]` in nats."""
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        kl = torch.empty_like(negative_entropies)
        for start in range(0, len(states), TOKENS_OF_LOGITS):
            chunk = slice(start, start + TOKENS_OF_LOGITS)
            logits = logits_of(states[chunk], head)
            log_total = logits.logsumexp(1)
            kl[chunk] = negative_entropies[chunk] - (states[chunk] * rows[chunk]).sum(1) + log_total
            if gradient is not None:
                gradient[chunk] = mean_rows(logits.sub_(log_total[:, None]).exp_(), head) - rows[chunk]
        ctx.save_for_backward(gradient)
        ctx.dtype = states.dtype
        return kl

    @staticmethod
    def backward(ctx, kl_gradient):
        (gradient,) = ctx.saved_tensors
        return (kl_gradient[:, None] * gradient).to(ctx.dtype), None, None, None


def logits_of(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """`[T, H]` -> `[T, V]`, multiplied in the head's dtype, at least float32 from there on."""
    logits = F.linear(states.to(head.dtype), head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def mean_rows(weights: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """The mean of the head's rows under distributions `[T, V]` -> `[T, H]`, in the dtype of the distributions."""
    return (weights.to(head.dtype) @ head).to(weights.dtype)
