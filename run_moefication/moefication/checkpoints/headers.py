"""The tensors in a checkpoint's folder, memory-mapped: safetensors or .bin, sharded or not."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import MoEficationError
from ..storage.files import digest, read_json_object
from ..storage.tensors import load_tensors

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
HEADS = (HEAD, "score.weight")
ADAPTER = "adapter_config.json"
# What an index may name although no file holds it: the head or the embedding of a tied model, one of which is enough,
# and rotary tables of older releases. The checkpoint refuses where one is needed.
MAY_BE_MISSING = re.compile(r"lm_head\.weight|(model\.)?embed_tokens\.weight|.+\.rotary_emb\.\w+")
FINGERPRINT_SAMPLES = 16
# Fields of config.json that say nothing about what the weights compute.
CONFIG_NOISE = {"_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "use_cache"}
MERGE_ADAPTER = "merge it into its base model first (peft: merge_and_unload, then save_pretrained)"


class StoredTensors:
    """The tensors of a checkpoint, memory-mapped, so that their values are read from the disk when they are used.

    By name without the prefix `model.`: `tensors`, not to be written to, and `files`, the name of the file of each.
    """

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor], files: dict[str, str], prefix: str):
        """Names may still carry `prefix`, with which those of all tensors but heads begin in the files."""
        self.path, self._prefix = path, prefix
        self.tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        self.files = {name.removeprefix(prefix): files[name] for name in tensors}

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its name without `model.` prefix, not to be written to."""
        return self.tensors[name]

    def stored_name(self, name: str) -> str:
        """The name that a tensor has in the files."""
        return name if name in HEADS else self._prefix + name

    def hashed(self, raw_config: dict[str, Any]) -> str:
        """sha256 over a config.json and every tensor's name, shape and sampled values, whatever files they lie in."""
        config = {key: value for key, value in raw_config.items() if key not in CONFIG_NOISE}
        tensors = []
        for name in sorted(self.tensors):
            flat = self.tensor(name).flatten()
            samples = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)].to(torch.float32)
            tensors.append([name, str(flat.dtype), self.tensors[name].shape, samples.numpy().tobytes().hex()])
        return digest([config, tensors])


def map_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors in a folder's weight files, memory-mapped but for torch's old format, and the file of each by name.
    Refused if a file is missing or damaged, or the index and the files disagree."""
    for single in WEIGHT_FILES:
        index = path / f"{single}.index.json"
        if (path / single).exists():
            tensors = _map_file(path / single)
            return tensors, dict.fromkeys(tensors, single)
        if index.exists():
            return _map_shards(path, index)
    adapter = f"; a LoRA adapter alone is none: {MERGE_ADAPTER}" if (path / ADAPTER).exists() else ""
    raise MoEficationError(
        f"{path} holds no weights ({' or '.join(WEIGHT_FILES)}, or shards of them with their index){adapter}"
    )


def _map_shards(path: Path, index: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    weight_map = read_json_object(index, "download it again").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise MoEficationError(f"{index} has no weight_map from tensor to file; download it again")
    tensors: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise MoEficationError(f"{index} names {file}, outside of the checkpoint's folder")
        shard = _map_file(path / file)
        if twice := shard.keys() & tensors.keys():
            raise MoEficationError(f"{path}: {min(twice)} lies in both {files[min(twice)]} and {file}")
        tensors |= shard
        files |= dict.fromkeys(shard, file)
    for name, file in weight_map.items():
        if files.get(name) != file and (name in files or not MAY_BE_MISSING.fullmatch(name)):
            raise MoEficationError(f"{index} says that {name} lies in {file}, where it is not; download both again")
    return tensors, files


def _map_file(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise MoEficationError(f"{file} is missing; download it again")
    file.open("rb").close()  # raises PermissionError, where safetensors would say that there is no such file
    if file.suffix == ".bin":
        # torch wrote no zip archives before 1.6. (A file that is not torch's at all is refused by the loader.)
        tensors = load_tensors(file, mmap=zipfile.is_zipfile(file))
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
        ):
            raise MoEficationError(f"{file} is not a dict of tensors by name")
        return {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise MoEficationError(
            f"{file} is not a whole safetensors file (a half download, or a Git LFS pointer?): {error}"
        ) from error
