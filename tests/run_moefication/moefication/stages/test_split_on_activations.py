"""A split by what neurons do: statistics against a loop, planted groups found, the dense model's own activations."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LLAMA3_ROPE, make_llama
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pipeline import GATE, UP, Killed, contents, corpus_of, inputs_to, load, renames
from sklearn.linear_model import Ridge

from run_moefication.moefication.artifacts.features import Features
from run_moefication.moefication.artifacts.split import Split
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.fitting.ridge import token_weights
from run_moefication.moefication.layers.mlp import GatedMLP
from run_moefication.moefication.stages.features import extract_features
from run_moefication.moefication.stages.split_on_activations import NeuronStatistics, split_by_activations
from run_moefication.moefication.text.corpus import Corpus
from run_moefication.settings import FeatureSettings, GraphSplitSettings, SplitSettings

NEURONS = 24


def statistics_of(activations: torch.Tensor, norms=None, weights=None, size: int = 1000) -> NeuronStatistics:
    """Of tokens whose inputs are what their neurons do: a linear map foresees it."""
    norms = torch.ones(activations.shape[1]) if norms is None else norms
    weights = token_weights((activations * norms).square().sum(1)) if weights is None else weights
    statistics = NeuronStatistics(GatedMLP([], [], torch.diag(norms), None))
    for chunk in zip(activations.abs().split(size), activations.split(size), weights.split(size), strict=True):
        statistics.add(*chunk)
    return statistics


CLUSTERED = partial(SplitSettings, cluster_on="activations")
METHODS = [CLUSTERED, GraphSplitSettings]


def split_of(statistics: NeuronStatistics, num_experts: int, num_shared: int, method=CLUSTERED, **options):
    """The labels, once the clustering, if it is one, has converged."""
    labels, parts = statistics.split(method(num_experts=num_experts, num_shared_experts=num_shared, **options))
    assert parts.metrics.get("converged", True)
    return labels


def loop_over_tokens(activations, norms, keep_fraction, weights):
    """Importance and counts, a token and a neuron at a time; what is foreseen is scikit-learn's, of the right mean."""
    num_tokens, num_neurons = activations.shape
    added = activations.abs() * norms
    inputs, targets, w = activations.abs().double().numpy(), added.double().numpy(), weights.double().numpy()
    features = np.pad(inputs, ((0, 0), (0, 1)), constant_values=1)
    alpha = 0.01 * (features**2 * w[:, None]).sum(0).mean()
    ridge = Ridge(alpha=alpha, fit_intercept=False, solver="cholesky").fit(features, targets, sample_weight=w)
    centred = inputs - np.average(inputs, axis=0, weights=w)
    foreseen = centred @ ridge.coef_[:, :-1].T + np.average(targets, axis=0, weights=w)
    scores = sorted(foreseen.flatten())
    place = int((1 - keep_fraction) * (len(scores) - 1))
    least = scores[place]
    assume(least - scores[max(place - 1, 0)] > 1e-5 or place == 0)  # float32 may swap what lies nearer
    assume(scores[place + 1] - least > 1e-5)
    importance = torch.zeros(num_neurons, dtype=torch.float64)
    together = torch.zeros(num_neurons, num_neurons)
    for token in range(num_tokens):
        for i in range(num_neurons):
            importance[i] += float(weights[token]) * float(added[token, i]) ** 2
        needed = [i for i in range(num_neurons) if foreseen[token, i] >= max(least, 1e-9)]
        for i in needed:
            for j in needed:
                together[i, j] += 1
    return importance, together


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 13), st.sampled_from([0.05, 0.25, 0.5, 0.9]), st.integers(0, 2**31))
def test_statistics_are_those_of_a_loop_over_tokens_however_they_come_in_chunks(tokens, size, keep_fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(tokens, NEURONS, generator=generator)
    norms, weights = (torch.rand(count, generator=generator) + 0.1 for count in (NEURONS, tokens))
    statistics = statistics_of(activations, norms, weights, size)
    importance, together = loop_over_tokens(activations, norms, keep_fraction, weights)
    torch.testing.assert_close(statistics.importance, importance, rtol=1e-5, atol=1e-7)
    assert torch.equal(statistics.together(keep_fraction), together)


def test_what_no_linear_map_foresees_counts_for_nothing():
    """Two neurons fire by a coin that the inputs do not show, two others by one that they show."""
    generator = torch.Generator().manual_seed(0)
    shown, hidden = torch.randint(2, (2, 4000), generator=generator).float()
    inputs = torch.stack([shown, torch.rand(4000, generator=generator)], dim=1)
    noise = 0.1 * torch.rand(4000, 4, generator=generator)
    activations = torch.stack([hidden, shown, hidden, shown], dim=1) + noise
    statistics = NeuronStatistics(GatedMLP([], [], torch.ones(4, 2) / 2**0.5, None))
    statistics.add(inputs, activations, torch.ones(4000))
    together = statistics.together(0.25) / 4000
    assert together[1, 3] == pytest.approx(0.5, abs=0.03)
    assert together[0, 2] < 0.02


def test_massive_activations_do_not_own_the_statistics():
    """A massive token counts like others, and a neuron that is huge at one token in a hundred is not shared."""
    activations = torch.randn(50, NEURONS, generator=torch.Generator().manual_seed(0))
    massive = activations.clone()
    massive[7] *= 1e4
    calm, wild = statistics_of(activations).importance, statistics_of(massive).importance
    torch.testing.assert_close(wild / wild.sum(), calm / calm.sum(), rtol=0.2, atol=0)
    torch.testing.assert_close(calm.sum().item(), 50.0, rtol=0.05, atol=0)  # 1 for each token, but for the clamp
    activations = torch.rand(1000, NEURONS, generator=torch.Generator().manual_seed(0)) + 1
    activations[:, 5] = 0.01
    activations[::100, 5] = 1e4
    assert split_of(statistics_of(activations), 6, 1)[5] != 5


def planted(num_groups: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of neurons in hidden groups, one of which fires at each token; and the group of each neuron."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(num_groups).repeat_interleave(width)[torch.randperm(num_groups * width, generator=generator)]
    fires = torch.randint(num_groups, (400,), generator=generator)
    size = torch.where(groups == fires[:, None], 3.0, 0.1)
    return size * (torch.rand(400, len(groups), generator=generator) + 0.5), groups


@pytest.mark.parametrize(
    ("method", "options", "seed"),
    [(CLUSTERED, {"distance": "l2"}, 0), (CLUSTERED, {"distance": "cos"}, 1)]
    + [(GraphSplitSettings, {"num_neighbours": count}, 2) for count in (4, 128)],
)
def test_neurons_that_fire_together_land_together(method, options, seed):
    activations, groups = planted(num_groups=6, width=5, seed=seed)
    labels = split_of(statistics_of(activations), 6, 0, method, keep_fraction=1 / 6, seed=seed, **options)
    for expert in range(6):
        assert len(groups[labels == expert].unique()) == 1
    assert labels.bincount().tolist() == [5] * 6


@pytest.mark.parametrize("method", METHODS)
def test_the_hottest_neurons_are_the_shared_experts(method):
    """Hot in what they add, not in their activations; and the others are still clustered as if these were not there."""
    activations, groups = planted(num_groups=4, width=6)
    hot = torch.tensor([3, 8, 11, 17, 20, 26, 29, 30, 31, 33, 34, 35])
    cold = torch.tensor([i for i in range(36) if i not in hot.tolist()])
    both = torch.empty(400, 36)
    both[:, cold] = activations
    both[:, hot] = 0.01 * (torch.rand(400, 12, generator=torch.Generator().manual_seed(1)) + 1)
    norms = torch.ones(36)
    norms[hot] = torch.arange(2000.0, 800.0, -100.0)
    # Hot neurons take 12 of the places of each token, the group that fires the other 6.
    labels = split_of(statistics_of(both, norms), 6, 2, method, keep_fraction=0.5)
    assert labels.bincount().tolist() == [6] * 6
    assert labels[hot].tolist() == [4] * 6 + [5] * 6  # by heat, the hottest first
    for expert in range(4):
        assert len(groups[labels[cold] == expert].unique()) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_shared", [0, 1, 5])
def test_dead_neurons_and_ties_still_give_equal_experts(num_shared, method):
    ties = torch.ones(10, NEURONS)
    dead = torch.zeros(10, NEURONS)
    half_dead = torch.cat([torch.zeros(10, 12), torch.randn(10, 12)], dim=1)
    for activations in (ties, dead, half_dead):
        labels = split_of(statistics_of(activations), 6, num_shared, method)
        assert labels.bincount(minlength=6).tolist() == [4] * 6
    assert (statistics_of(dead).together(0.25) == 0).all()  # what adds nothing is needed by none
    # Equal importance goes by place.
    assert (split_of(statistics_of(ties), 6, num_shared, method)[: 4 * num_shared] >= 6 - num_shared).all()


@pytest.fixture(scope="module")
def corpus(checkpoint, text_folder) -> Corpus:
    corpus = corpus_of(checkpoint, text_folder, None, block_size=16, max_tokens=500)
    assert len({len(block) for block in corpus.blocks}) > 1  # shorter blocks sit among the others
    return corpus


def split(checkpoint, text, folder, template=GATE, method=CLUSTERED, **options) -> Path:
    settings = method(**({"num_experts": 8, "num_shared_experts": 2} | options))
    writer = split_by_activations(checkpoint, text, folder, template, settings)
    assert writer.finished
    return writer.folder


@pytest.fixture(scope="module")
def finished(checkpoint, corpus, tmp_path_factory) -> Path:
    return split(checkpoint, corpus, tmp_path_factory.mktemp("finished"))


@pytest.mark.parametrize(
    ("fields", "source", "num_shared", "batch_size"),
    [
        ({}, "corpus", 2, 1),
        ({"mlp_bias": True}, "corpus", 2, 5),
        ({"rope_parameters": LLAMA3_ROPE}, "corpus", 4, 5),
        ({}, "full", 2, 1),
        ({}, "inputs", 0, 1),
    ],
)
def test_shared_experts_are_the_neurons_that_add_most(fields, source, num_shared, batch_size, corpus, tmp_path):
    """To what the dense model itself computes on the corpus, or as stage 2 recorded it; the others share the rest."""
    checkpoint = DenseCheckpoint(str(make_llama(tmp_path / "llama", **fields)))
    text = corpus
    if source != "corpus":
        extract_features(checkpoint, corpus, tmp_path, FeatureSettings(feature_format=source, dtype="float32"))
        text = Features(tmp_path / "llama-Hidden-Features", checkpoint, GATE)
    folder = split(checkpoint, text, tmp_path / "out", num_shared_experts=num_shared, batch_size=batch_size)
    opened, model = Split(folder, checkpoint, GATE, 8), load(checkpoint.path)
    assert opened.num_shared_experts == num_shared
    for index, layer in enumerate(model.model.layers):
        hidden, stream = (
            inputs_to(module, model, corpus.blocks) for module in (layer.mlp.down_proj, layer.post_attention_layernorm)
        )
        added = (hidden * layer.mlp.down_proj.weight.detach().norm(dim=0)).square()
        magnitudes = stream.square() if source == "corpus" else added
        rank = (added * token_weights(magnitudes.sum(1))[:, None]).sum(0).argsort(descending=True).argsort()
        shared = opened.shared_neurons(index)
        assert len(shared) == num_shared * 8
        assert (rank[shared] < num_shared * 8 + 1).all()  # float32 sums may swap the two at the edge
        together = torch.cat([opened.routed_neurons(index).flatten(), shared])
        assert sorted(together.tolist()) == list(range(64))


def test_templates_name_the_files_and_another_seed_gives_other_labels(finished, checkpoint, corpus, tmp_path):
    assert {path.name for path in finished.rglob("*")} == {GATE.format(i) for i in range(3)} | {"manifest.json"}
    folder = split(checkpoint, corpus, tmp_path / "up", template=UP)
    for layer in range(3):
        assert (folder / UP.format(layer)).read_bytes() == (finished / GATE.format(layer)).read_bytes()
    other = contents(split(checkpoint, corpus, tmp_path / "other", seed=1))
    assert any(other[GATE.format(i)] != contents(finished)[GATE.format(i)] for i in range(3))


def test_the_same_seed_gives_the_same_graph_split(checkpoint, corpus, tmp_path):
    first, again, other = (
        contents(split(checkpoint, corpus, tmp_path / name, method=GraphSplitSettings, seed=seed))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    labels = [GATE.format(layer) for layer in range(3)]
    assert [first[name] for name in labels] == [again[name] for name in labels]
    assert any(first[name] != other[name] for name in labels)


def test_a_resumed_run_makes_again_only_what_is_lost(finished, checkpoint, corpus, tmp_path):
    """Killed when the labels of a layer and the streams before the next one are there."""
    with renames(fatal=GATE.format(1)), pytest.raises(Killed):
        split(checkpoint, corpus, tmp_path / "killed")
    (labels,) = (tmp_path / "killed").rglob(GATE.format(0))
    files = [file for file in (tmp_path / "killed").rglob("*") if file.suffix != ".json" and file.is_file()]
    for number, file in enumerate(file for file in files if file.stat().st_size):
        root = Path(shutil.copytree(tmp_path / "killed", tmp_path / str(number)))
        lost = root / file.relative_to(tmp_path / "killed")
        if number % 2:
            lost.unlink()
        else:
            lost.write_bytes(lost.read_bytes()[:-1])
        assert contents(split(checkpoint, corpus, root)) == contents(finished), lost
    time = labels.stat().st_mtime_ns
    folder = split(checkpoint, corpus, tmp_path / "killed")
    assert contents(folder) == contents(finished)
    assert (folder / GATE.format(0)).stat().st_mtime_ns == time
