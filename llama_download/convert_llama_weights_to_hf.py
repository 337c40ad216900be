"""Convert LLaMA weights as Meta releases them into a transformers checkpoint.

    python convert_llama_weights_to_hf.py --input_dir llama --model_size 7B --output_dir llama_7B

LLaMA 1 (7B 13B 30B 65B), Llama 2 (7B 13B 70B), Llama 3, 3.1 and 3.2 (1B 3B 8B 70B). Reads params.json, the
consolidated.NN.pth and tokenizer.model; writes config, safetensors shards with their index, and a fast tokenizer.
Memory: about one output shard, whatever the model's size.
"""

import argparse
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

from run_moefication.command_line import new_parser, path, run, took
from run_moefication.moefication.errors import MoEficationError

# (dim, n_layers, n_heads, n_kv_heads) of LLaMA 1 (7B to 65B), Llama 2 (7B, 13B, 70B) and Llama 3 (1B to 70B).
SIZES = {
    "7B": (4096, 32, 32, 32),
    "13B": (5120, 40, 40, 40),
    "30B": (6656, 60, 52, 52),
    "65B": (8192, 80, 64, 64),
    "70B": (8192, 80, 64, 8),
    "1B": (2048, 16, 32, 8),
    "3B": (3072, 28, 24, 8),
    "8B": (4096, 32, 32, 8),
}
SHAPE = "{1} layers of dim {0} with {2} heads ({3} of keys and values)"
MOST_UNUSED_ROWS = 1024  # an embedding may be padded; a tokenizer smaller by more is another model's
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    place = "folder of params.json and the shards, or the one above it: then its folder --model_size is read"
    add("--input_dir", type=path, required=True, help=place)
    size = "the size that params.json must be of; auto takes params.json as it stands"
    add("--model_size", choices=(*SIZES, "auto"), required=True, help=size)
    add("--output_dir", type=path, required=True, help="folder of the new checkpoint; new or empty")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="of the new weights (default: that of the source)")
    shard_size = "of a safetensors file, in KB, MB or GB (powers of ten)"
    add("--max_shard_size", type=num_bytes, default="5GB", help=shard_size)
    add("--overwrite", action="store_true", help="replace a checkpoint that this script made")
    return run(parser, convert, argv)


def num_bytes(text: str) -> int:
    """The type of `--max_shard_size`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", text.upper().replace(" ", ""))
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


def convert(arguments: argparse.Namespace) -> None:
    """Check everything, then write the checkpoint beside its final name and rename it."""
    output_dir = Path(arguments.output_dir)
    folder = find_model(Path(arguments.input_dir), arguments.model_size)
    tokenizer_path = find_tokenizer(folder)

    from llama_download.checkpoint_folder import is_complete, new_folder
    from llama_download.meta_checkpoint import MetaCheckpoint
    from llama_download.tokenizer_conversion import convert_tokenizer
    from run_moefication.moefication.storage.files import file_sha256

    model = MetaCheckpoint(folder)
    config = model.config
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    require_size(tuple(getattr(config, name) for name in fields), arguments.model_size, folder)
    source = model.content | {
        "tokenizer": file_sha256(tokenizer_path),
        "dtype": arguments.dtype,
        "max_shard_size": arguments.max_shard_size,
    }
    if is_complete(output_dir, source, arguments.overwrite):
        print(f"already finished: {output_dir} (--overwrite redoes it)")
        return
    tokenizer = convert_tokenizer(tokenizer_path, model.family, config.max_position_embeddings)
    if not 0 <= config.vocab_size - len(tokenizer) <= MOST_UNUSED_ROWS:
        raise MoEficationError(
            f"{tokenizer_path} has {len(tokenizer)} tokens, the embedding of {folder} {config.vocab_size} rows: "
            f"put the model's own tokenizer.model into its folder"
        )
    print(
        f"{folder}: {model.family}, {config.num_hidden_layers} layers of {config.hidden_size} x "
        f"{config.intermediate_size}, {config.max_position_embeddings} positions; shards: {len(model.files)}"
    )
    with new_folder(output_dir, source) as partial:
        shutil.copyfile(tokenizer_path, partial / tokenizer_path.name)  # other tools look for the original
        tokenizer.save_pretrained(partial)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
        model.write(partial, arguments.dtype, arguments.max_shard_size, ids)
    print(f"written: {output_dir} ({took(arguments)})")
    print(f"next: MODEL_PATH={shlex.quote(str(output_dir))} bash run_moefication/1_split.sh")


def find_model(input_dir: Path, model_size: str) -> Path:
    """The folder of `params.json`."""
    for folder in (input_dir, input_dir / model_size):
        if (folder / "params.json").is_file():
            return folder
    within = "" if model_size == "auto" else f", nor has its folder {model_size}"
    raise MoEficationError(f"--input_dir {input_dir} has no params.json{within}: name the folder that has")


def require_size(found: tuple[int, ...], model_size: str, folder: Path) -> None:
    """Refuse a model that is not of the size named (`auto` takes any)."""
    if model_size != "auto" and found != SIZES[model_size]:
        right = next((name for name, shape in SIZES.items() if shape == found), "auto")
        raise MoEficationError(
            f"--model_size {model_size} has {SHAPE.format(*SIZES[model_size])}, {folder / 'params.json'} "
            f"{SHAPE.format(*found)}: give --input_dir {folder} --model_size {right}, or another folder"
        )


def find_tokenizer(folder: Path) -> Path:
    """`tokenizer.model`, beside the model (Llama 3) or above its folder (LLaMA 1 and 2)."""
    for place in (folder, folder.resolve().parent):
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    raise MoEficationError(f"{folder} has no tokenizer.model, nor has the folder above: download it, too")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the unfinished folder is removed
    sys.exit(main())
