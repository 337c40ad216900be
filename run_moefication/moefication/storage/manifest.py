"""What a folder's `manifest.json` says, how two of them differ, and refusing those that cannot be trusted."""

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import MoEficationError
from .files import parse_json_object

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CARD = "README.md"  # of a checkpoint, which its owner may change
SPEC = "spec.json"  # in a folder's workspace: what it will be
STAGE_SCRIPTS = {
    "split": "llama_split_clustering.py",
    "hidden_features": "llama_get_hidden_features.py",
    "select": "llama_select_mlp.py",
    "convert": "llama_convert.py",
    "calibrate": "llama_calibrate.py",
    "distill": "llama_distill.py",
    "export": "llama_export.py",
    "import": "import_llama_moe_v1.py",
}
# Options that older versions had, and the value with which their results are those of today.
GONE = {"layer_budgets": "equal"}
VERSIONED_PACKAGES = ("torch", "transformers", "scikit-learn", "numpy", "safetensors")
# What the manifests of later stages keep of a manifest.
TOLD = ("stage", "options", "environment", "facts", "metrics", "seconds")
MOE_STAGES = ("convert", "calibrate", "distill", "import")  # whose folders are LlamaMoE checkpoints
# What else lies in the folder cannot be told without its manifest, so --overwrite cannot clear it.
CURE_OF_DAMAGE = "remove its folder and run the stage again"


def environment(device: str) -> dict[str, str]:
    """Versions and device kind: what decides the last bits of a result beside inputs and options."""
    return {package: version(package) for package in VERSIONED_PACKAGES} | {"device": torch.device(device).type}


@dataclass(frozen=True)
class ArtifactSpec:
    """What a folder is: the stage, every option that shapes its content, and what it is made from.

    `source` is the dense model's (see `DenseCheckpoint.source`), `inputs` maps the name of each artifact read to its
    digest. `environment` is compared only while the folder is unfinished, `facts` of the run that began it never are,
    nor is `earlier`: what the manifests of those artifacts tell (see `Artifact.history`).
    """

    stage: str
    options: dict[str, Any]
    source: dict[str, Any]
    environment: dict[str, str]
    inputs: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    earlier: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The spec as it stands in manifests."""
        return {"format": FORMAT_VERSION, **asdict(self)}


def own_files(folder: Path) -> list[str]:
    """Names of the files that a stage wrote into this folder, the manifest last; none without a manifest."""
    if not (folder / MANIFEST).exists():
        return []
    names = [*read_manifest(folder / MANIFEST)["files"], MANIFEST]
    for name in names:
        inside(folder, name)
    return names


def difference(existing: dict[str, Any], wanted: dict[str, Any], is_finished: bool) -> str | None:
    """What keeps an existing folder from being the wanted one, as the rest of a sentence, or None."""
    if existing["source"].get("fingerprint") != wanted["source"]["fingerprint"]:
        return f"was made from another model ({existing['source'].get('name')}: its weights or config differ)"
    # Older versions also recorded options without an effect, which this run does not name.
    gone = {name: value for name, value in GONE.items() if name in existing["options"]}
    for name, now in sorted((gone | wanted["options"]).items()):
        before = existing["options"].get(name)
        if before != now:
            return f"was made with {name} {before}, this run asks for {now}"
    for name, value in wanted["inputs"].items():
        if existing["inputs"].get(name) != value:
            return f"was made from another {name}"
    if not is_finished:
        for name, value in wanted["environment"].items():
            if existing["environment"].get(name) != value:
                return f"was begun with {name} {existing['environment'].get(name)}, this run has {value}"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest or spec, refused if it is damaged, foreign, or of another format version."""
    manifest = parse_json_object(path, CURE_OF_DAMAGE)
    if manifest.get("stage") not in STAGE_SCRIPTS:
        raise MoEficationError(f"{path} is not a manifest of this toolkit")
    if (found := manifest.get("format")) != FORMAT_VERSION:
        raise MoEficationError(f"{path} has format {found!r}, this version reads {FORMAT_VERSION}; remake the folder")
    for name in ("options", "source", "inputs", "environment", "facts"):
        if not isinstance(manifest.get(name), dict):
            raise MoEficationError(f"{path} is damaged (no {name}); {CURE_OF_DAMAGE}")
    if not _are_told(manifest.get("earlier", [])):  # manifests of version 0.1 have none
        raise MoEficationError(f"{path} is damaged (earlier stages); {CURE_OF_DAMAGE}")
    if path.name == MANIFEST and not _are_entries(manifest.get("files")):
        raise MoEficationError(f"{path} is damaged (no list of files with sizes and sums); {CURE_OF_DAMAGE}")
    return manifest


def _are_told(earlier: Any) -> bool:
    return isinstance(earlier, list) and all(
        isinstance(one, dict) and isinstance(one.get("stage"), str) for one in earlier
    )


def _are_entries(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )


def inside(folder: Path, relative: str) -> Path:
    """The path of a file that a manifest names, which must lie in the manifest's folder."""
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise MoEficationError(f"the manifest of {folder} names {relative}, outside of it")
    return folder / path
