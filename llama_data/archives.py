"""Files of packages (.whl, .tgz, .deb), read in memory: nothing is unpacked to the disk.

Packages are known by their checksums before they come here, so that nothing has to guard against hostile ones.
"""

import io
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

from llama_download.registry import RegistryError
from run_moefication.moefication.errors import MoEficationError


def require_reader(path: Path) -> None:
    """Raise RegistryError where the package needs a program that is not installed."""
    if path.suffix == ".deb" and shutil.which("dpkg-deb") is None:
        raise RegistryError(f"{path.name} needs dpkg-deb, which is not installed")


def read_members(path: Path, pattern: str) -> dict[str, bytes]:
    """Content of the package's regular files whose whole name matches the pattern, in order of their names.

    Raises MoEficationError where the package is damaged.
    """
    wanted = re.compile(pattern).fullmatch
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                return {name: archive.read(name) for name in sorted(archive.namelist()) if wanted(name)}
        with tarfile.open(fileobj=_tar_of_deb(path) if path.suffix == ".deb" else path.open("rb")) as archive:
            files = {info.name.removeprefix("./"): info for info in archive if info.isreg()}
            return {name: archive.extractfile(files[name]).read() for name in sorted(files) if wanted(name)}
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise MoEficationError(f"{path} cannot be read as a package ({error})") from error


def _tar_of_deb(path: Path) -> io.BytesIO:
    """The files of a Debian package as an uncompressed tar file."""
    result = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], capture_output=True)
    if result.returncode:
        raise OSError(result.stderr.decode(errors="replace").strip())
    return io.BytesIO(result.stdout)
