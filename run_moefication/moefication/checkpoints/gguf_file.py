"""GGUF files of LlamaMoE models, for llama.cpp and what is built on it.

The architecture is `glm4moe`, or `step35` where rotary frequencies have factors (Llama 3): the two whose routing a file
can set. With gating function 3 llama.cpp chooses experts by logits plus bias and weighs them by a softmax over their
logits alone. Here logits are so small that each of k experts weighs 1/k, and the file's scale of weights is k: as in
LlamaMoE every chosen expert counts fully, gates may have a bias, and shared experts are there.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import MoEficationError, SettingError
from ..progress import progress
from .engine_model import EngineModel
from .gguf_tokenizer import Tokenizer

PLAIN, WITH_ROPE_FACTORS = "glm4moe", "step35"
ARCHITECTURES = {"default": PLAIN, "linear": PLAIN, "llama3": WITH_ROPE_FACTORS}  # by the kind of rotary embedding
TYPES = {name.lower(): gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0")}
SOFTMAX_OF_CHOSEN = 3  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX_WEIGHT, which the package does not name
LOGIT_SCALE = 2.0**-30  # a power of two, so that nothing is rounded
# The graph of llama.cpp has room for so many in a model of 32 layers; for as few as 22 in one of 18, 35 or 36.
MOST_EXPERTS_PER_TOK, MOST_EXPERTS = 29, 1024
SLIDING_WINDOW = 512  # of the layer that `step35` must have, and that does nothing here


class GGUFTensor(NamedTuple):
    """A tensor of the file, made when it is written. Only matrices are stored in fewer bits than float32."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    make: Callable[[], torch.Tensor]

    def data(self) -> np.ndarray:
        """The bytes of the file."""
        return gguf.quantize(self.make().float().contiguous().numpy(), self.type)


class GGUFModel:
    """A model as a file of one type of weights: `f32`, `f16`, `bf16`, `q8_0` or `q4_0`."""

    def __init__(self, model: EngineModel, tokenizer: Tokenizer, name: str, outtype: str):
        self._model, self._tokenizer, self._name, self._type = model, tokenizer, name, TYPES[outtype]
        self._config = model.reference
        self._architecture = _architecture(model)

    def write(self, file: BinaryIO) -> None:
        """Write the file, a tensor at a time in memory."""
        writer = gguf.GGUFWriter(None, self._architecture)
        writer.add_name(self._name)
        writer.add_file_type(
            gguf.LlamaFileType[f"{'ALL' if self._type == TYPES['f32'] else 'MOSTLY'}_{self._type.name}"]
        )
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in self._metadata().items():
            add_value(writer, f"{self._architecture}.{key}", value)
        for key, value in self._tokenizer.metadata().items():
            add_value(writer, f"tokenizer.{key}", value)
        tensors = list(self.tensors())
        for tensor in tensors:
            size = int(np.prod(gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type), dtype=np.int64))
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, tensor.type)
        writer.fout, writer.state = [file], gguf.gguf_writer.WriterState.EMPTY  # else it would open a file by name
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in progress(tensors, f"write {self._type.name}", "tensor"):
            writer.write_tensor_data(tensor.data())

    def require_written(self, path: Path) -> None:
        """Read a file back; raise MoEficationError where it is not what this model writes."""
        read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        for tensor in progress(list(self.tensors()), f"read {path.name} back", "tensor"):
            found = read.get(tensor.name)
            if found is None or found.tobytes() != tensor.data().tobytes():
                raise MoEficationError(f"{path}: {tensor.name} is not what was written; a broken disk?")

    def tensors(self) -> Iterator[GGUFTensor]:
        """All tensors, in the order of the file."""
        config, stored = self._config, self._model.moe.tensors
        embedding = "embed_tokens.weight"
        yield self._matrix("token_embd.weight", stored[embedding].shape, partial(self._stored, embedding))
        yield self._float32("output_norm.weight", (config.hidden_size,), partial(self._stored, "norm.weight"))
        if not config.tie_word_embeddings or self._architecture == WITH_ROPE_FACTORS:
            head = embedding if config.tie_word_embeddings else "lm_head.weight"
            yield self._matrix("output.weight", stored[head].shape, partial(self._stored, head))
        if self._architecture == WITH_ROPE_FACTORS:
            yield self._float32("rope_freqs.weight", (config.head_dim // 2,), partial(_rope_factors, config))
        for layer in range(config.num_hidden_layers):
            yield from self._layer(layer)
        if self._architecture == WITH_ROPE_FACTORS:
            for tensor in self._layer(0):  # one more that adds nothing: it is the one with a sliding window
                name = tensor.name.replace("blk.0.", f"blk.{config.num_hidden_layers}.")
                yield tensor._replace(name=name, make=partial(torch.zeros, tensor.shape))

    def _layer(self, layer: int) -> Iterator[GGUFTensor]:
        model, config = self._model, self._config
        hidden, width, experts = config.hidden_size, config.moe_intermediate_size, model.num_experts
        shared, block = model.num_shared_experts * width, f"blk.{layer}."
        norm = "post_attention_norm" if self._architecture == PLAIN else "ffn_norm"
        for name, kind in {"attn_norm": "input", norm: "post_attention"}.items():
            make = partial(self._stored, f"layers.{layer}.{kind}_layernorm.weight")
            yield self._float32(f"{block}{name}.weight", (hidden,), make)
        for name, kind in {"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o"}.items():
            source = f"layers.{layer}.self_attn.{kind}_proj.weight"
            yield self._matrix(f"{block}{name}.weight", model.moe.tensors[source].shape, partial(self._stored, source))
        router = (experts, hidden)
        yield self._float32(f"{block}ffn_gate_inp.weight", router, lambda: model.router(layer) * LOGIT_SCALE)
        yield self._float32(f"{block}exp_probs_b.bias", (experts,), lambda: model.selection_bias(layer) * LOGIT_SCALE)
        yield self._matrix(
            f"{block}ffn_gate_exps.weight", (experts, width, hidden), lambda: model.gate_up_proj(layer)[:, :width]
        )
        yield self._matrix(
            f"{block}ffn_up_exps.weight", (experts, width, hidden), lambda: model.gate_up_proj(layer)[:, width:]
        )
        yield self._matrix(f"{block}ffn_down_exps.weight", (experts, hidden, width), partial(model.down_proj, layer))
        shapes = {"gate": (shared, hidden), "up": (shared, hidden), "down": (hidden, shared)}
        for name, shape in shapes.items():
            make = partial(model.shared, layer, f"{name}_proj")
            yield self._matrix(f"{block}ffn_{name}_shexp.weight", shape, make)

    def _stored(self, name: str) -> torch.Tensor:
        return self._model.moe.tensor(name)

    def _float32(self, name: str, shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> GGUFTensor:
        return GGUFTensor(name, shape, TYPES["f32"], make)

    def _matrix(self, name: str, shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> GGUFTensor:
        """Of the file's type, but for what loses too much by 4 bits, and rows that its blocks do not divide."""
        kind = self._type
        if kind == TYPES["q4_0"] and name in ("token_embd.weight", "output.weight"):
            kind = TYPES["q8_0"]
        if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = TYPES["f16"]
        return GGUFTensor(name, tuple(shape), kind, make)

    def _metadata(self) -> dict[str, Any]:
        """Of the architecture, by key."""
        config, model, num_layers = self._config, self._model, self._config.num_hidden_layers
        rope = config.rope_parameters
        values: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "block_count": num_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": float(rope["rope_theta"]),
            "rope.dimension_count": config.head_dim,
            "leading_dense_block_count": 0,
            "expert_count": model.num_experts,
            "expert_used_count": model.experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_gating_func": SOFTMAX_OF_CHOSEN,
            "expert_weights_scale": float(model.experts_per_tok),
            "expert_weights_norm": False,
        }
        if rope.get("rope_type") == "linear":
            values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        if self._architecture == PLAIN:
            return values | {"expert_shared_count": model.num_shared_experts}
        return values | {
            "block_count": num_layers + 1,
            "attention.head_count": [config.num_attention_heads] * (num_layers + 1),
            "attention.head_count_kv": [config.num_key_value_heads] * (num_layers + 1),
            "attention.sliding_window": SLIDING_WINDOW,
            "attention.sliding_window_pattern": [False] * num_layers + [True],
            "rope.dimension_count": 2 * config.head_dim,  # the engine rotates half of it
            "rope.dimension_count_swa": config.head_dim,
            "expert_shared_feed_forward_length": model.num_shared_experts * config.moe_intermediate_size,
        }


def _architecture(model: EngineModel) -> str:
    """That of llama.cpp which computes what the model does; refused if there is none."""
    config, path = model.reference, model.moe.path
    if config.attention_bias:
        raise SettingError(
            f"{path} has biases in attention, which such a file does not hold; vLLM runs the LlamaMoE itself"
        )
    if model.experts_per_tok > MOST_EXPERTS_PER_TOK:
        raise MoEficationError(
            f"{path} runs {model.experts_per_tok} routed experts per token, and llama.cpp has room for "
            f"{MOST_EXPERTS_PER_TOK}: convert with fewer and wider experts (RECIPE=engine), or a smaller budget"
        )
    if model.num_experts > MOST_EXPERTS:
        raise MoEficationError(f"{path} has {model.num_experts} routed experts, and llama.cpp takes {MOST_EXPERTS}")
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise MoEficationError(f"{path} has rotary embeddings of kind {kind}; in a GGUF they can be {known}")
    return ARCHITECTURES[kind]


def _rope_factors(config: LlamaConfig) -> torch.Tensor:
    """How much slower each pair of dimensions rotates than by the plain rule, float32 `[head_dim / 2]`."""
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1 / (config.rope_parameters["rope_theta"] ** steps * slowed)


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A value of the file's head, in the type that the engine wants of Python's."""
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders[list] = writer.add_array
    adders[type(value)](key, value)
