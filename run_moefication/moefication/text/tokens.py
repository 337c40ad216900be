"""Documents to one stream of tokens, kept on the disk, whatever the size of the text."""

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.tokenizers import load_tokenizer, tokenizer_files
from ..errors import MoEficationError
from ..progress import Progress
from ..storage.files import digest, file_sha256, locked, read_json_object, write_atomically, write_json
from .documents import Document, DocumentReader, grouped
from .text_files import TextFile, find_text_files

BATCH_CHARACTERS = 4 << 20  # that much text is tokenised at once, on all cores, in some 200 MB of memory
CACHE_VERSION = 4
CURE = "remove it, and the text is tokenised again"  # for a damaged record of a cache
logger = logging.getLogger(__name__)


class TokenStream(NamedTuple):
    """A domain's tokens: int32, memory-mapped. `skipped_lines` of its text held no document."""

    tokens: torch.Tensor
    skipped_lines: int


def tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, vocab_size: int, bad: Callable[[str, str], None]
) -> Iterator[np.ndarray]:
    """The documents as one token stream, int32, piece by piece, with EOS between documents (without one: nothing).

    `bad` is called with the place of a document that has a token beyond the `vocab_size` rows of the model's embedding,
    and why it cannot be used; where it returns, the document is left out.
    """
    eos = tokenizer.eos_token_id
    if eos is not None and eos >= vocab_size:
        raise MoEficationError(
            f"the tokenizer ends documents with token {eos} ({tokenizer.eos_token}), "
            f"but the model's embedding has {vocab_size} rows"
        )
    separator = np.array([] if eos is None else [eos], dtype=np.int32)
    is_first = True
    for batch in grouped(documents, lambda document: len(document.text), BATCH_CHARACTERS):
        parts = []
        for document, ids in zip(batch, encode([document.text for document in batch], tokenizer), strict=True):
            tokens = np.asarray(ids, dtype=np.int32)
            if len(tokens) and (largest := int(tokens.max())) >= vocab_size:
                token = tokenizer.convert_ids_to_tokens(largest)
                bad(document.place, f"holds token {largest} ({token!r}), but the embedding has {vocab_size} rows")
                continue
            parts += [tokens] if is_first else [separator, tokens]
            is_first = False
        if parts:
            yield np.concatenate(parts)


def first_tokens(text_path: Path, model_path: Path, max_tokens: int | None, vocab_size: int) -> torch.Tensor:
    """The first tokens of a text by a model's tokenizer, read no further than needed; `vocab_size` as in `tokenize`."""
    pieces, count = [], 0
    reader = DocumentReader(find_text_files(text_path))
    tokens = tokenize(reader, load_tokenizer(model_path), vocab_size, reader.bad)
    for piece in tokens if max_tokens else _shown(tokens, reader, text_path.name):
        pieces.append(torch.from_numpy(piece))
        count += len(piece)
        if max_tokens is not None and count >= max_tokens:
            break
    return torch.cat(pieces)[:max_tokens] if pieces else torch.empty(0, dtype=torch.int32)


def _shown(pieces: Iterator[np.ndarray], reader: DocumentReader, what: str) -> Iterator[np.ndarray]:
    """The pieces, made of what a reader reads, under a bar of its bytes."""
    with Progress(total=reader.total_bytes, desc=f"tokenise {what}", unit="B", unit_scale=True) as bar:
        for piece in pieces:
            yield piece
            bar.update(reader.position - bar.n)


def encode(batch: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of `tokenizer(batch)`, made on all cores and without offsets, which nobody needs."""
    if not tokenizer.is_fast:
        return tokenizer(batch, verbose=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer.json may ask for it
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(batch)]


def token_stream(
    checkpoint: DenseCheckpoint, domain: str, files: list[TextFile], cache_path: str | Path | None, skip_bad_lines: bool
) -> TokenStream:
    """The tokens of a domain, from the cache if it holds just this text as this tokenizer cuts it; without a cache in a
    temporary file. Processes that need the same text make it one after the other: all but the first find it there."""
    reader = DocumentReader(files, skip_bad_lines)
    write = partial(_write_tokens, checkpoint, domain, reader)
    if cache_path is None:
        file = tempfile.TemporaryFile()  # noqa: SIM115 (the mapping keeps it)
        write(file)
        file.flush()
        return TokenStream(_mapped(file), reader.skipped)
    cached = Path(cache_path) / f"{domain}-{_cache_key(checkpoint, files, skip_bad_lines)[:32]}.tokens"
    record = cached.with_suffix(".json")  # written last
    with locked(FileLock(cached.with_suffix(".lock"))):
        is_whole = (
            record.exists() and cached.exists() and file_sha256(cached) == read_json_object(record, CURE)["sha256"]
        )
        if record.exists() and not is_whole:
            logger.warning("%s is damaged; tokenising again", cached)
        for unfinished in cached.parent.glob(f".{cached.name}.*.tmp"):  # of a killed run
            unfinished.unlink()
        if not is_whole:
            entry = write_atomically(cached, write)
            write_json(record, entry | {"skipped_lines": reader.skipped})
        return TokenStream(_mapped(cached), read_json_object(record, CURE)["skipped_lines"])


def _write_tokens(checkpoint: DenseCheckpoint, domain: str, reader: DocumentReader, file: BinaryIO) -> None:
    tokenizer, vocab_size = load_tokenizer(checkpoint.path), checkpoint.config.vocab_size
    count = 0
    for piece in _shown(tokenize(reader, tokenizer, vocab_size, reader.bad), reader, domain):
        file.write(piece.data)
        count += len(piece)
    if not count:
        skipped = f" but for {reader.skipped:,} lines that were skipped" if reader.skipped else ""
        raise MoEficationError(f"{reader.files[0]} holds no text{skipped}")


def _cache_key(checkpoint: DenseCheckpoint, files: list[TextFile], skip_bad_lines: bool) -> str:
    tokenizer = {name: digest(content.hex()) for name, content in tokenizer_files(checkpoint.path).items()}
    libraries = [version(package) for package in ("transformers", "tokenizers")]  # which read the same files otherwise
    # What the class of the tokenizer follows from, and which tokens are refused.
    model = [checkpoint.raw_config.get(name) for name in ("model_type", "tokenizer_class")]
    shown = Progress(files, "compare text with the cache", unit="file", leave=False)
    # The names too: they decide how a file is read.
    contents = [[file.path.suffix, file.member, file.plain_name, file_sha256(file.path)] for file in shown]
    return digest([CACHE_VERSION, tokenizer, libraries, model, checkpoint.config.vocab_size, contents, skip_bad_lines])


def _mapped(file) -> torch.Tensor:
    return torch.from_numpy(np.memmap(file, dtype=np.int32, mode="c"))
