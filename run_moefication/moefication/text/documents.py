"""Files of text to documents: jsonl, plain text, either compressed or in a zip; parquet."""

import codecs
import contextlib
import gzip
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

try:
    from compression import zstd  # Python 3.14
except ImportError:
    from backports import zstd

from ..errors import MoEficationError, SettingError
from .text_files import TextFile

MAX_LINE_BYTES = 64 << 20
PLAIN_TEXT_BYTES = 4 << 20  # longer plain text is read as several documents, cut at line ends
# Compression makes real text ten times smaller, hardly ever a hundred times: what expands further than this is no text.
MAX_EXPANSION = 200
FREE_EXPANSION_BYTES = 64 << 20
# What readers of archives and compressed files raise for damaged ones.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile, zstd.ZstdError, NotImplementedError)
LONGEST_WINDOW = {zstd.DecompressionParameter.window_log_max: 31}  # what `zstd --long=31` needs: up to 2 GiB of memory


class Document(NamedTuple):
    """A text, and the file and line it stands in."""

    text: str
    place: str


class DocumentReader:
    """Iterates over the non-empty documents of files: the "text" of each line of a .jsonl, other files as plain text.

    Args:
        skip_bad_lines: count the lines that hold no document, and go on, instead of stopping at the first. None: the
            same as False, for callers without such an option, which errors then do not mention.

    Attributes:
        total_bytes, position: how much there is to read, and how much of it is read, for progress.
        skipped: lines skipped so far.

    Raises:
        MoEficationError: names the file, and the line that is not a JSON object with a string "text" in UTF-8.
    """

    def __init__(self, files: list[TextFile], skip_bad_lines: bool | None = None):
        self.files, self._skip_bad_lines = files, skip_bad_lines
        self.skipped = self._done = 0
        self._position: Callable[[], int] = int
        self._sizes = [_size(file) for file in files]
        self.total_bytes = sum(self._sizes)

    @property
    def position(self) -> int:
        return self._done + self._position()

    def __iter__(self) -> Iterator[Document]:
        for file, size in zip(self.files, self._sizes, strict=True):
            try:
                if file.is_parquet:
                    yield from self._documents(file, self._rows(file), _text_of_value)
                elif file.holds_lines:
                    yield from self._documents(file, self._json_lines(file), _text_of_line)
                else:
                    yield from self._plain_text(file)
            except DAMAGE as error:
                raise MoEficationError(f"{file} is damaged or cut short ({error}); get it again") from error
            self._position, self._done = int, self._done + size

    def bad(self, place: str, why: str, error: Exception | None = None) -> None:
        """A document cannot be used: raise MoEficationError, or count it where bad lines are skipped."""
        if not self._skip_bad_lines:
            cure = "" if self._skip_bad_lines is None else "; skip_bad_lines goes on without it"
            raise SettingError(f"{place}: {why}{cure}") from error
        self.skipped += 1

    def _documents(
        self, file: TextFile, values: Iterable[tuple[int, Any]], text_of: Callable[[Any], str]
    ) -> Iterator[Document]:
        """The documents of numbered lines or rows; `text_of` raises ValueError for one that holds none."""
        for number, value in values:
            try:
                text = text_of(value)
            except ValueError as error:
                self.bad(f"{file}:{number}", str(error), error)
                continue
            if text.strip():
                yield Document(text, f"{file}:{number}")

    def _json_lines(self, file: TextFile) -> Iterator[tuple[int, bytes | None]]:
        """As `_lines`, without the empty ones; a file that is one JSON array is refused."""
        for number, line in self._lines(file):
            bare = None if line is None else line.removeprefix(codecs.BOM_UTF8).strip()
            if number == 1 and bare and (bare == b"[" or bare.startswith(b"[{")):
                raise MoEficationError(f"{file} is one JSON array; write each of its elements in a line: jq -c '.[]'")
            if bare != b"":
                yield number, line

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

    def _rows(self, file: TextFile) -> Iterator[tuple[int, Any]]:
        """The numbered values of a parquet file's column "text"; memory: those of a row group."""
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
                limit -= batch.nbytes
                if limit < 0:
                    raise _expands(file)
                for value in batch.column(0):
                    number += 1
                    yield number, value
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


def _text_of_value(value: Any) -> str:
    """The document of a value of a parquet file. Raises ValueError saying what is wrong with it."""
    try:
        text = value.as_py()
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeError as error:
        raise ValueError("not UTF-8 text") from error
    if not isinstance(text, str):
        raise ValueError("its text is no string")
    return text


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
        openers = dict.fromkeys((".gz", ".gzip"), gzip.open)
        openers |= dict.fromkeys((".zst", ".zstd"), partial(zstd.open, options=LONGEST_WINDOW))
        opener = openers.get(PurePosixPath(file.member or file.path.name).suffix.lower())
        yield (stack.enter_context(opener(raw, "rb")) if opener else raw), raw.tell
