"""The folders that stages hand to one another: filling one part by part. `artifact` reads it when it is finished.

While a folder is filled (see `FolderWriter`), its workspace holds `spec.json` (what is being made, from what) and a
JSON file for each finished part (a layer, a feature shard), written after the files of the part. When every part is
there they are merged into `manifest.json`, and the folder gets its name: "finished" means that the manifest is there.
Several processes may fill one folder. Each writes its own parts; whoever sees the last one finishes.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch

from ..errors import SettingError
from .artifact import Artifact
from .files import file_sizes, parse_json_object, write_atomically, write_json
from .folder_writer import WORKSPACE, FolderWriter
from .manifest import (
    CURE_OF_DAMAGE,
    MANIFEST,
    SPEC,
    STAGE_SCRIPTS,
    ArtifactSpec,
    difference,
    own_files,
    read_manifest,
)

logger = logging.getLogger(__name__)

ELSEWHERE = "choose another save_path"
OVERWRITES = "overwrites"  # in the workspace: a finished folder may be replaced


def require_place(folder: Path, stage: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Refuse a folder that cannot be written, or that holds anything but what that stage left.

    Returns: the spec of an unfinished folder and the manifest of a finished one, each None where there is none.
    """
    writer = FolderWriter(folder, own_files)
    # In this order: another process may just be giving the folder its name.
    partial, finished = None, None
    with contextlib.suppress(FileNotFoundError):
        partial = read_manifest(writer.workspace / SPEC)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        finished = read_manifest(folder / MANIFEST)
    if finished is None:
        writer.refuse_place()
        if folder.exists() and any(folder.iterdir()):
            raise SettingError(
                f"{folder} holds files but no {MANIFEST}: not ours to fill; {ELSEWHERE}, "
                f"or remove what an earlier version left unfinished"
            )
    for existing in filter(None, (partial, finished)):
        if existing["stage"] != stage:
            raise SettingError(f"{folder} was written by {STAGE_SCRIPTS[existing['stage']]}; {ELSEWHERE}")
    return partial, finished


class ArtifactWriter(FolderWriter):
    """Fills one folder, part by part: begins it, or goes on with one begun, or finished, with the same spec.

    Nothing is touched before the first write, so that a stage may still refuse its input after asking what is missing.

    Args:
        parts: names of all the units the finished folder will consist of.
        overwrite: make anew what an earlier run of the same stage left; what it finished stays until then.
        shared: other processes of this run fill the same folder: an unfinished folder with the same spec is theirs,
            and is joined rather than made anew.
        exclusive: no other process may fill this folder meanwhile. A writer is a context, at whose end the folder is
            free again, whatever ended it.

    Raises:
        MoEficationError: the folder holds something else, or was begun with other options, model or inputs; at the
            first write: another process is filling it.
    """

    def __init__(
        self,
        folder: Path,
        spec: ArtifactSpec,
        parts: Iterable[str],
        *,
        overwrite: bool = False,
        shared: bool = False,
        exclusive: bool = False,
    ):
        super().__init__(folder, own_files)
        self.parts = list(parts)
        self._wanted, self._overwrite, self._shared, self._exclusive = spec.to_json(), overwrite, shared, exclusive
        self._held = contextlib.ExitStack()  # the lock of an exclusive writer
        existing = self._existing()
        self._begun, self._may_write = existing is not None, False
        self._lap_began = time.perf_counter()
        self.spec = existing or self._wanted  # the one in force, with the facts of the run that began the folder
        self.was_finished = self.finished  # there was nothing to do from the start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def finished(self) -> bool:
        """Whether the folder is whole and has its name."""
        return self._begun and not (self.workspace / SPEC).exists() and (self.folder / MANIFEST).exists()

    def missing(self) -> list[str]:
        """Names of the parts that are not there yet, in order."""
        missing = [part for part in self.parts if not (self._begun and self._is_whole(part))]
        return [] if self.finished else missing  # asked last: another process may finish the folder meanwhile

    def begin(self) -> None:
        """Begin the folder or join those who fill it, unless that is done; `write` does it too."""
        if self._may_write or self.finished:
            return
        if self._exclusive:
            self._held.enter_context(self.locked(timeout=0))
        with self.locked():
            existing = self._existing()  # again: another process of this run may have begun meanwhile
            if existing is None:
                self.start()
                if self._overwrite:
                    (self.workspace / OVERWRITES).touch()
                write_json(self.workspace / SPEC, self._wanted)
            self.spec, self._begun = existing or self._wanted, True
            for part in self.missing():
                if self._record(part).exists():
                    logger.warning("%s: files of %s are missing or cut short; it is made again", self.folder, part)
        self._may_write = True

    def _existing(self) -> dict[str, Any] | None:
        """The spec of what is there and is gone on with, finished or not; None: begin anew."""
        partial, finished = require_place(self.folder, self._wanted["stage"])
        if partial is not None and difference(partial, self._wanted, is_finished=False) is None:
            may_replace = finished is None or (self.workspace / OVERWRITES).exists()
            if may_replace and (self._shared or not self._overwrite):
                return partial
        if self._overwrite:
            self.refuse_place()
            return None
        existing = finished or partial
        unlike = existing and difference(existing, self._wanted, is_finished=finished is not None)
        if unlike:
            place = self.folder if finished is not None else f"what was begun for {self.folder}"
            raise SettingError(f"{place} {unlike}; {ELSEWHERE}, or add overwrite to redo it")
        if finished is not None:
            Artifact(self.folder, finished).check_sizes()  # "finished" is not said of a folder that has lost files
        return finished

    def write(self, relative: str, write: Callable[[BinaryIO], Any]) -> dict[str, Any]:
        """Write one file atomically and return its manifest entry."""
        self.begin()
        return write_atomically(self.partial / relative, write)

    def write_tensors(self, relative: str, tensors: Any) -> dict[str, Any]:
        """Write a tensor, or a dict of them, as a torch file. Views are the caller's to clone."""
        return self.write(relative, lambda file: torch.save(tensors, file))

    def temporary_path(self, name: str) -> Path:
        """Where a file or folder may lie that is needed until this folder is finished, and is removed then."""
        return self.workspace / name

    def write_part(self, part: str, files: dict[str, dict[str, Any]], metrics: Any = None) -> None:
        """Record a finished unit: the entries of its files and its metrics."""
        self.begin()  # of a unit without files, this may be the first write
        content = {"files": files} if metrics is None else {"files": files, "metrics": metrics}
        content["seconds"] = self.lap()
        with self.locked():  # else another process could rename the folder while the record is synced
            write_json(self._record(part), content)

    def lap(self) -> float:
        """Seconds since the last lap, or since this writer was made; each part records those that went into it."""
        now = time.perf_counter()
        seconds, self._lap_began = now - self._lap_began, now
        return round(seconds, 3)

    def add_to_lap(self, seconds: float) -> None:
        """Count time that was spent on the next part elsewhere, such as in a run that was interrupted."""
        self._lap_began -= seconds

    def _record(self, part: str) -> Path:
        return self.workspace / f"{part}.json"

    def _read_record(self, part: str) -> dict[str, Any]:
        return parse_json_object(self._record(part), CURE_OF_DAMAGE)

    def _is_whole(self, part: str) -> bool:
        """Whether a part is recorded, and its files are there in their full size."""
        with contextlib.suppress(FileNotFoundError):
            files = self._read_record(part)["files"]
            return file_sizes(self.partial, files) == {name: entry["size"] for name, entry in files.items()}
        return False

    def metrics(self) -> dict[str, Any]:
        """Metrics of the parts that are there, by part."""
        missing = self.missing()
        try:
            return self._merged(part for part in self.parts if part not in missing)["metrics"]
        except FileNotFoundError:
            return read_manifest(self.folder / MANIFEST)["metrics"]

    def finish(self) -> bool:
        """Give the folder its name if every part is there. Returns whether it is finished."""
        if self.missing():
            return False
        if not self.finished or (self.folder / WORKSPACE).exists():  # else it may lie on a disk that is read-only
            with self.locked():
                if self.finished:  # by another process, or by a run that was killed before it had swept
                    self.sweep()
                else:
                    write_json(self.partial / MANIFEST, self.spec | self._merged(self.parts))
                    self.publish()
        self._held.close()
        return True

    def _merged(self, parts: Iterable[str]) -> dict[str, Any]:
        """What the manifest says of the parts: their files together, their metrics by part, and the seconds that all
        processes together spent on them."""
        contents = {part: self._read_record(part) for part in parts}
        return {
            "files": {file: entry for content in contents.values() for file, entry in content["files"].items()},
            "metrics": {part: content["metrics"] for part, content in contents.items() if "metrics" in content},
            "seconds": round(sum(content.get("seconds", 0.0) for content in contents.values()), 3),
        }
