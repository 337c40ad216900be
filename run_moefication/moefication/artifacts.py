"""Every path, file name and manifest the stages hand to one another; atomic writes, checked reads.

A folder under construction holds its data files and `manifest.parts/`: `claim.json` (what is being made, from what) and
one JSON piece per finished unit (a layer, a feature shard), written after the unit's files. When every expected piece
is there they are merged into `manifest.json`, which is thereby the mark of a finished folder, and the parts are
removed. Several processes may fill one folder: each writes its own units, whoever sees the last piece finishes.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import MoEficationError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARTS = "manifest.parts"
CLAIM = "claim.json"
STAGE_SCRIPTS = {
    "split": "llama_split_clustering.py",
    "hidden_features": "llama_get_hidden_features.py",
    "select": "llama_select_mlp.py",
    "convert": "llama_convert.py",
}
VERSIONED_PACKAGES = ("torch", "transformers", "scikit-learn", "numpy", "safetensors")
MAX_MANIFEST_BYTES = 1 << 30


# ---------------------------------------------------------------------------------------------------- names


def split_folder(save_path: str | Path, model_name: str, num_experts: int) -> Path:
    """`SAVE/NAME-8Expert-Split-Clustering`"""
    return Path(save_path) / f"{model_name}-{num_experts}Expert-Split-Clustering"


def features_folder(save_path: str | Path, model_name: str) -> Path:
    """`SAVE/NAME-Hidden-Features`"""
    return Path(save_path) / f"{model_name}-Hidden-Features"


def select_folder(save_path: str | Path, model_name: str, num_experts: int) -> Path:
    """`SAVE/NAME-8Expert-Select-MLP`"""
    return Path(save_path) / f"{model_name}-{num_experts}Expert-Select-MLP"


def shard_file(kind: str, rank: int, index: int) -> str:
    """`hidden_inputs/R_I.pth` or `hidden_gate_outputs/R_I.pth`, relative to the features folder."""
    return f"{kind}/{rank}_{index}.pth"


# ---------------------------------------------------------------------------------------------------- writing


class _HashingFile:
    """A write-only file that counts and hashes what passes through, so that no file is read back to be hashed."""

    def __init__(self, file: BinaryIO):
        self._file, self._sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data) -> int:
        written = self._file.write(data)
        self._sha256.update(data)
        self.size += written
        return written

    def flush(self) -> None:
        self._file.flush()

    def entry(self) -> dict[str, Any]:
        return {"size": self.size, "sha256": self._sha256.hexdigest()}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some file systems cannot sync a folder; the rename stands there all the same.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Any], None]) -> dict[str, Any]:
    """Make `path` by `write(file)`: under its final name it is whole, whatever interrupts.

    Returns: `{"size", "sha256"}` of the file, for its manifest.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as raw:
            file = _HashingFile(raw)
            try:
                write(file)
            except RuntimeError as error:  # torch.save hides a full disk behind an error of its own
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            raw.flush()
            os.fsync(raw.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)
    return file.entry()


def _json_bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def tensor_sha256(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's bytes, whatever its dtype."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def digest(content: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def environment(device: str) -> dict[str, str]:
    """Versions and device kind: what decides the last bits of a result beside inputs and options."""
    return {package: version(package) for package in VERSIONED_PACKAGES} | {"device": torch.device(device).type}


@dataclass(frozen=True)
class Claim:
    """What a folder is: the stage, every option that shapes its content, and what it is made from.

    `source` describes the dense model (see `Checkpoint.source`), `inputs` maps the name of each artifact read to its
    digest, `environment` is compared only while the folder is unfinished, `facts` are kept from the run that began the
    folder and never compared.
    """

    stage: str
    options: dict[str, Any]
    source: dict[str, Any]
    environment: dict[str, str]
    inputs: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT_VERSION,
            "stage": self.stage,
            "options": self.options,
            "source": self.source,
            "inputs": self.inputs,
            "environment": self.environment,
            "facts": self.facts,
        }


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

    Raises:
        MoEficationError: the folder holds something else, or was begun with other options, model or inputs.
    """

    def __init__(
        self, folder: Path, claim: Claim, pieces: Iterable[str], *, overwrite: bool = False, shared: bool = False
    ):
        self.folder, self.pieces = folder, list(pieces)
        self._wanted, self._overwrite, self._shared = claim.to_json(), overwrite, shared
        existing, must_clear = self._look()
        self._begun = existing is not None and not must_clear
        self.claim = existing if self._begun else self._wanted
        self.was_finished = self.finished

    @property
    def finished(self) -> bool:
        return self._begun and (self.folder / MANIFEST).exists()

    def missing(self) -> list[str]:
        """Names of the pieces that are not there yet, in order."""
        missing = [piece for piece in self.pieces if not self._begun or not self._piece_path(piece).exists()]
        # Asked last: whoever finishes the folder writes the manifest before it takes the parts away.
        return [] if self.finished else missing

    def begin(self) -> None:
        """Clear and claim the folder, unless that is done; `write` does it too."""
        if self._begun:
            return
        existing, must_clear = self._look()  # again: another process of this run may have begun meanwhile
        if must_clear:
            _clear(self.folder)
            existing = None
        if existing is None:
            existing = self._wanted
            write_atomically(self.folder / PARTS / CLAIM, lambda file: file.write(_json_bytes(existing)))
        self.claim, self._begun = existing, True

    def _look(self) -> tuple[dict[str, Any] | None, bool]:
        """The claim that is there, if any, and whether it must be cleared away first."""
        existing, finished = _existing_claim(self.folder)
        if existing is None:
            # A run that died before its claim leaves an empty folder of parts, which is ours.
            if self.folder.exists() and any(path.name != PARTS for path in self.folder.iterdir()):
                raise MoEficationError(
                    f"{self.folder} holds files but no {MANIFEST}: not ours to fill; choose another --save_path"
                )
            return None, False
        difference = _difference(existing, self._wanted, finished)
        if self._overwrite and existing["stage"] == self._wanted["stage"]:
            return existing, bool(difference or finished or not self._shared)
        if difference:
            raise MoEficationError(
                f"{self.folder} {difference}; choose another --save_path, or add --overwrite to redo it"
            )
        return existing, False

    def write(self, relative: str, write: Callable[[Any], None]) -> dict[str, Any]:
        """Write one file atomically and return its manifest entry."""
        self.begin()
        path = self.folder / relative
        for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of an interrupted run: this file is ours alone
            stale.unlink()
        return write_atomically(path, write)

    def write_tensors(self, relative: str, tensors: Any) -> dict[str, Any]:
        """Write a tensor, or a dict of them, as a torch file. Views are the caller's to clone."""
        return self.write(relative, lambda file: torch.save(tensors, file))

    def write_piece(self, piece: str, files: dict[str, dict[str, Any]], metrics: Any = None) -> None:
        """Record a finished unit: the entries of its files and its metrics."""
        content = {"files": files} if metrics is None else {"files": files, "metrics": metrics}
        write_atomically(self._piece_path(piece), lambda file: file.write(_json_bytes(content)))

    def metrics(self) -> dict[str, Any]:
        """Metrics of the pieces that are there, by piece."""
        missing = self.missing()
        try:
            return self._merged(piece for piece in self.pieces if piece not in missing)[1]
        except FileNotFoundError:
            return _read_manifest(self.folder / MANIFEST)["metrics"]

    def finish(self) -> bool:
        """Write `manifest.json` if every piece is there. Returns whether the folder is finished."""
        if self.missing():
            return False
        # Another process may be doing just this: what it takes away meanwhile is in its manifest, equal to ours.
        with contextlib.suppress(FileNotFoundError):
            files, metrics = self._merged(self.pieces)
            manifest = self.claim | {"files": files, "metrics": metrics}
            self.write(MANIFEST, lambda file: file.write(_json_bytes(manifest)))
        parts = self.folder / PARTS
        for path in [*parts.glob("*.json"), *parts.glob(".*.tmp")]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            parts.rmdir()
        return True

    def _merged(self, pieces: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Files of the pieces together, and their metrics by piece."""
        contents = {piece: _read_json(self._piece_path(piece)) for piece in pieces}
        files = {file: entry for content in contents.values() for file, entry in content["files"].items()}
        return files, {piece: content["metrics"] for piece, content in contents.items() if "metrics" in content}

    def _piece_path(self, piece: str) -> Path:
        return self.folder / PARTS / f"{piece}.json"


def _existing_claim(folder: Path) -> tuple[dict[str, Any] | None, bool]:
    """The claim or manifest in a folder (None: there is none), and whether it is finished."""
    if folder.exists() and not folder.is_dir():
        raise MoEficationError(f"{folder} is a file; choose another --save_path")
    for path, finished in ((folder / MANIFEST, True), (folder / PARTS / CLAIM, False)):
        if path.exists():
            return _read_manifest(path), finished
    return None, False


def _difference(existing: dict[str, Any], wanted: dict[str, Any], finished: bool) -> str | None:
    """What keeps an existing folder from being the wanted one, as the rest of a sentence, or None."""
    if existing["stage"] != wanted["stage"]:
        return f"was written by {STAGE_SCRIPTS[existing['stage']]}"
    if existing["source"].get("fingerprint") != wanted["source"]["fingerprint"]:
        return f"was made from another model ({existing['source'].get('name')}: its weights or config differ)"
    # An option that only one of the two knows (a newer version's) counts as different.
    for name in sorted({*existing["options"], *wanted["options"]}):
        before, now = existing["options"].get(name), wanted["options"].get(name)
        if before != now:
            return f"was made with --{name} {before}, this run asks for {now}"
    for name, value in wanted["inputs"].items():
        if existing["inputs"].get(name) != value:
            return f"was made from another {name}"
    if not finished:
        for name, value in wanted["environment"].items():
            if existing["environment"].get(name) != value:
                return f"was begun with {name} {existing['environment'].get(name)}, this run has {value}"
    return None


def _clear(folder: Path) -> None:
    """Remove what we wrote here: the files that the manifest or its pieces name, and these records themselves."""
    parts = sorted((folder / PARTS).glob("*.json"))
    records = [folder / MANIFEST, *parts]
    named = {file for record in records if record.exists() for file in _read_json(record).get("files", {})}
    # The manifest first: a folder interrupted halfway is unfinished, never wrongly finished.
    for path in [folder / MANIFEST, *(_inside(folder, file) for file in sorted(named)), *parts]:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- reading


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError("too large")
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MoEficationError(
            f"{path} is damaged ({error}); remake its folder with --overwrite or remove it"
        ) from None
    if not isinstance(content, dict):
        raise MoEficationError(f"{path} is damaged (not a JSON object); remake its folder or remove it")
    return content


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_json(path)
    if manifest.get("stage") not in STAGE_SCRIPTS:
        raise MoEficationError(f"{path} is not a manifest of this toolkit")
    if manifest.get("format") != FORMAT_VERSION:
        raise MoEficationError(
            f"{path} has format {manifest.get('format')!r}, this version reads {FORMAT_VERSION}; remake the folder"
        )
    for name in ("options", "source", "inputs", "environment", "facts"):
        if not isinstance(manifest.get(name), dict):
            raise MoEficationError(f"{path} is damaged (no {name}); remake its folder")
    return manifest


def _inside(folder: Path, relative: str) -> Path:
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts:
        raise MoEficationError(f"the manifest of {folder} names {relative}, outside of it")
    return folder / path


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
            raise MoEficationError(
                f"{self.folder} was made for --{name} {self.options.get(name)} "
                f"of {self.manifest['source'].get('name')}, this run asks for {wanted}"
            )

    def load(self, relative: str) -> Any:
        """A torch file of this folder, its size and sha256 checked against the manifest."""
        path = self._checked_path(relative)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.files[relative]["sha256"]:
            raise MoEficationError(f"{path} is damaged: its checksum is not the manifest's; {self._cure}")
        return load_tensors(path)

    def map(self, relative: str) -> Any:
        """A torch file of this folder, memory-mapped: only its size is checked, tensors are the reader's to check."""
        return load_tensors(self._checked_path(relative))

    def check_sizes(self) -> None:
        """Refuse a folder in which a listed file is missing or cut short: cheap, and done before long work."""
        for relative in self.files:
            self._checked_path(relative)

    def _checked_path(self, relative: str) -> Path:
        path = _inside(self.folder, relative)
        entry = self.files.get(relative)
        if entry is None:
            raise MoEficationError(f"{self.folder} has no {relative}; {self._cure}")
        if not path.is_file():
            raise MoEficationError(f"{path} is missing although the manifest lists it; {self._cure}")
        if path.stat().st_size != entry["size"]:
            raise MoEficationError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {entry['size']}; {self._cure}"
            )
        return path

    @property
    def _cure(self) -> str:
        return f"run {STAGE_SCRIPTS[self.manifest['stage']]} again with --overwrite"


def open_finished(folder: str | Path, stage: str) -> Artifact:
    """Open a folder that `stage` has finished.

    Raises:
        MoEficationError: absent, unfinished (says what is missing where that is known), or of another stage.
    """
    folder = Path(folder)
    script = STAGE_SCRIPTS[stage]
    if not folder.is_dir():
        raise MoEficationError(f"{folder} is not a folder; run {script} first")
    manifest, finished = _existing_claim(folder)
    if manifest is None:
        raise MoEficationError(f"{folder} has no {MANIFEST}: not a folder written by {script}")
    if manifest["stage"] != stage:
        raise MoEficationError(f"{folder} was written by {STAGE_SCRIPTS[manifest['stage']]}, not by {script}")
    if not finished:
        done = len(list((folder / PARTS).glob("*.json"))) - 1
        raise MoEficationError(f"{folder} is unfinished ({done} parts done); run {script} again, it goes on from there")
    if not isinstance(manifest.get("files"), dict):
        raise MoEficationError(f"{folder / MANIFEST} is damaged (no files); run {script} again with --overwrite")
    return Artifact(folder, manifest)


def load_tensors(path: Path) -> Any:
    """A torch file, memory-mapped; nothing in it is ever executed.

    Raises:
        MoEficationError: not a regular file, cut short, or holding anything but tensors and plain containers.
    """
    if not path.is_file():
        raise MoEficationError(f"{path} is not a file")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the unpickler raises anything, from UnpicklingError to KeyError
        reason = str(error).strip().split("\n")[0].split(". ")[0][:150]
        raise MoEficationError(f"{path} is not a whole file of plain tensors, refused ({reason})") from None
