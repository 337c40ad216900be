"""Torch files, read so that nothing in them is ever executed."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch

from ..errors import MoEficationError

# What torch's unpickler and its reader of archives raise for a file that is cut, foreign or forbidden.
UNPICKLING_ERRORS = (
    *(pickle.UnpicklingError, RuntimeError, ValueError, LookupError, AttributeError, TypeError, AssertionError),
    *(EOFError, ImportError, OSError),
)


def load_tensors(path: Path, mmap: bool = True) -> Any:
    """A torch file, memory-mapped; without `mmap`, the format of torch before 1.6 is read, too, all of it into memory.
    Refused: what is cut short, or holds anything but tensors and plain containers."""
    if not path.is_file():
        raise MoEficationError(f"{path} is not a file")
    try:
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except UNPICKLING_ERRORS as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0][:150]
        raise MoEficationError(f"{path} is not a whole file of plain tensors, refused ({reason})") from error


def tensor_sha256(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's bytes, whatever its dtype."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
