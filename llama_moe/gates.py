"""Gates: they score every expert for every token and select those that run. Nothing here knows about LLaMA.

Axes: T tokens, E routed experts, K slots per token (the experts it may run), H hidden size.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Gate(nn.Module):
    """Scores every expert for every token and selects those that run. Subclasses give `score`; the arguments are as in
    `LlamaMoEConfig`. Gates hold raw parameters, not `nn.Linear`: tools that quantise or adapt "all linear layers" must
    leave the routing alone."""

    NUM_QUANTILES = 1025  # score quantiles kept for `set_active_share`, at levels 0, 1/1024, ..., 1
    # All experts run. Stands for minus infinity, which float16 makes of it, but tools can subtract it.
    LOWEST_THRESHOLD = -1e30

    def __init__(
        self,
        num_experts: int,
        *,
        num_experts_per_tok: int,
        routing: str = "top_k",
        min_experts_per_tok: int = 0,
        max_experts_per_tok: int | None = None,
        multiply_gate_scores: bool = False,
        score_scale_factor: float = 1.0,
        noise: float = 0.0,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.routing = routing
        self.min_experts_per_tok = min_experts_per_tok
        self.max_experts_per_tok = num_experts if max_experts_per_tok is None else max_experts_per_tok
        self.multiply_gate_scores = multiply_gate_scores
        self.score_scale_factor = score_scale_factor
        self.noise = noise
        if routing == "threshold":
            self.register_buffer("threshold", torch.full((1,), self.LOWEST_THRESHOLD))
            self.register_buffer("score_quantiles", torch.zeros(self.NUM_QUANTILES))  # all equal: none stored yet

    def score(self, hidden_states: Tensor) -> Tensor:
        """`[T, H]`, as the MLP sees it (not normalised) -> raw scores `[T, E]`."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns scores `[T, E]`, the weights of the slots `[T, K]`, and the slots' experts `[T, K]`."""
        scores = self.score(hidden_states)
        if self.training and self.noise:
            scores = scores + self.noise * torch.randn_like(scores)
        index, used = self.route(scores)
        return scores, self._weights(scores, index, used).to(hidden_states.dtype), index

    @property
    def _is_unbounded(self) -> bool:
        """Whether a token runs every expert whose score reaches the threshold, and no other."""
        bounds = (self.min_experts_per_tok, self.max_experts_per_tok)
        return self.routing == "threshold" and bounds == (0, self.num_experts)

    def route(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores `[T, E]` -> the slots' experts `[T, K]`, and which slots are used, bool `[T, K]` (None: all are)."""
        if self.routing == "top_k":
            return torch.topk(scores, self.num_experts_per_tok, dim=-1).indices, None
        if self._is_unbounded:
            return torch.arange(scores.shape[-1], device=scores.device).expand_as(scores), scores >= self.threshold
        best, index = torch.topk(scores, self.max_experts_per_tok, dim=-1)
        forced = torch.arange(best.shape[-1], device=scores.device) < self.min_experts_per_tok
        return index, (best >= self.threshold) | forced

    def mask(self, scores: Tensor) -> Tensor:
        """Which experts run, bool `[T, E]`."""
        index, used = self.route(scores)
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True if used is None else used)

    def _weights(self, scores: Tensor, index: Tensor, used: Tensor | None) -> Tensor:
        if self.multiply_gate_scores:
            chosen = scores.gather(-1, index)
            if used is not None:
                chosen = chosen.masked_fill(~used, torch.finfo(chosen.dtype).min)
            weights = torch.softmax(chosen, dim=-1, dtype=torch.float32)
        elif scores.requires_grad and (used is not None or index.shape[-1] < scores.shape[-1]):
            weights = self._straight_through(scores.gather(-1, index))
        elif used is not None and self.score_scale_factor == 1.0:
            return used.to(scores.dtype)  # fewer operations: on a GPU each costs as much as a token's gate
        else:
            weights = scores.new_ones(index.shape)
        if self.score_scale_factor != 1.0:
            weights = weights * self.score_scale_factor
        return weights if used is None else weights * used

    def _straight_through(self, chosen: Tensor) -> Tensor:
        """Ones whose gradient is that of a sigmoid around the boundary between running and not (Bengio et al. 2013,
        "Estimating or propagating gradients through stochastic neurons"): without it a gate could not be trained."""
        boundary = self.threshold if self.routing == "threshold" else chosen.amin(dim=-1, keepdim=True)
        soft = torch.sigmoid(chosen - boundary.detach())
        return 1 + (soft - soft.detach())

    def within_bounds(self, scores: Tensor) -> Tensor:
        """Scores `[T, E]` of which a share that reaches a threshold is the share that runs: those of experts that
        `min_experts_per_tok` forces on are the highest, those that `max_experts_per_tok` forces off the lowest."""
        if self._is_unbounded:
            return scores
        order = scores.argsort(dim=-1, descending=True)
        forced_on, forced_off = order[:, : self.min_experts_per_tok], order[:, self.max_experts_per_tok :]
        highest, lowest = scores.max().expand_as(forced_on), scores.min().expand_as(forced_off)
        return scores.scatter(-1, forced_on, highest).scatter(-1, forced_off, lowest)

    @torch.no_grad()
    def store_score_quantiles(self, scores: Tensor) -> None:
        """Keep the quantiles of all scores `[T, E]` of a text: what `set_active_share` sets thresholds by. They must be
        finite (else `ValueError`, as if the gate routes by top-k)."""
        self._require_threshold_routing()
        if not scores.numel() or not scores.isfinite().all():
            raise ValueError("quantiles need scores, all of them finite")
        scores = self.within_bounds(scores).flatten().float()
        ordered = np.sort(scores.cpu().numpy())  # PyTorch's sort takes ten times as long on CPUs
        levels = np.linspace(0, len(ordered) - 1, self.NUM_QUANTILES).round().astype(np.int64)
        self.score_quantiles.copy_(torch.from_numpy(ordered[levels]))

    @classmethod
    @torch.no_grad()
    def quantile_threshold(cls, score_quantiles: Tensor, share: float) -> float:
        """The threshold at which this share of all token-expert pairs runs on the text of the quantiles; `ValueError`
        if these are all equal, as where none were stored."""
        if not 0 < share < 1:
            return cls.LOWEST_THRESHOLD if share >= 1 else -cls.LOWEST_THRESHOLD
        if score_quantiles[0] == score_quantiles[-1]:
            why = "the model has not been calibrated, or the layer's experts add nothing"
            raise ValueError(f"no score quantiles are stored, or all are equal: {why}")
        level, part = divmod((1 - share) * (cls.NUM_QUANTILES - 1), 1)
        low, high = score_quantiles[int(level) : int(level) + 2]
        return torch.lerp(low, high, part).item()

    def set_active_share(self, share: float) -> None:
        """Set the threshold to the `quantile_threshold` of the stored quantiles; `ValueError` where there are none."""
        self._require_threshold_routing()
        self.threshold.fill_(self.quantile_threshold(self.score_quantiles, share))

    def _require_threshold_routing(self) -> None:
        if self.routing != "threshold":
            raise ValueError(f"this gate's routing is {self.routing!r}; only threshold routing has score quantiles")


class LinearGate(Gate):
    """One linear map from hidden state to expert scores; with a `rank`, the product of two factors of that width."""

    def __init__(self, hidden_size: int, num_experts: int, rank: int | None = None, has_bias: bool = False, **routing):
        super().__init__(num_experts, **routing)
        self.rank = rank
        if rank is None:
            self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        else:
            self.input_weight = nn.Parameter(torch.empty(rank, hidden_size))
            self.output_weight = nn.Parameter(torch.empty(num_experts, rank))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_experts)) if has_bias else None)

    def score(self, hidden_states: Tensor) -> Tensor:
        if self.rank is None:
            return F.linear(hidden_states, self.weight, self.bias)
        return F.linear(F.linear(hidden_states, self.input_weight), self.output_weight, self.bias)


class MLPGate(Gate):
    """Linear-Tanh-Linear without biases, E hidden units (MoEfication, Zhang et al. 2022, section 3.2)."""

    def __init__(self, hidden_size: int, num_experts: int, **routing):
        super().__init__(num_experts, **routing)
        self.input_weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.output_weight = nn.Parameter(torch.empty(num_experts, num_experts))

    def score(self, hidden_states: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(hidden_states, self.input_weight)), self.output_weight)


GATE_CLASSES = {"mlp": MLPGate, "linear": LinearGate}
ROUTING_FIELDS = ("routing", "min_experts_per_tok", "max_experts_per_tok", "multiply_gate_scores", "score_scale_factor")


def make_gate(config, layer_idx: int = 0) -> Gate:
    """The gate that a `LlamaMoEConfig` describes, its parameters not yet filled."""
    fields = {name: getattr(config, name) for name in ROUTING_FIELDS}
    fields |= {"num_experts_per_tok": config.experts_per_tok_of(layer_idx), "noise": config.gate_noise}
    if config.gate_network == "linear":
        fields |= {"rank": config.gate_rank, "has_bias": config.gate_bias}
    return GATE_CLASSES[config.gate_network](config.hidden_size, config.num_experts, **fields)


def load_balancing_loss(scores: list[Tensor], selected: list[Tensor], attention_mask: Tensor | None = None) -> Tensor:
    """How unevenly experts are used, over all layers at once: their number times the sum over experts of the share of
    tokens that ran it times its mean softmax score (Switch Transformer, Fedus et al. 2021, equations 4 to 6). Equals
    the mean number of experts per token when balanced. `scores` and `selected` are `[T, E]` by layer, floating and
    bool; the `attention_mask [batch, sequence]`, of T entries, is 0 for tokens that do not count."""
    device, num_experts = scores[0].device, scores[0].shape[-1]
    counts = torch.ones(scores[0].shape[0], device=device) if attention_mask is None else attention_mask.flatten()
    counts = counts.to(device, torch.float32)  # [T]
    total = counts.sum().clamp(min=1) * len(scores)
    load = sum(counts @ chosen.to(device, torch.float32) for chosen in selected) / total
    probability = sum(counts @ layer.to(device).softmax(-1, dtype=torch.float32) for layer in scores) / total
    return num_experts * (load * probability).sum()
