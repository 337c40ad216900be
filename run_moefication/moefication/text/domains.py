"""Which domain of a pretraining mix the text in a folder is of, by the names of its files and folders."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import MoEficationError
from .documents import TextFile, cure_of_unread, find_text_files

logger = logging.getLogger(__name__)

# Sampling proportions of LLaMA's pretraining data (Touvron et al. 2023, table 1).
LLAMA_MIX = {
    "commoncrawl": 0.67,
    "c4": 0.15,
    "github": 0.045,
    "wikipedia": 0.045,
    "book": 0.045,
    "arxiv": 0.025,
    "stackexchange": 0.02,
}
# What files and folders of each domain are called, as words in lower case, each a run of letters and digits: names of
# RedPajama and SlimPajama, and those that people give. A number may follow the last letter.
ALIASES = {
    "commoncrawl": r"common ?crawl|redpajamacommoncrawl|cc ?net|cc main|cc \d{4} \d{2}",
    "c4": r"c4|redpajamac4",
    "github": r"github|redpajamagithub",
    "wikipedia": r"wikipedia|wiki|enwiki|redpajamawikipedia",
    "book": r"books?|book ?corpus|redpajamabook",
    "arxiv": r"arxiv|redpajamaarxiv",
    "stackexchange": r"stack ?exchange|redpajamastackexchange",
}
HASH = re.compile(
    r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"  # a UUID
    r"|(?<![^\W_])(?=[0-9]*[a-f])(?=[a-f]*[0-9])[0-9a-f]{8,}(?![^\W_])"
)
HELD_OUT = "heldout"  # a folder whose text is never for training
SHOWN_FILES = 3


@dataclass(frozen=True)
class _Found:
    """A text file below a data folder, and the names that may say its domain, the ones that count most first."""

    file: TextFile
    names: list[str]


def domain_of(name: str, aliases: Mapping[str, str] = ALIASES) -> str | None:
    """The domain that a file's or folder's name speaks of, if any: one of its aliases among the words of the name.

    Raises:
        MoEficationError: the name speaks of several.
    """
    words = _words(name)
    domains = [domain for domain, alias in aliases.items() if re.search(_pattern(alias), words)]
    if len(domains) > 1:
        raise MoEficationError(f"{name} names several domains ({', '.join(domains)}); rename it")
    return domains[0] if domains else None


def known_domain(name: str) -> str:
    """What a domain is called here: as in LLaMA's mix, if `name` is an alias there, else by its letters and digits."""
    words = _words(name)
    matches = (domain for domain, alias in ALIASES.items() if re.fullmatch(_pattern(alias), words))
    return next(matches, words.replace(" ", ""))


def find_domains(data_path: str | Path, weights: Mapping[str, float] | None = None) -> dict[str, list[TextFile]]:
    """The files of each domain in a folder, or a single file.

    A file's own name says its domain, or else the name of the nearest folder around it. Folders below the data folder
    are read (to their end) if their name speaks of a domain.

    Args:
        weights: by domain, as `known_domain` calls it: only files of these are taken. None: those of LLaMA's mix; a
            folder where no name speaks of any is one domain of its own, and one where only some do is refused.
    """
    data_path = Path(data_path)
    # Of other domains the words may be apart: the domain "mynotes" is what "my_notes.jsonl" speaks of.
    aliases = {name: ALIASES.get(name) or " ?".join(map(re.escape, name)) for name in weights or ALIASES}
    found: dict[str, list[TextFile]] = {}
    unnamed = []
    for text in _text_below(data_path, aliases):
        domain = next(filter(None, (domain_of(name, aliases) for name in text.names)), None)
        (found.setdefault(domain, []) if domain else unnamed).append(text.file)
    unread = _unread(data_path, aliases) if data_path.is_dir() else ""
    if not found and not unnamed:
        raise MoEficationError(
            f"--train_data_path {data_path} holds no .jsonl, .txt or .parquet (nor .gz, .zst of the first two) or .zip "
            f"file: llama_data/make_sample_data.py makes some{unread and f'; not read: {unread}'}"
        )
    absent = [domain for domain in weights or () if domain not in found]
    if absent:
        raise MoEficationError(f"--domain_weights names {absent[0]}, but no file name in {data_path} carries that word")
    if unnamed and found and not weights:
        raise MoEficationError(
            f"{unnamed[0]} names none of the domains {', '.join(LLAMA_MIX)}, as other files there do; "
            f"rename it, or choose with --domain_weights"
        )
    if unread:
        logger.warning("%s: not read: %s", data_path, unread)
    return found or {"text": unnamed}


def _pattern(alias: str) -> str:
    return rf"(?<!\S)(?:{alias})((?<=[^\W\d])\d+)?(?!\S)"


def _words(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", HASH.sub(" ", name.lower())))


def _text_below(path: Path, aliases: Mapping[str, str]) -> Iterator[_Found]:
    for file in find_text_files(path):
        yield _Found(file, file.names)
    for folder in _domain_folders(path, aliases):
        around = [folder, *(parent for parent in folder.parents if path in parent.parents)]
        for file in find_text_files(folder):
            yield _Found(file, [*file.names, *(parent.name for parent in around)])


def _domain_folders(path: Path, aliases: Mapping[str, str]) -> Iterator[Path]:
    """The folders below `path` that are read: those of a domain with all below them, but for `HELD_OUT`."""
    if not path.is_dir():
        return
    seen = set()  # links may lead in circles
    for top in sorted(folder for folder in path.iterdir() if folder.is_dir() and folder.name != HELD_OUT):
        if domain_of(top.name, aliases) is None:
            continue
        for place, folders, _ in os.walk(top, followlinks=True):
            folders[:] = sorted(name for name in folders if name != HELD_OUT and not name.startswith("."))
            if (real := os.path.realpath(place)) in seen:
                folders.clear()
                continue
            seen.add(real)
            yield Path(place)


def _unread(path: Path, aliases: Mapping[str, str]) -> str:
    """What in the folders that are read looks like data, but is not read, and the cure."""
    read = [path, *_domain_folders(path, aliases)]
    files: dict[str, list[str]] = {}
    for folder in read:
        for file in sorted(folder.iterdir()):
            if file.is_file() and not file.name.startswith(".") and (cure := cure_of_unread(file)):
                files.setdefault(cure, []).append(str(file.relative_to(path)))
    for folder in sorted(set(filter(Path.is_dir, path.iterdir())) - set(read)):
        if folder.name != HELD_OUT and any(TextFile(file).is_text for file in folder.iterdir()):
            files.setdefault("name it after a domain to have it read", []).append(f"{folder.name}/")
    return "; ".join(f"{some(names)} ({cure})" for cure, names in files.items())


def some(names: list[str]) -> str:
    """The first few of them, and how many more there are."""
    more = len(names) - SHOWN_FILES
    return ", ".join(names[:SHOWN_FILES]) + (f" and {more} more" if more > 0 else "")
