"""Folders that appear whole under their name or not at all, and that say what they were made from."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from run_moefication.moefication.errors import MoEficationError

RECORD = "source.json"  # what the folder was made from, and its files with their sizes
UNFINISHED = ".unfinished"  # marks a folder that `new_folder` is filling


def is_complete(folder: Path, source: dict[str, Any]) -> bool:
    """Whether the folder was made from just this source, and has every file in its full size."""
    record = _read_record(folder)
    files = record.pop("files", None)
    return record == source and files == _sizes(folder, files)


def refuse_occupied(folder: Path, overwrite: bool = False) -> None:
    """Refuse a folder that is neither absent nor empty nor, to be overwritten, made by `new_folder` alone."""
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise MoEficationError(f"--output_dir {folder} is no folder: choose another name")
    if os.path.ismount(folder):
        raise MoEficationError(f"--output_dir {folder} is a mount point, which cannot be replaced: name a folder in it")
    files = _read_record(folder).get("files", {})
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in {RECORD, *files})
    if foreign:
        raise MoEficationError(f"--output_dir {folder} holds something else ({foreign[0]}): choose another folder")
    if files and not overwrite and _sizes(folder, files) != files:
        raise MoEficationError(f"--output_dir {folder} has lost or changed files: --overwrite makes it anew")
    if (folder / RECORD).exists() and not overwrite:
        raise MoEficationError(f"--output_dir {folder} was made from something else: choose another or --overwrite")


@contextlib.contextmanager
def new_folder(folder: Path, source: dict[str, Any], overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty folder to fill, which then gets its record and, synced, the name `folder`; removed if that fails.

    Raises:
        MoEficationError: see `refuse_occupied`; or another process is making the same folder.
    """
    from run_moefication.moefication.storage.files import sync  # brings torch in, which takes its time

    folder = folder.resolve()
    refuse_occupied(folder, overwrite)
    partial = folder.with_name(f".{folder.name}.partial")
    is_ours = (partial / UNFINISHED).exists() or (partial / RECORD).exists()
    if partial.is_symlink() or (partial.exists() and any(partial.iterdir()) and not is_ours):
        raise MoEficationError(f"{partial} is in the way, and not of this script: move it away")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / UNFINISHED).touch()
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MoEficationError(f"another run is writing {folder}: let it finish") from error
        _empty(partial)  # of what a killed run left
        try:
            yield partial
            _complete(partial, source)
            if folder.exists():
                for name in [RECORD, *_read_record(folder).get("files", {})]:
                    (folder / name).unlink(missing_ok=True)
                folder.rmdir()
            os.rename(partial, folder)
        except BaseException:
            shutil.rmtree(partial)
            raise
        sync(folder.parent)
    finally:
        os.close(lock)


def _complete(partial: Path, source: dict[str, Any]) -> None:
    """Write the record, give every file the rights that a new file has here, and have all of it on the disk."""
    from run_moefication.moefication.storage.files import sync

    names = sorted(path.name for path in partial.iterdir() if path.name != UNFINISHED)
    record = source | {"files": _sizes(partial, names)}
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    mode = partial.stat().st_mode & 0o666  # safetensors makes its files private
    for path in partial.iterdir():
        path.chmod(mode)
        sync(path)
    (partial / UNFINISHED).unlink()  # the record marks it as well: however it is killed, the next run knows it
    sync(partial)


def _read_record(folder: Path) -> dict[str, Any]:
    """The folder's record; empty where it has none that is whole."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        names_are_bare = all(Path(name).name == name for name in record["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return record if names_are_bare else {}


def _sizes(folder: Path, names: Any) -> dict[str, int] | None:
    with contextlib.suppress(OSError):
        return {name: (folder / name).stat().st_size for name in names or ()}
    return None


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name == UNFINISHED:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
