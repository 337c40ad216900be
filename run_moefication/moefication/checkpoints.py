"""Dense LLaMA checkpoints, read tensor by tensor: safetensors or .bin, sharded or not, with or without a head.

Everything is checked when a checkpoint is opened, before any work: config, index, headers, names and shapes of all
tensors. Tensors are memory-mapped; nothing is held here.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.utils import logging

from .errors import MoEficationError
from .files import digest, load_tensors, read_json_object
from .progress import Progress, no_progress
from .weight_files import read_headers

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# The rows of these weights are the neurons of the MLP: what `--templates` may name.
TEMPLATES = ("layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.up_proj.weight")
FINGERPRINT_SAMPLES = 16
# Fields of config.json that say nothing about what the weights compute.
CONFIG_NOISE = {"_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "use_cache"}
# What makes a tokenizer; not every checkpoint has all.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
HEADS = ("lm_head.weight", "score.weight")
# Of checkpoints written by older transformers versions; computed from the config today.
IGNORED_TENSORS = re.compile(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def resolve_model_path(model_path: str) -> Path:
    """A local folder, or a hub id (`owner/name`), downloaded to the hub's own cache."""
    path = Path(model_path)
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise MoEficationError(f"--model_path {model_path} is a file; name the folder of the checkpoint")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_path) or model_path.startswith("."):
        raise MoEficationError(f"--model_path {model_path!r} is no folder here, and no hub id (owner/name)")
    try:
        return Path(snapshot_download(model_path, ignore_patterns=["*.gguf", "*.pth", "original/*", "onnx/*"]))
    except Exception as error:  # offline, unknown, gated, ...: the hub client has a class for each
        reason = str(error).strip().split("\n")[0]
        raise MoEficationError(
            f"--model_path {model_path} is no folder here and the hub has no answer ({reason})"
        ) from None


class Checkpoint:
    """A validated dense LLaMA checkpoint.

    Attributes:
        name: last part of the path as it was given; artifact folders are named after it.
        path: the folder.
        raw_config: config.json as it stands.
        config: the same as a `LlamaConfig` (Mistral's without sliding window is the same architecture).
        tensors: name without the `model.` prefix -> `TensorInfo`.
    """

    def __init__(self, model_path: str):
        self.path = resolve_model_path(model_path)
        self.name = Path(model_path).name or self.path.name
        if self.name in (".", ".."):
            self.name = self.path.name
        self.raw_config = _read_config(self.path)
        self.config = _llama_config(self.path, self.raw_config)
        infos = read_headers(self.path)
        self._prefix = "model." if "model.embed_tokens.weight" in infos else ""
        self.tensors = {name.removeprefix(self._prefix): info for name, info in infos.items()}
        # Heads apart, all names carry the prefix or none does.
        self._refuse_surplus(infos.keys() - map(self._stored_name, self.tensors))
        self._check_tensors()
        self._open_files: dict[str, Any] = {}

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the MLP weights."""
        return self.tensors[TEMPLATES[0].format(0)].dtype

    @property
    def lm_head(self) -> str | None:
        """Name of the tensor that makes logits of the last hidden states; None where there is none."""
        if self.config.tie_word_embeddings:
            return "embed_tokens.weight"
        return "lm_head.weight" if "lm_head.weight" in self.tensors else None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the config and over name, shape and sampled values of every tensor; free of the file layout."""
        config = {key: value for key, value in self.raw_config.items() if key not in CONFIG_NOISE}
        tensors = []
        for name in sorted(self.tensors):
            flat = self.tensor(name).flatten()
            samples = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)].to(torch.float32)
            tensors.append([name, str(flat.dtype), self.tensors[name].shape, samples.numpy().tobytes().hex()])
        return digest([config, tensors])

    @property
    def source(self) -> dict[str, Any]:
        """What manifests say of this model."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "num_layers": self.config.num_hidden_layers,
            "hidden_size": self.config.hidden_size,
            "intermediate_size": self.config.intermediate_size,
        }

    def check_finite(self, progress: Progress = no_progress) -> None:
        """Raise MoEficationError, naming it, if a tensor that today's LLaMA has holds NaN or infinite values."""
        head = [] if self.lm_head is None else [self.lm_head]
        for name in progress([*self.body_tensors(), *head], "check", "tensor"):
            self.finite_tensor(name)

    def body_tensors(self) -> list[str]:
        """Names of the tensors of the model without its heads, those that today's LLaMA has."""
        return [name for name in self.tensors if name not in HEADS and not IGNORED_TENSORS.fullmatch(name)]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its name without `model.` prefix; memory-mapped, not to be written to."""
        info = self.tensors[name]
        stored = self._stored_name(name)
        if info.file not in self._open_files:
            path = self.path / info.file
            is_safetensors = path.suffix == ".safetensors"
            self._open_files[info.file] = safe_open(path, "pt") if is_safetensors else load_tensors(path)
        opened = self._open_files[info.file]
        return opened[stored] if isinstance(opened, dict) else opened.get_tensor(stored)

    def finite_tensor(self, name: str) -> torch.Tensor:
        """As `tensor`, refused if it holds NaN or infinity."""
        tensor = self.tensor(name)
        if not tensor.sum(dtype=torch.float64).isfinite():
            raise MoEficationError(f"{self.path / self.tensors[name].file}: {name} holds NaN or infinite values")
        return tensor

    def mlp_tensor(self, layer: int, projection: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """`gate_proj.weight`, `up_proj.bias`, ... of a layer, in float32."""
        return self.finite_tensor(f"layers.{layer}.mlp.{projection}").to(device, torch.float32)

    def require_experts(self, num_experts: int) -> None:
        """Refuse a number of experts that does not cut the MLP into equal parts; names what would."""
        width = self.config.intermediate_size
        if 1 <= num_experts <= width and width % num_experts == 0:
            return
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        nearby = sorted(sorted(divisors, key=lambda n: abs(n - num_experts))[:5])
        raise MoEficationError(
            f"--num_experts {num_experts} does not divide the MLP width {width} of {self.name}; "
            f"near it, {', '.join(map(str, nearby))} do"
        )

    def load_model(self, device: str, dtype: torch.dtype) -> LlamaModel:
        """The whole dense model without its head, for a forward pass."""
        with quiet_transformers():
            # The tensors as they were checked here, whatever files they lie in.
            state = {name: self.tensor(name) for name in self.body_tensors()}
            model, loading = LlamaModel.from_pretrained(
                None, config=self.config, state_dict=state, dtype=dtype, output_loading_info=True
            )
        if loading["missing_keys"] or loading["mismatched_keys"]:
            raise MoEficationError(f"{self.path}: weights did not load ({sorted(loading['missing_keys'])[:3]})")
        return model.to(device).eval()

    def _stored_name(self, name: str) -> str:
        return name if name in HEADS else self._prefix + name

    def _refuse_surplus(self, names: Collection[str]) -> None:
        if names:
            raise MoEficationError(f"{self.path} holds {min(names)}, which its config.json has no place for")

    def _check_tensors(self) -> None:
        expected = set()
        shapes = _expected_shapes(self.path, self.config)
        if "score.weight" in self.tensors:  # of a classifier, with any number of labels
            labels = self.tensors["score.weight"].shape[:1]
            shapes = chain(shapes, [("score.weight", (*labels, self.config.hidden_size))])
        for name, shape in shapes:
            expected.add(name)
            if name not in self.tensors:
                if name == "lm_head.weight":
                    continue  # base models have none, tied ones need none
                raise MoEficationError(
                    f"{self.path} lacks the tensor {self._stored_name(name)}, which its config.json calls for"
                )
            info = self.tensors[name]
            if info.shape != shape:
                raise MoEficationError(
                    f"{self.path}: {name} has shape {list(info.shape)}, its config.json calls for {list(shape)}"
                )
            if info.dtype not in DTYPES.values():
                raise MoEficationError(f"{self.path}: {name} is {info.dtype}; float32, float16 and bfloat16 are read")
        self._refuse_surplus([n for n in self.tensors if n not in expected and not IGNORED_TENSORS.fullmatch(n)])


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the reports and bars of transformers while something that is checked here is loaded."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------- config


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json_object(path / "config.json", "is this the folder of a transformers checkpoint?")
    kind = config.get("model_type")
    if kind == "mistral" and config.get("sliding_window") is not None:
        raise MoEficationError(f"{path} is a Mistral with sliding_window, which LLaMA attention does not have")
    if kind not in ("llama", "mistral"):
        raise MoEficationError(f"{path} is a {kind!r} model; llama, and mistral without sliding_window, are converted")
    if config.get("quantization_config"):
        raise MoEficationError(f"{path} is quantised; give the checkpoint it was quantised from")
    if config.get("auto_map"):
        raise MoEficationError(f"{path} brings code of its own (auto_map in config.json), which is not run here")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise MoEficationError(f"{path} has hidden_act {config['hidden_act']!r}; MLPs with SiLU (SwiGLU) are converted")
    return config


def _llama_config(path: Path, raw: dict[str, Any]) -> LlamaConfig:
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        value = raw.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise MoEficationError(f"{path / 'config.json'}: {name} is {value!r}; a positive integer is needed")
    fields = {key: value for key, value in raw.items() if key not in ("model_type", "sliding_window", "architectures")}
    try:
        with quiet_transformers():
            return LlamaConfig.from_dict(fields)
    except Exception as error:  # the config's validators raise their own classes
        raise MoEficationError(f"{path / 'config.json'}: {str(error).strip().splitlines()[-1].strip()}") from None


def _expected_shapes(path: Path, config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names (without `model.`) and shapes of a LLaMA of this config, from transformers itself.

    One layer is built on the meta device and repeated lazily, so that an absurd layer count costs nothing.
    """
    one_layer = LlamaConfig.from_dict(config.to_dict() | {"num_hidden_layers": 1})
    try:
        with torch.device("meta"):
            tensors = LlamaForCausalLM(one_layer).state_dict()
    except Exception as error:  # sizes that no tensor has (2^63, -1, no key-value heads): a class of error for each
        reason = str(error).strip().split("\n")[0]
        raise MoEficationError(f"{path / 'config.json'} describes no model that can be built ({reason})") from None
    shapes = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in tensors.items()}
    for layer in range(config.num_hidden_layers):
        for name, shape in shapes.items():
            if name.startswith("layers.0."):
                yield name.replace("layers.0.", f"layers.{layer}.", 1), shape
    for name, shape in shapes.items():
        if not name.startswith("layers.0."):
            yield name, shape
