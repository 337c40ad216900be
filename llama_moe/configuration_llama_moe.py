"""Configuration of LlamaMoE: a LLaMA whose MLPs are split into experts."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MixtralConfig

GATE_NETWORKS = ("mlp", "linear")
ROUTINGS = ("top_k", "threshold")

# All four classes, so that AutoModel and the rest find the code whichever class saved the checkpoint.
_AUTO_MAP = {
    "AutoConfig": "configuration_llama_moe.LlamaMoEConfig",
    "AutoModel": "modeling_llama_moe.LlamaMoEModel",
    "AutoModelForCausalLM": "modeling_llama_moe.LlamaMoEForCausalLM",
    "AutoModelForSequenceClassification": "modeling_llama_moe.LlamaMoEForSequenceClassification",
}
_SHARED_EXPERTS_PLAN = {
    "layers.*.mlp.shared_experts.gate_proj": "colwise",
    "layers.*.mlp.shared_experts.up_proj": "colwise",
    "layers.*.mlp.shared_experts.down_proj": "rowwise",
}


@strict
class LlamaMoEConfig(LlamaConfig):
    """A `LlamaConfig` plus how each MLP is cut into experts of equal width, and how a token chooses among them.

    The counts follow the names inference engines read: they are of routed experts, beside which `num_shared_experts`
    run for every token.

    Args:
        num_experts: routed experts per layer.
        num_experts_per_tok: routed experts that run per token, at least 1. With threshold routing it is the rounded
            average, and 0 where the shared experts alone run; the thresholds in the checkpoint decide.
        layer_num_experts_per_tok: the same for each layer, where layers differ: with top-k routing whole numbers, of
            which `num_experts_per_tok` is the largest; with threshold routing averages.
        num_shared_experts: experts that always run, as one MLP `shared_experts`.
        moe_intermediate_size: neurons per expert; default `intermediate_size / (num_experts + num_shared_experts)`.
        gate_network: "mlp" (Linear-Tanh-Linear, MoEfication section 3.2) or "linear".
        gate_rank: width between the two factors of a "linear" gate; None for a single, full matrix.
        gate_bias: whether a "linear" gate has a bias.
        gate_noise: standard deviation of the noise added to the scores while training.
        routing: "top_k" runs the `num_experts_per_tok` experts of the highest score; "threshold" every expert whose
            score reaches its layer's threshold, so that tokens differ in cost and the average is the budget.
        min_experts_per_tok, max_experts_per_tok: bounds of threshold routing: so many of the best experts run whatever
            their score, and no others beyond so many (None: all may).
        multiply_gate_scores: weight the selected experts by the softmax over their scores. Off, each weighs 1, which
            keeps a converted model equal to its dense source when all experts run.
        score_scale_factor: multiplies the weights of all routed experts.
        output_bias: a bias on the output of each MLP, which calibration can fit. Models with `mlp_bias` have one.
        router_aux_loss_coef: factor of the load-balancing loss in a causal LM's loss while training.
        output_router_logits: return the gate scores of every layer, and from a causal LM the load-balancing loss.

    Raises:
        ValueError: the counts do not fit together, or the file is of the older LLaMA-MoE v1 project.
    """

    model_type = "llama_moe"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "router_logits", "aux_loss"]
    # LLaMA's own plan names projections that do not exist here. Mixtral names its gate and experts as this package
    # does, and its plans use the installed release's names of the styles, which change.
    base_model_tp_plan = MixtralConfig.base_model_tp_plan
    base_model_ep_plan = getattr(MixtralConfig, "base_model_ep_plan", None)

    num_experts: int = 8
    num_experts_per_tok: int = 2
    layer_num_experts_per_tok: list[int | float] | None = None
    num_shared_experts: int = 0
    moe_intermediate_size: int | None = None
    gate_network: str = "mlp"
    gate_rank: int | None = None
    gate_bias: bool = False
    gate_noise: float | int = 0.0
    routing: str = "top_k"
    min_experts_per_tok: int = 0
    max_experts_per_tok: int | None = None
    multiply_gate_scores: bool = False
    score_scale_factor: float | int = 1.0
    output_bias: bool = False
    router_aux_loss_coef: float | int = 0.0
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if "size_experts" in kwargs or "num_selects" in kwargs:
            raise ValueError(
                "this config.json (with size_experts or num_selects) is of the LLaMA-MoE v1 project, whose model_type "
                "is the same; convert its checkpoints with llama_download/import_llama_moe_v1.py, or load them with "
                "trust_remote_code=True and without importing llama_moe"
            )
        kwargs.setdefault("auto_map", dict(_AUTO_MAP))
        all_experts = self.num_experts + self.num_shared_experts
        if self.moe_intermediate_size is None and all_experts > 0:
            self.moe_intermediate_size = self.intermediate_size // all_experts
        self.check_experts()
        if self.num_shared_experts:
            self.base_model_tp_plan = self.base_model_tp_plan | _SHARED_EXPERTS_PLAN
        super().__post_init__(**kwargs)

    @property
    def num_selects(self) -> int:
        """Experts that run per token, shared ones included: the command line's `--num_selects`."""
        return self.num_experts_per_tok + self.num_shared_experts

    @num_selects.setter
    def num_selects(self, value: int) -> None:
        if self.routing == "threshold":
            raise ValueError("thresholds hold the budget: use model.set_active_fraction or set_num_experts_per_tok")
        self.num_experts_per_tok = value - self.num_shared_experts

    def experts_per_tok_of(self, layer: int) -> int | float:
        """Routed experts that run per token in this layer; with threshold routing, on average."""
        budgets = self.layer_num_experts_per_tok
        if budgets is None:
            return self.num_experts_per_tok
        # Older checkpoints whose budget was changed kept the layers' averages of the budget before it.
        if self.routing == "threshold" and round(sum(budgets) / len(budgets)) != self.num_experts_per_tok:
            return self.num_experts_per_tok
        return budgets[layer]

    @property
    def max_routed_experts(self) -> int:
        """Routed experts that a token runs at most: `max_experts_per_tok`, or all."""
        return self.num_experts if self.max_experts_per_tok is None else self.max_experts_per_tok

    def check_experts(self) -> None:
        """Raise `ValueError` unless the fields fit together. Models ask too: `from_pretrained(..., field=value)` sets
        fields after the config was made."""
        lowest = {"num_experts": 1, "num_shared_experts": 0, "moe_intermediate_size": 1}
        lowest |= {"gate_noise": 0, "router_aux_loss_coef": 0}
        for field, least in lowest.items():
            self._require(field, least <= getattr(self, field) < math.inf, f"at least {least}")
        for field, choices in (("gate_network", GATE_NETWORKS), ("routing", ROUTINGS)):
            self._require(field, getattr(self, field) in choices, f"one of {', '.join(choices)}")
        self._require("score_scale_factor", math.isfinite(self.score_scale_factor), "a finite number")
        all_experts = self.num_experts + self.num_shared_experts
        if all_experts * self.moe_intermediate_size != self.intermediate_size:
            shared = f" plus num_shared_experts ({self.num_shared_experts})" if self.num_shared_experts else ""
            raise ValueError(
                f"num_experts ({self.num_experts}){shared} times moe_intermediate_size ({self.moe_intermediate_size}) "
                f"must give intermediate_size ({self.intermediate_size})"
            )
        if self.gate_rank is not None:
            limit = min(self.hidden_size, self.num_experts)
            self._require("gate_rank", 1 <= self.gate_rank <= limit, f"1 to {limit}, the smaller side of the gate")
        for field, none in (("gate_rank", None), ("gate_bias", False)):
            is_fine = self.gate_network == "linear" or getattr(self, field) == none
            self._require(field, is_fine, f'{none} unless gate_network is "linear"')
        self._check_budgets()

    def _check_budgets(self) -> None:
        is_threshold = self.routing == "threshold"
        min_experts, max_experts = self.min_experts_per_tok, self.max_routed_experts
        whole = f"1 to num_experts ({self.num_experts})"
        self._require("max_experts_per_tok", 1 <= max_experts <= self.num_experts, whole)
        self._require("min_experts_per_tok", 0 <= min_experts <= max_experts, f"0 to {max_experts}")
        if is_threshold:
            bounds = f"{min_experts} to {max_experts}, the bounds of each token"
            self._require("num_experts_per_tok", min_experts <= self.num_experts_per_tok <= max_experts, bounds)
        else:
            self._require("num_experts_per_tok", 1 <= self.num_experts_per_tok <= self.num_experts, whole)
            if min_experts > 0 or self.max_experts_per_tok is not None:
                raise ValueError('min_experts_per_tok and max_experts_per_tok are for routing "threshold"')
        budgets, layers = self.layer_num_experts_per_tok, self.num_hidden_layers
        if budgets is None:
            return
        if is_threshold:
            wanted = f"0 to num_experts ({self.num_experts})"
            fits = all(0 <= k <= self.num_experts for k in budgets)
        else:
            wanted = f"{whole}, the largest num_experts_per_tok"
            are_counts = all(isinstance(k, int) and k >= 1 for k in budgets)
            fits = are_counts and max(budgets, default=0) == self.num_experts_per_tok
        self._require("layer_num_experts_per_tok", len(budgets) == layers and fits, f"{layers} numbers of {wanted}")

    def _require(self, field: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{field} is {getattr(self, field)!r}; it must be {wanted}")
