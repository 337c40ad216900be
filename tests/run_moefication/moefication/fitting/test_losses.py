"""Losses over a vocabulary in chunks against their definitions on whole logits."""

import pytest
import torch
from torch.nn import functional as F

from run_moefication.moefication.fitting.losses import TOKENS_OF_LOGITS, TeacherKL, predicted

TOKENS, VOCABULARY = 2 * TOKENS_OF_LOGITS + 44, 50


def test_predictions_are_the_cross_entropy_and_the_greatest_logits():
    generator = torch.Generator().manual_seed(0)
    states, head = torch.randn(TOKENS, 24, generator=generator), torch.randn(VOCABULARY, 24, generator=generator)
    tokens = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    logits = states[:-1] @ head.T
    nll, best = predicted(states, tokens, head)
    assert nll == pytest.approx(F.cross_entropy(logits, tokens[1:], reduction="sum").item(), rel=1e-5)
    assert torch.equal(best, logits.argmax(1))


def test_the_loss_is_the_divergence_of_the_logits_with_its_gradient():
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, 24), (TOKENS, 24), (VOCABULARY, 24))
    student, teacher, head = (torch.randn(shape, generator=generator) for shape in shapes)
    straight, ours = student.clone().requires_grad_(), student.clone().requires_grad_()
    distributions = [(states @ head.T).softmax(-1) for states in (straight, teacher)]
    expected = (distributions[1] * (distributions[1] / distributions[0]).log()).sum()
    loss = TeacherKL(teacher, head)(ours).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (3 * expected).backward()
    (3 * loss).backward()
    assert (ours.grad - straight.grad).norm() < 1e-5 * straight.grad.norm()
    rounded = TeacherKL(teacher, head.bfloat16())(student).sum()  # the products are rounded, the sums are not
    assert rounded.dtype == torch.float32
    assert 0 < abs(rounded.item() / expected.item() - 1) < 0.01
