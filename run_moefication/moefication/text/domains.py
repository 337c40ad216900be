"""The domains of the text in a folder, told by the names of its files and folders."""

import glob
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import MoEficationError, SettingError
from .text_files import HELD_OUT_FOLDER, TextFile, find_text_files, some, unread_data

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
# Names of each domain's files and folders, as patterns over words in lower case: those of RedPajama and SlimPajama, and
# those that people give. A number may follow the last letter.
ALIASES = {
    "commoncrawl": r"common ?crawl|redpajamacommoncrawl|cc ?net|cc main|cc \d{4} \d{2}",
    "c4": r"c4|redpajamac4",
    "github": r"github|redpajamagithub",
    "wikipedia": r"wikipedia|wiki|enwiki|redpajamawikipedia",
    "book": r"books?|book ?corpus|redpajamabook",
    "arxiv": r"arxiv|redpajamaarxiv",
    "stackexchange": r"stack ?exchange|redpajamastackexchange",
}
# Content-addressed stores name folders and files by a UUID, a checksum, or a checksum in pieces.
HASH = re.compile(
    r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"
    r"|(?<![^\W_])(?=[0-9]*[a-f])(?=[a-f]*[0-9])[0-9a-f]{8,}(?![^\W_])"
    r"|(?<![^\W_])([0-9]*[a-f][0-9a-f]*[\W_]+){2,}[0-9]*[a-f][0-9a-f]*(?![^\W_])"
)


def domains_in(name: str, aliases: Mapping[str, str] = ALIASES) -> list[str]:
    """The domains that have an alias among the words of a file's or folder's name."""
    words = _words(name)
    return [domain for domain, alias in aliases.items() if re.search(_pattern(alias), words)]


def known_domain(name: str) -> str:
    """What a domain is called here: as in LLaMA's mix, if `name` is an alias there, else by its letters and digits."""
    words = _words(name)
    matches = (domain for domain, alias in ALIASES.items() if re.fullmatch(_pattern(alias), words))
    return next(matches, words.replace(" ", ""))


def find_domains(data_path: str | Path, weights: Mapping[str, float] | None = None) -> dict[str, list[TextFile]]:
    """The files of each domain in a folder, or a single file.

    A file's own name says its domain, or else the name of the folder below the data folder in which it lies, however
    deep. Folders are read if their name speaks of a domain. Only files of the domains of `weights` (named as by
    `known_domain`) are taken; without them those of LLaMA's mix, where a folder in which no name speaks of any is one
    domain of its own, and one in which only some do is refused.
    """
    data_path = Path(data_path)
    # The name of another domain may be written in several words: "my_notes.jsonl" is of the domain "mynotes".
    aliases = {name: ALIASES.get(name) or " ?".join(map(re.escape, name)) for name in weights or ALIASES}
    found: dict[str, list[TextFile]] = {}
    unnamed, unpacked = [], []
    folders = _domain_folders(data_path, aliases) if data_path.is_dir() else {}
    for folder, names in {data_path: [], **folders}.items():
        for file in find_text_files(folder):
            beside = file.path.with_suffix("")  # where a zip may lie unpacked
            if file.member and beside in folders and [*beside.rglob(glob.escape(file.plain_name))]:
                unpacked.append(str(file.path.relative_to(data_path) / file.member))
                continue
            domain = _decided([*file.names, *names], file, aliases)
            (found.setdefault(domain, []) if domain else unnamed).append(file)
    unread = unread_data(data_path, [*folders]) if data_path.is_dir() else ""
    if unpacked:
        unread += f"{unread and '; '}{some(unpacked)} (the folder beside the zip is read for it)"
    if not found and not unnamed:
        raise SettingError(
            f"train_data_path {data_path} holds no .jsonl, .txt or .parquet (nor .gz, .zst of the first two) or .zip "
            f"file: llama_data/make_sample_data.py makes some{unread and f'; not read: {unread}'}"
        )
    absent = [domain for domain in weights or () if domain not in found]
    if absent:
        raise SettingError(f"domain_weights names {absent[0]}, but no file name in {data_path} carries that word")
    if unnamed and found and not weights:
        raise SettingError(
            f"{unnamed[0]} names none of the domains {', '.join(LLAMA_MIX)}, as other files there do; "
            f"rename it, or choose with domain_weights"
        )
    if unread:
        logger.warning("%s: not read: %s", data_path, unread)
    return found or {"text": unnamed}


def _decided(names: list[str], file: TextFile, aliases: Mapping[str, str]) -> str | None:
    """The domain of the first name that speaks of one; a name that speaks of several is decided by those after it."""
    candidates: list[str] = []
    for name in names:
        found = [domain for domain in domains_in(name, aliases) if not candidates or domain in candidates]
        if len(found) == 1:
            return found[0]
        candidates = candidates or found
    if candidates:
        raise MoEficationError(f"{file} names several domains ({', '.join(candidates)}); rename it")
    return None


def _pattern(alias: str) -> str:
    return rf"(?<!\S)(?:{alias})((?<=[^\W\d])\d+)?(?!\S)"


def _words(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", HASH.sub(" ", name.lower())))


def _domain_folders(path: Path, aliases: Mapping[str, str]) -> dict[Path, list[str]]:
    """The folders that are read below `path`: those named after a domain, and all below them but for held-out and
    hidden ones; each with the name that counts."""
    tops = sorted(folder for folder in path.iterdir() if folder.is_dir() and folder.name != HELD_OUT_FOLDER)
    # Some stores spread their files over folders by the start of their checksum: 3f, c4, c5.
    of_checksums = [folder for folder in tops if re.fullmatch(r"[0-9a-f]{2}", folder.name)]
    skipped = of_checksums if len(of_checksums) > 2 else []
    left = [(top, top.name) for top in tops if len(domains_in(top.name, aliases)) == 1 and top not in skipped]
    found = {}
    while left:
        folder, name = left.pop(0)
        if (real := folder.resolve()) not in found:  # links may lead in circles
            found[real] = folder, name
            below = sorted(filter(Path.is_dir, folder.iterdir()))
            left = [(one, name) for one in below if one.name != HELD_OUT_FOLDER and one.name[0] != "."] + left
    return {folder: [name] for folder, name in found.values()}
