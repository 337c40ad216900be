"""Files in a data folder that look like text but are not read, and what to do about them."""

import itertools
import zipfile
from collections.abc import Iterator
from pathlib import Path

from .text_files import HELD_OUT_FOLDER, ZIP_DAMAGE, TextFile, cure_of_unread

SHOWN_NAMES = 3
MOST_LOOKED_AT = 10_000  # files of an unread folder, to tell whether it holds text


def unread_data(path: Path, read_below: list[Path]) -> str:
    """The files and folders that are not read, a few by name, with a cure for each kind; "" where all is read.

    Args:
        path: the data folder.
        read_below: the folders below it that are read, too.
    """
    names: dict[str, list[str]] = {}
    for folder in (path, *read_below):
        for name, cure in _unread_files(folder):
            names.setdefault(cure, []).append(str((folder / name).relative_to(path)))
    for folder in sorted(set(filter(Path.is_dir, path.iterdir())) - set(read_below)):
        if folder.name != HELD_OUT_FOLDER and not folder.name.startswith(".") and _holds_text(folder):
            names.setdefault("name it after a domain to have it read", []).append(f"{folder.name}/")
    return "; ".join(f"{some(files)} ({cure})" for cure, files in names.items())


def _unread_files(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.iterdir()):
        if file.name.startswith("."):
            continue
        if file.is_symlink() and not file.exists():
            yield file.name, "its link leads nowhere"
        elif file.is_file() and (cure := cure_of_unread(file.name)):
            yield file.name, cure
        elif file.is_file() and file.suffix.lower() == ".zip":
            yield from ((f"{file.name}/{member}", "unpack the zip") for member in _unread_members(file))


def _unread_members(file: Path) -> list[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except ZIP_DAMAGE:  # the reader refuses it
        return []
    return sorted(name for name in names if cure_of_unread(name) or name.lower().endswith((".zip", ".parquet")))


def _holds_text(folder: Path) -> bool:
    try:
        return any(TextFile(file).is_text for file in itertools.islice(folder.rglob("*"), MOST_LOOKED_AT))
    except OSError:  # the folder must not be read, such as lost+found
        return False


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
