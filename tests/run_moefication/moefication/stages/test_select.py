"""Recall means what it says, and training improves it without ever looking at the held-out tokens."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.layers.scores import routing_quality, top_k_mask
from run_moefication.moefication.stages.select import fit_gate, initial_gate, parse_layers
from run_moefication.settings import GateSettings

EXPERTS, K, HIDDEN, WIDTH = 8, 2, 24, 5
SETTINGS = GateSettings(
    templates="layers.{}.mlp.gate_proj.weight",
    num_experts=EXPERTS,
    num_selects=K,
    use_softmax=True,
    epochs=20,
    batch_size=128,
)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**31), st.data())
def test_quality_is_the_straight_computation_and_perfect_is_one(experts, tokens, seed, data):
    k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(seed)
    scores, guess = (torch.rand(tokens, experts, generator=generator) for _ in range(2))
    assert routing_quality(top_k_mask(scores, k), scores, k) == {"recall": 1.0, "mass_recall": 1.0}
    recall = mass = 0.0
    for token in range(tokens):
        best = sorted(range(experts), key=lambda e, t=token: -scores[t, e])[:k]
        chosen = sorted(range(experts), key=lambda e, t=token: -guess[t, e])[:k]
        recall += len({*best} & {*chosen}) / k / tokens
        mass += sum(scores[token, chosen].tolist()) / sum(scores[token, best].tolist()) / tokens
    quality = routing_quality(top_k_mask(guess, k), scores, k)
    assert quality["recall"] == pytest.approx(recall)
    assert quality["mass_recall"] == pytest.approx(mass, rel=1e-5)


def test_tokens_without_any_score_count_as_right():
    scores = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])
    assert routing_quality(torch.tensor([[0.0, 1, 0], [1, 0, 0]]), scores, 1)["mass_recall"] == (1 + 1 / 3) / 2
    nothing = torch.zeros(5, 4)
    assert routing_quality(top_k_mask(nothing, 2), nothing, 2) == {"recall": 1.0, "mass_recall": 1.0}


def problem(tokens: int = 1500, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight rows, neurons of experts, inputs and scores as a layer would give them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(EXPERTS * WIDTH, HIDDEN, generator=generator)
    neurons = torch.randperm(EXPERTS * WIDTH, generator=generator).view(EXPERTS, WIDTH)
    inputs = torch.randn(tokens, HIDDEN, generator=generator)
    scores = torch.nn.functional.silu(inputs @ rows.T)[:, neurons].square().sum(-1)
    return rows, neurons, inputs, scores


def fit(problem: tuple[torch.Tensor, ...], network: str = "mlp", **changes: object) -> dict:
    """The metrics of a gate's fit."""
    rows, neurons, inputs, scores = problem
    options = dataclasses.replace(SETTINGS, gate_network=network, gate_fit="adam", **changes)
    return fit_gate(initial_gate(network, rows, neurons), inputs, scores, options)


@pytest.mark.parametrize("network", ["mlp", "linear", "similarity"])
def test_initial_gate_is_the_mean_normalised_row(network):
    rows, neurons, inputs, scores = problem()
    gate = initial_gate(network, rows, neurons)
    first, *second = gate.parameters()
    for expert in range(EXPERTS):
        expected = sum(rows[neuron] / rows[neuron].norm() for neuron in neurons[expert]) / WIDTH
        torch.testing.assert_close(first[expert].detach(), expected, rtol=1e-5, atol=1e-6)
    assert [torch.equal(weight, torch.eye(EXPERTS)) for weight in second] == [True] * (network == "mlp")
    hidden = inputs @ first.T
    torch.testing.assert_close(gate.score(inputs), hidden.tanh() if network == "mlp" else hidden)
    if network == "similarity":  # is not trained
        similarity = GateSettings(num_experts=EXPERTS, num_selects=K, gate_network=network)
        metrics = fit_gate(gate, inputs, scores, similarity)
        assert torch.equal(gate.weight, initial_gate(network, rows, neurons).weight)
        assert (metrics["loss"]["train"], metrics["best_epoch"]) == ([], 0)


def straight_loss(logits: torch.Tensor, scores: torch.Tensor, use_softmax: bool) -> float:
    """The losses as their formulas stand in textbooks, token by token, in float64."""
    total = 0.0
    for guess, score in zip(logits.double(), scores.double(), strict=True):
        if use_softmax:
            target, predicted = score / score.sum(), guess.exp() / guess.exp().sum()
            total += (target * (target / predicted).log()).sum().item()  # KL(target || predicted)
        else:
            best = set(score.topk(K).indices.tolist())
            chances = 1 / (1 + (-guess).exp())
            total -= sum((chances[e] if e in best else 1 - chances[e]).log().item() for e in range(EXPERTS)) / EXPERTS
    return total / len(logits)


@pytest.mark.parametrize(("network", "use_softmax"), [("mlp", True), ("linear", False)])
def test_losses_are_the_formulas(network, use_softmax):
    rows, neurons, inputs, scores = problem(350)
    # A step too small to change a weight: the first epoch's loss is that of the gate as it starts, over all batches.
    changes = dict(gate_network=network, use_softmax=use_softmax, epochs=1, lr=1e-30)
    gate = initial_gate(network, rows, neurons)
    losses = fit_gate(gate, inputs, scores, dataclasses.replace(SETTINGS, **changes))["loss"]
    logits = gate.score(inputs).detach()
    # float32 against float64.
    assert losses["train"] == [pytest.approx(straight_loss(logits[:-35], scores[:-35], use_softmax), rel=1e-5)]
    assert losses["valid"] == [pytest.approx(straight_loss(logits[-35:], scores[-35:], use_softmax), rel=1e-5)] * 2


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from([1e-4, 0.01, 1.0, 30.0]), st.booleans(), st.sampled_from(["mlp", "linear"]))
def test_a_gate_never_ends_below_its_start(seed, lr, use_softmax, network):
    rows, neurons, inputs, scores = problem(120, seed)
    options = dataclasses.replace(SETTINGS, epochs=4, lr=lr, use_softmax=use_softmax, gate_network=network, seed=seed)
    start = fit_gate(initial_gate(network, rows, neurons), inputs, scores, dataclasses.replace(options, epochs=0))
    end = fit_gate(gate := initial_gate(network, rows, neurons), inputs, scores, options)
    assert end["mass_recall"] >= start["mass_recall"]
    left = routing_quality(top_k_mask(gate.score(inputs[-12:]).detach(), K), scores[-12:], K)
    assert left == {name: end[name] for name in left}  # the gate left behind is the one reported
    assert (end["mass_recall"] > start["mass_recall"]) == (end["best_epoch"] > 0)
    assert sum(end["expert_load"]) == pytest.approx(K)


def test_a_loss_that_is_not_finite_is_refused():
    given = problem(200)
    given[2][7, 3] = float("inf")
    with pytest.raises(MoEficationError, match="loss of a gate did not stay finite; use a smaller lr than"):
        fit(given, "linear")


@pytest.mark.parametrize(
    ("tokens", "valid_percent", "held_out"), [(2, 0.1, 1), (2, 0.99, 1), (10, 0.1, 1), (10, 0.99, 9), (200, 0.25, 50)]
)
def test_held_out_tokens_are_the_share_asked_for_and_never_all_or_none(tokens, valid_percent, held_out):
    metrics = fit(problem(tokens), epochs=1, valid_percent=valid_percent)
    assert (metrics["train_tokens"], metrics["valid_tokens"]) == (tokens - held_out, held_out)


def test_best_constant_choice_is_the_highest_mean_of_the_training_tokens():
    *_, scores = given = problem()
    scores[:, 3] += 1e6
    scores[:, 5] += 1e5
    assert fit(given, epochs=0)["constant_recall"] == 1.0
    scores[-150:, [0, 1]] += 1e7  # what only the held-out tokens show, a choice made before them cannot know
    assert fit(given, epochs=0)["constant_recall"] == 0.0


def test_held_out_tokens_do_not_train():
    *given, scores = problem()
    changed = scores.clone()
    changed[-150:] = changed[-150:].flip(-1)
    losses = [fit((*given, s), patience=100)["loss"] for s in (scores, changed)]
    assert losses[0]["train"] == losses[1]["train"]
    assert losses[0]["valid"] != losses[1]["valid"]


def test_training_stops_early_and_keeps_the_best():
    *given, scores = problem(300)
    noise = torch.rand_like(scores)  # nothing to learn: held-out recall soon stops improving
    metrics = fit((*given, noise), epochs=200, patience=3)
    assert len(metrics["loss"]["train"]) == metrics["best_epoch"] + 3 < 200


def test_another_seed_gives_another_gate():
    first, other = (fit(problem(), seed=seed)["loss"]["train"] for seed in (0, 1))
    assert first[-1] != other[-1]


@pytest.mark.parametrize(
    ("texts", "layers"),
    [
        ([], list(range(32))),
        (["0-7"], list(range(8))),
        (["0", "1", "2"], [0, 1, 2]),
        (["8-9", "3", "30-31"], [3, 8, 9, 30, 31]),
        (["5,4", "4-5"], [4, 5]),
    ],
)
def test_layers(texts, layers, caplog):
    assert parse_layers(texts, 32) == layers
    assert not caplog.text


@pytest.mark.parametrize("text", ["32", "0-33", "32-32", "7-0", "a", "-1", "1-", "1.5", "0--3"])
def test_other_layers_are_refused(text):
    with pytest.raises(MoEficationError, match=f"specify_layer '?{text}'?"):
        parse_layers([text], 32)
