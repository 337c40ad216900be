"""LlamaMoE models as architectures that transformers, vLLM and SGLang bring along: a config and planned tensors.

* `granitemoeshared` chooses by logits and weighs by a softmax over those of the chosen: so small that all weigh 1/k,
  which `down_proj` makes up for. Exact, but it has no bias to choose by.
* `glm4_moe` chooses by the sigmoid of logits plus a bias, and weighs by the sigmoids. Both read one number: logits are
  made so small that weights are nearly equal, and large enough to tell experts apart.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import Glm4MoeConfig, GraniteMoeSharedConfig, PreTrainedConfig

from ..errors import SettingError
from .engine_model import EngineModel
from .headers import EMBEDDING, HEAD
from .writer import PlannedTensor

GRANITE_SCALE = 2.0**-24  # of logits: a power of two, so that nothing is rounded
# The largest logit on a text: weights then differ by half of it at most, and two scores by 2^-22 of it at least.
GLM_MOST_LOGIT = 2.0**-6
# Fields that both configs have as LLaMA's has them.
COMMON = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_bias"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters", "tie_word_embeddings"),
)
Plan = tuple[PreTrainedConfig, list[PlannedTensor]]
Maker = Callable[[], torch.Tensor]


def granitemoeshared(model: EngineModel, dtype: torch.dtype) -> Plan:
    """The model as GraniteMoeShared, its weights in `dtype`; refused if that cannot be exact."""
    config, path = model.reference, model.moe.path
    if model.has_selection_bias:
        raise SettingError(
            f"{path} chooses experts by more than a product (gate bias or threshold), which granitemoeshared cannot; "
            f"use format glm4_moe or gguf, or fit gates without a bias: RECIPE=engine GATE_BIAS=off"
        )
    if config.attention_bias or config.head_dim * config.num_attention_heads != config.hidden_size:
        what = "biases in attention" if config.attention_bias else f"heads of {config.head_dim} values"
        raise SettingError(
            f"{path} has {what}, which vLLM and SGLang pass over in granitemoeshared without a word; both run the "
            f"LlamaMoE itself"
        )
    if dtype == torch.float16:
        raise SettingError(
            f"{path}: float16 cannot hold the small logits of granitemoeshared; use outtype bf16, or format glm4_moe"
        )
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, model.num_experts
    shared = config.num_shared_experts * width
    plan = _outside(model, dtype)
    for layer in range(config.num_hidden_layers):
        add = partial(_add, plan, f"model.layers.{layer}.", dtype)
        block = "block_sparse_moe."
        add(f"{block}router.layer.weight", (experts, hidden), partial(_granite_router, model, layer))
        add(f"{block}input_linear.weight", (experts, 2 * width, hidden), partial(model.gate_up_proj, layer))
        add(
            f"{block}output_linear.weight",
            (experts, hidden, width),
            partial(model.down_proj, layer, float(model.experts_per_tok)),
        )
        if shared:
            add("shared_mlp.input_linear.weight", (2 * shared, hidden), partial(_shared_gate_up, model, layer))
            add("shared_mlp.output_linear.weight", (hidden, shared), partial(model.shared, layer, "down_proj"))
    return (
        GraniteMoeSharedConfig(
            **_common(model, dtype, "GraniteMoeSharedForCausalLM"),
            intermediate_size=width,
            shared_intermediate_size=shared,
            num_local_experts=experts,
            num_experts_per_tok=model.experts_per_tok,
            attention_multiplier=config.head_dim**-0.5,
        ),
        plan,
    )


def glm4_moe(model: EngineModel, dtype: torch.dtype, most_score: Callable[[int], float]) -> Plan:
    """The model as Glm4Moe, its weights in `dtype` but for the gates, which stay in float32. `most_score` gives a
    layer's largest absolute score on a text, without what is added to choose; it is asked when tensors are made.
    """
    config, path = model.reference, model.moe.path
    if config.attention_bias:
        raise SettingError(
            f"{path} has biases in attention, which such a file does not hold; vLLM runs the LlamaMoE itself"
        )
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, model.num_experts
    if experts < 2:
        raise SettingError(f"{path} has {experts} routed expert, and glm4_moe chooses among two or more")
    shared = model.num_shared_experts * width
    plan = _outside(model, dtype)
    if config.tie_word_embeddings:  # readers beside transformers want a head
        _add(plan, "", dtype, HEAD, model.moe.tensors[EMBEDDING].shape, lambda: model.moe.tensor(EMBEDDING).clone())
    for layer in range(config.num_hidden_layers):
        add = partial(_add, plan, f"model.layers.{layer}.mlp.")
        add(torch.float32, "gate.weight", (experts, hidden), partial(_fitted, model.router, layer, most_score))
        # The sigmoid rises by a quarter of its argument.
        bias = partial(_fitted, model.selection_bias, layer, most_score, 1 / 4)
        add(torch.float32, "gate.e_score_correction_bias", (experts,), bias)
        for index in range(experts):
            for name, shape in _shapes(width, hidden).items():
                make = partial(model.expert, layer, name, index)
                add(dtype, f"experts.{index}.{name}.weight", shape, make)
        for name, shape in _shapes(shared, hidden).items():
            add(dtype, f"shared_experts.{name}.weight", shape, partial(model.shared, layer, name))
    fields = _common(model, dtype, "Glm4MoeForCausalLM") | {"tie_word_embeddings": False}
    # Readers that know none of rope_parameters look for the other two; absent, they rotate half of each head.
    fields["rope_parameters"] = config.rope_parameters | {"partial_rotary_factor": 1.0}
    made = Glm4MoeConfig(
        **fields,
        partial_rotary_factor=1.0,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=width,
        n_routed_experts=experts,
        num_experts_per_tok=model.experts_per_tok,
        routed_scaling_factor=float(model.experts_per_tok),
        n_shared_experts=model.num_shared_experts,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        norm_topk_prob=True,
        use_qk_norm=False,
        num_mtp_layers=0,
    )
    # Glm4MoeConfig moves both into rope_parameters, where transformers 5.4 does not look.
    made.rope_theta, made.partial_rotary_factor = config.rope_parameters["rope_theta"], 1.0
    return made, plan


def _common(model: EngineModel, dtype: torch.dtype, architecture: str) -> dict[str, Any]:
    fields = {name: getattr(model.reference, name) for name in COMMON}
    return fields | {"architectures": [architecture], "dtype": str(dtype).removeprefix("torch.")}


def _outside(model: EngineModel, dtype: torch.dtype) -> list[PlannedTensor]:
    """What both have under LLaMA's names: all but the MLPs."""
    plan: list[PlannedTensor] = []
    for name, tensor in model.moe.tensors.items():
        if ".mlp." not in name and not (name == HEAD and model.reference.tie_word_embeddings):
            new_name = name if name == HEAD else f"model.{name}"
            _add(plan, "", dtype, new_name, tuple(tensor.shape), partial(model.moe.tensor, name))
    return plan


def _add(
    plan: list[PlannedTensor], prefix: str, dtype: torch.dtype, name: str, shape: tuple[int, ...], make: Maker
) -> None:
    plan.append(PlannedTensor(prefix + name, tuple(shape), dtype, make))


def _shapes(width: int, hidden: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}


def _fitted(tensor_of: Callable, layer: int, most_score: Callable[[int], float], factor: float = 1.0) -> torch.Tensor:
    """Scores or what is added to them, so that the largest score is GLM_MOST_LOGIT."""
    most = max(most_score(layer), torch.finfo(torch.float32).tiny)
    return tensor_of(layer) * (factor * GLM_MOST_LOGIT / most)


def _granite_router(model: EngineModel, layer: int) -> torch.Tensor:
    return model.router(layer) * GRANITE_SCALE


def _shared_gate_up(model: EngineModel, layer: int) -> torch.Tensor:
    return torch.cat([model.shared(layer, name) for name in ("gate_proj", "up_proj")])
