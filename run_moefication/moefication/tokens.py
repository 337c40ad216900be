"""Documents to one stream of tokens, kept on the disk, whatever the size of the text."""

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .checkpoints import TOKENIZER_FILES, Checkpoint, quiet_transformers
from .documents import DocumentReader, TextFile
from .errors import MoEficationError
from .files import digest, file_sha256, turn, write_atomically, write_json
from .progress import Progress, no_progress

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
BATCH_CHARACTERS = 4 << 20  # of text tokenised at once, over all cores: some 200 MB of memory
CACHE_VERSION = 2
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenStream:
    """A domain's tokens: int32, memory-mapped. `skipped_lines` of its text held no document."""

    tokens: torch.Tensor
    skipped_lines: int


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder; its code, if it brings any, is not run."""
    try:
        if not any((path / name).is_file() for name in VOCABULARY_FILES):  # some releases would then make an empty one
            raise FileNotFoundError(f"none of {', '.join(VOCABULARY_FILES)} is there")
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # missing files, unknown classes, broken JSON: each raises something else
        reason = str(error).strip().split("\n")[0]
        raise MoEficationError(f"{path} has no usable tokenizer ({reason})") from None


def tokenize(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """The documents as one token stream, int32, piece by piece, with EOS between documents (without one: nothing)."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    is_first = True
    for batch in _batches(documents):
        parts = []
        for ids in encode(batch, tokenizer):
            parts += [ids] if is_first else [separator, ids]
            is_first = False
        yield np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode(batch: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The same ids as `tokenizer(batch)`, on all cores and without the offsets that nobody asks for."""
    if not tokenizer.is_fast:
        return tokenizer(batch, verbose=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # which a tokenizer.json may ask for
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(batch)]


def token_stream(
    checkpoint: Checkpoint,
    domain: str,
    files: list[TextFile],
    cache_path: str | Path | None,
    *,
    skip_bad_lines: bool = False,
    progress: Progress = no_progress,
) -> TokenStream:
    """The tokens of a domain, from the cache if it holds just this text as this tokenizer cuts it.

    Without a cache they go to a temporary file, which lives as long as they are used. Processes that need the same
    text make it one after the other, so that all but the first find it there.
    """

    if cache_path is None:
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the mapping keeps it)
        skipped = _write_tokens(checkpoint, domain, files, file, skip_bad_lines, progress)
        file.flush()
        return TokenStream(_mapped(file), skipped)
    cached = Path(cache_path) / f"{domain}-{_cache_key(checkpoint, files, skip_bad_lines)[:32]}.tokens"
    with turn(cached.with_suffix(".lock")):
        stream = _read_cache(cached)
        if stream is None:
            skipped = 0

            def write(file) -> None:
                nonlocal skipped
                skipped = _write_tokens(checkpoint, domain, files, file, skip_bad_lines, progress)

            entry = write_atomically(cached, write)
            write_json(cached.with_suffix(".json"), entry | {"skipped_lines": skipped})
            stream = TokenStream(_mapped(cached), skipped)
    return stream


def _write_tokens(
    checkpoint: Checkpoint, domain: str, files: list[TextFile], file, skip_bad_lines: bool, progress: Progress
) -> int:
    """Write the raw tokens of all documents; returns the number of lines skipped."""
    reader = DocumentReader(files, skip_bad_lines)
    largest = -1
    for piece in _following(reader, tokenize(reader, load_tokenizer(checkpoint.path)), f"tokenise {domain}", progress):
        file.write(piece.data)
        largest = max(largest, int(piece.max()))
    if largest < 0:
        raise MoEficationError(f"{files[0]} holds no text")
    if largest >= checkpoint.config.vocab_size:
        raise MoEficationError(
            f"the tokenizer of {checkpoint.name} gives token {largest}, "
            f"its embedding has {checkpoint.config.vocab_size} rows"
        )
    return reader.skipped


def _following(
    reader: DocumentReader, pieces: Iterator[np.ndarray], what: str, progress: Progress
) -> Iterator[np.ndarray]:
    """The pieces, while a bar over the bytes that the reader has to read keeps up with it."""
    steps = iter(progress(range(-(-reader.total_bytes >> 20)), what, "MiB"))
    done = 0
    for piece in pieces:
        yield piece
        while done < reader.position >> 20 and next(steps, None) is not None:
            done += 1
    for _ in steps:
        pass


# ---------------------------------------------------------------------------------------------------- the cache


def _cache_key(checkpoint: Checkpoint, files: list[TextFile], skip_bad_lines: bool) -> str:
    tokenizer_files = {n: file_sha256(checkpoint.path / n) for n in TOKENIZER_FILES if (checkpoint.path / n).exists()}
    # The names too: they decide how a file is read.
    contents = [[file.path.suffix, file.member, file.plain_name, file_sha256(file.path)] for file in files]
    return digest([CACHE_VERSION, tokenizer_files, contents, skip_bad_lines])


def _mapped(file) -> torch.Tensor:
    return torch.from_numpy(np.memmap(file, dtype=np.int32, mode="c"))


def _read_cache(path: Path) -> TokenStream | None:
    """The cached tokens, or None if there are none or they are damaged (which is said)."""
    record_path = path.with_suffix(".json")  # written last
    if not record_path.exists():
        return None
    try:
        record = json.loads(record_path.read_bytes())
        if file_sha256(path) == record["sha256"] and isinstance(record["skipped_lines"], int):
            return TokenStream(_mapped(path), record["skipped_lines"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.debug("%s: %s", path, error)
    logger.warning("%s is damaged; tokenising again", path)
    return None
