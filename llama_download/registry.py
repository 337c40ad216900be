"""Pinned packages of the registries of Python (pip), JavaScript (npm) and Debian (apt-get): fetched once, checked
always, never installed and nothing in them ever run. And how scripts that fetch them end."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from run_moefication.command_line import fail
from run_moefication.moefication.storage.files import file_sha256


class RegistryError(RuntimeError):
    """A package cannot be had: its client is not installed, or found no network, no registry or no such release."""


@dataclass(frozen=True)
class Package:
    """One file of a registry, known by its checksum; the subclasses say which registry."""

    registry: ClassVar[str]
    client: ClassVar[str]
    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The release, in the words of the registry's client."""
        raise NotImplementedError

    @property
    def file_name(self) -> str:
        """The name under which the client leaves the file."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """The registry and the release, for people."""
        return f"{self.registry} {self.requirement}"

    @classmethod
    def download(cls, packages: "Sequence[Package]", folder: Path) -> None:
        """Have the client put the packages' files into `folder`. Raises RegistryError where it cannot."""
        raise NotImplementedError


class Wheel(Package):
    """A release in the Python package index that has a single wheel for every platform.

    Wheels only: pip runs the code of a source distribution merely to look at it.
    """

    registry = "PyPI"  # `name` is as in the wheel's file name, with underscores
    client = sys.executable  # runs pip

    @property
    def requirement(self) -> str:
        return f"{self.name.replace('_', '-')}=={self.version}"

    @property
    def file_name(self) -> str:
        return f"{self.name}-{self.version}-py3-none-any.whl"

    @classmethod
    def download(cls, packages: Sequence[Package], folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        _run_client(pip, [package.requirement for package in packages], folder, "check the network and pip's index")


class NpmPackage(Package):
    """A release in the npm registry."""

    registry = client = "npm"

    @property
    def requirement(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def file_name(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @classmethod
    def download(cls, packages: Sequence[Package], folder: Path) -> None:
        npm = ["npm", "pack", "--ignore-scripts", "--loglevel=error", "--no-update-notifier"]
        _run_client(npm, [package.requirement for package in packages], folder, "check the network and npm's registry")


@dataclass(frozen=True)
class DebianPackage(Package):
    """A version of a package of Debian 12 and of whatever else has it."""

    registry: ClassVar[str] = "Debian"
    client: ClassVar[str] = "apt-get"
    architecture: str = "all"

    @property
    def requirement(self) -> str:
        return f"{self.name}={self.version}"

    @property
    def file_name(self) -> str:
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"

    @property
    def _with_architecture(self) -> str:
        return self.requirement if self.architecture == "all" else f"{self.name}:{self.architecture}={self.version}"

    @classmethod
    def download(cls, packages: "Sequence[DebianPackage]", folder: Path) -> None:
        """Put the package files into `folder`, by package lists of our own where the machine's are stale."""
        names = [package._with_architecture for package in packages]
        download, advice = ["--quiet", "download"], "check the network, and which Debian apt-get is set up for"
        with contextlib.suppress(RegistryError):
            _run_client(["apt-get", *download], names, folder, advice)
            return
        # The machine's lists may be older than the pin. Any user can bring lists of their own up to date.
        lists = folder / "lists"
        (lists / "partial").mkdir(parents=True)
        settings = (f"Dir::State::Lists={lists}", "Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache=")
        apt_get = ["apt-get", *(part for setting in settings for part in ("--option", setting))]
        with contextlib.suppress(RegistryError):
            _run_client([*apt_get, "--quiet"], ["update"], folder, advice)
        _run_client([*apt_get, *download], names, folder, advice)


def fetch(package: Package, cache_dir: Path) -> Path:
    """Path of the package's file in `cache_dir`, downloaded unless an undamaged copy lies there already.

    Raises RegistryError where it cannot be had, ValueError where the registry's file is not the pinned one.
    """
    if not _is_in(cache_dir, package):
        if shutil.which(package.client) is None:
            raise RegistryError(f"{package.title} needs {package.client}, which is not installed")
        print(f"Downloading {package.requirement}", file=sys.stderr)
        with _folder_in(cache_dir) as folder:
            package.download([package], folder)
            if not _is_in(folder, package):
                raise ValueError(
                    f"{package.registry}'s {package.file_name} is not the expected file: check which registry answers"
                )
            os.replace(folder / package.file_name, cache_dir / package.file_name)
    return cache_dir / package.file_name


def prefetch(packages: Iterable[Package], cache_dir: Path) -> None:
    """Bring the packages into `cache_dir` with one call of each client, which are slow to start.

    Where such a call fails, nothing is said: `fetch` then tries each package alone.
    """
    missing = [package for package in dict.fromkeys(packages) if not _is_in(cache_dir, package)]
    for kind in dict.fromkeys(map(type, missing)):
        group = [package for package in missing if type(package) is kind]
        if len(group) == 1 or shutil.which(kind.client) is None:
            continue
        print(f"Downloading {len(group)} packages of {kind.registry}", file=sys.stderr)
        with _folder_in(cache_dir) as folder:
            with contextlib.suppress(RegistryError):
                kind.download(group, folder)
            for package in group:
                if _is_in(folder, package):
                    os.replace(folder / package.file_name, cache_dir / package.file_name)


def _is_in(folder: Path, package: Package) -> bool:
    """Whether the package's file lies in a folder, undamaged."""
    path = folder / package.file_name
    return path.is_file() and file_sha256(path) == package.sha256


@contextlib.contextmanager
def _folder_in(cache_dir: Path) -> Iterator[Path]:
    """A temporary folder on the cache's disk."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache_dir) as folder:
        yield Path(folder)


def exit_status(work: Callable[[], None], program: str) -> int:
    """Do a script's work. Returns its exit status: 0, or after one line on stderr 3 where the registry could not be
    reached, 2 for wrong input and other errors of files."""
    try:
        work()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except (RegistryError, OSError, ValueError) as error:
        status = fail(program, str(error))
        return 3 if isinstance(error, RegistryError) else status
    return 0


def _run_client(command: list[str], wanted: list[str], folder: Path, advice: str) -> None:
    """Run a client's command for what is wanted, with `folder` as its working directory; RegistryError with the
    client's reason if it fails."""
    # Clients draw bars on stdout, which belongs to our caller, and write errors to stderr.
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    streams = dict(stdout=bar, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    result = subprocess.run([*command, *wanted], cwd=folder, **streams, text=True, errors="replace")
    if result.returncode:
        client = "pip" if command[1] == "-m" else command[0]
        lines = result.stderr.strip().splitlines() or [f"{client} ended with status {result.returncode}"]
        reason = lines[0] if client == "npm" else lines[-1]  # npm ends with hints
        raise RegistryError(f"{client} could not fetch {' '.join(wanted)}: {advice} ({reason.strip()})")
