"""LlamaMoE for transformers: each class is its stock Llama parent with one difference, named in its docstring.

The parents' `__init__` would build dense MLPs first, so each class calls the grandparent's and builds its own parts.
"""

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
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
from .expert_kernels import IMPLEMENTATION  # imported here: transformers 5.4 finds no files beyond this one's imports
from .gates import Gate, load_balancing_loss
from .moe_layers import Experts, MoEBlock
from .triton_kernels import TRITON_IMPLEMENTATION

# What transformers calls the cache, in calls and in outputs: before 5.24 it has another name.
CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class LlamaMoEDecoderLayer(LlamaDecoderLayer):
    """The difference: `mlp` is an `MoEBlock`."""

    def __init__(self, config: LlamaMoEConfig, layer_idx: int):
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = MoEBlock(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def _gates_of(layer: nn.Module) -> list[Gate]:
    """The gate of a layer: where PEFT wraps one, the original and its copies, of which the last is in use."""
    return [module for module in layer.modules() if isinstance(module, Gate)]


class LlamaMoEPreTrainedModel(LlamaPreTrainedModel):
    """The difference: experts and gates are initialised, recorded, dispatched, and their budget can be changed."""

    config: LlamaMoEConfig
    config_class = LlamaMoEConfig
    _no_split_modules = ["LlamaMoEDecoderLayer"]
    # Scores that round to a rounded threshold would all reach it, and more experts run than were asked for.
    _keep_in_fp32_modules_strict = ["threshold", "score_quantiles"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(Gate, index=0),
        "hidden_states": LlamaMoEDecoderLayer,
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (Experts, Gate, MoEBlock)):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, Gate) and module.routing == "threshold":
            init.constant_(module.threshold, module.LOWEST_THRESHOLD)
            init.zeros_(module.score_quantiles)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The inherited answer greps the source of whichever Llama class was built first in the process, and caches it.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Unless asked otherwise, "llama_moe": the fast kernels of `expert_kernels`."""
        if requested_experts is None:
            return IMPLEMENTATION
        if requested_experts in (IMPLEMENTATION, TRITON_IMPLEMENTATION):
            return requested_experts
        return super().get_correct_experts_implementation(requested_experts)

    def set_num_experts_per_tok(self, num_experts_per_tok: int | Sequence[int]) -> None:
        """Change how many routed experts run per token (with threshold routing, on average): one for every layer, or
        one per layer. `ValueError` for a number that no layer can run, or a threshold without score quantiles."""
        budgets, num_layers = num_experts_per_tok, self.config.num_hidden_layers
        if not isinstance(budgets, Sequence):
            budgets = [budgets] * num_layers
        if len(budgets) != num_layers:
            raise ValueError(f"{len(budgets)} budgets given for {num_layers} layers")
        lowest, highest = self._routed_bounds()
        for budget in budgets:
            is_whole = isinstance(budget, Integral) and not isinstance(budget, bool)
            if not (is_whole and lowest <= budget <= highest):
                raise ValueError(f"num_experts_per_tok is {budget!r}; it must be {lowest} to {highest}")
        self._set_routed_budgets([int(budget) for budget in budgets])

    def set_active_fraction(self, fraction: float) -> None:
        """Change the share of all experts, shared ones included, that runs per token, in every layer. `ValueError` for
        one that the model cannot run: top-k routing takes whole numbers of experts."""
        if not isinstance(fraction, Real):
            raise ValueError(f"active fraction {fraction!r} is not a number")
        config = self.config
        total = config.num_experts + config.num_shared_experts
        routed = fraction * total - config.num_shared_experts
        tolerance = 1e-6 * total
        bounds = self._routed_bounds()
        if not (fraction > 0 and bounds[0] - tolerance <= routed <= bounds[1] + tolerance):
            limits = " to ".join(f"{(config.num_shared_experts + count) / total:.4g}" for count in bounds)
            raise ValueError(f"active fraction {fraction} is outside of {limits}, what this model can run")
        if config.routing == "top_k":
            if abs(routed - round(routed)) > tolerance:
                raise ValueError(f"active fraction {fraction} is not a whole number of {total} experts")
            routed = round(routed)
        self._set_routed_budgets([routed] * config.num_hidden_layers)

    def _routed_bounds(self) -> tuple[int, int]:
        """The fewest and the most routed experts that a layer can be set to run per token."""
        fewest = 1 if self.config.routing == "top_k" else self.config.min_experts_per_tok
        return fewest, self.config.max_routed_experts

    def _set_routed_budgets(self, budgets: list[int | float]) -> None:
        """Set routed experts per token by layer, in gates and config; on a refusal nothing has changed."""
        config = self.config
        layers = [module for module in self.modules() if isinstance(module, LlamaMoEDecoderLayer)]
        gates = [(gate, budget) for layer, budget in zip(layers, budgets, strict=True) for gate in _gates_of(layer)]
        if config.routing == "threshold":
            thresholds = [gate.quantile_threshold(gate.score_quantiles, b / config.num_experts) for gate, b in gates]
            for (gate, _), threshold in zip(gates, thresholds, strict=True):
                gate.threshold.fill_(threshold)
            config.num_experts_per_tok = round(sum(budgets) / len(budgets))
        else:
            for gate, budget in gates:
                gate.num_experts_per_tok = budget
            config.num_experts_per_tok = max(budgets)
        config.layer_num_experts_per_tok = budgets if len(set(budgets)) > 1 else None


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


class LlamaMoEForCausalLM(LlamaMoEPreTrainedModel, LlamaForCausalLM, GenerationMixin):
    """The difference: its output carries `router_logits`, a tuple of `[tokens, experts]` per layer, and `aux_loss`,
    when asked; with `router_aux_loss_coef` the latter is part of the loss while training."""

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
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """As `LlamaForCausalLM.forward`; `logits_to_keep`: the last so many positions (0: all), or those listed."""
        asked = self.config.output_router_logits if output_router_logits is None else output_router_logits
        balanced = self.training and labels is not None and self.config.router_aux_loss_coef > 0
        # transformers from 5.24 on passes `cache`, among the rest, and PEFT's prefixes come by either name.
        given = kwargs.pop(CACHE, None)
        given = past_key_values if given is None else given
        cache = {} if given is None else {CACHE: given}
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=asked or balanced,
            **cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        router_logits, aux_loss = outputs.get("router_logits"), None
        if router_logits is not None:
            selected = [_gates_of(layer)[-1].mask(s) for layer, s in zip(self.model.layers, router_logits, strict=True)]
            new_tokens = outputs.last_hidden_state.shape[1]  # the mask covers the cached ones as well
            mask = attention_mask[:, -new_tokens:] if getattr(attention_mask, "ndim", 0) == 2 else None
            aux_loss = load_balancing_loss(router_logits, selected, mask)
            if balanced:
                # With gradient accumulation each batch brings its share of the loss, and so of this one.
                all_items = kwargs.get("num_items_in_batch")
                share = 1 if all_items is None else (labels[:, 1:] != -100).sum().to(loss.device) / all_items
                loss = loss + self.config.router_aux_loss_coef * share * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss if asked else None,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=router_logits if asked else None,
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
