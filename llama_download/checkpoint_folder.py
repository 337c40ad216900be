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


def is_complete(folder: Path, source: dict[str, Any], overwrite: bool = False) -> bool:
    """Whether the folder was made from just this source, and has every file in its full size; never if to `overwrite`.
    Raises MoEficationError where it holds anything else; with `overwrite`, anything that `new_folder` did not make."""
    record = _read_record(folder)
    files = record.pop("files", {})
    is_whole = files == file_sizes(folder, files)
    if is_whole and record == source and not overwrite:
        return True
    FolderWriter(folder, _own_files).refuse_place()
    foreign = {path.name for path in folder.glob("*")} - {RECORD, *files}
    if foreign:
        raise MoEficationError(f"--output_dir {folder} holds something else ({min(foreign)}): choose another folder")
    if (folder / RECORD).exists() and not overwrite:
        what = "was made from something else: choose another or" if is_whole else "has lost or changed files:"
        raise MoEficationError(f"--output_dir {folder} {what} --overwrite makes it anew")
    return False


@contextlib.contextmanager
def new_folder(folder: Path, source: dict[str, Any]) -> Iterator[Path]:
    """Gives an empty folder to fill, which then gets its record and, synced, the name `folder`; removed if that fails.
    `is_complete` comes first. Raises MoEficationError where another process is making the same folder."""
    writer = FolderWriter(folder, _own_files)
    partial = writer.partial
    with writer.locked(timeout=0):
        writer.start()
        try:
            yield partial
            names = sorted(path.name for path in partial.iterdir() if path.is_file())
            record = source | {"files": file_sizes(partial, names)}
            (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            mode = partial.stat().st_mode & 0o666  # as new files have it here; safetensors makes its files private
            for name in [*names, RECORD]:
                (partial / name).chmod(mode)
                sync(partial / name)
            sync(partial)
            writer.publish()
        except BaseException:
            writer.discard()
            raise


def _read_record(folder: Path) -> dict[str, Any]:
    """The folder's record; empty where it has none that is whole."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if all(Path(name).name == name for name in record["files"]):
            return record
    return {}


def _own_files(folder: Path) -> list[str]:
    return [*_read_record(folder).get("files", ()), RECORD]
