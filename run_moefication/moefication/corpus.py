"""Token streams to blocks: packed, drawn, and mixed as LLaMA's pretraining mixed its domains."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoints import Checkpoint
from .documents import TextFile, find_text_files
from .errors import MoEficationError
from .files import digest, tensor_sha256
from .progress import Progress, no_progress
from .tokens import token_stream

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
EQUAL = "equal"
DEFAULT_BLOCK_SIZE = 2048


@dataclass(frozen=True)
class DomainShare:
    """One row of the mix that was applied, in tokens. `skipped_lines` of the text held no document."""

    domain: str
    weight: float
    available: int
    asked: int
    got: int
    skipped_lines: int


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


# ---------------------------------------------------------------------------------------------------- blocks


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


def parse_domain_weights(text: str | None) -> dict[str, float] | str | None:
    """`c4=0.5,github=0.5` -> weights by domain; "equal" (all alike) and None (LLaMA's mix) stay as they are."""
    if text in (None, EQUAL):
        return text
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


def find_domains(data_path: str | Path, weights: dict[str, float] | None) -> dict[str, list[TextFile]]:
    """The files of each domain in a folder (not below it), or a single file; the domain is a word of the file's name.

    With weights given, only files of these domains are taken. Without, a folder where no name carries a domain of
    LLaMA's mix is one domain of its own; a folder where only some do is refused rather than read in part.
    """
    files = find_text_files(Path(data_path))
    if not files:
        raise MoEficationError(
            f"--train_data_path {data_path} holds no .jsonl, .txt (nor .gz, .zst of them) or .zip file: "
            f"llama_data/make_sample_data.py makes some"
        )
    domains: dict[str, list[TextFile]] = {}
    unnamed = []
    for file in files:
        matches = [domain for domain in weights or LLAMA_MIX if domain in _plain(file.label)]
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
    domain_weights: dict[str, float] | str | None = None,
    data_use_percent: float = 1.0,
    max_tokens: int | None = None,
    skip_bad_lines: bool = False,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Corpus:
    """Blocks of the domains in a folder, in their proportions: as many tokens as the scarcest domain allows.

    Blocks are drawn at random within each domain, the last one cut so that the shares are exact, and shuffled across
    domains. They are views of the tokens on the disk (4 bytes each); in memory are a few batches of text.

    Args:
        domain_weights: of domains by name; "equal": every domain alike; None: as LLaMA's pretraining.
        cache_path: folder that keeps the tokens for the next run; None for a temporary file.
        data_use_percent: the share of the possible tokens to take, in (0, 1].
        max_tokens: an upper limit on the tokens taken, all domains together.
    """
    if not 0 < data_use_percent <= 1:
        raise MoEficationError(
            f"--data_use_percent {data_use_percent} is not a fraction in (0, 1]; one percent is 0.01"
        )
    if max_tokens is not None and max_tokens < 1:
        raise MoEficationError(f"--max_tokens {max_tokens} must be at least 1")
    domains = find_domains(data_path, None if domain_weights == EQUAL else domain_weights)
    streams = {
        name: token_stream(checkpoint, name, files, cache_path, skip_bad_lines=skip_bad_lines, progress=progress)
        for name, files in domains.items()
    }
    mix = dict.fromkeys(domains, 1.0) if domain_weights == EQUAL else domain_weights or LLAMA_MIX
    weights = {name: mix.get(name, 1.0) for name in streams}
    weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    total = data_use_percent * min(len(stream.tokens) / weights[name] for name, stream in streams.items())
    total = min(total, max_tokens or total)

    left = math.inf if max_tokens is None else max_tokens
    generator = np.random.default_rng(seed)
    blocks, shares = [], []
    for name, stream in streams.items():
        available = len(stream.tokens)
        asked = min(available, round(total * weights[name]), left)  # rounded shares may exceed the limit together
        left -= asked
        taken = _draw(stream.tokens, block_size, asked, generator)
        blocks += taken
        got = sum(map(len, taken))
        shares.append(DomainShare(name, weights[name], available, asked, got, stream.skipped_lines))
    if not blocks:
        raise MoEficationError(f"{data_path}: the options leave no token to read")
    options = {
        "block_size": block_size,
        "domain_weights": domain_weights,
        "data_use_percent": data_use_percent,
        "max_tokens": max_tokens,
        "skip_bad_lines": skip_bad_lines,
        "seed": seed,
    }
    return Corpus([blocks[i] for i in generator.permutation(len(blocks))], shares, options)


def _draw(tokens: torch.Tensor, block_size: int, num_tokens: int, generator: np.random.Generator) -> list[torch.Tensor]:
    """Random blocks of a packed stream, without replacement, of exactly `num_tokens` tokens together."""
    drawn, left = [], num_tokens
    for index in generator.permutation(-(-len(tokens) // block_size)):
        if left == 0:
            break
        block = tokens[index * block_size : (index + 1) * block_size]
        drawn.append(block[:left])
        left -= len(drawn[-1])
    return drawn


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
