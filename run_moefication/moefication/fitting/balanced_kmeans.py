"""Balanced k-means: clusters of exactly equal size.

Lloyd's iteration whose assignment step is solved exactly: of all assignments that give every cluster the same number of
rows, the cheapest. That step is a transportation problem with few sinks, solved by successive shortest augmenting paths
(Ahuja, Magnanti and Orlin, Network Flows, 1993, section 9.7) over the small graph of clusters.

Axes: N rows (neurons), E clusters (experts), D columns.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ...settings import DISTANCES
from ..errors import MoEficationError, SettingError

MAX_ITERATIONS = 300
# Passes that bring the prices near their optimum before the exact repair. Any number gives the same assignment cost;
# these keep the repair to about one per cent of the rows.
PRICE_PASSES = 30
# First centres are chosen among so many rows a cluster, drawn at random: a group of a cluster's size is next to never
# without one, and to read all rows for every centre takes as long as some iterations.
SEED_ROWS = 16
# Prices to start from are estimated anew if they leave more than this share of the rows to repair, as those do that are
# of the first centres, single rows. Else the estimate takes longer than the repair that it saves.
MOST_SURPLUS = 0.02


@dataclass(frozen=True)
class Assignment:
    """Labels `[N]`, and prices `[E]` that prove them: no balanced assignment costs less than `lower_bound`."""

    labels: np.ndarray
    prices: np.ndarray
    cost: float
    lower_bound: float


@dataclass(frozen=True)
class Clustering:
    """Labels `int64 [N]`, the sum of distances of rows to their centres, Lloyd iterations, and whether they ended."""

    labels: torch.Tensor
    cost: float
    lower_bound: float
    iterations: int
    converged: bool

    @property
    def metrics(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "cost": self.cost,
            "lower_bound_of_last_assignment": self.lower_bound,
            "iterations": self.iterations,
            "converged": self.converged,
        }


def balanced_kmeans(rows: torch.Tensor, num_clusters: int, distance: str = "l2", seed: int = 0) -> Clustering:
    """Cluster rows into equal parts, seeded by k-means++ (Arthur and Vassilvitskii, 2007).

    `rows`: float `[N, D]`, which the caller may have normalised. `distance`: "l2", squared Euclidean to the mean, or
    "cos", one minus the cosine to the normalised mean.
    """
    if distance not in DISTANCES:
        raise SettingError(f"distance {distance!r} is not one of {', '.join(DISTANCES)}")
    if num_clusters < 1 or len(rows) % num_clusters:
        raise MoEficationError(f"{len(rows)} rows cannot be cut into {num_clusters} equal clusters")
    rows = rows.float()
    if distance == "cos":
        rows = F.normalize(rows)
    row_squares = _square_lengths(rows)
    centres = rows[seed_rows(rows, row_squares, num_clusters, seed)]
    scale = 0.5 if distance == "cos" else 1.0  # between unit vectors, |x - c|^2 = 2 (1 - cos)
    labels, assignment, iterations = np.full(len(rows), -1), None, 0
    sums = rows.new_zeros(num_clusters, rows.shape[1], dtype=torch.float64)
    while iterations < MAX_ITERATIONS:
        iterations += 1
        prices = None if assignment is None else assignment.prices
        if distance == "cos":
            centres = F.normalize(centres)
        assignment = balanced_assignment(_squared_distances(rows, row_squares, centres) * scale, prices)
        moved = np.flatnonzero(assignment.labels != labels)
        if not len(moved):
            break
        sums += _change(rows, moved, labels[moved], assignment.labels[moved], num_clusters)
        labels, centres = assignment.labels, (sums * (num_clusters / len(rows))).float()
    return Clustering(
        labels=torch.from_numpy(labels),
        cost=assignment.cost,
        lower_bound=assignment.lower_bound,
        iterations=iterations,
        converged=not len(moved),
    )


def seed_rows(rows: torch.Tensor, row_squares: torch.Tensor, num_clusters: int, seed: int) -> list[int]:
    """Rows that are the first centres, by k-means++ (Arthur and Vassilvitskii, 2007) on a sample of the rows.

    On it, the draws are those of scikit-learn's `kmeans_plusplus`, which takes five times as long on 1,344 rows of as
    many columns, since it converts them to float64 at every step.
    """
    generator, num_trials = np.random.RandomState(seed), 2 + int(np.log(num_clusters))
    sample = np.arange(len(rows))
    if len(rows) > SEED_ROWS * num_clusters:
        sample = generator.permutation(sample)[: SEED_ROWS * num_clusters]
        rows, row_squares = rows[sample], row_squares[sample]
    chosen = [int(generator.uniform() * len(rows))]
    nearest = _squared_distances(rows, row_squares, rows[chosen])[:, 0]
    while len(chosen) < num_clusters:
        draws = generator.uniform(size=num_trials) * nearest.sum()
        candidates = np.searchsorted(nearest.cumsum(), draws).clip(max=len(rows) - 1)
        distances = np.minimum(nearest[:, None], _squared_distances(rows, row_squares, rows[candidates]))
        best = distances.sum(axis=0).argmin()
        chosen.append(int(candidates[best]))
        nearest = distances[:, best]
    return sample[chosen].tolist()


def _square_lengths(rows: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean lengths, float64 `[N]`; a sum of squares would write them all down first."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()


def _squared_distances(rows: torch.Tensor, row_squares: torch.Tensor, centres: torch.Tensor) -> np.ndarray:
    """Squared Euclidean distances, float64 `[N, E]`."""
    products = (rows @ centres.T).double()
    distances = products.mul_(-2).add_(row_squares[:, None]).add_(_square_lengths(centres))
    return distances.clamp_(min=0).cpu().numpy()


def _change(
    rows: torch.Tensor, moved: np.ndarray, before: np.ndarray, after: np.ndarray, num_clusters: int
) -> torch.Tensor:
    """What moving rows from clusters `before` (-1: from none) to `after` adds to the sums of clusters, `[E, D]`."""
    clusters = np.concatenate([before, after]) + 1
    order = clusters.argsort(kind="stable")
    starts = np.searchsorted(clusters[order], np.arange(num_clusters + 1))
    moved, signs = np.tile(moved, 2)[order], np.where(order < len(moved), -1, 1)
    moved, starts, signs = (torch.from_numpy(part).to(rows.device) for part in (moved, starts, signs))
    # Sums of sets of rows, which are not copied.
    return F.embedding_bag(moved, rows, starts, mode="sum", per_sample_weights=signs.to(rows.dtype))[1:]


def balanced_assignment(costs: np.ndarray, prices: np.ndarray | None = None) -> Assignment:
    """The cheapest assignment of N rows to E clusters with exactly N/E rows in each, at costs float64 `[N, E]`.

    Exact up to float64 rounding, and proved by its own prices: `lower_bound` is the value of the dual problem, which no
    balanced assignment undercuts. Ties go by row and cluster order. `prices [E]` to start from change time, not cost.
    """
    num_rows, num_clusters = costs.shape
    if num_rows % num_clusters:
        raise MoEficationError(f"{num_rows} rows cannot be cut into {num_clusters} equal clusters")
    if not np.isfinite(costs).all():
        raise MoEficationError("assignment costs hold NaN or infinite values")
    capacity = num_rows // num_clusters
    prices = np.zeros(num_clusters) if prices is None else prices
    labels = (costs + prices).argmin(axis=1)
    surplus = np.maximum(np.bincount(labels, minlength=num_clusters) - capacity, 0).sum()
    if surplus > MOST_SURPLUS * num_rows:
        prices = _estimate_prices(costs, capacity)
        labels = (costs + prices).argmin(axis=1)
    prices = _repair(costs, labels, prices, capacity)
    cost = costs[np.arange(num_rows), labels].sum()
    lower_bound = (costs + prices).min(axis=1).sum() - capacity * prices.sum()
    return Assignment(labels, prices, float(cost), float(lower_bound))


def _estimate_prices(costs: np.ndarray, capacity: int) -> np.ndarray:
    """Prices `[E]` at which each cluster attracts about `capacity` rows.

    Sinkhorn scaling of the smoothed problem, the smoothing cooled from the spread of the costs downwards.
    """
    costs = costs - costs.min(axis=1, keepdims=True)
    prices, spread = torch.zeros(costs.shape[1], 1), costs.mean()
    if spread > 0:
        # float32 is exact enough to start from. Short rows would be slow: clusters lie along the first axis.
        costs = torch.from_numpy((costs / spread).astype(np.float32).T.copy())
        for temperature in np.geomspace(1, 1e-3, PRICE_PASSES).tolist():
            share = torch.softmax((costs + prices) / -temperature, dim=0).sum(dim=1, keepdim=True)
            prices += temperature * (share.clamp(min=1e-9) / capacity).log()
    return prices[:, 0].double().numpy() * spread


def _repair(costs: np.ndarray, labels: np.ndarray, prices: np.ndarray, capacity: int) -> np.ndarray:
    """Move rows along cheapest paths of clusters, from overfull to underfull ones, until all are equal.

    Every row starts in its cheapest cluster at the given prices, so the start is optimal for its own cluster sizes, and
    a shortest augmenting path keeps it so. `labels` is changed in place; returns the final prices.
    """
    num_clusters = costs.shape[1]
    counts = np.bincount(labels, minlength=num_clusters)
    # Cheapest way to move one row from cluster a to b: its extra cost (never negative) and that row, both [a, b].
    extra = np.full((num_clusters, num_clusters), np.inf)
    mover = np.zeros((num_clusters, num_clusters), dtype=np.int64)

    def refresh(cluster: int) -> None:
        """Row `cluster` of `extra` and `mover`, after its members changed."""
        members = np.flatnonzero(labels == cluster)
        extra[cluster] = np.inf
        if len(members):
            reduced = costs[members] + prices
            reduced -= reduced[:, [cluster]]
            best = reduced.argmin(axis=0)
            mover[cluster], extra[cluster] = members[best], reduced[best, np.arange(num_clusters)]
            extra[cluster, cluster] = np.inf

    for cluster in range(num_clusters):
        refresh(cluster)
    tolerance = 1e-13 * np.abs(costs).max()
    while (counts > capacity).any():
        distance, parent = _shortest_paths(extra, counts > capacity, tolerance)
        target = np.where(counts < capacity, distance, np.inf).argmin()
        # Raising prices by the distances keeps every extra cost non-negative and makes the path free.
        shift = np.minimum(distance, distance[target])
        prices = prices - shift
        extra += shift[:, None] - shift[None, :]
        path = [target]
        while parent[path[-1]] >= 0:
            path.append(parent[path[-1]])
        source = path[-1]
        if len(path) == 2:
            # Rows that cost the same to move (equal ones, zero ones) go together, as many as both ends allow.
            members = np.flatnonzero(labels == source)
            cost = costs[members, target] - costs[members, source]
            movers = members[cost <= cost.min() + tolerance]
            movers = movers[: min(counts[source] - capacity, capacity - counts[target])]
            labels[movers] = target
        else:
            movers = [mover[source, path[-2]]]
            for to, frm in pairwise(path):
                labels[mover[frm, to]] = to
        counts[source] -= len(movers)
        counts[target] += len(movers)
        for cluster in path:
            refresh(cluster)
    return prices


def _shortest_paths(extra: np.ndarray, sources: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Distance `[E]` from the nearest source and the cluster before each on that path (-1: a source). Bellman-Ford."""
    distance = np.where(sources, 0.0, np.inf)
    parent, changed = np.full(len(distance), -1), np.flatnonzero(sources)
    while True:
        candidates = distance[changed, None] + extra[changed]
        better = np.flatnonzero(candidates.min(axis=0) < distance - tolerance)
        if not len(better):
            return distance, parent
        best = candidates[:, better].argmin(axis=0)
        distance[better], parent[better] = candidates[best, better], changed[best]
        changed = better
