"""LlamaMoE for transformers: each class is its stock Llama parent with one difference, named in its docstring.

The parents' `__init__` would build dense MLPs first, so each class calls the grandparent's and builds its own parts.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from .configuration_llama_moe import LlamaMoEConfig
from .moe_layers import Experts, Gate, MoEBlock


class LlamaMoEDecoderLayer(LlamaDecoderLayer):
    """The difference: `mlp` is an `MoEBlock`."""

    def __init__(self, config: LlamaMoEConfig, layer_idx: int):
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = MoEBlock(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class LlamaMoEPreTrainedModel(LlamaPreTrainedModel):
    """The difference: experts and gates are initialised, recorded, dispatched, and their budget can be changed."""

    config: LlamaMoEConfig
    config_class = LlamaMoEConfig
    _no_split_modules = ["LlamaMoEDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(Gate, index=0),
        "hidden_states": LlamaMoEDecoderLayer,
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (Experts, Gate)):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, MoEBlock) and hasattr(module, "output_bias"):
            init.zeros_(module.output_bias)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The inherited answer greps the source of whichever Llama class was built first in the process, and caches it.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """grouped_mm needs strides of 16 bytes: expert widths that break them run eager unless asked otherwise."""
        if requested_experts is None and (self.config.moe_intermediate_size % 8 or self.config.hidden_size % 8):
            return "eager"
        return super().get_correct_experts_implementation(requested_experts)

    def set_num_experts_per_tok(self, num_experts_per_tok: int) -> None:
        """Change how many experts run per token, in every layer, in place.

        Raises:
            ValueError: not between 1 and the number of experts.
        """
        if not 1 <= num_experts_per_tok <= self.config.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {num_experts_per_tok}; it must be 1 to num_experts ({self.config.num_experts})"
            )
        self.config.num_experts_per_tok = num_experts_per_tok
        for module in self.modules():
            if isinstance(module, Gate):
                module.num_experts_per_tok = num_experts_per_tok


class LlamaMoEModel(LlamaMoEPreTrainedModel, LlamaModel):
    """The difference: its layers. `forward` is Llama's; ask it for `output_router_logits=True` as well."""

    def __init__(self, config: LlamaMoEConfig):
        config.check_experts()
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(LlamaMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class LlamaMoEForCausalLM(LlamaMoEPreTrainedModel, LlamaForCausalLM):
    """The difference: its output carries `router_logits`, a tuple of `[tokens, experts]` per layer, when asked."""

    def __init__(self, config: LlamaMoEConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlamaMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """As `LlamaForCausalLM.forward`; `logits_to_keep`: the last so many positions (0: all), or those listed."""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.get("router_logits"),
        )


class LlamaMoEForSequenceClassification(LlamaMoEPreTrainedModel, LlamaForSequenceClassification):
    """The difference: built on `LlamaMoEModel` by name, since AutoModel would not find it in a copied checkpoint."""

    def __init__(self, config: LlamaMoEConfig):
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LlamaMoEModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


LlamaMoEConfig.register_for_auto_class()
LlamaMoEModel.register_for_auto_class("AutoModel")
LlamaMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
LlamaMoEForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "LlamaMoEForCausalLM",
    "LlamaMoEForSequenceClassification",
    "LlamaMoEModel",
    "LlamaMoEPreTrainedModel",
]
