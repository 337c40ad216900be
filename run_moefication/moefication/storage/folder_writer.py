"""The one way to write a folder: it is filled beside its name, and renamed when it is whole."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock

from ..errors import MoEficationError
from .files import locked, sync

WORKSPACE = "manifest.parts"  # in the partial folder, which is ours if it has one: what the finished one does not keep
REPLACED = "replaced"  # in WORKSPACE: the folder whose place the new one takes
LOCK_TIMEOUT = 60.0  # seconds; all but exclusive runs hold the lock for moments


class FolderWriter:
    """Fills `.NAME.partial` beside the folder NAME, and gives it that name when it is whole.

    A killed run leaves `.NAME.partial`, and perhaps the file `.NAME.lock` of its lock, which dies with its process. A
    folder that is replaced stays in its place until the new one is whole: for that time both are on the disk. Then it
    moves into the new one's `WORKSPACE`, the new one gets the name, `sweep` carries files that are not ours over and
    removes the rest. A run killed in between is completed by the next `publish` or `sweep`, or undone by `discard`.

    NAME may be a link. `own_files` names the files that may be removed there, its record last; without one, none.
    """

    def __init__(self, folder: Path, own_files: Callable[[Path], list[str]]):
        self.folder, self._own_files = folder, own_files
        self._target = folder.resolve()
        self.partial = self._target.with_name(f".{self._target.name}.partial")
        self.workspace = self.partial / WORKSPACE
        # One thread may begin a folder and another finish it.
        self._lock = FileLock(self._target.with_name(f".{self._target.name}.lock"), thread_local=False)

    def refuse_place(self) -> None:
        """Refuse a folder that cannot be made or replaced here, before any work."""
        target, partial = self._target, self.partial
        if target.exists() and not target.is_dir():
            raise MoEficationError(f"{self.folder} is a file; choose another name")
        if os.path.ismount(target):
            raise MoEficationError(f"{self.folder} is a mount point, which cannot be replaced: name a folder in it")
        nearest = next(parent for parent in target.parents if parent.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise MoEficationError(f"{self.folder} cannot be made: {nearest} is no folder to write to")
        is_ours = self.workspace.exists() and not partial.is_symlink()
        if partial.is_symlink() or (partial.exists() and not is_ours and any(partial.iterdir())):
            raise MoEficationError(f"{partial} is in the way, and not ours: move it away")
        if target.exists():
            own_files = self._own_files(target)  # refuses a record that cannot be trusted
            folders = {(target / name).parent for name in own_files}
            if links := sorted(str(folder) for folder in folders - {target} if folder.is_symlink()):
                raise MoEficationError(f"{links[0]} is a link, which cannot be replaced: move its folder back")

    def locked(self, timeout: float = LOCK_TIMEOUT) -> AbstractContextManager[None]:
        """Be the only process that works on this folder; may be nested. After `timeout` seconds it is refused."""
        return locked(self._lock, timeout, self.folder)

    def start(self) -> None:
        """Make an empty partial folder; what an earlier run left of it goes."""
        self.discard()
        self.workspace.mkdir(parents=True)

    def discard(self) -> None:
        """Remove the partial folder. A folder that was about to be replaced gets its name back."""
        if (self.workspace / REPLACED).exists():
            os.rename(self.workspace / REPLACED, self._target)
        if self.partial.exists():
            for path in self.partial.iterdir():
                if path != self.workspace:  # it goes last, since it says that all this is ours
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.rmtree(self.partial)

    def publish(self) -> None:
        """Give the partial folder its name, in place of a folder that has it already."""
        for temporary in self.partial.rglob(".*.tmp"):  # of a killed run
            temporary.unlink()
        self.sweep()  # what a killed run left to do
        if self._target.exists() and any(self._target.iterdir()):
            ours = self._own_files(self._target)
            for path in self.partial.rglob("*"):
                name = path.relative_to(self.partial)
                if path.is_file() and (self._target / name).exists() and name.as_posix() not in ours:
                    raise MoEficationError(f"{self.folder / name} is in the way, and not ours: move it away")
            os.rename(self._target, self.workspace / REPLACED)
        os.rename(self.partial, self._target)
        sync(self._target.parent)
        self.sweep()

    def sweep(self) -> None:
        """Remove the workspace of a finished folder, after the files that are not ours have moved out of it."""
        workspace = self._target / WORKSPACE
        replaced = workspace / REPLACED
        if replaced.exists():
            for name in self._own_files(replaced):
                (replaced / name).unlink(missing_ok=True)
                if (folder := (replaced / name).parent) != replaced:
                    with contextlib.suppress(OSError):  # not empty, or gone
                        folder.rmdir()
            shutil.copytree(replaced, self._target, symlinks=True, copy_function=os.rename, dirs_exist_ok=True)
        if workspace.exists():
            try:
                shutil.rmtree(workspace)
            except OSError as error:
                # On NFS, a file that is still mapped lives on under another name: the next `sweep` removes the folder.
                if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
                    raise
