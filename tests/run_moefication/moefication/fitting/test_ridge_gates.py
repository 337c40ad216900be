"""Ridge regression against scikit-learn's, and gates made of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from llama_moe.gates import LinearGate
from run_moefication.moefication.fitting.ridge import NormalEquations, best_strength, token_weights
from run_moefication.moefication.fitting.ridge_gates import fit_ridge_gate

HIDDEN, EXPERTS = 12, 6


def problem(tokens: int = 600, noise: float = 0.3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with uneven directions and an offset, and scores that are nearly linear in them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=generator)
    inputs = torch.randn(tokens, HIDDEN, generator=generator) @ mixing + 0.5
    weight = torch.randn(HIDDEN, EXPERTS, generator=generator)
    return inputs, inputs @ weight + 3 + noise * torch.randn(tokens, EXPERTS, generator=generator)


def make_gate(rank: int | None = None, has_bias: bool = True) -> LinearGate:
    return LinearGate(HIDDEN, EXPERTS, rank=rank, has_bias=has_bias, num_experts_per_tok=EXPERTS)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(1, 5), st.integers(1, 60), st.floats(1e-3, 10), st.integers(0, 2**31))
def test_the_solution_is_scikit_learns(features, targets, tokens, strength, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(tokens, features, generator=generator), torch.randn(tokens, targets, generator=generator)
    w, prior = torch.rand(tokens, generator=generator) + 0.1, torch.randn(features, targets, generator=generator)
    equations = NormalEquations(features, targets)
    for chunk in zip(x.split(7), y.split(7), w.split(7), strict=True):
        equations.add(*chunk)
    alpha = strength * float((x.square() * w[:, None]).sum(0).mean())
    for given_prior in (None, prior):
        # A prior is a regression of what it leaves over.
        rest = y if given_prior is None else y - x @ given_prior
        # In float64: the library's float32 solution is further from it than ours, whose sums are in float64.
        exact = (x.double().numpy(), rest.double().numpy())
        model = Ridge(alpha=alpha, fit_intercept=False).fit(*exact, sample_weight=w.double().numpy())
        expected = np.atleast_2d(model.coef_).reshape(targets, features).T
        expected = expected + (0 if given_prior is None else given_prior.numpy())
        np.testing.assert_allclose(equations.solve(strength, given_prior).numpy(), expected, rtol=1e-3, atol=1e-4)


def test_the_error_is_the_straight_computation():
    x, y = problem()
    w = torch.rand(len(x), generator=torch.Generator().manual_seed(2)) + 0.1
    equations = NormalEquations(HIDDEN, EXPERTS)
    for chunk in zip(x.split(100), y.split(100), w.split(100), strict=True):
        equations.add(*chunk)
    solution = torch.randn(HIDDEN, EXPERTS, generator=torch.Generator().manual_seed(3))
    straight = ((x @ solution - y).square().sum(1) * w).sum() / (y.square().sum(1) * w).sum()
    assert equations.error(solution) == pytest.approx(straight.item(), rel=1e-4)


def test_the_strength_that_does_best_on_held_out_tokens_is_taken():
    x, y = problem(tokens=40, noise=20.0)
    train, held_out = NormalEquations(HIDDEN, EXPERTS), NormalEquations(HIDDEN, EXPERTS)
    train.add(x[:20], y[:20], torch.ones(20))
    held_out.add(x[20:], y[20:], torch.ones(20))
    strengths = (1e-6, 1e-3, 1e-1, 1.0, 10.0)
    found, error = best_strength(train, held_out, strengths)
    errors = {strength: held_out.error(train.solve(strength)) for strength in strengths}
    assert error == errors[found] == min(errors.values()) < errors[1e-6]


def test_a_gate_learns_scores_that_are_linear_in_its_input():
    inputs, scores = problem(noise=0.0)
    report = fit_ridge_gate(gate := make_gate(), inputs, scores, 60)
    torch.testing.assert_close(gate.score(inputs), scores, rtol=0.02, atol=0.1)
    assert report["explained_variance"] > 0.999


def test_a_gate_without_a_bias_is_scikit_learns_map_through_zero():
    inputs, scores = problem()
    report = fit_ridge_gate(gate := make_gate(has_bias=False), inputs, scores, 60)
    x, y = inputs[:-60].double(), scores[:-60].double()
    weights = token_weights(scores.square().mean(dim=1))[:-60].double()
    # The strength's unit is the mean over inputs and the constant, which is zero here.
    alpha = report["ridge_strength"] * (x.square() * weights[:, None]).sum() / (HIDDEN + 1)
    model = Ridge(alpha=alpha.item(), fit_intercept=False).fit(x.numpy(), y.numpy(), sample_weight=weights.numpy())
    np.testing.assert_allclose(gate.weight.detach().numpy(), model.coef_, rtol=1e-3, atol=1e-3)
    assert 0 < report["explained_variance"] < 1


def test_held_out_tokens_are_not_fitted_to():
    inputs, scores = problem()
    fit_ridge_gate(gate := make_gate(), inputs, scores, 60)
    changed = scores.clone()
    changed[-60:] *= 1.001  # too little to choose another strength
    fit_ridge_gate(other := make_gate(), inputs, changed, 60)
    assert torch.equal(gate.weight, other.weight)
    changed[0] += 1
    fit_ridge_gate(other, inputs, changed, 60)
    assert not torch.equal(gate.weight, other.weight)


def test_a_gate_of_full_rank_is_the_gate_without_one():
    inputs, scores = problem()
    plain, factored = make_gate(), make_gate(EXPERTS)
    reports = [fit_ridge_gate(gate, inputs, scores, 60) for gate in (plain, factored)]
    torch.testing.assert_close(factored.score(inputs), plain.score(inputs), rtol=1e-3, atol=0.02)
    assert reports[1]["explained_variance"] == pytest.approx(reports[0]["explained_variance"], abs=1e-3)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_in_the_metric_of_the_inputs_loses_least(rank):
    """On the fitted tokens it predicts the full gate's scores better than the truncated matrix does."""
    inputs, scores = problem(tokens=3000)
    fit_ridge_gate(full := make_gate(), inputs, scores, 60)
    fit_ridge_gate(low := make_gate(rank), inputs, scores, 60)
    inner = (inputs[:-60] @ low.input_weight.detach().T).T  # [rank, tokens]
    variances = inner.cov(aweights=token_weights(scores[:-60].square().mean(dim=1)))
    torch.testing.assert_close(variances.view(rank, rank), torch.eye(rank), rtol=0.01, atol=0.01)
    left, values, right = torch.linalg.svd(full.weight.detach())
    naive = left[:, :rank] * values[:rank] @ right[:rank]
    with torch.no_grad():
        target = full.score(inputs)
        errors = [(s - target - (s - target).mean(0)).square().mean() for s in (low.score(inputs), inputs @ naive.T)]
    assert errors[0] < errors[1]
    assert errors[0] > 1e-3


def test_massive_tokens_do_not_own_the_fit():
    inputs, scores = problem()
    wild = scores.clone()
    wild[::100] = 1e4 * torch.randn(6, EXPERTS, generator=torch.Generator().manual_seed(1))
    fit_ridge_gate(gate := make_gate(), inputs, wild, 60)
    calm = torch.ones(len(inputs), dtype=torch.bool)
    calm[::100] = False
    torch.testing.assert_close(gate.score(inputs)[calm], scores[calm], rtol=0.1, atol=1.0)


def test_token_weights_are_inverse_squares_up_to_four_medians():
    assert token_weights(torch.tensor([1.0, 2.0, 4.0, 1e6, 0.1])).tolist() == [1.0, 0.5, 0.25, pytest.approx(1e-6), 2.0]
    # Tokens of nothing but zeros weigh what the others allow, however many they are.
    assert token_weights(torch.tensor([1.0, 2.0, 4.0, 0.0, 0.0, 0.0, 0.0])).tolist() == [1.0, 0.5, 0.25] + [2.0] * 4
    assert token_weights(torch.zeros(3)).isfinite().all()
