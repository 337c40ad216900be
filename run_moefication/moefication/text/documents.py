"""Files of text to documents: jsonl, plain text, either compressed or in a zip, which is never unpacked; parquet."""

import codecs
import contextlib
import gzip
import importlib.util
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

try:
    from compression import zstd  # Python 3.14
except ImportError:
    from backports import zstd

from ..errors import MoEficationError

LINES = (".jsonl", ".json")  # the second is what C4 calls such files
TEXT = ".txt"
OF_DATASETS = ("manifest.json", "redpajama.json", "dataset_info.json", "dataset_infos.json")  # no text
PARQUET = ".parquet"
COMPRESSED = (".gz", ".zst")
# Data that is not read, by what it ends with, and what to do about it.
UNREAD = {
    "unpack it": (".xz", ".bz2", ".lzma", ".lz4", ".7z", ".rar", ".tar", ".tgz", ".tar.gz", ".tar.zst"),
    'write it as .jsonl, with a "text" in each line': (".csv", ".tsv", ".arrow", ".feather", ".pkl", ".warc.gz"),
}
NO_PARQUET = "pip install datasets, with which it is read"
MAX_LINE_BYTES = 64 << 20
PLAIN_TEXT_BYTES = 4 << 20  # plain text beyond it is read as several documents, cut at line ends
# Real text shrinks to a tenth, hardly ever to a hundredth: what expands further than this is no text.
MAX_EXPANSION = 200
FREE_EXPANSION_BYTES = 64 << 20
LONGEST_WINDOW = {zstd.DecompressionParameter.window_log_max: 31}  # what `zstd --long=31` needs: up to 2 GiB of memory
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile, zstd.ZstdError, NotImplementedError)


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
        """Whether a folder or zip that holds the file is meant to be read with it."""
        is_named_so = (
            self.holds_lines or self.plain_name.lower().endswith(TEXT) or (self.is_parquet and reads_parquet())
        )
        return is_named_so and self.plain_name not in OF_DATASETS and not self.plain_name.startswith(".")

    @property
    def names(self) -> list[str]:
        """The names that may say which domain it is of: its own, and within a zip those of the folders and the zip."""
        inside = PurePosixPath(self.member).parts if self.member else ()
        return [*reversed(inside), self.path.name]


class Document(NamedTuple):
    """A text, and the file and line it stands in."""

    text: str
    place: str


def reads_parquet() -> bool:
    """Whether the package that reads parquet is installed; `datasets` brings it."""
    return importlib.util.find_spec("pyarrow") is not None


def cure_of_unread(file: Path) -> str | None:
    """What to do about a file that looks like data, but is not read; None for any other file."""
    cures = UNREAD if reads_parquet() else UNREAD | {NO_PARQUET: (PARQUET,)}
    return next((cure for cure, ends in cures.items() if file.name.lower().endswith(ends)), None)


def find_text_files(path: Path) -> list[TextFile]:
    """The files of a folder (not below it), or a single file, in the order of their plain names.

    An unpacked file goes before a compressed one of that name, and before a zip that holds one or is called like it.

    Raises:
        MoEficationError: nothing there, or a zip that is damaged or reaches out of its place.
    """
    if path.is_file():
        if cure := cure_of_unread(path):
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
    found = list(names.values())
    for file in zips:
        if not any(file.stem + suffix in names for suffix in LINES):
            found += [member for member in zip_members(file) if member.plain_name not in names]
    return sorted(found, key=lambda file: (file.plain_name, str(file)))


def zip_members(path: Path) -> list[TextFile]:
    """The text in a zip, but for what lies in a folder `heldout`; refused as a whole if any name in it is unsafe."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
    except (*DAMAGE, OSError) as error:
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
    texts = [file for file in texts if file.is_text and "heldout" not in PurePosixPath(file.member).parts]
    if not texts:
        raise MoEficationError(f"{path} holds no .jsonl or .txt file")
    return texts


class DocumentReader:
    """Iterates over the non-empty documents of files: the "text" of each line of a .jsonl, other files as plain text.

    Args:
        skip_bad_lines: count the lines that hold no document, and go on, instead of stopping at the first. None: the
            same as False where there is no option to set it, of which errors then do not speak.

    Attributes:
        total_bytes, position: how much there is to read, and how much of it is read, for progress.
        skipped: lines skipped so far.

    Raises:
        MoEficationError: names the file, and the line that is not a JSON object with a string "text" in UTF-8.
    """

    def __init__(self, files: list[TextFile], skip_bad_lines: bool | None = None):
        self._files, self._skip_bad_lines = files, skip_bad_lines
        self.skipped = self._done = 0
        self._position: Callable[[], int] = int
        self._sizes = [_size(file) for file in files]
        self.total_bytes = sum(self._sizes)

    @property
    def position(self) -> int:
        return self._done + self._position()

    def __iter__(self) -> Iterator[Document]:
        for file, size in zip(self._files, self._sizes, strict=True):
            read = self._rows if file.is_parquet else self._documents if file.holds_lines else self._plain_text
            try:
                yield from read(file)
            except DAMAGE as error:
                raise MoEficationError(f"{file} is damaged or cut short ({error}); get it again") from error
            self._position, self._done = int, self._done + size

    def bad(self, place: str, why: str, error: Exception | None = None) -> None:
        """A document cannot be used: raise MoEficationError, or count it where bad lines are skipped."""
        if not self._skip_bad_lines:
            cure = "" if self._skip_bad_lines is None else "; --skip_bad_lines goes on without it"
            raise MoEficationError(f"{place}: {why}{cure}") from error
        self.skipped += 1

    def _documents(self, file: TextFile) -> Iterator[Document]:
        for number, line in self._lines(file):
            if line is not None and not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            try:
                text = _text_of_line(line)
            except ValueError as error:
                self.bad(f"{file}:{number}", str(error), error)
                continue
            if text.strip():
                yield Document(text, f"{file}:{number}")

    def _plain_text(self, file: TextFile) -> Iterator[Document]:
        """The whole file; in documents of `PLAIN_TEXT_BYTES` and up to the end of the line, where it is longer."""
        parts: list[str] = []
        size = offset = 0
        first = 1
        for number, line in self._lines(file):
            if line is None:
                raise MoEficationError(f"{file}:{number}: line longer than {MAX_LINE_BYTES >> 20} MiB; break it")
            try:
                parts.append(line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n"))
            except UnicodeDecodeError as error:
                raise MoEficationError(f"{file} is not UTF-8 text (byte {offset + error.start})") from error
            offset += len(line)
            size += len(line)
            if size >= PLAIN_TEXT_BYTES:
                yield Document("".join(parts), f"{file}:{first}")
                parts, size, first = [], 0, number + 1
        if any(part.strip() for part in parts):
            yield Document("".join(parts), f"{file}:{first}")

    def _rows(self, file: TextFile) -> Iterator[Document]:
        """The rows of a parquet file; memory: those of a row group."""
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        size, number = file.path.stat().st_size, 0
        limit = FREE_EXPANSION_BYTES + MAX_EXPANSION * size
        try:
            table = ParquetFile(file.path)
            if "text" not in table.schema_arrow.names:
                raise MoEficationError(f"{file} has no column text, but {', '.join(table.schema_arrow.names)}")
            self._position = lambda: size * number // max(1, table.metadata.num_rows)
            for batch in table.iter_batches(columns=["text"]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        self.bad(f"{file}:{number}", "its text is no string")
                    elif text.strip():
                        limit -= len(text)
                        yield Document(text, f"{file}:{number}")
                if limit < 0:
                    raise _expands(file)
        except ArrowException as error:
            raise MoEficationError(f"{file} is damaged or cut short ({error}); get it again") from error

    def _lines(self, file: TextFile) -> Iterator[tuple[int, bytes | None]]:
        """Numbered lines with their ends; None for one beyond `MAX_LINE_BYTES`, which is never held in memory."""
        limit = FREE_EXPANSION_BYTES + MAX_EXPANSION * file.path.stat().st_size
        read, number = 0, 1
        with _open(file) as (stream, self._position):
            while line := stream.readline(MAX_LINE_BYTES + 1):
                read += len(line)
                too_long = len(line) > MAX_LINE_BYTES
                while too_long and line and not line.endswith(b"\n") and read <= limit:
                    line = stream.readline(MAX_LINE_BYTES)
                    read += len(line)
                if read > limit:
                    raise _expands(file)
                yield number, None if too_long else line
                number += 1


def _text_of_line(line: bytes | None) -> str:
    """The document of a line (None: a line that was too long). Raises ValueError saying what is wrong with it."""
    if line is None:
        raise ValueError(f"line longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        text = json.loads(line.decode("utf-8-sig"))["text"]
        if not isinstance(text, str):
            raise TypeError
        text.encode()  # a lone surrogate is valid JSON, but no tokenizer takes it
    except UnicodeError as error:
        raise ValueError("not UTF-8 text") from error
    except KeyError as error:
        raise ValueError('no "text" field') from error
    except TypeError as error:
        raise ValueError('not a JSON object with a string "text"') from error
    except (ValueError, RecursionError) as error:
        raise ValueError("not valid JSON") from error
    return text


def _expands(file: TextFile) -> MoEficationError:
    return MoEficationError(f"{file} expands to over {MAX_EXPANSION} times its size, as no text does; refused")


def _size(file: TextFile) -> int:
    """Bytes to read: of a zip's member those it expands to, of other compressed files those on the disk."""
    if file.member is None:
        return file.path.stat().st_size
    with zipfile.ZipFile(file.path) as archive:
        return archive.getinfo(file.member).file_size


@contextlib.contextmanager
def _open(file: TextFile) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The expanded bytes, and a function that says how far they are read, on the scale of `_size`."""
    with contextlib.ExitStack() as stack:
        if file.member is None:
            raw = stack.enter_context(file.path.open("rb"))
        else:
            raw = stack.enter_context(stack.enter_context(zipfile.ZipFile(file.path)).open(file.member))
        openers = {".gz": gzip.open, ".zst": partial(zstd.open, options=LONGEST_WINDOW)}
        opener = openers.get(PurePosixPath(file.member or file.path.name).suffix.lower())
        yield (stack.enter_context(opener(raw, "rb")) if opener else raw), raw.tell
