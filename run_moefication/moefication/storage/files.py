"""Single files, written so that they are whole or absent. Free of torch."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ..errors import MoEficationError


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(lock: FileLock, timeout: float = -1, what: Path | None = None) -> Iterator[None]:
    """Hold a lock, whose file is there only meanwhile. It may be nested, and dies with its process.

    If another process holds it after `timeout` seconds (-1: any time), a MoEficationError says that it writes `what`.
    """
    path = Path(lock.lock_file)
    new_folders = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout)
    except Timeout as error:
        raise MoEficationError(f"another run is writing {what or path}: let it finish") from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            path.unlink(missing_ok=True)  # whoever waits for it makes a new one
            with contextlib.suppress(OSError):  # something was written there
                for folder in new_folders:
                    folder.rmdir()
        lock.release()


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> dict[str, Any]:
    """Make `path` by `write(file)`: under its final name it is whole, whatever interrupts. Returns its entry for a
    manifest, `{"size", "sha256"}`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            try:
                write(file)
            except RuntimeError as error:  # torch.save hides a full disk behind an error of its own
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise
            file.flush()
            os.fsync(file.fileno())
        entry = {"size": temporary.stat().st_size, "sha256": file_sha256(temporary)}
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # which disk is full
        raise
    sync(path.parent)
    return entry


def write_json(path: Path, content: Any) -> dict[str, Any]:
    """Write a JSON file atomically; the same content gives the same bytes."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return write_atomically(path, lambda file: file.write(text.encode()))


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sizes(folder: Path, names: Iterable[str]) -> dict[str, int] | None:
    """The sizes of these files in a folder, by name; None where one is not there."""
    with contextlib.suppress(OSError):
        return {name: (folder / name).stat().st_size for name in names}
    return None


def digest(content: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; `what` says what to do where there is none."""
    if not path.is_file():  # nor a pipe, which would be waited for
        raise MoEficationError(f"{path.parent} has no {path.name}; {what}")
    return parse_json_object(path, what)


def parse_json_object(path: Path, what: str) -> dict[str, Any]:
    """As `read_json_object`, but raises FileNotFoundError where there is no such file."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MoEficationError(f"{path} is not JSON; {what}") from error
    if not isinstance(content, dict):
        raise MoEficationError(f"{path} is not a JSON object; {what}")
    return content
