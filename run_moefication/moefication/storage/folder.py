"""Every path, file name and manifest the stages hand to one another, and the checks of what is read back.

A folder under construction holds its data files and `manifest.parts/`: `claim.json` (what is being made, from what) and
one JSON piece per finished unit (a layer, a feature shard), written after the unit's files, whose names are noted
before. When every expected piece is there they are merged into `manifest.json`, which is thereby the mark of a finished
folder, and the parts are removed. Several processes may fill one folder: each writes its own units, whoever sees the
last piece finishes.
"""

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import MoEficationError, SettingError
from .clearing import clear, note, remove
from .files import digest, file_sha256, load_tensors, turn, write_atomically, write_json
from .manifest import (
    CLAIM,
    CLEARING,
    LOCK,
    MANIFEST,
    NAMES,
    PARTS,
    SCRATCH,
    STAGE_SCRIPTS,
    TURN,
    Claim,
    difference,
    existing_claim,
    inside,
    read_json,
    read_manifest,
)

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------- names


def require_place(folder: Path, stage: str) -> tuple[dict[str, Any] | None, bool]:
    """The claim or manifest in a folder (None: there is none), and whether it is finished; refused where the folder
    holds anything but what that stage left."""
    existing, finished = existing_claim(folder)
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not finished and not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise SettingError(f"{folder} cannot be made: {nearest} is no folder to write to; choose another save_path")
    if existing is None:
        # A run that died before its claim leaves an empty folder of parts, which is ours.
        if folder.exists() and any(path.name != PARTS for path in folder.iterdir()):
            raise SettingError(f"{folder} holds files but no {MANIFEST}: not ours to fill; choose another save_path")
    elif existing["stage"] != stage:
        raise SettingError(f"{folder} was written by {STAGE_SCRIPTS[existing['stage']]}; choose another save_path")
    return existing, finished


class ArtifactWriter:
    """Fills one folder, unit by unit: begins it, or goes on with one begun, or finished, with the same claim.

    Nothing is touched before the first write, so that a stage may still refuse its input after asking what is missing.

    Args:
        folder: made if absent; may exist empty.
        claim: what the folder will be.
        pieces: names of all the units the finished folder will consist of.
        overwrite: throw away what an earlier run of the same stage left, and nothing else.
        shared: other processes of this run fill the same folder: an unfinished folder with the same claim is theirs,
            and is joined rather than cleared.
        exclusive: no other process may fill this folder meanwhile: the stage has scratch files, which two would share.

    Raises:
        MoEficationError: the folder holds something else, or was begun with other options, model or inputs; at the
            first write of an exclusive one: another process is filling it.
    """

    def __init__(
        self,
        folder: Path,
        claim: Claim,
        pieces: Iterable[str],
        *,
        overwrite: bool = False,
        shared: bool = False,
        exclusive: bool = False,
    ):
        self.folder, self.pieces = folder, list(pieces)
        self._wanted, self._overwrite, self._shared = claim.to_json(), overwrite, shared
        self._exclusive, self._lock = exclusive, None
        existing, must_clear = self._look()
        self._begun = existing is not None and not must_clear
        self.claim = existing if self._begun else self._wanted
        self.was_finished = self.finished
        self._damaged = self._find_damaged() if self._begun and not self.finished else []
        self._may_write = False

    @property
    def finished(self) -> bool:
        return self._begun and (self.folder / MANIFEST).exists()

    def missing(self) -> list[str]:
        """Names of the pieces that are not there yet, in order."""
        missing = [
            piece
            for piece in self.pieces
            if not self._begun or piece in self._damaged or not self._piece_path(piece).exists()
        ]
        # Asked last: whoever finishes the folder writes the manifest before it takes the parts away.
        return [] if self.finished else missing

    def begin(self) -> None:
        """Clear and claim the folder, unless that is done; `write` does it too."""
        if self._may_write:
            return
        if not self._begun:
            self._look()  # a folder that others have filled since is refused before anything is written
        if self._exclusive and self._lock is None:
            self._lock = _locked(self.folder)
        with turn(self.folder / PARTS / TURN):
            if not self._begun:
                existing, must_clear = self._look()  # again: another process of this run may have begun meanwhile
                if must_clear:
                    clear(self.folder, existing)
                if must_clear or existing is None:
                    existing = self._wanted
                    write_json(self.folder / PARTS / CLAIM, existing)
                self.claim, self._begun = existing, True
            for piece in self._find_damaged():
                logger.warning("%s: files of %s are missing or cut short; it is made again", self.folder, piece)
                self._piece_path(piece).unlink()
        self._damaged, self._may_write = [], True

    def _find_damaged(self) -> list[str]:
        """The pieces that are there, but not all their files."""
        damaged = []
        for piece in self.pieces:
            with contextlib.suppress(FileNotFoundError):  # not there, or taken away by the process that finishes
                files = read_json(self._piece_path(piece))["files"]
                paths = {inside(self.folder, file): entry["size"] for file, entry in files.items()}
                if any(not path.is_file() or path.stat().st_size != size for path, size in paths.items()):
                    damaged.append(piece)
        return damaged

    def _look(self) -> tuple[dict[str, Any] | None, bool]:
        """The claim that is there, if any, and whether it must be cleared away first."""
        existing, finished = require_place(self.folder, self._wanted["stage"])
        if existing is None:
            return None, False
        unlike = difference(existing, self._wanted, finished)
        half_cleared = CLEARING in existing and not finished
        if self._overwrite:
            return existing, bool(unlike or finished or half_cleared or not self._shared)
        if unlike:
            raise SettingError(f"{self.folder} {unlike}; choose another save_path, or add overwrite to redo it")
        if finished:
            Artifact(self.folder, existing).check_sizes()  # "finished" is not said of a folder that has lost files
        return existing, half_cleared

    def write(self, relative: str, write: Callable[[Any], None]) -> dict[str, Any]:
        """Write one file atomically and return its manifest entry."""
        self.begin()
        path = self.folder / relative
        note(self.folder, [relative])
        for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of an interrupted run: this file is ours alone
            stale.unlink()
        return write_atomically(path, write)

    def write_tensors(self, relative: str, tensors: Any) -> dict[str, Any]:
        """Write a tensor, or a dict of them, as a torch file. Views are the caller's to clone."""
        return self.write(relative, lambda file: torch.save(tensors, file))

    def scratch(self, name: str) -> Path:
        """Where a file or folder may lie that is needed until this folder is finished, and is removed then."""
        self.begin()
        return self.folder / PARTS / f"{name}{SCRATCH}"

    def write_piece(self, piece: str, files: dict[str, dict[str, Any]], metrics: Any = None) -> None:
        """Record a finished unit: the entries of its files and its metrics."""
        self.begin()  # of a unit without files, this may be the first write
        content = {"files": files} if metrics is None else {"files": files, "metrics": metrics}
        write_json(self._piece_path(piece), content)

    def metrics(self) -> dict[str, Any]:
        """Metrics of the pieces that are there, by piece."""
        missing = self.missing()
        try:
            return self._merged(piece for piece in self.pieces if piece not in missing)[1]
        except FileNotFoundError:
            return read_manifest(self.folder / MANIFEST)["metrics"]

    def finish(self) -> bool:
        """Write `manifest.json` if every piece is there. Returns whether the folder is finished."""
        if self.missing():
            return False
        # Another process may be doing just this: what it takes away meanwhile is in its manifest, equal to ours.
        with contextlib.suppress(FileNotFoundError):
            files, metrics = self._merged(self.pieces)
            manifest = self.claim | {"files": files, "metrics": metrics}
            write_json(self.folder / MANIFEST, manifest)
        parts = self.folder / PARTS
        ours = [*parts.glob("*.json"), *parts.glob(".*.tmp"), *parts.glob(f"*{SCRATCH}")]
        ours += [parts / name for name in (NAMES, TURN, LOCK)]
        for path in [*ours, *self.folder.glob(f".{MANIFEST}.*.tmp")]:
            remove(path)
        with contextlib.suppress(OSError):
            parts.rmdir()
        if self._lock is not None:
            self._lock.close()
        return True

    def _merged(self, pieces: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Files of the pieces together, and their metrics by piece."""
        contents = {piece: read_json(self._piece_path(piece)) for piece in pieces}
        files = {file: entry for content in contents.values() for file, entry in content["files"].items()}
        return files, {piece: content["metrics"] for piece, content in contents.items() if "metrics" in content}

    def _piece_path(self, piece: str) -> Path:
        return self.folder / PARTS / f"{piece}.json"


def _locked(folder: Path) -> IO[bytes]:
    """The folder's lock, ours until the file returned is closed, as it is when the process ends, however it does."""
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    lock = (folder / PARTS / LOCK).open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise MoEficationError(f"another run is writing {folder}: let it finish") from error
    except OSError as error:  # a file system that cannot lock
        logger.debug("%s: %s", folder, error)
    return lock


# ---------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Artifact:
    """A finished folder, opened by `open_finished`."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        return self.manifest["options"]

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        return self.manifest["files"]

    @property
    def digest(self) -> str:
        """Stands for the content: two folders with the same files, whatever their names, have the same."""
        return digest(self.files)

    def require_source(self, fingerprint: str, name: str) -> None:
        """Refuse a folder made from another dense model than `name`."""
        if self.manifest["source"].get("fingerprint") != fingerprint:
            raise MoEficationError(
                f"{self.folder} was made from another model ({self.manifest['source'].get('name')}) than {name}"
            )

    def require_option(self, name: str, wanted: Any) -> None:
        """Refuse a folder made with another value of an option than this stage asks for."""
        if self.options.get(name) != wanted:
            raise SettingError(
                f"{self.folder} was made for {name} {self.options.get(name)} "
                f"of {self.manifest['source'].get('name')}, this run asks for {wanted}"
            )

    def load(self, relative: str) -> Any:
        """A torch file of this folder, its size and sha256 checked against the manifest."""
        path = self._checked_path(relative)
        if file_sha256(path) != self.files[relative]["sha256"]:
            raise SettingError(f"{path} is damaged: its checksum is not the manifest's; {self._cure}")
        return load_tensors(path)

    def map(self, relative: str) -> Any:
        """A torch file of this folder, memory-mapped: only its size is checked, tensors are the reader's to check."""
        return load_tensors(self._checked_path(relative))

    def check_sizes(self) -> None:
        """Refuse a folder in which a listed file is missing or cut short: cheap, and done before long work."""
        for relative in self.files:
            self._checked_path(relative)

    def _checked_path(self, relative: str) -> Path:
        path = inside(self.folder, relative)
        entry = self.files.get(relative)
        if entry is None:
            raise SettingError(f"{self.folder} has no {relative}; {self._cure}")
        if not path.is_file():
            raise SettingError(f"{path} is missing although the manifest lists it; {self._cure}")
        if path.stat().st_size != entry["size"]:
            raise SettingError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {entry['size']}; {self._cure}"
            )
        return path

    @property
    def _cure(self) -> str:
        return f"run {STAGE_SCRIPTS[self.manifest['stage']]} again with overwrite"


def open_finished(folder: str | Path, *stages: str) -> Artifact:
    """Open a folder that one of the stages has finished.

    Raises:
        MoEficationError: absent, unfinished (says what is missing where that is known), or of another stage.
    """
    folder = Path(folder)
    script = STAGE_SCRIPTS[stages[0]]
    if not folder.is_dir():
        raise MoEficationError(f"{folder} is not a folder; run {script} first")
    manifest, finished = existing_claim(folder)
    if manifest is None:
        raise MoEficationError(f"{folder} has no {MANIFEST}: not a folder written by {script}")
    if manifest["stage"] not in stages:
        raise MoEficationError(f"{folder} was written by {STAGE_SCRIPTS[manifest['stage']]}, not by {script}")
    if not finished:
        done = len(list((folder / PARTS).glob("*.json"))) - 1
        again = STAGE_SCRIPTS[manifest["stage"]]
        raise MoEficationError(f"{folder} is unfinished ({done} parts done); run {again} again, it goes on from there")
    return Artifact(folder, manifest)
