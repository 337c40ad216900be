"""Files of packages (.whl, .tgz, .deb), read in memory. Checksums were compared before: no package is hostile."""

import io
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

from run_moefication.moefication.errors import MoEficationError


def read_members(path: Path, pattern: str) -> dict[str, bytes]:
    """Content of the package's regular files whose whole name matches the pattern, in order of their names.
    Raises MoEficationError where the package is damaged."""
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
