"""The finished folders that stages hand to one another, read back and checked by their manifests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MoEficationError, SettingError
from .files import digest, file_sha256
from .folder_writer import FolderWriter
from .manifest import CARD, MANIFEST, SPEC, STAGE_SCRIPTS, TOLD, inside, own_files, read_manifest
from .tensors import load_tensors


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

    @property
    def history(self) -> list[dict[str, Any]]:
        """What manifests of later stages tell of this folder and of those that it was made from, the earliest first."""
        own = {name: self.manifest[name] for name in TOLD if name in self.manifest}
        return [*self.manifest.get("earlier", []), own]

    def require_source(self, fingerprint: str, name: str) -> None:
        """Refuse a folder made from another dense model than `name`."""
        source = self.manifest["source"]
        if source.get("fingerprint") != fingerprint:
            raise MoEficationError(f"{self.folder} was made from another model ({source.get('name')}) than {name}")

    def require_option(self, name: str, wanted: Any) -> None:
        """Refuse a folder made with another value of an option than this stage asks for."""
        if self.options.get(name) != wanted:
            found = f"{name} {self.options.get(name)} of {self.manifest['source'].get('name')}"
            raise SettingError(f"{self.folder} was made for {found}, this run asks for {wanted}")

    def verified(self, relative: str) -> Path:
        """The path of a file, its size and sha256 checked against the manifest."""
        path = self._checked_path(relative)
        if file_sha256(path) != self.files[relative]["sha256"]:
            raise SettingError(f"{path} is damaged: its checksum is not the manifest's; {self.cure}")
        return path

    def load(self, relative: str) -> Any:
        """A torch file of this folder, verified."""
        return load_tensors(self.verified(relative))

    def map(self, relative: str) -> Any:
        """A torch file of this folder, memory-mapped: only its size is checked, tensors are the reader's to check."""
        return load_tensors(self._checked_path(relative))

    def check_sizes(self) -> None:
        """Refuse a folder in which a listed file is missing or cut short: cheap, and done before long work."""
        for relative in self.files.keys() - {CARD}:
            self._checked_path(relative)

    def _checked_path(self, relative: str) -> Path:
        path = inside(self.folder, relative)
        entry = self.files.get(relative)
        if entry is None:
            raise SettingError(f"{self.folder} has no {relative}; {self.cure}")
        if not path.is_file():
            raise SettingError(f"{path} is missing although the manifest lists it; {self.cure}")
        if (size := path.stat().st_size) != entry["size"]:
            raise SettingError(f"{path} has {size} bytes, the manifest says {entry['size']}; {self.cure}")
        return path

    @property
    def cure(self) -> str:
        """What to do about a damaged folder."""
        return f"run {STAGE_SCRIPTS[self.manifest['stage']]} again with overwrite"


def history_of(*artifacts: Artifact) -> list[dict[str, Any]]:
    """The histories of several folders together; what two of them tell stands there once."""
    told: list[dict[str, Any]] = []
    for artifact in artifacts:
        told += [one for one in artifact.history if one not in told]
    return told


def open_finished(folder: str | Path, *stages: str) -> Artifact:
    """Open a folder that one of the stages has finished; the error about one that is unfinished says how far it is."""
    folder = Path(folder)
    script = STAGE_SCRIPTS[stages[0]]
    if not (folder / MANIFEST).exists():
        workspace = FolderWriter(folder, own_files).workspace
        if (workspace / SPEC).exists():
            script, done = STAGE_SCRIPTS[read_manifest(workspace / SPEC)["stage"]], len([*workspace.glob("*.json")]) - 1
            raise MoEficationError(f"{folder} is unfinished ({done} parts done); run {script} again, it goes on there")
        if not folder.is_dir():
            raise MoEficationError(f"{folder} is not a folder; run {script} first")
        raise MoEficationError(f"{folder} has no {MANIFEST}: not a folder written by {script}")
    manifest = read_manifest(folder / MANIFEST)
    if manifest["stage"] not in stages:
        raise MoEficationError(f"{folder} was written by {STAGE_SCRIPTS[manifest['stage']]}, not by {script}")
    return Artifact(folder, manifest)
