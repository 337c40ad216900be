"""From sources to documents: what is there, without repetitions, in two halves, about equally many tokens a domain."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from llama_data.archives import read_members
from llama_data.deduplication import unique_texts, untangled
from llama_data.sources import DOMAINS, Source
from llama_download.registry import Package

TRAIN_TOKENS, HELD_OUT_TOKENS = 400_000, 80_000  # a domain, where its sources have as many
SHORTEST_DOCUMENT = 200  # characters; below lie stubs that hold a title and nothing else
HELD_OUT_ONE_IN = 6  # works
# Shares of a text's runs of 13 words: above the first a text repeats others; above the second it is too near to the
# other half. The second allows for what many texts have in common, such as licences in code and footers in mails.
REPEATED, TANGLED = 0.5, 0.1

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Candidate:
    """A document that could be taken, and where it is from."""

    source: Source
    work: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the work is held out. Its name alone decides, so that a work is on one side in all sources."""
        return number(self.work.lower()) % HELD_OUT_ONE_IN == 0

    def record(self) -> dict[str, str]:
        """The line of the jsonl file."""
        return {
            "text": self.text,
            "domain": self.source.domain,
            "source": f"{self.source.package.title}: {self.work}",
            "licence": self.source.licence,
        }


@dataclass(frozen=True)
class Half:
    """The documents of one domain that are for training, or held out, in the order of their sources."""

    documents: list[Candidate]
    tokens: int


def number(text: str) -> int:
    """A number that depends on the text alone, for choices that look random and never change."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def candidates(sources: Iterable[Source], paths: Mapping[Package, Path]) -> list[Candidate]:
    """All documents of the sources for whose package there is a file, stubs left out."""
    return [
        Candidate(source, document.work or source.package.name, document.text)
        for source in sources
        if source.package in paths
        for document in source.extract(read_members(paths[source.package], source.members))
        if len(document.text) >= SHORTEST_DOCUMENT
    ]


def without_repetitions(documents: Sequence[Candidate]) -> list[Candidate]:
    """The documents that repeat no earlier one, and are not near to the other half."""
    unique = unique_texts([document.text for document in documents], REPEATED)
    documents = [*compress(documents, unique)]
    held_out = np.array([document.held_out for document in documents], dtype=bool)
    return [*compress(documents, untangled([document.text for document in documents], held_out, TANGLED))]


def select(documents: Sequence[Candidate], count_tokens: CountTokens) -> dict[str, tuple[Half, Half]]:
    """For each domain that has any documents, those to train on and those held out."""
    halves = {}
    for domain in DOMAINS:
        of_domain = [document for document in documents if document.source.domain == domain]
        if of_domain:
            train = take([document for document in of_domain if not document.held_out], TRAIN_TOKENS, count_tokens)
            held_out = take([document for document in of_domain if document.held_out], HELD_OUT_TOKENS, count_tokens)
            halves[domain] = train, held_out
    return halves


def take(documents: Sequence[Candidate], tokens: int, count_tokens: CountTokens) -> Half:
    """As many documents as reach that many tokens, of all works alike; those of spare sources only after the others."""
    drawn = sorted(range(len(documents)), key=lambda i: (bool(documents[i].source.spare), number(documents[i].text)))
    taken, total = [], 0
    for i in drawn:
        if total >= tokens:
            break
        taken.append(i)
        total += count_tokens(documents[i].text)
    return Half([documents[i] for i in sorted(taken)], total)
