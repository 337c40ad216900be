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


CLIENTS = {"PyPI": sys.executable, "npm": "npm", "Debian": "apt-get"}  # Python runs pip
ADVICE = {
    "PyPI": "check the network and pip's index",
    "npm": "check the network and npm's registry",
    "Debian": "check the network, and which Debian apt-get is set up for",
}


@dataclass(frozen=True)
class Package:
    """One file of a registry, known by its checksum.

    Attributes:
        registry: "PyPI" (releases with a single wheel for every platform), "npm", or "Debian".
        name: for PyPI as in the wheel's file name, with underscores.
        architecture: of Debian's packages.
    """

    registry: str
    name: str
    version: str
    sha256: str
    architecture: str = "all"

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
    """Path of the package's file in `cache_dir`, downloaded unless an undamaged copy lies there already.

    Raises:
        RegistryError: it cannot be had.
        MoEficationError: the registry's file is not the pinned one.
    """
    if not package.is_in(cache_dir):
        client = CLIENTS[package.registry]
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
    """Bring the packages into `cache_dir` with one call of each client, which are slow to start.

    Where such a call fails, nothing is said: `fetch` then tries each package alone.
    """
    missing = [package for package in dict.fromkeys(packages) if not package.is_in(cache_dir)]
    for registry, client in CLIENTS.items():
        group = [package for package in missing if package.registry == registry]
        if len(group) > 1 and shutil.which(client):
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
    """Have the registry's client put the packages into `folder`."""
    wanted = [package.requirement for package in packages]
    if packages[0].registry == "PyPI":  # wheels only: pip runs the code of a source distribution merely to look at it
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        return _run(pip, wanted, folder, "PyPI")
    if packages[0].registry == "npm":
        npm = ["npm", "pack", "--ignore-scripts", "--loglevel=error", "--no-update-notifier"]
        return _run(npm, wanted, folder, "npm")
    wanted = [
        f"{p.name}={p.version}" if p.architecture == "all" else f"{p.name}:{p.architecture}={p.version}"
        for p in packages
    ]
    with contextlib.suppress(RegistryError):
        return _run(["apt-get", "--quiet", "download"], wanted, folder, "Debian")
    # The machine's package lists may be older than the pin. Any user can bring lists of their own up to date.
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    settings = (f"Dir::State::Lists={lists}", "Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache=")
    apt_get = ["apt-get", "--quiet", *(f"--option={setting}" for setting in settings)]
    with contextlib.suppress(RegistryError):
        _run([*apt_get, "update"], [], folder, "Debian")
    return _run([*apt_get, "download"], wanted, folder, "Debian")


def _run(command: list[str], wanted: list[str], folder: Path, registry: str) -> None:
    """Run a client's command in `folder` for what is wanted. Raises RegistryError with the client's reason."""
    # Clients draw bars on stdout, which belongs to our caller, and write errors to stderr.
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    streams = dict(stdout=bar, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    result = subprocess.run([*command, *wanted], cwd=folder, **streams, text=True, errors="replace")
    if result.returncode:
        client = "pip" if command[1] == "-m" else command[0]
        lines = result.stderr.strip().splitlines() or [f"{client} ended with status {result.returncode}"]
        reason = lines[0] if client == "npm" else lines[-1]  # npm ends with hints
        raise RegistryError(f"{client} could not fetch {' '.join(wanted)}: {ADVICE[registry]} ({reason.strip()})")
