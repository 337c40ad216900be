"""How much each expert matters for each token: the scores a gate learns to predict."""

import torch

# What is summed over the activations a of an expert's neurons.
ACTIVATION_CRITERIA = {
    "plain": lambda activations: activations,  # |sum a|
    "positive": lambda activations: activations.clamp(min=0),  # sum max(a, 0)
    "l2_norm": lambda activations: activations.square(),  # sum a^2
}
TOKENS_PER_CHUNK = 4096
MOST_SORTED_SCORES = 1 << 24  # more than so many are thinned out, token by token, before quantiles are taken


def token_stride(num_scores: int) -> int:
    """Stride over tokens that leaves at most `MOST_SORTED_SCORES` of `num_scores` scores to sort."""
    return max(1, -(-num_scores // MOST_SORTED_SCORES))


class ExpertScorer:
    """Scores per expert by one of `ACTIVATION_CRITERIA`, in float32."""

    def __init__(self, neurons: torch.Tensor, criterion: str):
        """`neurons`: int64 `[experts, width]`, the neurons of each expert; others, of shared ones, count for none."""
        num_experts, width = neurons.shape
        experts = torch.arange(num_experts, device=neurons.device).repeat_interleave(width)
        # One column of ones per expert: a matrix product sums the neurons of each.  A row per neuron, to the last used.
        self._membership = torch.zeros(int(neurons.max()) + 1, num_experts, device=neurons.device)
        self._membership[neurons.flatten(), experts] = 1
        self._criterion = criterion

    def __call__(self, activations: torch.Tensor) -> torch.Tensor:
        """`[tokens, neurons]` -> float32 `[tokens, experts]`, none negative."""
        activations = activations[:, : len(self._membership)].float()
        scores = ACTIVATION_CRITERIA[self._criterion](activations) @ self._membership
        return scores.abs() if self._criterion == "plain" else scores


class OutputNorms:
    """The criterion `output_norm`: the norm of what an expert adds to the MLP's output, from its activations.

    With h the expert's part of what enters down_proj and D its part of down_proj, |D h|^2 = h^T (D^T D) h, which needs
    no output of an expert: width times fewer numbers than hidden size.
    """

    def __init__(self, down: torch.Tensor, neurons: torch.Tensor):
        """`down`: float32 `[I, hidden]`, a row per neuron; `neurons`: int64 `[experts, width]`, of each expert."""
        self._neurons = neurons.to(down.device)
        rows = down[self._neurons]  # [experts, width, hidden]
        self._grams = rows @ rows.transpose(1, 2)  # [experts, width, width]

    def __call__(self, activations: torch.Tensor) -> torch.Tensor:
        """Float32 `[tokens, I]` -> float32 `[tokens, experts]`."""
        parts = activations.T[self._neurons]  # [experts, width, tokens]
        return (self._grams @ parts).mul_(parts).sum(1).clamp(min=0).sqrt().T


def top_k_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Ones where an expert is among the k best of its token, `[tokens, experts]`, in the dtype of the scores."""
    return torch.zeros_like(scores).scatter_(-1, scores.topk(k, dim=-1).indices, 1)


def routing_quality(selected: torch.Tensor, scores: torch.Tensor, k: int) -> dict[str, float]:
    """How good a choice of k experts per token is: `selected` (ones) against true `scores` >= 0, `[tokens, experts]`.

    Returns: means over tokens of `recall`, the share of the true top-k set found, and `mass_recall`, the score captured
    over the score of the best k. The true top k themselves give exactly 1.
    """
    true = top_k_mask(scores, k)
    recall = (selected * true).sum(dim=-1, dtype=torch.float64) / k
    captured = (selected * scores).sum(dim=-1, dtype=torch.float64)
    possible = (true * scores).sum(dim=-1, dtype=torch.float64)
    mass_recall = torch.where(possible > 0, captured / possible, 1.0)  # no expert scores: any choice is right
    return {"recall": recall.mean().item(), "mass_recall": mass_recall.mean().item()}
