"""LLaMA checkpoints, read tensor by tensor: safetensors or .bin, sharded or not, with or without a head.

All is checked when a checkpoint is opened, before any work: config, index, headers, names and shapes of all tensors.
"""

import logging
import re
from collections.abc import Collection, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

from ...settings import TEMPLATES
from ..errors import MoEficationError, SettingError
from ..names import model_name
from ..progress import Progress, progress
from .dense_config import expected_shapes, read_dense_config
from .headers import ADAPTER, EMBEDDING, HEAD, HEADS, MERGE_ADAPTER, StoredTensors, map_tensors
from .transformers_library import first_line, quiet_transformers

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Logits do not depend on the stored rotary tables of older releases, nor on the value head of reinforcement learning.
UNUSED_TENSORS = re.compile(
    r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|(v_head|value_head)\..+"
)
# What else repositories of the hub hold: other formats, and the same weights for other libraries.
NO_WEIGHTS_OF_OURS = ["*.gguf", "*.pth", "*.h5", "*.msgpack", "consolidated*", "original/*", "onnx/*"]
# The hub client raises these for the hub's answers, the network (the base of the first), files, and names.
HUB_ERRORS = (HfHubHTTPError, HfHubHTTPError.__bases__[0], OSError, ValueError)


def resolve_model_path(model_path: str | Path) -> Path:
    """A local folder, or a hub id (`owner/name`), downloaded to the hub's own cache."""
    path, model_path = Path(model_path), str(model_path)
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise SettingError(f"model_path {model_path} is a file; name the folder of the checkpoint")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model_path) or model_path.startswith("."):
        raise SettingError(f"model_path {model_path!r} is no folder here, and no hub id (owner/name)")
    fetch = partial(snapshot_download, model_path, tqdm_class=Progress)
    try:
        folder = Path(fetch(ignore_patterns=[*NO_WEIGHTS_OF_OURS, "*.bin"]))
        if any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
            return folder
        return Path(fetch(ignore_patterns=NO_WEIGHTS_OF_OURS))
    except HUB_ERRORS as error:
        reason = first_line(error)
        raise SettingError(f"model_path {model_path} is no folder here and the hub has no answer ({reason})") from error


class LlamaCheckpoint(StoredTensors):
    """A validated checkpoint of a LLaMA, whatever stands for its MLPs: those of its tensors that are used, and its
    config. Subclasses read config.json, and say what tensors there must be.

    Attributes:
        name: last part of the path as it was given; artifact folders are named after it.
        hub_id: the id on the hub, where the path was one; else None.
        raw_config: config.json as it stands.
        config: the same as a `LlamaConfig`, with the tied or untied head that the tensors have.
    """

    MLP_TENSOR: str  # one of the weights of the MLPs, whose dtype is theirs
    UNUSED = UNUSED_TENSORS

    def __init__(self, model_path: str | Path):
        path = resolve_model_path(model_path)
        self.name = model_name(model_path)
        self.hub_id = None if Path(model_path).is_dir() else str(model_path)
        self.raw_config, self.config = self._read_config(path)
        stored, files = map_tensors(path)
        unused = sorted(filter(self.UNUSED.fullmatch, stored))
        for name in unused:
            del stored[name]
        prefix = "model." if {f"model.{EMBEDDING}", "model.norm.weight"} & stored.keys() else ""
        super().__init__(path, stored, files, prefix)
        # All names but those of heads carry the prefix, or none does.
        self._refuse_surplus(stored.keys() - map(self.stored_name, self.tensors))
        if self.config.tie_word_embeddings and EMBEDDING not in self.tensors and HEAD in self.tensors:
            for named in (self.tensors, self.files):  # the one tensor of a tied model, under its other name
                named[EMBEDDING] = named.pop(HEAD)
        self._check_tensors()
        self._settle_head()
        self._tell_unread(unused)

    def _read_config(self, path: Path) -> tuple[dict[str, Any], LlamaConfig]:
        """config.json in a folder as it stands, and as a `LlamaConfig`; refused if it is not of this kind of model."""
        raise NotImplementedError

    def _expected_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names (without `model.`) and shapes of all tensors, lazily; `HEAD` may be absent."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the MLP weights."""
        return self.tensors[self.MLP_TENSOR].dtype

    @property
    def lm_head(self) -> str | None:
        """Name of the tensor that makes logits of the last hidden states; None where there is none."""
        if self.config.tie_word_embeddings:
            return EMBEDDING
        return HEAD if HEAD in self.tensors else None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the config and every tensor's name, shape and sampled values, whatever files they lie in."""
        return self.hashed(self.raw_config)

    @property
    def source(self) -> dict[str, Any]:
        """How manifests describe this model."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "num_layers": self.config.num_hidden_layers,
            "hidden_size": self.config.hidden_size,
            "intermediate_size": self.config.intermediate_size,
        }

    def check_finite(self) -> None:
        """Raise MoEficationError if a tensor that a causal LM uses holds NaN or infinity; the error names it."""
        head = [] if self.lm_head is None else [self.lm_head]
        for name in progress([*self.body_tensors(), *head], f"check {self.name}", "tensor"):
            self.finite_tensor(name)

    def body_tensors(self) -> list[str]:
        """Names of the tensors of the model without its heads."""
        return [name for name in self.tensors if name not in HEADS]

    def finite_tensor(self, name: str) -> torch.Tensor:
        """As `tensor`; raises MoEficationError if it holds NaN or infinity."""
        tensor = self.tensor(name)
        if not tensor.sum(dtype=torch.float64).isfinite():
            raise MoEficationError(f"{self.path / self.files[name]}: {name} holds NaN or infinite values")
        return tensor

    def _settle_head(self) -> None:
        """If `tie_word_embeddings` and the tensors disagree, the tensors decide, as they do in transformers."""
        if not (self.config.tie_word_embeddings and HEAD in self.tensors):
            return
        head, embedding = (self.tensor(name).to(self.dtype) for name in (HEAD, EMBEDDING))
        if not torch.equal(head, embedding):
            self.config.tie_word_embeddings = False
            self._warn(
                "its lm_head.weight is kept: it is not the embedding, though config.json has tie_word_embeddings"
            )

    def _tell_unread(self, unused: list[str]) -> None:
        if unused:
            more = f" and {len(unused) - 1} more like it are" if len(unused) > 1 else " is"
            self._warn(f"{unused[0]}{more} not read: the logits do not depend on it")
        if (self.path / ADAPTER).exists():
            self._warn(f"the LoRA adapter beside the weights is not read; {MERGE_ADAPTER}")

    def _warn(self, what: str) -> None:
        logger.warning("%s: %s", self.path, what)

    def _refuse_surplus(self, names: Collection[str]) -> None:
        if names:
            raise MoEficationError(
                f"{self.path} holds {min(names)}, which its config.json has no place for: "
                f"is it this model's config, or a tensor to be removed from the file?"
            )

    def _check_tensors(self) -> None:
        expected = set()
        for name, shape in self._expected_shapes():
            expected.add(name)
            tensor = self.tensors.get(name)
            if tensor is None and name == HEAD:
                continue  # base models have none, tied ones need none
            if tensor is None:
                missing = self.stored_name(name)
                raise MoEficationError(f"{self.path} lacks the tensor {missing}, which its config.json calls for")
            if tensor.shape != shape:
                found, wanted = list(tensor.shape), list(shape)
                raise MoEficationError(f"{self.path}: {name} has shape {found}, its config.json calls for {wanted}")
            if tensor.dtype not in DTYPES.values():
                raise MoEficationError(f"{self.path}: {name} is {tensor.dtype}; {', '.join(DTYPES)} are read")
        self._refuse_surplus(self.tensors.keys() - expected)


class DenseCheckpoint(LlamaCheckpoint):
    """A validated dense LLaMA checkpoint: those of its tensors that today's LLaMA uses, and its config."""

    MLP_TENSOR = TEMPLATES[0].format(0)

    def _read_config(self, path: Path) -> tuple[dict[str, Any], LlamaConfig]:
        return read_dense_config(path)

    def _expected_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from expected_shapes(self.path, self.config)
        if "score.weight" in self.tensors:  # a classifier has any number of labels
            labels = self.tensors["score.weight"].shape[:1]
            yield "score.weight", (*labels, self.config.hidden_size)

    def mlp_tensor(self, layer: int, projection: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """`gate_proj.weight`, `up_proj.bias`, ... of a layer, in float32."""
        return self.finite_tensor(f"layers.{layer}.mlp.{projection}").to(device).to(torch.float32)

    def require_experts(self, num_experts: int) -> None:
        """Raise SettingError if so many experts cannot be equal parts of the MLP; the error names numbers that can."""
        width = self.config.intermediate_size
        if 1 <= num_experts <= width and width % num_experts == 0:
            return
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        nearby = sorted(sorted(divisors, key=lambda n: abs(n - num_experts))[:5])
        raise SettingError(
            f"num_experts {num_experts} does not divide the MLP width {width} of {self.name}; "
            f"near it, {', '.join(map(str, nearby))} do"
        )

    def load_model(self, device: str, dtype: torch.dtype) -> LlamaModel:
        """The whole dense model without its head, for a forward pass."""
        return self._load(LlamaModel, {name: self.tensor(name) for name in self.body_tensors()}, device, dtype)

    def load_causal_lm(self, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
        """The whole dense model with its head."""
        if self.lm_head is None:
            raise MoEficationError(f"{self.path} lacks weights of a causal LM ({HEAD})")
        state = {f"model.{name}": self.tensor(name) for name in self.body_tensors()}
        if self.lm_head == HEAD:
            state[HEAD] = self.tensor(HEAD)
        return self._load(LlamaForCausalLM, state, device, dtype)

    def _load(
        self, model_class: type[PreTrainedModel], state: dict[str, torch.Tensor], device: str, dtype: torch.dtype
    ) -> PreTrainedModel:
        # transformers gets the tensors that were checked here, not the files.
        with quiet_transformers():
            model, loading = model_class.from_pretrained(
                None, config=self.config, state_dict=state, dtype=dtype, output_loading_info=True
            )
        if loading["missing_keys"] or loading["mismatched_keys"]:
            raise MoEficationError(f"{self.path}: weights did not load ({sorted(loading['missing_keys'])[:3]})")
        return model.to(device).eval()
