"""Text to token blocks: documents, tokenised, joined, packed, and mixed as LLaMA's pretraining mixed its domains."""

import codecs
import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .checkpoints import TOKENIZER_FILES, Checkpoint, quiet_transformers
from .errors import MoEficationError
from .files import digest, file_sha256, tensor_sha256, write_atomically
from .progress import Progress, no_progress

# Sampling proportions of LLaMA's pretraining data (Touvron et al. 2023, table 1), by the word a file's name carries.
LLAMA_MIX = {
    "commoncrawl": 0.67,
    "c4": 0.15,
    "github": 0.045,
    "wikipedia": 0.045,
    "book": 0.045,
    "arxiv": 0.025,
    "stackexchange": 0.02,
}
DEFAULT_BLOCK_SIZE = 2048
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
DOCUMENTS_PER_BATCH = 256
MAX_LINE_BYTES = 64 << 20
CACHE_VERSION = 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DomainShare:
    """One row of the mix that was applied, in tokens."""

    domain: str
    weight: float
    available: int
    asked: int
    got: int


@dataclass(frozen=True)
class Corpus:
    """Token blocks, each an int32 tensor of at most the block size, in the order every stage numbers them.

    `options` are those that chose the blocks, as manifests record them.
    """

    blocks: list[torch.Tensor]
    mix: list[DomainShare]
    options: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def digest(self) -> str:
        """sha256 over the blocks: stands for the text, the tokenizer and the choice of blocks in manifests."""
        return digest([tensor_sha256(block) for block in self.blocks])


# ---------------------------------------------------------------------------------------------------- documents


def read_documents(path: Path) -> Iterator[str]:
    """The non-empty documents of a file: the "text" of each line of a .jsonl, any other file as one document.

    Raises:
        MoEficationError: names file and line of whatever is not a JSON object with a string "text" in UTF-8.
    """
    if path.suffix != ".jsonl":
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise MoEficationError(f"{path} is not UTF-8 text (byte {error.start})") from None
        if text.strip():
            yield text
        return
    with path.open("rb") as file:
        for number in range(1, 1 << 62):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise MoEficationError(
                    f"{path}:{number}: line longer than {MAX_LINE_BYTES >> 20} MiB; split the document"
                )
            if line.removeprefix(codecs.BOM_UTF8).strip():
                text = _text_of_line(line, f"{path}:{number}")
                if text.strip():
                    yield text


def _text_of_line(line: bytes, place: str) -> str:
    try:
        text = json.loads(line.decode("utf-8-sig"))["text"]
        if not isinstance(text, str):
            raise TypeError
        text.encode()  # a lone surrogate is valid JSON, but no tokenizer takes it
    except UnicodeError:
        raise MoEficationError(f"{place}: not UTF-8 text") from None
    except KeyError:
        raise MoEficationError(f'{place}: no "text" field') from None
    except TypeError:
        raise MoEficationError(f'{place}: not a JSON object with a string "text"') from None
    except (ValueError, RecursionError):
        raise MoEficationError(f"{place}: not valid JSON") from None
    return text


# ---------------------------------------------------------------------------------------------------- tokens


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


def tokenize(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, progress: Progress = no_progress, what: str = ""
) -> torch.Tensor:
    """All documents as one int32 token stream, with EOS between them (tokenizers without EOS: nothing)."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents, parts = iter(documents), []
    batches = iter(lambda: list(islice(documents, DOCUMENTS_PER_BATCH)), [])
    for batch in progress(batches, f"tokenise {what}", "batch"):
        for ids in tokenizer(batch, verbose=False)["input_ids"]:
            parts += [separator, ids] if parts else [ids]
    return torch.from_numpy(np.concatenate([np.asarray(part, dtype=np.int32) for part in parts] or [np.empty(0, "i4")]))


def pack(tokens: torch.Tensor, block_size: int) -> list[torch.Tensor]:
    """Cut a token stream into blocks; the last, shorter one keeps its length."""
    return list(tokens.split(block_size)) if len(tokens) else []


def require_block_size(block_size: int | None, max_positions: int, name: str) -> int:
    """The block size to use: the one asked for, or 2048, or what the model takes at most."""
    if block_size is None:
        return min(DEFAULT_BLOCK_SIZE, max_positions)
    if not 2 <= block_size <= max_positions:
        raise MoEficationError(f"--block_size {block_size} is outside of 2 to {max_positions}, the positions of {name}")
    return block_size


# ---------------------------------------------------------------------------------------------------- the mix


def parse_domain_weights(text: str | None) -> dict[str, float] | None:
    """`c4=0.5,github=0.5` -> weights by domain; None stays None (LLaMA's mix)."""
    if text is None:
        return None
    weights: dict[str, float] = {}
    for item in text.split(","):
        domain, _, number = item.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not domain.strip() or not 0 < weight < float("inf"):
            raise MoEficationError(f"--domain_weights {text!r}: {item!r} is not of the form domain=positive number")
        if _plain(domain) in weights:
            raise MoEficationError(f"--domain_weights {text!r} names {domain.strip()} twice")
        weights[_plain(domain)] = weight
    return weights


def find_domains(data_path: str | Path, weights: dict[str, float] | None) -> dict[str, list[Path]]:
    """The files of each domain in a folder (not below it), or a single file; the domain is a word of the file's name.

    With weights given, only files of these domains are taken. Without, a folder where no name carries a domain of
    LLaMA's mix is one domain of its own; a folder where only some do is refused rather than read in part.
    """
    path = Path(data_path)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix == ".jsonl" and file.is_file())
    else:
        raise MoEficationError(f"--train_data_path {data_path} does not exist")
    if not files:
        raise MoEficationError(f"--train_data_path {data_path} holds no .jsonl file; unpack the zip files first")
    domains: dict[str, list[Path]] = {}
    unnamed = []
    for file in files:
        matches = [domain for domain in weights or LLAMA_MIX if domain in _plain(file.name)]
        if len(matches) > 1:
            raise MoEficationError(f"{file} names several domains ({', '.join(matches)}); rename it")
        if matches:
            domains.setdefault(matches[0], []).append(file)
        else:
            unnamed.append(file)
    if weights:
        absent = [domain for domain in weights if domain not in domains]
        if absent:
            raise MoEficationError(
                f"--domain_weights names {absent[0]}, but no file name in {data_path} carries that word"
            )
    elif not domains:
        return {"text": unnamed}
    elif unnamed:
        raise MoEficationError(
            f"{unnamed[0]} names none of the domains {', '.join(LLAMA_MIX)}, as other files there do; "
            f"rename it, or choose with --domain_weights"
        )
    return domains


def training_corpus(
    checkpoint: Checkpoint,
    data_path: str | Path,
    cache_path: str | Path | None,
    *,
    block_size: int,
    domain_weights: dict[str, float] | None = None,
    data_use_percent: float = 1.0,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Corpus:
    """Blocks of the domains in a folder, in their proportions: as many tokens as the scarcest domain allows.

    Blocks are drawn at random within each domain, the last one cut so that the shares are exact, and shuffled across
    domains. Memory: 4 bytes per token of the whole text.

    Args:
        data_use_percent: the share of the possible tokens to take, in (0, 1].
        max_tokens: an upper limit on the tokens taken, all domains together.
    """
    if not 0 < data_use_percent <= 1:
        raise MoEficationError(
            f"--data_use_percent {data_use_percent} is not a fraction in (0, 1]; one percent is 0.01"
        )
    if max_tokens is not None and max_tokens < 1:
        raise MoEficationError(f"--max_tokens {max_tokens} must be at least 1")
    domains = find_domains(data_path, domain_weights)
    streams = {
        name: _domain_tokens(checkpoint, name, files, cache_path, block_size, progress)
        for name, files in domains.items()
    }
    mix = domain_weights or LLAMA_MIX
    weights = {name: mix.get(name, 1.0) for name in streams}
    weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    total = data_use_percent * min(len(stream) / weights[name] for name, stream in streams.items())
    total = min(total, max_tokens or total)

    left = math.inf if max_tokens is None else max_tokens
    generator = np.random.default_rng(seed)
    blocks, shares = [], []
    for name, stream in streams.items():
        asked = min(len(stream), round(total * weights[name]), left)  # shares rounded up may exceed the limit together
        left -= asked
        taken = _draw(pack(stream, block_size), asked, generator)
        blocks += taken
        shares.append(DomainShare(name, weights[name], len(stream), asked, sum(map(len, taken))))
    if not blocks:
        raise MoEficationError(f"{data_path}: the options leave no token to read")
    options = {
        "block_size": block_size,
        "domain_weights": domain_weights,
        "data_use_percent": data_use_percent,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    return Corpus([blocks[i] for i in generator.permutation(len(blocks))], shares, options)


def _draw(blocks: list[torch.Tensor], num_tokens: int, generator: np.random.Generator) -> list[torch.Tensor]:
    """Random blocks, without replacement, of exactly `num_tokens` tokens together."""
    drawn, left = [], num_tokens
    for index in generator.permutation(len(blocks)):
        if left == 0:
            break
        drawn.append(blocks[index][:left])
        left -= len(drawn[-1])
    return drawn


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


# ---------------------------------------------------------------------------------------------------- the cache


def _domain_tokens(
    checkpoint: Checkpoint,
    domain: str,
    files: list[Path],
    cache_path: str | Path | None,
    block_size: int,
    progress: Progress,
) -> torch.Tensor:
    """The token stream of a domain, from the cache if it holds just this text, tokenizer and block size."""
    tokenizer_files = {n: file_sha256(checkpoint.path / n) for n in TOKENIZER_FILES if (checkpoint.path / n).exists()}
    # The suffix too: it decides how a file is read.
    contents = [[file.suffix, file_sha256(file)] for file in files]
    key = digest([CACHE_VERSION, tokenizer_files, contents, block_size])
    cached = None if cache_path is None else Path(cache_path) / f"{domain}-{key[:32]}.safetensors"
    if cached is not None and (tokens := _read_cache(cached)) is not None:
        return tokens
    tokenizer = load_tokenizer(checkpoint.path)
    documents = (document for file in files for document in read_documents(file))
    tokens = tokenize(documents, tokenizer, progress, domain)
    if not len(tokens):
        raise MoEficationError(f"{files[0]} holds no text")
    if int(tokens.max()) >= checkpoint.config.vocab_size:
        raise MoEficationError(
            f"the tokenizer of {checkpoint.name} gives token {int(tokens.max())}, "
            f"its embedding has {checkpoint.config.vocab_size} rows"
        )
    if cached is not None:
        content = save({"tokens": tokens}, metadata={"sha256": tensor_sha256(tokens)})
        write_atomically(cached, lambda file: file.write(content))
    return tokens


def _read_cache(path: Path) -> torch.Tensor | None:
    """The cached tokens, or None if there are none or they are damaged (which is said)."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            tokens, expected = file.get_tensor("tokens"), (file.metadata() or {}).get("sha256")
        if tensor_sha256(tokens) == expected:
            return tokens
    except Exception as error:  # safetensors raises its own class, and OSError
        logger.debug("%s: %s", path, error)
    logger.warning("%s is damaged; tokenising again", path)
    return None
