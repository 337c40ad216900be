"""The tensors in a checkpoint's folder, found by the headers of its files and read one by one: safetensors or .bin."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import MoEficationError
from ..storage.files import load_tensors, read_json_object

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
HEAD = "lm_head.weight"
HEADS = (HEAD, "score.weight")
ADAPTER = "adapter_config.json"
MERGE_ADAPTER = "merge it into its base model first (peft: merge_and_unload, then save_pretrained)"
SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies (file and name there), and what it is, as its file's header says."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class StoredTensors:
    """The tensors of a checkpoint, read from its files when they are asked for.

    Attributes:
        path: the folder.
        tensors: name without the `model.` prefix -> `TensorInfo`.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], prefix: str):
        """`prefix`: what the names of all tensors but heads begin with in the files."""
        self.path, self.tensors = path, tensors
        self._prefix = prefix
        self._open_files: dict[str, Any] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by its name without `model.` prefix; memory-mapped, not to be written to."""
        info = self.tensors[name]
        if info.file not in self._open_files:
            self._open_files[info.file] = self._open(info.file)
        opened = self._open_files[info.file]
        return opened[info.name].detach() if isinstance(opened, dict) else opened.get_tensor(info.name)

    def stored_name(self, name: str) -> str:
        """The name that a tensor has in the files."""
        return name if name in HEADS else self._prefix + name

    def _open(self, file: str) -> Any:
        return open_weights(self.path / file)


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Name -> `TensorInfo` of every tensor, from the headers of the weight files."""
    for single in WEIGHT_FILES:
        index = path / f"{single}.index.json"
        if (path / single).exists():
            return _file_header(path, single)
        if index.exists():
            return _indexed_headers(path, index)
    adapter = f"; a LoRA adapter alone is none: {MERGE_ADAPTER}" if (path / ADAPTER).exists() else ""
    raise MoEficationError(
        f"{path} holds no weights ({' or '.join(WEIGHT_FILES)}, or shards of them with their index){adapter}"
    )


def open_weights(path: Path) -> Any:
    """The tensors of a file by name: an open safetensors file, or a dict; memory-mapped but for torch's old format."""
    if path.suffix == ".safetensors":
        return safe_open(path, "pt")
    # torch wrote no zip archives before 1.6. (A file that is not torch's at all is refused by the loader.)
    return load_tensors(path, mmap=zipfile.is_zipfile(path))


def _indexed_headers(path: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json_object(index, "download it again").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise MoEficationError(f"{index} has no weight_map from tensor to file; download it again")
    infos: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise MoEficationError(f"{index} names {file}, outside of the checkpoint's folder")
        for name, info in _file_header(path, file).items():
            if name in infos:
                raise MoEficationError(f"{path}: {name} lies in both {infos[name].file} and {file}")
            infos[name] = info
    for name, file in weight_map.items():
        if name == HEAD and name not in infos:
            continue  # a tied model needs none; the checkpoint refuses where one is needed
        if name not in infos or infos[name].file != file:
            raise MoEficationError(f"{index} says that {name} lies in {file}, where it is not; download both again")
    return infos


def _file_header(path: Path, file: str) -> dict[str, TensorInfo]:
    if not (path / file).is_file():
        raise MoEficationError(f"{path / file} is missing; download it again")
    (path / file).open("rb").close()  # raises PermissionError, where safetensors would say that there is no such file
    if file.endswith(".bin"):
        tensors = open_weights(path / file)
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
        ):
            raise MoEficationError(f"{path / file} is not a dict of tensors by name")
        return {name: TensorInfo(file, name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    try:
        with open_weights(path / file) as opened:
            views = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            dtypes = {name: SAFETENSORS_DTYPES.get(kind := view.get_dtype(), kind) for name, view in views.items()}
            return {name: TensorInfo(file, name, tuple(view.get_shape()), dtypes[name]) for name, view in views.items()}
    except (SafetensorError, OSError) as error:
        raise MoEficationError(
            f"{path / file} is not a whole safetensors file (a half download, or a Git LFS pointer?): {error}"
        ) from error
