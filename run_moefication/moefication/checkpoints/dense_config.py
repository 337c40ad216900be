"""A dense model's config.json as the `LlamaConfig` of what its weights compute."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig

from ..errors import MoEficationError
from ..storage.files import read_json_object
from .transformers_library import CONFIG_ERRORS, first_line, last_line, quiet_transformers

# These fields of config.json describe the weights. All others steer the library, and would steer the new model, too.
DESCRIPTION = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "initializer_range", "attention_dropout"),
    *("max_position_embeddings", "original_max_position_embeddings", "rope_parameters", "rope_theta", "rope_scaling"),
    *("partial_rotary_factor", "attention_bias", "mlp_bias", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "num_labels", "id2label", "label2id", "problem_type"),
)
KINDS = ("llama", "mistral")
REFUSED_FIELDS = {
    "quantization_config": "is quantised; give the checkpoint it was quantised from",
    "auto_map": "brings code of its own (auto_map in config.json), which is not run here; "
    "if its weights are those of a plain LLaMA or Mistral, remove auto_map",
    "per_layer_config": "has layers of different shapes (per_layer_config), which are not converted",
}
ROPE_FIELDS = ("rope_parameters", "rope_scaling")
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def read_dense_config(path: Path) -> tuple[dict[str, Any], LlamaConfig]:
    """config.json in a folder as it stands, and as a `LlamaConfig`: a Mistral without sliding window is a LLaMA.

    What the file leaves out is what the model's own class says, for Mistral and LLaMA differ there. Refused: another
    architecture, a model that cannot be built, and code that would have to be run.
    """
    file = path / "config.json"
    raw = read_json_object(file, "is this the folder of a transformers checkpoint?")
    kind = raw.get("model_type")
    if kind not in KINDS:
        raise MoEficationError(f"{path} is a {kind!r} model; llama, and mistral without sliding_window, are converted")
    for name, why in REFUSED_FIELDS.items():
        if raw.get(name):
            raise MoEficationError(f"{path} {why}")
    if raw.get("is_causal", True) is not True:
        raise MoEficationError(f"{path} is no causal model (is_causal in config.json), which is not converted")
    return raw, llama_config(file, raw)


def llama_config(file: Path, raw: dict[str, Any]) -> LlamaConfig:
    """What the content of a config.json says of a LLaMA or a Mistral. Refused: values that no LLaMA has."""
    for name in ROPE_FIELDS:
        if not isinstance(raw.get(name), dict | None):
            raise MoEficationError(f"{file}: {name} is {raw[name]!r}; an object is needed")
    for name in SIZES:
        value = raw.get(name, 1)  # the class has a default for one that is left out
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise MoEficationError(f"{file}: {name} is {value!r}; a positive integer is needed")
    is_mistral = raw.get("model_type") == "mistral"
    config = _mistral(file, raw) if is_mistral else built_config(LlamaConfig, file, _described(raw))
    if config.hidden_act not in ("silu", "swish"):
        found = f"{file.parent} has hidden_act {config.hidden_act!r}"
        raise MoEficationError(f"{found}; MLPs with SiLU (SwiGLU) are converted")
    config.hidden_act = "silu"  # of which swish is another name
    return config


def is_convertible(raw: dict[str, Any]) -> bool:
    """Whether `read_dense_config` takes this kind of config.json: a plain LLaMA, or a Mistral without a window."""
    kind, default = raw.get("model_type"), MistralConfig()
    window, positions = (
        raw.get(name, getattr(default, name)) for name in ("sliding_window", "max_position_embeddings")
    )
    are_numbers = isinstance(window, int) and isinstance(positions, int)  # else the config's class says what is wrong
    is_windowed = kind == "mistral" and are_numbers and window < positions
    return kind in KINDS and not is_windowed and not raw.get("quantization_config")


def _described(fields: dict[str, Any]) -> dict[str, Any]:
    # transformers writes defaults into the dict of rope parameters that it is given, so it gets copies.
    return {name: deepcopy(fields[name]) for name in DESCRIPTION if name in fields}


def _mistral(file: Path, raw: dict[str, Any]) -> LlamaConfig:
    window = {name: value for name, value in raw.items() if name == "sliding_window"}  # else the class's default
    mistral = built_config(MistralConfig, file, _described(raw) | window)
    # A window as long as the model's longest text hides nothing.
    if mistral.sliding_window is not None and mistral.sliding_window < mistral.max_position_embeddings:
        found = f"sliding_window {mistral.sliding_window}"
        if not window:
            found += ' (what its config.json means by leaving it out; "sliding_window": null says that there is none)'
        raise MoEficationError(f"{file.parent} is a Mistral with {found}, which LLaMA attention does not have")
    fields = _described(mistral.to_dict()) | {"attention_bias": False, "mlp_bias": False}  # Mistral has neither
    return built_config(LlamaConfig, file, fields)


def built_config(config_class: type, file: Path, fields: dict[str, Any]) -> Any:
    """A config of transformers with these fields; refused, with the name of `file`, where its class refuses them."""
    try:
        with quiet_transformers():
            return config_class.from_dict(fields)
    except CONFIG_ERRORS as error:
        raise MoEficationError(f"{file}: {last_line(error)}") from error


def expected_shapes(path: Path, config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names (without `model.`) and shapes of a LLaMA of this config, from transformers itself.

    One layer is built on the meta device and repeated lazily, so that an absurd layer count costs nothing. Refused: a
    config of which no model can be built, or one that would fail on its first token.
    """
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    try:
        with quiet_transformers(), torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict() | {"num_hidden_layers": 1}))
        rotary_width = 2 * model.model.rotary_emb.inv_freq.numel()
        if heads % key_value_heads:
            raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {key_value_heads}")
        if rotary_width != config.head_dim:
            raise ValueError(f"its rope turns {rotary_width} of the {config.head_dim} dimensions of a head")
    # The config has sizes that no tensor can have (2^63, -1, no key-value heads), or rope fields that contradict.
    except (RuntimeError, *CONFIG_ERRORS) as error:
        file = path / "config.json"
        raise MoEficationError(f"{file} describes no model that can be built ({first_line(error)})") from error
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.")
        for layer in range(config.num_hidden_layers if name.startswith("layers.0.") else 1):
            yield name.replace("layers.0.", f"layers.{layer}.", 1), tuple(tensor.shape)
