"""Checkpoints that appear whole under their name or not at all, and that say what they were made from."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.storage.files import file_sizes, sync
from run_moefication.moefication.storage.folder_writer import FolderWriter

RECORD = "source.json"  # what the folder was made from, and its files with their sizes


def is_complete(folder: Path, source: dict[str, Any]) -> bool:
    """Whether the folder was made from just this source, and has every file in its full size."""
    record = _read_record(folder)
    files = record.pop("files", {})
    return record == source and files == file_sizes(folder, files)


def refuse_occupied(folder: Path, overwrite: bool = False) -> None:
    """Refuse a folder that holds anything; with `overwrite`, one that holds anything `new_folder` did not make."""
    FolderWriter(folder, _own_files).refuse_place()
    if not folder.exists():
        return
    files = _read_record(folder).get("files", {})
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in {RECORD, *files})
    if foreign:
        raise MoEficationError(f"--output_dir {folder} holds something else ({foreign[0]}): choose another folder")
    if files and not overwrite and file_sizes(folder, files) != files:
        raise MoEficationError(f"--output_dir {folder} has lost or changed files: --overwrite makes it anew")
    if (folder / RECORD).exists() and not overwrite:
        raise MoEficationError(f"--output_dir {folder} was made from something else: choose another or --overwrite")


@contextlib.contextmanager
def new_folder(folder: Path, source: dict[str, Any]) -> Iterator[Path]:
    """Gives an empty folder to fill, which then gets its record and, synced, the name `folder`; removed if that fails.

    `refuse_occupied` comes first. Raises MoEficationError where another process is making the same folder.
    """
    writer = FolderWriter(folder, _own_files)
    with writer.locked(timeout=0):
        writer.start()
        try:
            yield writer.partial
            _complete(writer.partial, source)
            writer.publish()
        except BaseException:
            writer.discard()
            raise


def _complete(partial: Path, source: dict[str, Any]) -> None:
    """Write the record, give every file the rights that a new file has here, and have all of it on the disk."""
    names = sorted(path.name for path in partial.iterdir() if path.is_file())
    record = source | {"files": file_sizes(partial, names)}
    (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    mode = partial.stat().st_mode & 0o666  # safetensors makes its files private
    for name in [*names, RECORD]:
        (partial / name).chmod(mode)
        sync(partial / name)
    sync(partial)


def _read_record(folder: Path) -> dict[str, Any]:
    """The folder's record; empty where it has none that is whole."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        names_are_bare = all(Path(name).name == name for name in record["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return record if names_are_bare else {}


def _own_files(folder: Path) -> list[str]:
    return [*_read_record(folder).get("files", ()), RECORD]
