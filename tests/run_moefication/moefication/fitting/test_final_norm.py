"""The final norm's fit: divergence and gradient against autograd, the minimum against SciPy's."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional as F

from run_moefication.moefication.fitting.final_norm import Divergence, fit_final_norm
from run_moefication.moefication.fitting.losses import TOKENS_OF_LOGITS

HIDDEN, WORDS = 12, 40


def problem(tokens: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Head, what enters it in the dense model, the same with noise in some channels and normalised, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    head, normed = (torch.randn(size, HIDDEN, generator=generator) for size in (WORDS, tokens))
    normed = F.rms_norm(normed, (HIDDEN,))
    weight = torch.rand(HIDDEN, generator=generator) + 0.5
    noisy = normed + noise * torch.linspace(0, 1, HIDDEN) * torch.randn(tokens, HIDDEN, generator=generator)
    return head, normed * weight, F.rms_norm(noisy, (HIDDEN,)), weight


def straight(head: torch.Tensor, dense: torch.Tensor, normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    expected, found = (F.softmax(hidden @ head.T, dim=-1) for hidden in (dense, normed * weight))
    return (expected * (expected / found).log()).sum(-1).mean()


@pytest.mark.parametrize("tokens", [1, 7, TOKENS_OF_LOGITS + 3])
def test_divergence_and_gradient_are_autograds(tokens):
    head, dense, normed, weight = (tensor.double() for tensor in problem(tokens, 0.7))
    weights = [weight.clone().requires_grad_() for _ in range(2)]
    loss, expected = Divergence(head, dense, normed)(weights[0]), straight(head, dense, normed, weights[1])
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(weights[0].grad, weights[1].grad, rtol=1e-9, atol=1e-12)


def test_the_curvature_is_the_hessians_diagonal():
    head, dense, normed, weight = (tensor.double() for tensor in problem(50, 0.7))

    def of_factors(factors):
        return straight(head, dense, normed, factors * weight)

    hessian = torch.autograd.functional.hessian(of_factors, torch.ones(HIDDEN, dtype=torch.float64))
    torch.testing.assert_close(Divergence(head, dense, normed).curvature(weight), hessian.diagonal())


@pytest.mark.parametrize("tokens", [900, 9000])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_minimum_is_scipys(seed, tokens):
    head, dense, normed, weight = problem(tokens, 1.0, seed)
    exact = Divergence(head.double(), dense.double(), normed.double())
    pull = exact.curvature(weight.double()).mean() * 400 / tokens

    def both(factors):
        factors = torch.tensor(factors, requires_grad=True)
        loss = exact(factors * weight) + pull / 2 * (factors - 1).square().sum()
        loss.backward()
        return loss.item(), factors.grad.numpy()

    best = minimize(both, np.ones(HIDDEN), jac=True, method="L-BFGS-B")
    factors = fit_final_norm(Divergence(head, dense, normed), weight) / weight
    before, found = (both(f)[0] for f in (np.ones(HIDDEN), factors.double().numpy()))
    assert found - best.fun < 0.02 * (before - best.fun)
    # Channels are believed the less the noisier they are, and the more so the more tokens say it.
    assert factors[-3:].mean() < (0.9 if tokens == 900 else 0.8) * factors[:3].mean()


def test_without_noise_the_weight_stays():
    head, dense, normed, weight = problem(100, 0.0)
    torch.testing.assert_close(fit_final_norm(Divergence(head, dense, normed), weight), weight, rtol=1e-4, atol=1e-4)
