"""The folder of download_redpajama.py: files under temporary names, a state to go on from, and at last a manifest."""

import os
from pathlib import Path
from typing import Any

from llama_data.own_files import old_names
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.storage.files import write_json

MANIFEST = "redpajama.json"
STATE = ".redpajama.part.json"


def part_path(folder: Path, name: str) -> Path:
    """Where a file lies until it is complete."""
    return (folder / name).with_name(f".{Path(name).name}.part")


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
    for name in old_names(folder, manifest, files):
        (folder / name).unlink(missing_ok=True)
    kept = ("options", "revision", "records", "skipped")
    manifest = {**{key: state[key] for key in kept}, "files": files}
    write_json(folder / MANIFEST, manifest)
    discard_partial_files(folder, state)
    return manifest


def discard_partial_files(folder: Path, state: dict[str, Any] | None) -> None:
    """Delete what an unfinished download left: its partial files, then its state."""
    if state:
        for name in state["files"]:
            part_path(folder, name).unlink(missing_ok=True)
        (folder / STATE).unlink(missing_ok=True)
