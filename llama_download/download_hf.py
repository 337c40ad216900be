"""What download_hf.sh runs: MODEL_ID TARGET_FOLDER REVISION; its header says what it does and how it ends."""

import glob
import re
import shlex
import sys
from pathlib import Path

from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

RECORD = ".download_hf"  # in the target folder: what it is filled with
TEXTS = (".json", ".jinja", ".model", ".txt", ".md")
NETWORK = (ConnectionError, TimeoutError, errors.LocalEntryNotFoundError)
LICENCES = ("LICEN", "NOTICE", "USE_POLICY")


class Refused(Exception):
    """What the hub or the folder holds is not what can be used."""


def main(model_id: str, target: str, revision: str) -> None:
    """Fill the folder with the model's checkpoint, every file of one commit and compared with the hub's checksums."""
    folder = Path(target)
    claim(folder, f"{model_id}@{revision}")
    api = HfApi()
    info = api.model_info(model_id, revision=revision)
    names = needed([file.rfilename for file in info.siblings])
    claim(folder, f"{model_id}@{revision}", write=True)
    where = {"repo_id": model_id, "revision": info.sha, "local_dir": folder}
    snapshot_download(**where, allow_patterns=[glob.escape(name) for name in names])

    def damaged() -> list[str]:
        found = api.verify_repo_checksums(**where)
        wrong = {*found.missing_paths, *(mismatch["path"] for mismatch in found.mismatches)}
        return [name for name in names if name in wrong]

    for name in damaged():
        hf_hub_download(**where, filename=name, force_download=True)
    if wrong := damaged():
        raise Refused(f"{wrong[0]}: what the hub sends is not what its checksum says: try again later")
    print(f"verified: {len(names)} files of {model_id} ({info.sha[:12]}) in {folder}")
    print(f"next: MODEL_PATH={shlex.quote(str(folder))} bash run_moefication/1_split.sh")


def claim(folder: Path, source: str, write: bool = False) -> None:
    """Raise Refused where the folder holds anything but (a part of) this model; with `write`, note that it will."""
    record = folder / RECORD
    if record.is_file():
        if (there := record.read_text().strip()) != source:
            raise Refused(f"{folder} holds {there}: choose another folder for {source}")
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise Refused(f"{folder} holds something else: choose another folder")
    elif write:
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(source + "\n")


def needed(names: list[str]) -> list[str]:
    """Of a repository's files those of its checkpoint. transformers looks for weights in this order, too."""
    top = [name for name in names if "/" not in name]
    for whole in ("model.safetensors", "pytorch_model.bin"):
        stem, _, suffix = whole.partition(".")
        shards = [name for name in top if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name)]
        weights = [whole] if whole in top else [*shards, f"{whole}.index.json"] if shards else []
        if weights:
            break
    if "config.json" not in top or not weights:
        raise Refused("the repository has no checkpoint in transformers format (config.json with safetensors or .bin)")
    texts = [name for name in top if name.endswith(TEXTS) or name.upper().startswith(LICENCES)]
    return sorted({*weights, *(name for name in texts if not name.endswith(".index.json"))})


def explain(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit status for an error that is no bug of ours."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, Refused):
        return str(error), 2
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to download", 2
    if isinstance(error, errors.RevisionNotFoundError):
        return "the model has no such branch, tag or commit: check REVISION", 2
    gated = isinstance(error, errors.GatedRepoError)
    if status == 404 or (isinstance(error, errors.RepositoryNotFoundError) and not gated):
        return "the hub has no such model, or it is private: check the name; for private ones: hf auth login", 2
    if status in (401, 403):
        return "the hub refuses: accept the model's licence on its page on the hub, then log in: hf auth login", 2
    if type(error).__name__ == "UnsupportedProtocol":
        return "HF_ENDPOINT is no address such as https://huggingface.co", 2
    if error.__cause__ is not None and (explained := explain(error.__cause__)):
        return explained
    half = isinstance(error, OSError) and error.errno is None  # the client's word for a file that came incomplete
    if half or isinstance(error, NETWORK) or status is not None or type(error).__module__.startswith("http"):
        reason = type(error).__name__ if status is None else f"HTTP {status}"
        return f"the network or the hub fails ({reason}): check the network, then run this again: it goes on", 3
    if isinstance(error, OSError):
        return f"cannot be written: {error}", 2
    if isinstance(error, ValueError):  # of the client's JSON parser
        return (
            "the address does not answer as a hub does: check HF_ENDPOINT, or the page your network wants you to see",
            2,
        )
    return None


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not (explained := explain(error)):
            raise
        print(f"download_hf.sh: error: {sys.argv[1]}: {' '.join(explained[0].split())}", file=sys.stderr)
        sys.exit(explained[1])
