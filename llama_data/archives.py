"""Members of packages (.whl, .tgz, .deb), read in memory: nothing is unpacked to the disk, and sizes are limited."""

import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_MEMBER_BYTES = 64 << 20
MAX_UNPACKED_BYTES = 1 << 30
AR_MAGIC = b"!<arch>\n"
AR_HEADER_BYTES = 60


def read_members(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of the package's regular files whose whole name matches the pattern, in order of their names.

    Raises ValueError where the package is damaged, of an unknown kind, or larger than the limits.
    """
    wanted = re.compile(pattern)
    readers = {".whl": _zip_members, ".tgz": _tgz_members, ".deb": _deb_members}
    if path.suffix not in readers:
        raise ValueError(f"{path} is no .whl, .tgz or .deb file")
    try:
        members = dict(readers[path.suffix](path, wanted))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a package ({error})") from error
    yield from sorted(members.items())


def _zip_members(path: Path, wanted: re.Pattern) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir() and wanted.fullmatch(info.filename):
                _limit(info.file_size, MAX_MEMBER_BYTES, f"{path}: {info.filename}")
                yield info.filename, archive.read(info)  # zipfile stops at the size it declares


def _tgz_members(path: Path, wanted: re.Pattern) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        yield from _tar_members(file, "gz", str(path), wanted)


def _deb_members(path: Path, wanted: re.Pattern) -> Iterator[tuple[str, bytes]]:
    """A .deb is an ar archive; its files lie in the member `data.tar`, compressed."""
    with path.open("rb") as file:
        if file.read(len(AR_MAGIC)) != AR_MAGIC:
            raise ValueError(f"{path} is no ar archive")
        while len(header := file.read(AR_HEADER_BYTES)) == AR_HEADER_BYTES:
            name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), header[48:58].strip()
            if header[58:] != b"`\n" or not size.isdigit():
                raise ValueError(f"{path} has a damaged ar header")
            _limit(int(size), MAX_MEMBER_BYTES, f"{path}: {name}")
            content = file.read(int(size) + int(size) % 2)  # members begin at even places
            if name.startswith("data.tar"):
                compression = name.removeprefix("data.tar").lstrip(".")
                yield from _tar_members(io.BytesIO(content), compression, str(path), wanted)
                return
    raise ValueError(f"{path} holds no data.tar")


def _tar_members(file: BinaryIO, compression: str, place: str, wanted: re.Pattern) -> Iterator[tuple[str, bytes]]:
    if compression not in ("", "gz", "bz2", "xz"):
        raise ValueError(f"{place}: compression {compression!r} is not supported")
    unpacked = 0
    # As a stream, so that the declared sizes are seen before what they declare is decompressed.
    with tarfile.open(fileobj=file, mode=f"r|{compression}") as archive:
        for info in archive:
            unpacked += info.size
            _limit(unpacked, MAX_UNPACKED_BYTES, place)
            name = info.name.removeprefix("./")
            if info.isreg() and wanted.fullmatch(name):
                _limit(info.size, MAX_MEMBER_BYTES, f"{place}: {name}")
                yield name, archive.extractfile(info).read()


def _limit(size: int, limit: int, place: str) -> None:
    if size > limit:
        raise ValueError(f"{place} unpacks to {size:,} bytes or more, over the limit of {limit:,}")
