"""What in a stage's folder is ours to remove, and removing it: no foreign file is touched, and a kill at any moment
leaves a folder that is cleared to its end the next time."""

import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import sync, write_json
from .manifest import CLAIM, CLEARING, MANIFEST, NAMES, PARTS, SCRATCH, inside, read_json


def note(folder: Path, names: Iterable[str]) -> None:
    """Add names of files of the folder to those that are ours to remove. A break before each and one after it: a line
    torn by a full disk spoils no other."""
    (folder / PARTS).mkdir(parents=True, exist_ok=True)  # gone, if another run has finished the folder meanwhile
    with (folder / PARTS / NAMES).open("a") as file:
        file.write("".join(f"\n{name}\n" for name in names))


def _noted(folder: Path) -> set[str]:
    """The names that `note` was given."""
    lines = (folder / PARTS / NAMES).read_text().split("\n")
    return {name for name in lines[:-1] if name and "\0" not in name}


def clear(folder: Path, claim: dict[str, Any]) -> None:
    """Remove all files that we wrote here, so that of the folder of this claim the claim alone is left.

    Interrupted, it leaves a folder that knows itself half cleared, and the names of what is to be removed.
    """
    parts = folder / PARTS
    records = [folder / MANIFEST, *(path for path in parts.glob("*.json") if path.name != CLAIM)]
    records = [path for path in records if path.exists()]
    note(folder, {file for record in records for file in read_json(record).get("files", {})})
    paths = [inside(folder, name) for name in sorted(_noted(folder))]
    sync(parts / NAMES)
    claim = {name: value for name, value in claim.items() if name not in ("files", "metrics")}
    write_json(parts / CLAIM, claim | {CLEARING: True})
    for path in [*records, *parts.glob(f"*{SCRATCH}")]:
        remove(path)
    for path in paths:
        for ours in (path, *path.parent.glob(f".{path.name}.*.tmp")):
            if ours.is_file() or ours.is_symlink():
                remove(ours)
        if path.parent != folder:
            with contextlib.suppress(OSError):  # not empty, or gone
                path.parent.rmdir()
    remove(parts / NAMES)


def remove(path: Path) -> None:
    """Remove a file, or a folder of scratch, if it is there."""
    if path.is_dir() and not path.is_symlink():  # scratch of a stage that needs more than a file
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
