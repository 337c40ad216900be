"""The balanced assignment is the true optimum; the clustering is a fixed point of equal parts."""

from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from run_moefication.moefication.balanced_kmeans import balanced_assignment, balanced_kmeans
from run_moefication.moefication.errors import MoEficationError

# Of the cost: sums of some thousand float64 numbers.
RELATIVE = 1e-11


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
    assert np.array_equal(costs, before)


@pytest.mark.parametrize(
    ("rows", "clusters"), [(1, 1), (7, 1), (7, 7), (6, 3), (64, 8), (300, 2), (240, 60), (512, 64)]
)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_assignment_is_the_optimum(rows, clusters, scale):
    assert_optimal(np.random.default_rng(rows).random((rows, clusters)) * scale)


def test_assignment_is_the_best_of_all_six_row_assignments():
    costs = np.random.default_rng(0).random((6, 3))
    best = min(sum(costs[row, place // 2] for row, place in enumerate(order)) for order in permutations(range(6)))
    assert balanced_assignment(costs).cost == pytest.approx(best)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 7), st.integers(1, 8), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_assignment_is_the_optimum_with_ties(clusters, capacity, decimals, seed):
    costs = np.random.default_rng(seed).random((clusters * capacity, clusters)) * 3 - 1
    assert_optimal(costs.round(decimals))


@pytest.mark.parametrize("costs", [np.zeros((60, 6)), np.ones((1200, 12)), np.tile(np.arange(4.0), (400, 1))])
def test_equal_rows_still_give_equal_parts(costs):
    assert_optimal(costs)


def test_start_prices_change_nothing_but_time():
    generator = np.random.default_rng(1)
    costs = generator.random((200, 10))
    plain = balanced_assignment(costs)
    for prices in (plain.prices, generator.normal(size=10), np.full(10, 1e6)):
        assert np.array_equal(balanced_assignment(costs, prices).labels, plain.labels)


def test_permuted_rows_give_permuted_labels():
    generator = np.random.default_rng(2)
    costs, order = generator.random((120, 6)), generator.permutation(120)
    assert np.array_equal(balanced_assignment(costs[order]).labels, balanced_assignment(costs).labels[order])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_costs_must_be_finite(value):
    with pytest.raises(MoEficationError, match="NaN or infinite"):
        balanced_assignment(np.full((4, 2), value))


def test_sizes_must_divide():
    with pytest.raises(MoEficationError, match="7 rows cannot be cut into 2 equal clusters"):
        balanced_assignment(np.zeros((7, 2)))
    with pytest.raises(MoEficationError, match="7 rows cannot be cut into 2 equal clusters"):
        balanced_kmeans(torch.zeros(7, 3), 2)
    with pytest.raises(MoEficationError, match="--distance 'l1' is not one of l2, cos"):
        balanced_kmeans(torch.zeros(8, 3), 2, distance="l1")


# ---------------------------------------------------------------------------------------------------- clustering


def blobs(clusters: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Well separated groups of rows, shuffled, and the group of each."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(clusters).repeat_interleave(size)[torch.randperm(clusters * size, generator=generator)]
    centres = torch.nn.functional.normalize(torch.randn(clusters, 32, generator=generator))
    return centres[groups] + 0.02 * torch.randn(clusters * size, 32, generator=generator), groups


@pytest.mark.parametrize("distance", ["l2", "cos"])
@pytest.mark.parametrize(("clusters", "size"), [(2, 30), (5, 8), (16, 4)])
def test_separated_groups_are_found(distance, clusters, size):
    rows, groups = blobs(clusters, size)
    labels = balanced_kmeans(rows, clusters, distance=distance, seed=0).labels
    together = labels[:, None] == labels[None]
    assert torch.equal(together, groups[:, None] == groups[None])


def naive_cost(rows: torch.Tensor, labels: torch.Tensor, clusters: int, distance: str) -> float:
    """The sum of distances of every row to its own cluster's centre, in float64."""
    rows, total = rows.double(), 0.0
    for cluster in range(clusters):
        members = rows[labels == cluster]
        centre = members.mean(0)
        if distance == "cos":
            total += (1 - torch.nn.functional.cosine_similarity(members, centre[None])).sum().item()
        else:
            total += (members - centre).square().sum().item()
    return total


@pytest.mark.parametrize("distance", ["l2", "cos"])
@pytest.mark.parametrize("seed", [0, 1])
def test_cost_is_true_and_falls_until_nothing_moves(distance, seed, monkeypatch):
    rows = torch.nn.functional.normalize(torch.randn(160, 12, generator=torch.Generator().manual_seed(seed)))
    final = balanced_kmeans(rows, 8, distance=distance, seed=seed)
    assert final.converged
    assert final.labels.bincount().tolist() == [20] * 8
    assert final.cost == pytest.approx(naive_cost(rows, final.labels, 8, distance), rel=1e-5)
    costs = []
    for iterations in range(1, final.iterations + 1):
        monkeypatch.setattr("run_moefication.moefication.balanced_kmeans.MAX_ITERATIONS", iterations)
        costs.append(balanced_kmeans(rows, 8, distance=distance, seed=seed).cost)
    assert costs[-1] == final.cost
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(costs))
    assert costs[-1] < costs[0]


def test_same_seed_same_labels_other_seed_others():
    rows = torch.randn(96, 8, generator=torch.Generator().manual_seed(3))
    first, again, other = (balanced_kmeans(rows, 8, seed=seed).labels for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_and_two_threads_agree():
    rows, _ = blobs(8, 40)
    threads = torch.get_num_threads()
    try:
        labels = []
        for count in (1, 2):
            torch.set_num_threads(count)
            labels.append(balanced_kmeans(rows, 8).labels)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*labels)
