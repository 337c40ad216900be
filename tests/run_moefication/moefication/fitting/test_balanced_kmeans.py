"""The balanced assignment is the true optimum; the clustering is a fixed point of equal parts."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import kmeans_plusplus

from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.fitting.balanced_kmeans import balanced_assignment, balanced_kmeans, seed_rows

RELATIVE = 1e-11  # costs are sums of some thousand float64 numbers


def optimum(costs: np.ndarray) -> float:
    """The cheapest balanced assignment by scipy: every cluster's column repeated once per place."""
    rows, columns = linear_sum_assignment(np.repeat(costs, costs.shape[0] // costs.shape[1], axis=1))
    return costs[rows, columns // (costs.shape[0] // costs.shape[1])].sum()


def assert_optimal(costs: np.ndarray) -> None:
    before = costs.copy()
    assignment = balanced_assignment(costs)
    rows, clusters = costs.shape
    scale = max(1e-300, np.abs(costs).sum())
    assert np.bincount(assignment.labels, minlength=clusters).tolist() == [rows // clusters] * clusters
    assert assignment.cost == pytest.approx(costs[np.arange(rows), assignment.labels].sum())
    assert abs(assignment.cost - optimum(costs)) <= RELATIVE * scale
    assert abs(assignment.cost - assignment.lower_bound) <= RELATIVE * scale
    # The bound is what the prices prove: the dual value, computed here from them alone.
    dual = (costs + assignment.prices).min(axis=1).sum() - rows // clusters * assignment.prices.sum()
    assert abs(assignment.lower_bound - dual) <= RELATIVE * scale
    assert np.array_equal(costs, before)


@pytest.mark.parametrize(
    ("rows", "clusters", "scale"),
    [
        *((rows, clusters, 1.0) for rows, clusters in [(1, 1), (7, 1), (7, 7), (300, 2), (512, 64)]),
        *((240, 60, scale) for scale in (1e-150, 1.0, 1e150)),
    ],
)
def test_assignment_is_the_optimum(rows, clusters, scale):
    assert_optimal(np.random.default_rng(rows).random((rows, clusters)) * scale)


def hard_costs() -> dict[str, np.ndarray]:
    """Costs on which smoothed prices alone go wrong."""
    generator = np.random.default_rng(7)
    costs = generator.random((120, 6))
    return {
        "all rows want one cluster": costs - 10 * (np.arange(6) == 2),
        "rows of very different scale": costs * 10.0 ** generator.integers(-6, 6, (120, 1)),
        "a large constant": costs + 1e6,
        "groups of copies": np.repeat(costs[:6], 20, axis=0),
        "one cluster unaffordable": np.where(np.arange(6) == 0, 1e9, costs),
        "nothing": np.zeros((60, 6)),
        "all alike": np.ones((1200, 12)),
        "equal rows": np.tile(np.arange(4.0), (400, 1)),
    }


@pytest.mark.parametrize("kind", hard_costs())
def test_assignment_is_the_optimum_of_hard_costs(kind):
    assert_optimal(hard_costs()[kind])


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 7), st.integers(1, 8), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_assignment_is_the_optimum_with_ties(clusters, capacity, decimals, seed):
    costs = np.random.default_rng(seed).random((clusters * capacity, clusters)) * 3 - 1
    assert_optimal(costs.round(decimals))


def test_start_prices_and_the_order_of_rows_change_nothing():
    generator = np.random.default_rng(1)
    costs, order = generator.random((200, 10)), generator.permutation(200)
    plain = balanced_assignment(costs)
    for prices in (plain.prices, generator.normal(size=10), np.full(10, 1e6)):
        assert np.array_equal(balanced_assignment(costs, prices).labels, plain.labels)
    assert np.array_equal(balanced_assignment(costs[order]).labels, plain.labels[order])


def test_only_prices_that_misplace_many_rows_are_estimated(monkeypatch):
    costs = np.random.default_rng(2).random((200, 10))
    plain = balanced_assignment(costs)
    monkeypatch.delattr("run_moefication.moefication.fitting.balanced_kmeans._estimate_prices")
    assert np.array_equal(balanced_assignment(costs, plain.prices + 1).labels, plain.labels)
    with pytest.raises(NameError, match="_estimate_prices"):
        balanced_assignment(costs, plain.prices[::-1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_costs_must_be_finite(value):
    with pytest.raises(MoEficationError, match="NaN or infinite"):
        balanced_assignment(np.array([[0.0, 1.0], [1.0, value]]))


def test_wrong_arguments_are_refused():
    with pytest.raises(MoEficationError, match="7 rows cannot be cut into 2 equal clusters"):
        balanced_assignment(np.zeros((7, 2)))
    for clusters in (0, 3):
        with pytest.raises(MoEficationError, match=f"8 rows cannot be cut into {clusters} equal clusters"):
            balanced_kmeans(torch.zeros(8, 3), clusters)
    with pytest.raises(MoEficationError, match="distance 'l1' is not one of l2, cos"):
        balanced_kmeans(torch.zeros(8, 3), 2, distance="l1")


def blobs(clusters: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Well separated groups of rows, shuffled, and the group of each."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(clusters).repeat_interleave(size)[torch.randperm(clusters * size, generator=generator)]
    centres = torch.nn.functional.normalize(torch.randn(clusters, 32, generator=generator))
    return centres[groups] + 0.02 * torch.randn(clusters * size, 32, generator=generator), groups


def assert_same_groups(labels: torch.Tensor, groups: torch.Tensor) -> None:
    assert torch.equal(labels[:, None] == labels[None], groups[:, None] == groups[None])


@pytest.mark.parametrize(("distance", "clusters", "size"), [("l2", 2, 30), ("cos", 5, 8), ("l2", 16, 4)])
def test_separated_groups_are_found(distance, clusters, size):
    rows, groups = blobs(clusters, size)
    assert_same_groups(balanced_kmeans(rows, clusters, distance=distance, seed=0).labels, groups)


@pytest.mark.parametrize(("clusters", "size", "seed"), [(2, 16, 0), (16, 4, 1), (40, 3, 2)])
def test_first_centres_are_scikit_learns(clusters, size, seed):
    rows, groups = blobs(clusters, size, seed)
    _, expected = kmeans_plusplus(rows.numpy(), clusters, random_state=seed)
    chosen = seed_rows(rows, rows.square().sum(1, dtype=torch.float64), clusters, seed)
    assert chosen == expected.tolist()
    assert len(groups[chosen].unique()) == clusters


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.integers(17, 60), st.integers(0, 2**32 - 1))
def test_first_centres_of_many_rows_come_from_every_group(clusters, size, seed):
    rows, groups = blobs(clusters, size, seed % 1000)
    chosen = seed_rows(rows, rows.square().sum(1, dtype=torch.float64), clusters, seed)
    assert len(groups[chosen].unique()) == clusters


def test_cos_sees_directions_and_l2_lengths():
    # Short rows along two axes, near one another; long ones bent towards the diagonal, near one another too.
    short, long = torch.tensor([[0.1, 0.0], [0.0, 0.1]]), torch.tensor([[5.0, 3.0], [3.0, 5.0]])
    rows = torch.cat([short, long, short * 2, long * 1.1])
    for distance, groups in (("cos", [0, 1, 0, 1, 0, 1, 0, 1]), ("l2", [0, 0, 1, 1, 0, 0, 1, 1])):
        assert_same_groups(balanced_kmeans(rows, 2, distance=distance).labels, torch.tensor(groups))


def centre_costs(rows: torch.Tensor, labels: torch.Tensor, distance: str) -> torch.Tensor:
    """The distance of every row to every cluster's centre, in float64: `[rows, clusters]`."""
    rows = torch.nn.functional.normalize(rows.double()) if distance == "cos" else rows.double()
    centres = torch.stack([rows[labels == cluster].mean(0) for cluster in range(labels.max() + 1)])
    if distance == "cos":
        return 1 - torch.nn.functional.cosine_similarity(rows[:, None], centres[None], dim=-1)
    return (rows[:, None] - centres[None]).square().sum(-1)


@pytest.mark.parametrize(("distance", "seed"), [("l2", 0), ("cos", 1)])
def test_cost_is_true_and_falls_until_nothing_moves(distance, seed, monkeypatch):
    rows = torch.randn(160, 12, generator=torch.Generator().manual_seed(seed))
    rows *= torch.logspace(-1, 1, 160)[:, None]  # of all lengths
    final = balanced_kmeans(rows, 8, distance=distance, seed=seed)
    assert final.converged
    assert final.labels.bincount().tolist() == [20] * 8
    own = centre_costs(rows, final.labels, distance).gather(1, final.labels[:, None]).sum().item()
    assert final.cost == pytest.approx(own, rel=1e-5)
    costs = []
    for iterations in range(1, final.iterations + 1):
        monkeypatch.setattr("run_moefication.moefication.fitting.balanced_kmeans.MAX_ITERATIONS", iterations)
        costs.append(balanced_kmeans(rows, 8, distance=distance, seed=seed).cost)
    assert costs[-1] == final.cost
    # float32 distances: a step may seem to climb by their rounding.
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(costs))
    assert costs[-1] < costs[0]


@pytest.mark.parametrize("distance", ["l2", "cos"])
def test_result_is_a_fixed_point(distance):
    rows = torch.nn.functional.normalize(torch.randn(96, 6, generator=torch.Generator().manual_seed(4))).double()
    labels = balanced_kmeans(rows, 6, distance=distance).labels
    costs = centre_costs(rows, labels, distance)
    own = costs.gather(1, labels[:, None]).sum().item()
    # For these centres, scipy finds no cheaper balanced assignment. The clustering works in float32.
    assert own == pytest.approx(optimum(costs.numpy()), rel=1e-5)


def test_iterations_that_did_not_end_are_said(monkeypatch):
    monkeypatch.setattr("run_moefication.moefication.fitting.balanced_kmeans.MAX_ITERATIONS", 1)
    clustering = balanced_kmeans(torch.randn(96, 6, generator=torch.Generator().manual_seed(4)), 6)
    assert (clustering.iterations, clustering.converged) == (1, False)
    assert clustering.labels.bincount().tolist() == [16] * 6


def test_same_seed_same_labels_other_seed_others():
    rows = torch.randn(96, 8, generator=torch.Generator().manual_seed(3))
    first, again, other = (balanced_kmeans(rows, 8, seed=seed).labels for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_and_two_threads_agree():
    rows, _ = blobs(8, 40)
    threads, labels = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            labels.append(balanced_kmeans(rows, 8).labels)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*labels)
