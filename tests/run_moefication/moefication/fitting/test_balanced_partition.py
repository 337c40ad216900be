"""Planted groups are found; the repair gives exactly equal parts, move by move at the least loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.fitting.balanced_partition import balanced_partition, equalized


def planted(num_groups: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A graph whose edges weigh 0.5 to 1 in hidden groups, and up to 0.4 between them; and the group of each node."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(num_groups).repeat_interleave(size)[torch.randperm(num_groups * size, generator=generator)]
    noise = torch.rand(len(groups), len(groups), generator=generator, dtype=torch.float64).triu(1)
    weights = torch.where(groups[:, None] == groups, 0.5 + 0.5 * noise, 0.4 * noise).triu(1)
    return weights + weights.T, groups


@pytest.mark.parametrize(("num_groups", "size", "neighbours"), [(2, 30, 59), (5, 8, 12), (16, 4, 3), (12, 24, 40)])
def test_planted_groups_are_found(num_groups, size, neighbours):
    weights, groups = planted(num_groups, size, seed=num_groups)
    before = weights.clone()
    parts = balanced_partition(weights, num_groups, neighbours)
    together = groups[:, None] == groups
    assert torch.equal(parts.labels[:, None] == parts.labels, together)
    assert parts.inside == pytest.approx((weights[together].sum() / weights.sum()).item())
    assert torch.equal(weights, before)


def test_same_seed_same_labels_other_seed_others():
    weights = torch.rand(96, 96, generator=torch.Generator().manual_seed(3)).triu(1)
    weights += weights.T.clone()
    first, again, other = (balanced_partition(weights, 8, 20, seed).labels for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 60), st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 99))
def test_any_graph_is_cut_into_equal_parts(num_parts, size, neighbours, density, seed):
    """Without edges, with few or all of them; parts of one node too."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(num_parts * size, num_parts * size, generator=generator)
    weights = (weights * (weights < density)).triu(1)
    parts = balanced_partition(weights + weights.T, num_parts, neighbours, 2**32 - 1 - seed)
    assert parts.labels.bincount(minlength=num_parts).tolist() == [size] * num_parts
    assert 0 <= parts.inside <= 1


def repaired_by_loops(labels: list[int], weights: list[list[int]], num_parts: int) -> list[int]:
    """A move at a time, each the first of those that lose least, found by trying all."""
    labels, capacity, nodes = [*labels], len(labels) // num_parts, range(len(labels))

    def lost(move: tuple[int, int]) -> int:
        node, part = move
        old, new = (sum(weights[node][i] for i in nodes if labels[i] == one) for one in (labels[node], part))
        return old - new

    while any(labels.count(part) > capacity for part in range(num_parts)):
        small = [part for part in range(num_parts) if labels.count(part) < capacity]
        node, part = min(((i, j) for i in nodes if labels.count(labels[i]) > capacity for j in small), key=lost)
        labels[node] = part
    return labels


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 4))
def test_the_repair_makes_the_moves_that_lose_least(data, num_parts, size):
    count = num_parts * size
    labels = data.draw(st.lists(st.integers(0, num_parts - 1), min_size=count, max_size=count))
    entries = data.draw(st.lists(st.integers(0, 9), min_size=count**2, max_size=count**2))
    weights = torch.tensor(entries).view(count, count).triu(1)
    weights = weights + weights.T
    found = equalized(torch.tensor(labels), weights.double(), num_parts)
    assert found.bincount(minlength=num_parts).tolist() == [size] * num_parts
    assert found.tolist() == repaired_by_loops(labels, weights.tolist(), num_parts)


@pytest.mark.parametrize("num_parts", [0, 3])
def test_unequal_parts_are_refused(num_parts):
    with pytest.raises(MoEficationError, match=f"8 nodes cannot be cut into {num_parts} equal parts"):
        balanced_partition(torch.zeros(8, 8), num_parts, 4)
