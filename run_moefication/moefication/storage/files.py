"""Single files, written so that they are whole or absent, and read so that nothing in them is ever executed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import MoEficationError

if TYPE_CHECKING:
    import torch


class _HashingFile:
    """A write-only file that counts and hashes what passes through, so that no file is read back to be hashed."""

    def __init__(self, file: BinaryIO):
        self._file, self._sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data) -> int:
        written = self._file.write(data)
        self._sha256.update(data)
        self.size += written
        return written

    def flush(self) -> None:
        self._file.flush()

    def entry(self) -> dict[str, Any]:
        return {"size": self.size, "sha256": self._sha256.hexdigest()}


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
def turn(path: Path) -> Iterator[None]:
    """Held by one process at a time, where the file system can do that, by a file that is there meanwhile."""
    new_folders = [folder for folder in path.parents if not folder.exists()]
    with contextlib.ExitStack() as stack:
        held = False
        while not held:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the holder before has just removed the folder, too
                file = stack.enter_context(path.open("wb"))
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                # The holder before removes its file, and a third process may hold a new one by now.
                held = os.path.samestat(path.stat(), os.fstat(file.fileno()))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something was written there
                for folder in new_folders:
                    folder.rmdir()


def write_atomically(path: Path, write: Callable[[Any], None]) -> dict[str, Any]:
    """Make `path` by `write(file)`: under its final name it is whole, whatever interrupts.

    Returns: `{"size", "sha256"}` of the file, for its manifest.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as raw:
            file = _HashingFile(raw)
            try:
                write(file)
            except RuntimeError as error:  # torch.save hides a full disk behind an error of its own
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise
            raw.flush()
            os.fsync(raw.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync(path.parent)
    return file.entry()


def write_json(path: Path, content: Any) -> dict[str, Any]:
    """Write a JSON file atomically; the same content gives the same bytes."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return write_atomically(path, lambda file: file.write(text.encode()))


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_sha256(tensor: "torch.Tensor") -> str:
    """sha256 of a tensor's bytes, whatever its dtype."""
    import torch

    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def digest(content: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# What torch's unpickler and its reader of archives raise for a file that is cut, foreign or forbidden.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    EOFError,
    ImportError,
    OSError,
)


def load_tensors(path: Path, mmap: bool = True) -> Any:
    """A torch file, memory-mapped; nothing in it is ever executed.

    Args:
        mmap: False also reads the format of torch before 1.6, all of it into memory.

    Raises:
        MoEficationError: not a regular file, cut short, or holding anything but tensors and plain containers.
    """
    if not path.is_file():
        raise MoEficationError(f"{path} is not a file")
    import torch

    try:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except UNPICKLING_ERRORS as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0][:150]
        raise MoEficationError(f"{path} is not a whole file of plain tensors, refused ({reason})") from error


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; `what` says what to do where there is none."""
    if not path.is_file():  # nor a pipe, which would be waited for
        raise MoEficationError(f"{path.parent} has no {path.name}; {what}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MoEficationError(f"{path} is not JSON; {what}") from error
    if not isinstance(content, dict):
        raise MoEficationError(f"{path} is not a JSON object; {what}")
    return content
