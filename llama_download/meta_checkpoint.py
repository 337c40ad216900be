"""Checkpoints as Meta releases them: `params.json`, and one `consolidated.NN.pth` per rank of tensor parallelism.

Everything is checked when a checkpoint is opened. The files stay memory-mapped; a tensor is made only when asked for.
"""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig

from run_moefication.moefication.checkpoints.dense import DTYPES, DenseCheckpoint
from run_moefication.moefication.checkpoints.writer import WEIGHTS_INDEX, PlannedTensor, plan_shards, shard_index
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.progress import progress
from run_moefication.moefication.storage.files import digest, read_json_object
from run_moefication.moefication.storage.tensors import load_tensors

# How many positions each generation was trained on, which params.json does not tell.
POSITIONS = {
    "LLaMA 1": 2048,
    "Llama 2": 4096,
    "Code Llama": 16384,
    "Llama 3": 8192,
    "Llama 3.1": 131072,
    "Llama 3.2": 131072,
}
# What params.json may hold (an integer stands for a float, too), and what it must hold.
PARAMS = dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "vocab_size"), int)
PARAMS |= dict.fromkeys(("norm_eps", "ffn_dim_multiplier", "rope_theta", "rope_scaling_factor"), float)
PARAMS |= {"use_scaled_rope": bool}
REQUIRED = ("dim", "n_layers", "n_heads", "norm_eps")
ROTARY_TABLE = "rope.freqs"  # LLaMA 1 and 2 ship it; transformers computes it from the config


@dataclass(frozen=True)
class MetaTensor:
    """A tensor of Meta's format and its place in transformers'."""

    name: str  # in transformers' checkpoint
    shape: tuple[int, ...]  # of the whole tensor
    axis: int | None = None  # along which the shards hold equal parts; None where each holds all of it
    head_dim: int | None = None  # set for query and key projections, whose rows transformers has in another order

    def fits(self, parts: list[torch.Tensor]) -> bool:
        """Whether these are the parts that shards should hold: of equal shapes, with no head cut in two."""
        if self.axis is None:
            return all(tuple(part.shape) == self.shape and torch.equal(part, parts[0]) for part in parts)
        size, remainder = divmod(self.shape[self.axis], len(parts))
        shape = (*self.shape[: self.axis], size, *self.shape[self.axis + 1 :])
        return not remainder and not size % (self.head_dim or 1) and all(tuple(part.shape) == shape for part in parts)

    def merge(self, parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor as transformers has it; the mapped file itself, which needs no memory, where it is that."""
        merged = torch.cat(parts, self.axis) if self.axis is not None and len(parts) > 1 else parts[0]
        if self.head_dim is not None:
            # Meta rotates neighbours (2i, 2i + 1) of a head, transformers pairs (i, i + head_dim / 2).
            merged = merged.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        return merged.to(dtype)


class MetaCheckpoint:
    """A checkpoint in Meta's format, validated, and its `config` in transformers'. Raises MoEficationError, which names
    the file that is missing, surplus, cut short or at odds with `params.json`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.params = _read_params(folder / "params.json")
        self.files = _shard_files(folder)
        self._shards = [_read_shard(file) for file in self.files]
        # The layout lists as many layers as params.json says: look at the last one first, lest there be a billion.
        self.dtype = self._require(f"layers.{self.params['n_layers'] - 1}.attention_norm.weight", 1).dtype
        embedding, output = self._require("tok_embeddings.weight", 2), self._shards[0].get("output.weight")
        # Llama 3.2 ships its tied embedding twice. Where shards cut the two differently, they stay two.
        tied = output is None or all(
            torch.equal(shard["tok_embeddings.weight"], shard.get("output.weight", output)) for shard in self._shards
        )
        self.family = _family(self.params, tied)
        # The embedding is cut by columns in LLaMA 1 and 2, by rows in Llama 3.
        by_rows = embedding.shape[1] == self.params["dim"]
        rows = len(embedding) * (len(self._shards) if by_rows else 1)
        self.config = _config(self.params, self.family, rows, tied)
        self._tensors = dict(_layout(self.config, embedding_axis=0 if by_rows else 1))
        self._check()

    @property
    def content(self) -> dict[str, Any]:
        """What tells these weights from others. It needs no reading: the files list sizes and checksums of members."""
        members = []
        for file in self.files:
            with zipfile.ZipFile(file) as archive:
                members.append([[member.filename, member.file_size, member.CRC] for member in archive.infolist()])
        return {"params": self.params, "weights": digest(members)}

    def write(self, folder: Path, dtype: str | None, max_shard_bytes: int, ids: dict[str, int]) -> None:
        """Write config and weights as transformers has them, one shard in memory at a time, in `dtype` or that of the
        source, and check that the whole is a LLaMA. `ids` are the tokenizer's: `bos_token_id` and `eos_token_id`."""
        new_dtype = getattr(torch, dtype) if dtype else self.dtype
        self.config.update(ids | {"dtype": new_dtype})
        self.config.save_pretrained(folder)
        GenerationConfig(**ids).save_pretrained(folder)
        shards = plan_shards(self._plan(new_dtype), max_shard_bytes)
        for name, group in progress(shards.items(), "convert", "shard"):
            try:
                save_file({planned.name: planned.made({}) for planned in group}, folder / name, {"format": "pt"})
            except SafetensorError as error:  # this is how it says that the disk is full
                raise MoEficationError(f"{folder / name}: {error}") from error
        if len(shards) > 1:
            (folder / WEIGHTS_INDEX).write_text(json.dumps(shard_index(shards), indent=2) + "\n", encoding="utf-8")
        DenseCheckpoint(str(folder))

    def _plan(self, dtype: torch.dtype) -> list[PlannedTensor]:
        """All tensors of the transformers checkpoint, embedding first, in `dtype`."""

        def make(meta_name: str, tensor: MetaTensor) -> torch.Tensor:
            merged = tensor.merge([shard[meta_name] for shard in self._shards], dtype)
            if dtype == torch.float16 != self.dtype and merged.isinf().any():
                raise MoEficationError(f"{self.folder}: {meta_name} has values beyond float16; choose another --dtype")
            return merged

        return [
            PlannedTensor(tensor.name, tensor.shape, dtype, partial(make, meta_name, tensor))
            for meta_name, tensor in self._tensors.items()
        ]

    def _require(self, name: str, ndim: int) -> torch.Tensor:
        """A tensor of the first shard, needed before the layout of all is known."""
        tensor = self._shards[0].get(name)
        if tensor is None or tensor.ndim != ndim:
            raise MoEficationError(f"{self.files[0]} has no {name}, which the params.json beside it calls for")
        if tensor.dtype not in DTYPES.values():
            raise MoEficationError(f"{self.files[0]}: {name} is {tensor.dtype}; float32, float16, bfloat16 are read")
        return tensor

    def _check(self) -> None:
        """Every shard has the tensors of the layout, of one dtype, in parts that make up their shapes."""
        unused = {ROTARY_TABLE, "output.weight"} - self._tensors.keys()
        for file, shard in zip(self.files, self._shards, strict=True):
            for name in sorted(self._tensors.keys() ^ (shard.keys() - unused)):
                problem = "lacks" if name in self._tensors else "holds"
                raise MoEficationError(f"{file} {problem} {name}, at odds with the params.json beside it")
            for name in self._tensors:
                if shard[name].dtype != self.dtype:
                    raise MoEficationError(f"{file}: {name} is {shard[name].dtype}, the others are {self.dtype}")
        for name, tensor in self._tensors.items():
            parts = [shard[name] for shard in self._shards]
            if not tensor.fits(parts):
                shapes = ", ".join(str(list(part.shape)) for part in parts)
                raise MoEficationError(
                    f"{self.folder}: the {len(parts)} shard(s) hold {name} as {shapes}, which do not make up the "
                    f"{list(tensor.shape)} of params.json: shards are missing, too many, or of another model"
                )


def _read_params(path: Path) -> dict[str, Any]:
    params = read_json_object(path, "is this the folder of one model in Meta's format? If so, download it again")
    params = {name: value for name, value in params.items() if value is not None}
    for name, kind in PARAMS.items():
        value = params.get(name)
        is_number = type(value) in (int, kind) and 0 < value < 2**31
        is_valid = isinstance(value, bool) if kind is bool else is_number
        # Meta's code asks the tokenizer for a vocabulary of -1; here the embedding tells.
        if not is_valid and (name, value) != ("vocab_size", -1) and (name in params or name in REQUIRED):
            raise MoEficationError(f"{path}: {name} is {value!r}, which no LLaMA has")
    heads, kv_heads = params["n_heads"], params.get("n_kv_heads", params["n_heads"])
    if params["dim"] % (2 * heads) or heads % kv_heads:
        raise MoEficationError(
            f"{path}: dim {params['dim']}, n_heads {heads}, n_kv_heads {kv_heads} do not divide evenly"
        )
    return params


def _family(params: dict[str, Any], tied: bool) -> str:
    """The generation, as far as `params.json` and the tensors tell; only the number of positions and the scaling of
    their angles depend on it."""
    if params.get("use_scaled_rope"):
        return "Llama 3.2" if tied else "Llama 3.1"
    if params.get("rope_theta") == 500_000:
        return "Llama 3"
    if params.get("rope_theta") == 1_000_000:
        return "Code Llama"
    # LLaMA 1 has 1e-6 throughout, but for its 65B.
    is_first = params["norm_eps"] < 1e-5 or (params["dim"], params["n_layers"]) == (8192, 80)
    return "LLaMA 1" if is_first and "n_kv_heads" not in params else "Llama 2"


def _config(params: dict[str, Any], family: str, embedding_rows: int, tied: bool) -> LlamaConfig:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(params.get("rope_theta", 10_000))}
    if params.get("use_scaled_rope"):
        rope |= {
            "rope_type": "llama3",
            "factor": float(params.get("rope_scaling_factor", 32 if family == "Llama 3.2" else 8)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": POSITIONS["Llama 3"],
        }
    # Meta's rule: two thirds of 4 dim, times the multiplier, rounded up.
    width = int(params.get("ffn_dim_multiplier", 1) * int(8 * params["dim"] / 3))
    multiple = params.get("multiple_of", 256)
    vocab_size = params.get("vocab_size", -1)
    return LlamaConfig(
        vocab_size=embedding_rows if vocab_size == -1 else vocab_size,
        hidden_size=params["dim"],
        intermediate_size=-(-width // multiple) * multiple,
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads", params["n_heads"]),
        rms_norm_eps=params["norm_eps"],
        max_position_embeddings=POSITIONS[family],
        rope_parameters=rope,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
    )


def _shard_files(folder: Path) -> list[Path]:
    """The shards in the order of their ranks."""
    found = sorted(folder.glob("consolidated.*.pth"))
    files = [folder / f"consolidated.{rank:02d}.pth" for rank in range(max(len(found), 1))]
    for file in files:
        if file not in found:
            there = ", ".join(file.name for file in found) or "no shards"
            raise MoEficationError(
                f"{file} is missing; the folder has {there}: download it again, or move away what is no shard"
            )
    return files


def _read_shard(file: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = load_tensors(file)
    except MoEficationError as error:
        raise MoEficationError(f"{error}; download it again") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.is_cpu
        for name, tensor in tensors.items()
    ):
        raise MoEficationError(f"{file} is not a dict of tensors by name")
    return tensors


def _layout(config: LlamaConfig, embedding_axis: int) -> Iterator[tuple[str, MetaTensor]]:
    """Meta's name of every tensor, and what becomes of it."""
    hidden, width, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    head_dim = hidden // config.num_attention_heads
    keys = config.num_key_value_heads * head_dim
    layer = (
        ("attention_norm", "input_layernorm", (hidden,)),
        ("attention.wq", "self_attn.q_proj", (hidden, hidden), 0, head_dim),
        ("attention.wk", "self_attn.k_proj", (keys, hidden), 0, head_dim),
        ("attention.wv", "self_attn.v_proj", (keys, hidden), 0),
        ("attention.wo", "self_attn.o_proj", (hidden, hidden), 1),
        ("ffn_norm", "post_attention_layernorm", (hidden,)),
        ("feed_forward.w1", "mlp.gate_proj", (width, hidden), 0),
        ("feed_forward.w3", "mlp.up_proj", (width, hidden), 0),
        ("feed_forward.w2", "mlp.down_proj", (hidden, width), 1),
    )
    yield "tok_embeddings.weight", MetaTensor("model.embed_tokens.weight", (vocab, hidden), embedding_axis)
    for i in range(config.num_hidden_layers):
        for meta, ours, *rest in layer:
            yield f"layers.{i}.{meta}.weight", MetaTensor(f"model.layers.{i}.{ours}.weight", *rest)
    yield "norm.weight", MetaTensor("model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        yield "output.weight", MetaTensor("lm_head.weight", (vocab, hidden), 0)
