"""Download a checkpoint in transformers format from the Hugging Face hub.

    bash download_hf.sh meta-llama/Llama-3.2-1B /models/Llama-3.2-1B

Takes config, tokenizer, licence and the weights: safetensors, or .bin where there are none. Everything comes from one
commit and is compared with the hub's checksums; files that are there and right are not fetched again.

Settings in the environment: REVISION (main: a branch, tag or commit), PYTHON (one with this project installed; its
.venv if there is one), HF_TOKEN or `hf auth login` for models behind a licence, HF_ENDPOINT for a mirror. Exit status:
2 for what the hub refuses or what cannot be written, 3 where the network fails.
"""

import argparse
import contextlib
import glob
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from run_moefication.command_line import new_parser, path, run
from run_moefication.moefication.errors import MoEficationError, NetworkError
from run_moefication.moefication.progress import Progress, progress

RECORD = ".download_hf"  # in the target folder: what it is filled with
TEXTS = (".json", ".jinja", ".model", ".txt", ".md")
WEIGHTS = (".safetensors", ".bin")
LICENCES = ("LICEN", "NOTICE", "USE_POLICY")


def main() -> int:
    """Returns the exit status."""
    parser = new_parser(__doc__)
    parser.prog = "download_hf.sh"
    parser.add_argument("model_id", metavar="MODEL_ID", type=path, help="name of the model on the hub")
    place = "new, empty, or of an earlier run for this model"
    parser.add_argument("target", metavar="TARGET_FOLDER", type=path, help=place)
    return run(parser, download, None)


def download(arguments: argparse.Namespace) -> None:
    """Fill the folder with the model's checkpoint, every file of one commit and compared with the hub's checksums."""
    model, folder, revision = arguments.model_id, Path(arguments.target), os.environ.get("REVISION") or "main"
    source = f"{model}@{revision}"
    refuse_occupied(folder, source)
    with hub_errors(model):
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download

        api = HfApi()
        info = api.model_info(model, revision=revision)
        names = needed(model, [file.rfilename for file in info.siblings])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(source + "\n")
        where = {"repo_id": model, "revision": info.sha, "local_dir": folder}
        snapshot_download(**where, allow_patterns=[glob.escape(name) for name in names], tqdm_class=Progress)
        for attempt in range(2):
            with progress(range(len(names)), "compare checksums with the hub's", "file") as bar:
                found = api.verify_repo_checksums(**where)
                bar.update(len(names))
            wrong = {*found.missing_paths, *(mismatch["path"] for mismatch in found.mismatches)} & {*names}
            if wrong and attempt:
                raise MoEficationError(
                    f"{min(wrong)} as the hub sends it is not what its checksum says: try again later"
                )
            for name in wrong:
                hf_hub_download(**where, filename=name, force_download=True)
    stale = [path.name for path in folder.iterdir() if path.suffix in WEIGHTS and path.name not in names]
    if stale:  # transformers might prefer them
        raise MoEficationError(f"{folder} holds {min(stale)}, weights that {model} has no more: remove that file")
    print(f"verified: {len(names)} files of {model} ({info.sha[:12]}) in {folder}")
    print(f"next: MODEL_PATH={shlex.quote(str(folder))} bash run_moefication/1_split.sh")


def refuse_occupied(folder: Path, source: str) -> None:
    """Refuse a folder that holds anything but (a part of) this model at this revision."""
    there = source
    if (folder / RECORD).is_file():
        there = (folder / RECORD).read_text().strip()
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        there = "something else"
    if there != source:
        raise MoEficationError(f"{folder} holds {there}: choose another folder for {source}")


def needed(model: str, names: list[str]) -> list[str]:
    """The files of a repository that make its checkpoint. transformers looks for weights in this order, too."""
    top = [name for name in names if "/" not in name]
    for whole in ("model.safetensors", "pytorch_model.bin"):
        stem, _, suffix = whole.partition(".")
        shards = [name for name in top if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name)]
        weights = [whole] if whole in top else [*shards, f"{whole}.index.json"] if shards else []
        if weights:
            break
    if "config.json" not in top or not weights:
        raise MoEficationError(
            f"{model} has no checkpoint in transformers format (config.json with safetensors or .bin) on the hub"
        )
    texts = [name for name in top if name.endswith(TEXTS) or name.upper().startswith(LICENCES)]
    return sorted({*weights, *(name for name in texts if not name.endswith(".index.json"))})


@contextlib.contextmanager
def hub_errors(model: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line that names the model, with the exit status that fits."""
    from huggingface_hub import errors

    try:
        yield
    except MoEficationError:
        raise
    except (OSError, ValueError, errors.HTTPError) as error:
        if getattr(error, "errno", None):  # a file cannot be written
            raise
        # The client hides some answers of the hub behind the news that its cache lacks the file, too.
        found = error.__cause__ if isinstance(error.__cause__, errors.HfHubHTTPError) else error
        if isinstance(found, json.JSONDecodeError) or type(found).__name__ == "UnsupportedProtocol":
            raise MoEficationError(f"{model}: no hub answers at this address: check HF_ENDPOINT ({found})") from error
        status = getattr(getattr(found, "response", None), "status_code", None)
        if isinstance(found, (errors.HFValidationError, errors.OfflineModeIsEnabled)) or status in (401, 403, 404):
            raise MoEficationError(f"{model}: {found}") from error
        raise NetworkError(f"{model}: {found}: check the network, then run this again: it goes on") from error


if __name__ == "__main__":
    sys.exit(main())
