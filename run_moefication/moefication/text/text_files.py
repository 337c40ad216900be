"""The files of text in a folder or a zip, which is never unpacked; and what is not read, with the cure."""

import contextlib
import importlib.util
import itertools
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import MoEficationError

LINES = (".jsonl", ".json", ".ndjson", ".jsonlines")  # C4 calls such files .json
TEXT = ".txt"
METADATA = ("manifest.json", "redpajama.json", "dataset_info.json", "dataset_infos.json")
PARQUET = ".parquet"
HELD_OUT_FOLDER = "heldout"  # a folder whose text is never for training
COMPRESSED = (".gz", ".gzip", ".zst", ".zstd")
# What to do about data that is not read -> the ends of its names.
UNREAD = {
    "unpack it": (".xz", ".bz2", ".lzma", ".lz4", ".br", ".7z", ".rar", ".tar", ".tgz", ".tar.gz", ".tar.zst"),
    'write it as .jsonl, with a "text" in each line': (
        *(".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".pkl", ".jl", ".warc", ".warc.gz"),
    ),
}
NO_TEXT = (".py", ".md")  # of datasets on the hub
NO_TEXT_NAMES = re.compile("(readme|licen[cs]e|notice|checksums|.*sums$)", re.IGNORECASE)
NO_PARQUET = "pip install datasets, with which it is read"
SHOWN_NAMES = 3
MOST_LOOKED_AT = 10_000  # files of an unread folder, to tell whether it holds text


@dataclass(frozen=True)
class TextFile:
    """A file of documents, on the disk or in a zip on the disk."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @property
    def plain_name(self) -> str:
        """The file's name without folder and compression: what it would be called unpacked."""
        name = PurePosixPath(self.member or self.path.name)
        return name.stem if name.suffix.lower() in COMPRESSED else name.name

    @property
    def holds_lines(self) -> bool:
        """Whether each line is a document; else the whole file is one."""
        return self.plain_name.lower().endswith(LINES)

    @property
    def is_parquet(self) -> bool:
        """Whether each row of its column "text" is a document."""
        return self.member is None and self.path.suffix.lower() == PARQUET

    @property
    def is_text(self) -> bool:
        """Whether the file is read when its folder or zip is."""
        name = self.plain_name
        is_named_so = name.lower().endswith((*LINES, TEXT)) or (self.is_parquet and reads_parquet())
        return is_named_so and name not in METADATA and not name.startswith(".")

    @property
    def num_bytes(self) -> int:
        """Bytes to read: of a zip's member those it expands to, of other compressed files those on the disk."""
        if self.member is None:
            return self.path.stat().st_size
        return next(info.file_size for info in _zip_infos(self.path) if info.filename == self.member)

    def open(self) -> BinaryIO:
        """Its bytes, on the scale of `num_bytes`."""
        return zipfile.ZipFile(self.path).open(self.member) if self.member else self.path.open("rb")

    @property
    def names(self) -> list[str]:
        """The names that may tell its domain: its own, and within a zip those of the folders and the zip."""
        *folders, name = PurePosixPath(self.member or self.path.name).parts
        return [name, *folders, *([self.path.name] if self.member else [])]


def reads_parquet() -> bool:
    """Whether the package that reads parquet is installed; `datasets` brings it."""
    return importlib.util.find_spec("pyarrow") is not None


def cure_of_unread(name: str) -> str | None:
    """What to do about a file of a name that looks like data, but is not read; None for any other."""
    cures = UNREAD if reads_parquet() else UNREAD | {NO_PARQUET: (PARQUET,)}
    return next((cure for cure, ends in cures.items() if name.lower().endswith(ends)), None)


def _cure_of_unknown(file: Path) -> str | None:
    """What to do about a file whose name says nothing of what it holds; None for one that is read, or not for that."""
    is_known = TextFile(file).is_text or file.name in METADATA or file.suffix.lower() in (".zip", *NO_TEXT)
    return None if is_known or NO_TEXT_NAMES.match(file.name) else "if it is text, let its name end in .txt or .jsonl"


def find_text_files(path: Path) -> list[TextFile]:
    """The files of a folder (not below it), or a single file, in the order of their plain names.

    An unpacked file goes before a compressed one of that name, and before a zip that holds one or is called like it;
    lines go before a .parquet that is called like them. MoEficationError: nothing there, or a damaged or unsafe zip.
    """
    if path.is_file():
        if cure := cure_of_unread(path.name):
            raise MoEficationError(f"{path} is not read: {cure}")
        return zip_members(path) if path.suffix.lower() == ".zip" else [TextFile(path)]
    if not path.is_dir():
        raise MoEficationError(f"{path} does not exist; name a folder or a file of text")
    return _chosen(path)[0]


def _chosen(path: Path) -> tuple[list[TextFile], dict[str, str]]:
    """The files of a folder as `find_text_files` gives them; and what is read in place of others, by their names."""
    files = sorted(filter(Path.is_file, path.iterdir()))
    names: dict[str, TextFile] = {}
    set_aside: dict[str, str] = {}
    for file in map(TextFile, sorted(files, key=lambda file: file.suffix.lower() in COMPRESSED)):
        if file.is_text and names.setdefault(file.plain_name, file) is not file:
            set_aside[file.path.name] = names[file.plain_name].path.name

    def as_lines(file: Path) -> str | None:
        return next((file.stem + suffix for suffix in LINES if file.stem + suffix in names), None)

    found = []
    for file in names.values():
        if file.is_parquet and (lines := as_lines(file.path)):
            set_aside[file.path.name] = lines
        else:
            found.append(file)
    for file in files:
        if file.suffix.lower() == ".zip" and (lines := as_lines(file)):
            set_aside[file.name] = lines
        elif file.suffix.lower() == ".zip":
            for member in zip_members(file):
                if member.plain_name in names:
                    set_aside[f"{file.name}/{member.member}"] = names[member.plain_name].path.name
                else:
                    found.append(member)
    for file in map(str, found):
        try:
            file.encode()
        except UnicodeEncodeError as error:
            raise MoEficationError(f"{os.fsencode(file)!r} has a name that is not UTF-8; rename it") from error
    return sorted(found, key=lambda file: (file.plain_name, str(file))), set_aside


def _zip_infos(path: Path) -> list[zipfile.ZipInfo]:
    """The entries of a zip but for folders."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, OSError) as error:
        raise MoEficationError(f"{path} is not a whole zip file ({error}); download it again") from error


def zip_members(path: Path) -> list[TextFile]:
    """The text in a zip, but for what lies in a folder `heldout`; refused as a whole if any name in it is unsafe."""
    members, seen = _zip_infos(path), set()
    for info in members:
        name, parts = info.orig_filename, PurePosixPath(info.orig_filename).parts
        if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name) or set(name) & {"\\", "\0"}:
            raise MoEficationError(f"{path} holds {name!r}, which leads out of its place; refused")
        if info.external_attr >> 28 == 0o12:
            raise MoEficationError(f"{path} holds {name!r}, a link; refused")
        if info.flag_bits & 1:
            raise MoEficationError(f"{path}: {name} is encrypted; unpack it yourself")
        if name.casefold() in seen:
            raise MoEficationError(f"{path} holds {name!r} twice; refused")
        seen.add(name.casefold())
    texts = [TextFile(path, info.filename) for info in members]
    texts = [file for file in texts if file.is_text and HELD_OUT_FOLDER not in PurePosixPath(file.member).parts]
    if not texts:
        raise MoEficationError(f"{path} holds no .jsonl or .txt file")
    return texts


def unread_data(path: Path, read_below: list[Path]) -> str:
    """The files and folders of a data folder, and of those `read_below` it, that are not read: a few by name, with a
    cure for each kind; "" where all is read."""
    names: dict[str, list[str]] = {}
    for file in (file for folder in (path, *read_below) for file in sorted(folder.iterdir())):
        for unread, cure in () if file.name.startswith(".") else _unread(file):
            names.setdefault(cure, []).append(str(unread.relative_to(path)))
    for folder in (path, *read_below):
        for name, read in _chosen(folder)[1].items():
            names.setdefault(f"{read} is read for it", []).append(str((folder / name).relative_to(path)))
    for folder in sorted(set(filter(Path.is_dir, path.iterdir())) - set(read_below)):
        below = itertools.islice(folder.rglob("*"), MOST_LOOKED_AT)
        is_hidden = folder.name == HELD_OUT_FOLDER or folder.name.startswith(".")
        if not is_hidden and any(TextFile(file).is_text for file in below):
            names.setdefault("name it after a domain to have it read", []).append(f"{folder.name}/")
    return "; ".join(f"{some(files)} ({cure})" for cure, files in names.items())


def _unread(file: Path) -> Iterator[tuple[Path, str]]:
    """The file, or the members of a zip, if not read, with the cure."""
    if file.is_symlink() and not file.exists():
        yield file, "its link leads nowhere"
    elif file.is_file() and (cure := cure_of_unread(file.name) or _cure_of_unknown(file)):
        yield file, cure
    elif file.is_file() and file.suffix.lower() == ".zip":
        with contextlib.suppress(MoEficationError):  # damaged: refused where it is read
            for name in sorted(info.filename for info in _zip_infos(file)):
                if cure_of_unread(name) or name.lower().endswith((".zip", PARQUET)):
                    yield file / name, "unpack the zip"


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
