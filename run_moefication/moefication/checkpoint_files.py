"""Everything in a new LlamaMoE checkpoint beside its weights."""

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import llama_moe
from llama_moe import LlamaMoEConfig

from .artifacts import ArtifactWriter
from .sharding import WEIGHTS_INDEX, PlannedTensor, shard_index

CODE_FILES = ("configuration_llama_moe.py", "modeling_llama_moe.py", "moe_layers.py", "gates.py")
# Copied as they are: loading and saving them again loses templates, and refuses some generation configs.
COPIED_FILES = (
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
)


def write_checkpoint_files(
    writer: ArtifactWriter,
    source: Path,
    shards: dict[str, list[PlannedTensor]],
    config: LlamaMoEConfig,
    card: str,
    tokenizer: dict[str, bytes],
) -> dict[str, dict[str, Any]]:
    """Write index, config, code, model card and the tokenizer's files, and copy licences and the like from `source`.

    Returns: the files' manifest entries.
    """
    contents = {file: (resources.files(llama_moe) / file).read_bytes() for file in CODE_FILES}
    if len(shards) > 1:
        contents[WEIGHTS_INDEX] = (json.dumps(shard_index(shards), indent=2) + "\n").encode()
    contents["README.md"] = card.encode()
    contents["config.json"] = config.to_json_string().encode()
    contents |= tokenizer

    files = {}
    for name in COPIED_FILES:
        if (source / name).is_file():
            with (source / name).open("rb") as original:
                files[name] = writer.write(name, lambda file, o=original: shutil.copyfileobj(o, file))
    for name, content in contents.items():
        files[name] = writer.write(name, lambda file, c=content: file.write(c))
    return files
