"""The folder of download_redpajama.py: files under temporary names, a state to go on from, and at last a manifest."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.storage.files import file_sha256

MANIFEST = "redpajama.json"
STATE = ".redpajama.part.json"


def part_path(folder: Path, name: str) -> Path:
    """Where a file lies until it is complete."""
    return (folder / name).with_name(f".{Path(name).name}.part")


def read_record(path: Path) -> dict[str, Any] | None:
    """A manifest or state of this script; None where there is none. Anything else raises MoEficationError."""
    if not path.exists():
        return None
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, OSError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record["options"], dict) and all(tally["bytes"] >= 0 for tally in record["files"].values()):
            return record
    raise MoEficationError(f"{path} is not of this script: move it away")


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a manifest or state, whole or not at all."""
    from run_moefication.moefication.storage.files import write_json  # brings torch in, which takes its time

    write_json(path, record)


def refuse_foreign_files(
    folder: Path, domains: dict[str, str], state: dict[str, Any] | None, manifest: dict[str, Any] | None
) -> None:
    """Raise MoEficationError where a file of these domains was not written by this script, or was changed since."""
    held = [(record or {"files": {}})["files"] for record in (state, manifest)]
    paths = [folder / name for files in held for name in files]
    paths += [path for side in (folder, folder / "heldout") for domain in domains for path in side.glob(f"{domain}.*")]
    for path in filter(Path.exists, paths):
        name = path.relative_to(folder).as_posix()
        sums = {files.get(name, {}).get("sha256") for files in held}
        if not path.is_file() or file_sha256(path) not in sums:
            raise MoEficationError(f"{path} was not made by this script, or was changed since: move it away")


def refuse_other_options(folder: Path, record: dict[str, Any], options: dict[str, Any]) -> None:
    """Raise MoEficationError where the folder holds a download with other options, or one that has lost a file."""
    others = [f"--{name}" for name, value in options.items() if record["options"].get(name) != value]
    if others:
        raise MoEficationError(f"{folder} holds a download with another {', '.join(others)}: --overwrite replaces it")
    missing = [name for name in record["files"] if "position" not in record and not (folder / name).exists()]
    if missing:
        raise MoEficationError(f"{folder / missing[0]} is missing: --overwrite downloads everything again")


def publish(folder: Path, state: dict[str, Any], manifest: dict[str, Any] | None) -> dict[str, Any]:
    """Give the complete files their names, in place of those of the manifest before; returns the new manifest.

    Interrupted, it can be called again. Files without a document are left out: no stage could read them.
    """
    files = {name: tally for name, tally in state["files"].items() if tally["documents"]}
    for name in files:
        if part_path(folder, name).exists():
            os.replace(part_path(folder, name), folder / name)
    for name in (manifest or {"files": {}})["files"]:
        if name not in files:
            (folder / name).unlink(missing_ok=True)
    kept = ("options", "revision", "records", "skipped")
    manifest = {**{key: state[key] for key in kept}, "files": files}
    write_record(folder / MANIFEST, manifest)
    discard_partial_files(folder, state)
    return manifest


def discard_partial_files(folder: Path, state: dict[str, Any] | None) -> None:
    """Delete what an unfinished download left: its partial files, then its state."""
    if state:
        for name in state["files"]:
            part_path(folder, name).unlink(missing_ok=True)
        (folder / STATE).unlink(missing_ok=True)
