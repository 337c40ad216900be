"""The files of text in a folder or a zip, which is never unpacked; and what is not read, with the cure."""

import importlib.util
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

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
NO_PARQUET = "pip install datasets, with which it is read"
ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, NotImplementedError, OSError)


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
        is_named_so = (
            self.holds_lines or self.plain_name.lower().endswith(TEXT) or (self.is_parquet and reads_parquet())
        )
        return is_named_so and self.plain_name not in METADATA and not self.plain_name.startswith(".")

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


def find_text_files(path: Path) -> list[TextFile]:
    """The files of a folder (not below it), or a single file, in the order of their plain names.

    An unpacked file goes before a compressed one of that name, and before a zip that holds one or is called like it;
    lines go before a .parquet that is called like them.

    Raises:
        MoEficationError: nothing there, or a zip that is damaged or reaches out of its place.
    """
    if path.is_file():
        if cure := cure_of_unread(path.name):
            raise MoEficationError(f"{path} is not read: {cure}")
        return zip_members(path) if path.suffix.lower() == ".zip" else [TextFile(path)]
    if not path.is_dir():
        raise MoEficationError(f"{path} does not exist")
    names: dict[str, TextFile] = {}
    zips = []
    for file in sorted(path.iterdir(), key=lambda file: (file.suffix.lower() in COMPRESSED, file.name)):
        if file.suffix.lower() == ".zip" and file.is_file():
            zips.append(file)
        elif TextFile(file).is_text and file.is_file():
            names.setdefault(TextFile(file).plain_name, TextFile(file))
    found = [
        file
        for file in names.values()
        if not file.is_parquet or not any(file.path.stem + suffix in names for suffix in LINES)
    ]
    for file in zips:
        if not any(file.stem + suffix in names for suffix in LINES):
            found += [member for member in zip_members(file) if member.plain_name not in names]
    return sorted(found, key=lambda file: (file.plain_name, str(file)))


def zip_members(path: Path) -> list[TextFile]:
    """The text in a zip, but for what lies in a folder `heldout`; refused as a whole if any name in it is unsafe."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
    except ZIP_DAMAGE as error:
        raise MoEficationError(f"{path} is not a whole zip file ({error}); download it again") from error
    seen: set[str] = set()
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
