"""Writing new checkpoints: the plan of which tensor lies in which file comes first, the tensors file by file."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save
from transformers import PreTrainedConfig

import llama_moe
from llama_moe import LlamaMoEConfig

from ..errors import MoEficationError
from ..storage.folder import ArtifactWriter
from ..storage.manifest import CARD

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS}.index.json"
MAX_SHARD_BYTES = 2 << 30
CODE_FILES = (
    *("configuration_llama_moe.py", "modeling_llama_moe.py"),
    *("moe_layers.py", "expert_kernels.py", "triton_kernels.py", "gates.py"),
)
# These files are copied: loading and saving them would lose templates, and refuse some generation configs.
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
COPIED_FILES = ("chat_template.json", "generation_config.json", *LICENCES)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the new checkpoint: known by name, shape and dtype before its values are. `make` gives these; where
    it is None, `write_shard` is handed them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def made(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor itself, in its dtype, contiguous; refused where it is not what was planned."""
        tensor = (self.make() if self.make else values[self.name]).to(self.dtype).contiguous()
        if tuple(tensor.shape) != self.shape:
            raise MoEficationError(f"{self.name} came out as {list(tensor.shape)}, {list(self.shape)} was planned")
        return tensor


def plan_shards(plan: list[PlannedTensor], max_shard_bytes: int) -> dict[str, list[PlannedTensor]]:
    """File name -> its tensors, in order, each file at most `max_shard_bytes` or one tensor."""
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for planned in plan:
        if groups[-1] and size + planned.num_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(planned)
        size += planned.num_bytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def shard_index(shards: dict[str, list[PlannedTensor]]) -> dict:
    """The content of `WEIGHTS_INDEX`, which more than one file needs."""
    tensors = [(planned, file) for file, group in shards.items() for planned in group]
    return {
        "metadata": {"total_size": sum(planned.num_bytes for planned, _ in tensors)},
        "weight_map": {planned.name: file for planned, file in tensors},
    }


def write_shard(
    writer: ArtifactWriter,
    file: str,
    planned: list[PlannedTensor],
    values: Mapping[str, torch.Tensor] = MappingProxyType({}),
    metrics: Any = None,
) -> None:
    """Make the tensors of one safetensors file, write it, and record it as a finished part. `values`: of exactly those
    tensors that are planned without `make`, by name."""
    if unplanned := values.keys() ^ {tensor.name for tensor in planned if tensor.make is None}:
        raise KeyError(f"{file}: planned or given, but not both: {', '.join(sorted(unplanned))}")
    tensors = {tensor.name: tensor.made(values) for tensor in planned}
    writer.write_part(file, {file: writer.write(file, lambda f: f.write(save(tensors, {"format": "pt"})))}, metrics)


def write_checkpoint_files(
    writer: ArtifactWriter,
    part: str,
    source: Path,
    shards: dict[str, list[PlannedTensor]],
    config: PreTrainedConfig,
    card: str,
    tokenizer: dict[str, bytes],
    metrics: Any = None,
) -> None:
    """Write index, config, card and tokenizer, and code where transformers has none, and copy licences and the like
    from `source`, as one part."""
    code = CODE_FILES if isinstance(config, LlamaMoEConfig) else ()
    contents = {file: (resources.files(llama_moe) / file).read_bytes() for file in code}
    if len(shards) > 1:
        contents[WEIGHTS_INDEX] = (json.dumps(shard_index(shards), indent=2) + "\n").encode()
    contents[CARD] = card.encode()
    contents["config.json"] = config.to_json_string().encode()
    contents |= tokenizer
    contents = {name: (source / name).read_bytes() for name in COPIED_FILES if (source / name).is_file()} | contents
    files = {name: writer.write(name, lambda file, c=content: file.write(c)) for name, content in contents.items()}
    writer.write_part(part, files, metrics)
