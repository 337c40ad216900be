"""LlamaMoE: LLaMA with Mixture-of-Experts MLPs, for transformers. Importing it registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_llama_moe import LlamaMoEConfig
from .modeling_llama_moe import (
    LlamaMoEForCausalLM,
    LlamaMoEForSequenceClassification,
    LlamaMoEModel,
    LlamaMoEPreTrainedModel,
)
from .moe_layers import RoutingStatistics, record_routing

AutoConfig.register(LlamaMoEConfig.model_type, LlamaMoEConfig)
AutoModel.register(LlamaMoEConfig, LlamaMoEModel)
AutoModelForCausalLM.register(LlamaMoEConfig, LlamaMoEForCausalLM)
AutoModelForSequenceClassification.register(LlamaMoEConfig, LlamaMoEForSequenceClassification)

__all__ = [
    "LlamaMoEConfig",
    "LlamaMoEForCausalLM",
    "LlamaMoEForSequenceClassification",
    "LlamaMoEModel",
    "LlamaMoEPreTrainedModel",
    "RoutingStatistics",
    "record_routing",
]
