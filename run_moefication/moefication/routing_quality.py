"""How good a choice of experts is, against the true scores."""

import torch


def top_k_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Ones where an expert is among the k best of its token, `[tokens, experts]`, in the dtype of the scores."""
    return torch.zeros_like(scores).scatter_(-1, scores.topk(k, dim=-1).indices, 1)


def routing_quality(selected: torch.Tensor, scores: torch.Tensor, k: int) -> dict[str, float]:
    """How good a choice of k experts per token is, against the true scores.

    Args:
        selected: `[tokens, experts]`, ones for the k experts chosen.
        scores: `[tokens, experts]`, none negative.

    Returns: means over tokens of `recall`, the share of the true top-k set found, and `mass_recall`, the score captured
    over the score of the best k. The true top k themselves give exactly 1.
    """
    true = top_k_mask(scores, k)
    recall = (selected * true).sum(dim=-1, dtype=torch.float64) / k
    captured = (selected * scores).sum(dim=-1, dtype=torch.float64)
    possible = (true * scores).sum(dim=-1, dtype=torch.float64)
    mass_recall = torch.where(possible > 0, captured / possible, 1.0)  # no expert scores: any choice is right
    return {"recall": recall.mean().item(), "mass_recall": mass_recall.mean().item()}
