"""Blocks drawn from streams of tokens, mixed as LLaMA's pretraining mixed its domains."""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...settings import EQUAL, CorpusSettings
from ..checkpoints.dense import DenseCheckpoint
from ..errors import MoEficationError, SettingError
from ..storage.files import digest
from ..storage.tensors import tensor_sha256
from .domains import LLAMA_MIX, find_domains, known_domain
from .tokens import TokenStream, token_stream

DEFAULT_BLOCK_SIZE = 2048
STRETCHES = 16  # of a domain's text, which are shuffled; documents are not torn, but for those at their edges


@dataclass(frozen=True)
class DomainShare:
    """One domain of a mix: its weight, and how many tokens there were, were asked for, and are in the blocks;
    `skipped_lines` of its text held no document; `files` are paths within the data folder."""

    domain: str
    weight: float
    available: int
    asked: int
    got: int
    skipped_lines: int
    files: list[str] = field(compare=False)


class Corpus:
    """Token blocks and the mix of domains in them, both of which `read` makes when they are first asked for, so that a
    stage can check all else before text is read. `options` are those that choose the blocks, as manifests record them.
    """

    def __init__(self, options: dict[str, Any], read: Callable[[], tuple[list[torch.Tensor], list[DomainShare]]]):
        self.options, self._read = options, cache(read)

    @property
    def blocks(self) -> list[torch.Tensor]:
        """int32 tensors of at most the block size, in the order every stage numbers them."""
        return self._read()[0]

    @property
    def mix(self) -> list[DomainShare]:
        return self._read()[1]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.blocks))

    @property
    def digest(self) -> str:
        """sha256 over the blocks; in manifests it stands for the text, the tokenizer and the choice of blocks."""
        return digest([tensor_sha256(block) for block in self.blocks])


def pack(tokens: torch.Tensor, block_size: int) -> list[torch.Tensor]:
    """Cut a token stream into blocks; the last, shorter one keeps its length."""
    return list(tokens.split(block_size)) if len(tokens) else []


def require_block_size(block_size: int | None, max_positions: int, name: str) -> int:
    """The given block size, checked, or else 2048 or as many positions as the model has."""
    if block_size is None:
        return min(DEFAULT_BLOCK_SIZE, max_positions)
    if not 2 <= block_size <= max_positions:
        raise SettingError(f"block_size {block_size} is outside of 2 to {max_positions}, the positions of {name}")
    return block_size


def require_held_out_block(corpus: Corpus) -> None:
    """Raise MoEficationError if the corpus is a single block, so that none can be held out."""
    if len(corpus.blocks) < 2:
        raise SettingError("the corpus is a single block, and one is held out; use a smaller block_size")


def parse_domain_weights(given: Mapping[str, float] | str | None) -> dict[str, float] | str | None:
    """`c4=0.5,github=0.5`, or such a mapping -> weights by domain; "equal" and None (LLaMA's mix) stay as they are."""
    if given in (None, EQUAL):
        return given
    text = given if isinstance(given, str) else ",".join(f"{name}={weight}" for name, weight in given.items())
    weights: dict[str, float] = {}
    for item in text.split(","):
        domain, _, number = item.partition("=")
        name, weight = known_domain(domain), -1.0
        with suppress(ValueError):
            weight = float(number)
        if not name or not 0 < weight < math.inf:
            raise SettingError(f"domain_weights {text!r}: {item!r} is not of the form domain=positive number")
        if name in weights:
            raise SettingError(f"domain_weights {text!r} names {domain.strip()} twice")
        weights[name] = weight
    return weights


def training_corpus(
    checkpoint: DenseCheckpoint, data_path: str | Path, cache_path: str | Path | None, settings: CorpusSettings
) -> Corpus:
    """Blocks of the domains in a folder, in their proportions: as many tokens as the scarcest domain allows.

    Blocks are drawn at random within each domain, the last one cut so that the shares are exact. They are views of a
    file of all tokens, 4 bytes each, in the folder `cache_path`, or else a temporary one. Stages hold out the last
    blocks: any such cut leaves all domains in their shares on both sides, and other documents on one than on the other.
    """
    if cache_path and Path(cache_path).resolve() == Path(data_path).resolve():
        raise SettingError(f"train_data_cache_path {cache_path} is the folder of the text, and would be read as text")
    positions, weights = checkpoint.config.max_position_embeddings, parse_domain_weights(settings.domain_weights)
    block_size = require_block_size(settings.block_size, positions, checkpoint.name)
    options = asdict(settings) | {"block_size": block_size, "domain_weights": weights}
    domains = find_domains(data_path, None if weights == EQUAL else weights)
    root = data_path if Path(data_path).is_dir() else Path(data_path).parent
    files = {name: [os.path.relpath(str(file), root) for file in domains[name]] for name in domains}

    def read() -> tuple[list[torch.Tensor], list[DomainShare]]:
        streams = {
            name: token_stream(checkpoint, name, domains[name], cache_path, settings.skip_bad_lines) for name in domains
        }
        blocks, shares = _mixed(streams, files, options)
        if not blocks:
            raise MoEficationError(f"{data_path}: the options leave no token to read")
        return blocks, shares

    return Corpus(options, read)


def _mixed(
    streams: dict[str, TokenStream], files: dict[str, list[str]], options: dict[str, Any]
) -> tuple[list[torch.Tensor], list[DomainShare]]:
    """Blocks of the domains' tokens as the options ask for them, and how much of each domain that is."""
    mix, max_tokens = options["domain_weights"] or LLAMA_MIX, options["max_tokens"]
    weights = {name: 1.0 if mix == EQUAL else mix.get(name, 1.0) for name in streams}
    weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    total = options["data_use_percent"] * min(len(stream.tokens) / weights[name] for name, stream in streams.items())
    left = max_tokens or math.inf
    total = min(total, left)
    generator = np.random.default_rng(options["seed"])
    placed, shares = [], []
    for name, stream in streams.items():
        available = len(stream.tokens)
        wanted = min(available, round(total * weights[name]), left)  # rounded shares may exceed the limit together
        left -= wanted
        taken = _draw(stream.tokens, options["block_size"], wanted, generator)
        asked = round(max_tokens * weights[name]) if max_tokens else wanted
        placed += (((number + 0.5) / len(taken), block) for number, block in enumerate(taken))
        got = sum(map(len, taken))
        shares.append(DomainShare(name, weights[name], available, asked, got, stream.skipped_lines, files[name]))
    return [block for _, block in sorted(placed, key=itemgetter(0))], shares


def _draw(tokens: torch.Tensor, block_size: int, num_tokens: int, generator: np.random.Generator) -> list[torch.Tensor]:
    """Random blocks of a packed stream, without replacement, of exactly `num_tokens` tokens together.

    They come a stretch of the stream after another, the stretches in random order, so that blocks of one document are
    near one another. A cut parts two neighbouring blocks of at most one stretch, and edges of stretches.
    """
    drawn, left, num_blocks = {}, num_tokens, -(-len(tokens) // block_size)
    for index in generator.permutation(num_blocks).tolist():
        if left == 0:
            break
        drawn[index] = tokens[index * block_size : (index + 1) * block_size][:left]
        left -= len(drawn[index])
    place = generator.permutation(STRETCHES)
    return [drawn[index] for index in sorted(drawn, key=lambda index: (place[index * STRETCHES // num_blocks], index))]
