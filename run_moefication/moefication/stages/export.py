"""A LlamaMoE checkpoint written for other programs: a GGUF file for llama.cpp, or a class that engines bring along.

The result is read back and compared with the LlamaMoE on a text before the folder gets its name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...settings import ExportSettings
from .. import llama_cpp
from ..checkpoints.dense import DTYPES, resolve_model_path
from ..checkpoints.engine_model import EngineModel
from ..checkpoints.model_card import Origin, export_card
from ..checkpoints.moe import StoredMoE, verify_weights
from ..checkpoints.stock import glm4_moe, granitemoeshared
from ..checkpoints.tokenizers import carried_over
from ..checkpoints.writer import LICENCES, MAX_SHARD_BYTES, plan_shards, write_checkpoint_files, write_shard
from ..errors import MoEficationError, SettingError
from ..names import model_name
from ..progress import progress
from ..storage.files import digest
from ..storage.folder import ArtifactWriter
from ..storage.manifest import CARD, MANIFEST, ArtifactSpec, environment, read_manifest
from ..text.corpus import pack
from ..text.tokens import first_tokens
from .export_check import Reference, check_gguf, check_stock, require_near

ABOUT, CHECK = "about", "check"  # parts
MOST_BLOCK = 512  # tokens that are read at once
OUTTYPE_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
NewWriter = Callable[[list[str]], ArtifactWriter]


def export(
    moe_path: str | Path,
    text_path: str | Path,
    save_path: str | Path,
    settings: ExportSettings,
    *,
    device: str = "cpu",
    overwrite: bool = False,
) -> ArtifactWriter:
    """Write a LlamaMoE checkpoint in another format, and check the result on the first tokens of a text.

    Memory: the LlamaMoE in float32, and of a class of transformers the result as well; a GGUF file is mapped.
    """
    path = resolve_model_path(moe_path)
    verify_weights(path)
    model, name = EngineModel(StoredMoE(path), settings.max_selects), model_name(moe_path)
    if not Path(text_path).is_file():
        raise SettingError(f"text_path {text_path} is not a file")
    if Path(save_path).resolve() == path:
        raise SettingError(f"save_path {save_path} is the source checkpoint itself; choose another folder")
    config = model.reference
    tokens = first_tokens(Path(text_path), path, settings.max_tokens, config.vocab_size)
    blocks = [block for block in pack(tokens, min(MOST_BLOCK, config.max_position_embeddings)) if len(block) > 1]
    if not blocks:
        raise MoEficationError(f"{text_path} holds fewer than 2 tokens")
    spec = ArtifactSpec(
        stage="export",
        options=settings.recorded(),
        source=_source(path, name),
        environment=environment(device),
        inputs={"moe_path": model.moe.hashed(model.moe.config.to_dict()), "text": digest(tokens.tolist())},
    )
    reference = Reference(model, blocks, device)
    new_writer = partial(ArtifactWriter, Path(save_path), spec, overwrite=overwrite, exclusive=True)
    if settings.format == "gguf":
        return _export_gguf(model, name, reference, settings.outtype or ["f16"], new_writer)
    return _export_stock(model, name, reference, settings, new_writer)


def _source(path: Path, name: str) -> dict[str, Any]:
    """How the manifest names what the model was made from: the dense model, where that is known."""
    if (path / MANIFEST).exists():
        return read_manifest(path / MANIFEST)["source"]
    return {"name": name, "fingerprint": None}


@contextmanager
def discarding_what_is_refused(writer: ArtifactWriter) -> Iterator[None]:
    """If the check of a result refuses it, all that was written goes."""
    try:
        yield
    except MoEficationError:
        writer.discard()
        raise


def _export_gguf(
    model: EngineModel, name: str, reference: Reference, outtypes: Sequence[str], new_writer: NewWriter
) -> ArtifactWriter:
    """A file for each type, and a card."""
    if find_spec("gguf") is None:
        raise SettingError("format gguf needs the package gguf: pip install -e '.[engine]' -c constraints.txt")
    from ..checkpoints.gguf_file import GGUFModel
    from ..checkpoints.gguf_tokenizer import Tokenizer

    tokenizer = Tokenizer(model.moe.path, model.reference.vocab_size)
    files = {f"{name}-{one.upper()}.gguf": (one, GGUFModel(model, tokenizer, name, one)) for one in outtypes}
    with new_writer([*files, ABOUT]) as writer:
        missing = writer.missing()
        for file, (outtype, content) in files.items():
            if file in missing:
                entry, checked = writer.write(file, content.write), {"run": False}
                with discarding_what_is_refused(writer):
                    if llama_cpp.is_installed():
                        checked |= check_gguf(reference, writer.partial / file)
                        if outtype in OUTTYPE_DTYPES:
                            require_near(checked, file)
                    else:
                        content.require_written(writer.partial / file)
                writer.write_part(file, {file: entry}, checked)
        if ABOUT in missing:
            path = model.moe.path
            contents = {one: (path / one).read_bytes() for one in LICENCES if (path / one).is_file()}
            contents[CARD] = export_card(
                Origin.of_moe(path, name), name, model.reference, "gguf", writer.metrics()
            ).encode()
            entries = {one: writer.write(one, lambda f, c=content: f.write(c)) for one, content in contents.items()}
            writer.write_part(ABOUT, entries)
        writer.finish()
    return writer


def _export_stock(
    model: EngineModel, name: str, reference: Reference, settings: ExportSettings, new_writer: NewWriter
) -> ArtifactWriter:
    """A checkpoint of a class that transformers has."""
    own = model.moe.tensors["layers.0.mlp.experts.down_proj"].dtype
    dtype = DTYPES[OUTTYPE_DTYPES[settings.outtype[0]]] if settings.outtype else own
    if settings.format == "granitemoeshared":
        config, plan = granitemoeshared(model, dtype)
    else:
        config, plan = glm4_moe(model, dtype, lambda layer: reference.most_scores[layer])
    shards = plan_shards(plan, MAX_SHARD_BYTES)
    with new_writer([*shards, ABOUT, CHECK]) as writer:
        missing = writer.missing()
        for file in progress([file for file in shards if file in missing], "export", "shard"):
            write_shard(writer, file, shards[file])
        if ABOUT in missing:
            card = export_card(Origin.of_moe(model.moe.path, name), name, model.reference, settings.format)
            tokenizer = carried_over(model.moe.path, config.model_type)
            write_checkpoint_files(writer, ABOUT, model.moe.path, shards, config, card, tokenizer)
        if CHECK in missing:
            with discarding_what_is_refused(writer):
                checked = check_stock(reference, writer.partial)
                require_near(checked, str(writer.folder))
            writer.write_part(CHECK, {}, checked)
        writer.finish()
    return writer
