"""Which files of a folder are ours. The scripts here write into folders that hold other files, too."""

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.storage.files import file_sha256


def read_record(path: Path, *keys: str) -> dict[str, Any] | None:
    """The record that a script keeps of its files, with these keys beside `files`; None where there is none.
    Raises MoEficationError where the file is something else."""
    if not path.exists():
        return None
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, OSError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(entry, dict) for entry in record["files"].values()) and record.keys() >= {*keys}:
            return record
    raise MoEficationError(f"{path} is not of this script: move it away")


def refuse_foreign_files(folder: Path, names: Iterable[str], records: Sequence[dict[str, Any] | None]) -> None:
    """Raise MoEficationError where one of these files is there, but not as one of the records has it."""
    entries = [record["files"] for record in records if record]
    for name in names:
        path, sums = folder / name, {files.get(name, {}).get("sha256") for files in entries}
        if path.exists() and not (path.is_file() and file_sha256(path) in sums):
            raise MoEficationError(f"{path} was not made by this script, or was changed since: move it away")


def old_names(folder: Path, old: dict[str, Any] | None, new: Iterable[str]) -> list[str]:
    """Files that only the old record has, without those outside of the folder, which a foreign record may name."""
    names = {*(old or {"files": {}})["files"]} - {*new}
    return sorted(name for name in names if (folder / name).resolve().is_relative_to(folder.resolve()))
