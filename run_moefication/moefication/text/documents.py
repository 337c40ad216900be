"""Files of text to documents: jsonl, plain text, either compressed or in a zip; parquet."""

import gzip
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

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
OPENERS = dict.fromkeys((".gz", ".gzip"), gzip.open)
OPENERS |= dict.fromkeys((".zst", ".zstd"), partial(zstd.open, options=LONGEST_WINDOW))


class Document(NamedTuple):
    """A text, and the file and line it stands in."""

    text: str
    place: str


class DocumentReader:
    """Iterates over the non-empty documents of files: the "text" of each line of a .jsonl, other files as plain text.

    A line that holds no document (no JSON object with a string "text" in UTF-8) raises MoEficationError, or with
    `skip_bad_lines` is counted in `skipped`. None is False for callers without that option: errors do not mention it.
    """

    def __init__(self, files: list[TextFile], skip_bad_lines: bool | None = None):
        self.files, self._skip_bad_lines = files, skip_bad_lines
        self._sizes = [file.num_bytes for file in files]
        self.total_bytes = sum(self._sizes)
        self.skipped = self._done = self._left_to_expand = 0
        self._position: Callable[[], int] = int

    @property
    def position(self) -> int:
        """How much of `total_bytes` is read, for progress."""
        return self._done + self._position()

    def __iter__(self) -> Iterator[Document]:
        for file, size in zip(self.files, self._sizes, strict=True):
            self._left_to_expand = FREE_EXPANSION_BYTES + MAX_EXPANSION * file.path.stat().st_size
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
                why = "not UTF-8 text" if isinstance(error, UnicodeError) else str(error)
                self.bad(f"{file}:{number}", why, error)
                continue
            if text.strip():
                yield Document(text, f"{file}:{number}")

    def _json_lines(self, file: TextFile) -> Iterator[tuple[int, bytes | None]]:
        """As `_lines`; a file that is one JSON array is refused."""
        for number, line in self._lines(file):
            if number == 1 and re.match(rb"(\xef\xbb\xbf)?\s*\[\s*({|$)", line or b""):
                raise MoEficationError(f"{file} is one JSON array; write each of its elements in a line: jq -c '.[]'")
            yield number, line

    def _plain_text(self, file: TextFile) -> Iterator[Document]:
        """The whole file; in documents of `PLAIN_TEXT_BYTES` and up to the end of the line, where it is longer."""
        for part in grouped(self._lines(file), lambda line: len(line[1] or b""), PLAIN_TEXT_BYTES):
            (first, *_), lines = zip(*part, strict=True)
            if None in lines:
                number = first + lines.index(None)
                raise MoEficationError(f"{file}:{number}: line longer than {MAX_LINE_BYTES >> 20} MiB; break it")
            try:
                text = b"".join(lines).decode("utf-8-sig" if first == 1 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                number = first + error.object.count(b"\n", 0, error.start)
                raise MoEficationError(f"{file}:{number}: not UTF-8 text") from error
            if text.strip():
                yield Document(text, f"{file}:{first}")

    def _rows(self, file: TextFile) -> Iterator[tuple[int, Any]]:
        """The numbered values of a parquet file's column "text"; memory: those of a row group."""
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        size, number = file.num_bytes, 0
        try:
            table = ParquetFile(file.path)
            if "text" not in table.schema_arrow.names:
                raise MoEficationError(f"{file} has no column text, but {', '.join(table.schema_arrow.names)}")
            self._position = lambda: size * number // max(1, table.metadata.num_rows)
            for batch in table.iter_batches(columns=["text"]):
                self._expand(file, batch.nbytes)
                for value in batch.column(0):
                    number += 1
                    yield number, value
        except ArrowException as error:
            raise EOFError(str(error)) from error  # one of DAMAGE

    def _lines(self, file: TextFile) -> Iterator[tuple[int, bytes | None]]:
        """Numbered lines with their ends; None for one beyond `MAX_LINE_BYTES`, which is never held in memory."""
        number, expand = 0, OPENERS.get(PurePosixPath(file.member or file.path.name).suffix.lower(), nullcontext)
        with file.open() as raw, expand(raw) as stream:
            self._position = raw.tell
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                self._expand(file, len(line))
                is_long = len(line) > MAX_LINE_BYTES
                while is_long and line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_LINE_BYTES)
                    self._expand(file, len(line))
                yield number, None if is_long else line

    def _expand(self, file: TextFile, num_bytes: int) -> None:
        """Count bytes of the file's content."""
        self._left_to_expand -= num_bytes
        if self._left_to_expand < 0:
            raise MoEficationError(f"{file} expands to over {MAX_EXPANSION} times its size, as no text does; refused")


def grouped(items: Iterable, size_of: Callable[[Any], int], size: int) -> Iterator[list]:
    """The items in lists; the item with which a list reaches the size is its last."""
    group, reached = [], 0
    for item in items:
        group.append(item)
        reached += size_of(item)
        if reached >= size:
            yield group
            group, reached = [], 0
    if group:
        yield group


def _text_of_value(value: Any) -> str:
    """The document of a value of a parquet file. Raises ValueError saying what is wrong with it."""
    text = value.as_py()
    text = text.decode() if isinstance(text, bytes) else text
    if not isinstance(text, str):
        raise ValueError("its text is no string")
    return text


def _text_of_line(line: bytes | None) -> str:
    """The document of a line (None: a line that was too long). Raises ValueError saying what is wrong with it."""
    if line is None:
        raise ValueError(f"line longer than {MAX_LINE_BYTES >> 20} MiB")
    line = line.decode("utf-8-sig").strip()
    if not line:
        return line
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("not valid JSON") from error
    if isinstance(content, dict) and "text" not in content:
        raise ValueError('no "text" field')
    if not isinstance(content, dict) or not isinstance(content["text"], str):
        raise ValueError('not a JSON object with a string "text"')
    content["text"].encode()  # a lone surrogate is valid JSON, but no tokenizer takes it
    return content["text"]
