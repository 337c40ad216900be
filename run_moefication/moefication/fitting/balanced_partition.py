"""A balanced partition of a graph: parts of exactly equal size that keep much of the edges' weight inside.

METIS (Karypis and Kumar, 1998, "A fast and high quality multilevel scheme for partitioning irregular graphs") bisects
the graph again and again, which leaves parts of nearly equal size. A repair makes them equal.

Axes: N nodes (neurons), E parts (experts).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import MoEficationError

LARGEST_WEIGHT = 1000  # of an edge, for METIS, which counts in whole numbers


@dataclass(frozen=True)
class Partition:
    """Labels `int64 [N]`, the share of the weight of all edges that lies inside parts, and the nodes repaired."""

    labels: torch.Tensor
    inside: float
    repaired: int

    @property
    def metrics(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"weight_inside": self.inside, "repaired": self.repaired}


def balanced_partition(weights: torch.Tensor, num_parts: int, num_neighbours: int, seed: int = 0) -> Partition:
    """Cut nodes into equal parts, so that the edges between parts weigh little. Needs the package pymetis.

    `weights`: float `[N, N]`, symmetric, none negative, and zeros on the diagonal. METIS sees the edges that are among
    the `num_neighbours` heaviest of either end; the repair sees all.
    """
    if num_parts < 1 or len(weights) % num_parts:
        raise MoEficationError(f"{len(weights)} nodes cannot be cut into {num_parts} equal parts")
    weights = weights.cpu()
    nearly = _metis(weights, num_parts, num_neighbours, seed)
    labels = equalized(nearly, weights, num_parts)
    own = _weight_to_parts(weights, labels, num_parts).gather(1, labels[:, None])
    inside, total = (sums.sum(dtype=torch.float64).item() for sums in (own, weights))
    share = min(1.0, inside / total) if total else 0.0  # the sums that `own` holds are rounded
    return Partition(labels, share, int((labels != nearly).sum()))


def _metis(weights: torch.Tensor, num_parts: int, num_neighbours: int, seed: int) -> torch.Tensor:
    """Parts of nearly equal size, `int64 [N]`."""
    import pymetis  # of the extra `graph`

    heaviest = weights.topk(min(num_neighbours, len(weights) - 1)).indices  # [N, neighbours]
    edges = torch.zeros_like(weights, dtype=torch.bool).scatter_(1, heaviest, True)
    edges = (edges | edges.T) & (weights > 0)
    whole = (weights[edges] * (LARGEST_WEIGHT / weights.max())).round().clamp(min=1).long()
    ends = F.pad(edges.sum(dim=1).cumsum(dim=0), (1, 0))
    graph = pymetis.CSRAdjacency(ends.numpy(), edges.nonzero()[:, 1].contiguous().numpy())
    options = pymetis.Options(seed=(seed + 1) % 2**31)  # of C's random numbers, which are the same for 0 and 1
    # Recursive bisection keeps more weight inside than METIS's k-way method.
    parts = pymetis.part_graph(num_parts, graph, eweights=whole.numpy(), recursive=True, options=options).vertex_part
    return torch.from_numpy(np.array(parts, dtype=np.int64))


def equalized(labels: torch.Tensor, weights: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Labels `int64 [N]` of equal parts: again and again, of all moves of a node from a part that is too large to one
    that is too small, the one that takes the least weight from inside parts. Ties go by node and part."""
    labels, capacity = labels.clone(), len(labels) // num_parts
    sizes = labels.bincount(minlength=num_parts)
    to_parts = _weight_to_parts(weights, labels, num_parts)
    for _ in range((sizes - capacity).clamp(min=0).sum().item()):
        lost = to_parts.gather(1, labels[:, None]) - to_parts  # [N, E]
        lost[sizes[labels] <= capacity] = torch.inf
        lost[:, sizes >= capacity] = torch.inf
        node, part = divmod(lost.argmin().item(), num_parts)
        for changed, sign in ((labels[node].item(), -1), (part, 1)):
            sizes[changed] += sign
            to_parts[:, changed] += sign * weights[node]
        labels[node] = part
    return labels


def _weight_to_parts(weights: torch.Tensor, labels: torch.Tensor, num_parts: int) -> torch.Tensor:
    """What the edges from each node to the nodes of each part weigh together, `[N, E]`."""
    return weights @ F.one_hot(labels, num_parts).to(weights)
