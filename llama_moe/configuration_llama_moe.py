"""Configuration of LlamaMoE: a LLaMA whose MLPs are split into experts."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

GATE_NETWORKS = ("mlp", "linear")


@strict
class LlamaMoEConfig(LlamaConfig):
    """A `LlamaConfig` plus how each MLP is cut into experts and how a token chooses among them.

    The counts follow the names inference engines read.

    Args:
        num_experts: experts per layer.
        num_experts_per_tok: experts that run per token.
        moe_intermediate_size: neurons per expert; default `intermediate_size / num_experts`.
        gate_network: "mlp" (Linear-Tanh-Linear, MoEfication section 3.2) or "linear".
        multiply_gate_scores: weight the selected experts by the softmax of their scores. Off, every selected expert
            has weight 1, which is what keeps a converted model equal to its dense source when all experts run.
        output_router_logits: return the gate scores of every layer with each forward pass.

    Raises:
        ValueError: the counts do not fit together, or the file is of the older LLaMA-MoE v1 project.
    """

    model_type = "llama_moe"
    keys_to_ignore_at_inference = ("past_key_values", "router_logits")
    # The dense plan names projections that do not exist here; only the attention half carries over.
    base_model_tp_plan = {k: v for k, v in LlamaConfig.base_model_tp_plan.items() if ".self_attn." in k}

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    gate_network: str = "mlp"
    multiply_gate_scores: bool = False
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if "size_experts" in kwargs or "num_selects" in kwargs:
            raise ValueError(
                "this config.json (with size_experts or num_selects) is of the LLaMA-MoE v1 project, whose model_type "
                "is the same; load its checkpoints with trust_remote_code=True and without importing llama_moe"
            )
        # All four classes, so that AutoModel and the rest find the code whichever class saved the checkpoint.
        kwargs.setdefault("auto_map", auto_map())
        if self.moe_intermediate_size is None and self.num_experts > 0:
            self.moe_intermediate_size = self.intermediate_size // self.num_experts
        self.check_experts()
        super().__post_init__(**kwargs)

    @property
    def num_selects(self) -> int:
        """Experts that run per token: the command line's `--num_selects`."""
        return self.num_experts_per_tok

    @num_selects.setter
    def num_selects(self, value: int) -> None:
        self.num_experts_per_tok = value

    def check_experts(self) -> None:
        """Raise `ValueError` unless the counts fit together. Models ask too: `from_pretrained(..., field=value)` sets
        fields after the config was made."""
        if self.num_experts < 1:
            raise ValueError(f"num_experts is {self.num_experts}; it must be at least 1")
        if self.num_experts * self.moe_intermediate_size != self.intermediate_size:
            raise ValueError(
                f"num_experts ({self.num_experts}) times moe_intermediate_size ({self.moe_intermediate_size}) must "
                f"give intermediate_size ({self.intermediate_size})"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; it must be 1 to num_experts ({self.num_experts})"
            )
        if self.gate_network not in GATE_NETWORKS:
            raise ValueError(f"gate_network is {self.gate_network!r}; it must be one of {', '.join(GATE_NETWORKS)}")


def auto_map() -> dict[str, str]:
    """The classes that the Auto classes find in a checkpoint carrying its own code."""
    return {
        "AutoConfig": "configuration_llama_moe.LlamaMoEConfig",
        "AutoModel": "modeling_llama_moe.LlamaMoEModel",
        "AutoModelForCausalLM": "modeling_llama_moe.LlamaMoEForCausalLM",
        "AutoModelForSequenceClassification": "modeling_llama_moe.LlamaMoEForSequenceClassification",
    }
