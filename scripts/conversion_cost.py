"""What each stage of a conversion takes, computed from a model's config.json: operations, disk, memory and minutes.

python scripts/conversion_cost.py --model_path /models/llama_7B --work .conversion
python scripts/conversion_cost.py --model_path /models/llama_7B --work .conversion --gpus 8 --teraflops 400
python scripts/conversion_cost.py --model_path /models/llama_7B --work .conversion --measured .conversion/minutes.jsonl

Settings come from the environment, as for the shell scripts (RECIPE, NUM_EXPERTS, CALIBRATION_TOKENS, ...). Minutes
are for a large product's speed on this machine, or the one given, of which the stages reach about UTILISATION.
`convert_7b.sh` asks first, and at the end puts what it measured beside. Exit status 2 where disk or memory are short.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timing
import torch

from run_moefication import command_line
from run_moefication.moefication.checkpoints.dense_config import read_dense_config
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.precision import bfloat16_products, product_dtype
from run_moefication.moefication.processes import pick_device
from run_moefication.settings import shell_settings

UTILISATION = 0.4  # of a large product's speed
BYTES_PER_SECOND = 5e8  # of a disk
BATCH = 4  # blocks that stage 2 has in a file
SHARD_BYTES = 2 << 30
EVAL_TOKENS = 65_536  # if the environment does not say
PARALLEL = ("2_get_hidden_features",)  # stages that run on all GPUs


@dataclass(frozen=True)
class Stage:
    """A stage's work: operations, bytes that it leaves on the disk, needs there meanwhile, and in memory."""

    name: str
    flops: float
    kept: float
    scratch: float
    memory: float
    moved: float = 0  # bytes read and written, where these decide


class Model:
    """The sizes of a dense model: parameters, and operations of a token in a layer."""

    def __init__(self, raw: dict[str, Any], config: Any, block_size: int):
        self.hidden, self.neurons, self.layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.layer = self.hidden * config.head_dim * 2 * (heads + kv_heads) + 3 * self.hidden * self.neurons
        heads_of_words = 1 if config.tie_word_embeddings else 2
        self.parameters = self.layers * self.layer + heads_of_words * config.vocab_size * self.hidden
        self.bytes_each = 4 if raw.get("dtype", raw.get("torch_dtype")) in (None, "float32") else 2
        # Products with weights, and of attention over the half of a block that a token sees on average.
        self.forward = 2 * self.layer + 2 * heads * config.head_dim * block_size


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--model_path", **command_line.MODEL)
    parser.add_argument("--work", type=Path, required=True, help="folder that everything is written to")
    parser.add_argument("--gpus", type=int, help="that stage 2 runs on, 0: none (default: those of this machine)")
    parser.add_argument("--teraflops", type=float, help="of a large product on one of them (default: measured here)")
    parser.add_argument("--measured", type=Path, help='JSON lines {"stage", "minutes"} to put beside')
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return command_line.run(parser, report, argv)


def report(arguments: argparse.Namespace) -> None:
    """Print the table, and refuse a machine that is too small."""
    folder = Path(arguments.model_path)
    if not (folder / "config.json").is_file():
        raise MoEficationError(f"--model_path {folder} has no config.json: name the folder of the checkpoint")
    settings = shell_settings(os.environ | {"MODEL_PATH": str(folder)})
    block_size = int(os.environ.get("BLOCK_SIZE") or 2048)
    raw, config = read_dense_config(folder)
    model = Model(raw, config, min(block_size, config.max_position_embeddings))
    gpus = torch.cuda.device_count() if arguments.gpus is None else arguments.gpus
    rate = arguments.teraflops and arguments.teraflops * 1e12
    if not rate:
        device = torch.device(pick_device(None))
        with bfloat16_products():  # as stages compute
            dtype = torch.bfloat16 if device.type == "cuda" else product_dtype(device)
        rate = timing.peak_rates(dtype, device)[0]
    counts = {name: int(value) for name, value in settings.items() if value.isdigit()}
    counts["EVAL_TOKENS"] = int(os.environ.get("EVAL_TOKENS") or EVAL_TOKENS)
    stages = costs(model, counts, gpus, block_size)
    measured = read_measured(arguments.measured) if arguments.measured else {}
    print(
        f"{folder.name}: {model.parameters / 1e9:.2f}B parameters, {settings['NUM_EXPERTS']} experts a layer; ", end=""
    )
    print(f"{gpus} GPUs" if gpus else f"{torch.get_num_threads()} threads", end="")
    print(f", a large product at {rate / 1e12:.2f} TFLOP/s\n")
    print("| stage | TFLOP | GB kept | GB meanwhile | GB of memory | minutes, computed | minutes, measured |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for stage in stages:
        seconds = stage.flops / (rate * UTILISATION * max(1, gpus if stage.name in PARALLEL else 1))
        row = vars(stage) | {"minutes": (seconds + stage.moved / BYTES_PER_SECOND) / 60}
        rows.append(row | {"measured": measured.get(stage.name)})
        found = f"{measured[stage.name]:.1f}" if stage.name in measured else "-"
        sizes = " | ".join(f"{size / 1e9:.1f}" for size in (stage.kept, stage.scratch, stage.memory))
        print(f"| {stage.name} | {stage.flops / 1e12:,.1f} | {sizes} | {row['minutes']:,.1f} | {found} |")
    kept = sum(stage.kept for stage in stages)
    disk, memory = kept + max(stage.scratch for stage in stages), max(stage.memory for stage in stages)
    total = sum(row["minutes"] for row in rows)
    print(f"\nTogether {total:,.0f} minutes; {disk / 1e9:.1f} GB of disk, of which {kept / 1e9:.1f} stay")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not arguments.measured:
        require_room(arguments.work, disk, memory)


def costs(model: Model, counts: dict[str, int], gpus: int, block_size: int) -> list[Stage]:
    """What each stage takes; `counts` are the shell scripts' settings that are numbers."""
    hidden, neurons, layers, experts = model.hidden, model.neurons, model.layers, counts["NUM_EXPERTS"]
    split, features = counts["SPLIT_TOKENS"], counts["FEATURE_TOKENS"]
    calibration, checkpoint = counts["CALIBRATION_TOKENS"], model.parameters * model.bytes_each
    float32_layer, square = 4 * model.layer, 4 * neurons**2
    in_memory = model.parameters * (model.bytes_each if gpus else 4)
    # Sums over tokens: of pairs of neurons (half of a square), of a map from inputs to neurons, of gates.
    pairs, maps = 1.2 * neurons**2, 2 * hidden * (hidden + neurons)
    shard = 2 * hidden * layers * BATCH * block_size
    fit = 3 * model.forward * calibration / 2  # a quarter of the text, twice, forward and backward
    return [
        Stage(
            "1_split",
            flops=layers * (split * (model.forward + pairs + maps) + 60 * neurons**2 * experts),
            kept=8 * neurons * layers,
            scratch=8 * hidden * split,
            memory=float32_layer + 4 * hidden * split + 8 * square,
        ),
        Stage(
            "2_get_hidden_features",
            flops=layers * features * model.forward,
            kept=2 * hidden * layers * features,
            scratch=0,
            memory=in_memory + 2 * shard,
        ),
        Stage(
            "3_select",
            flops=layers * features * (4 * hidden * neurons + 2 * hidden**2),
            kept=4 * layers * hidden * experts,
            scratch=0,
            memory=2 * hidden * features + float32_layer + 4 * features * experts,
        ),
        Stage("4_convert", 0, checkpoint, 0, 2 * min(SHARD_BYTES, checkpoint), moved=2 * checkpoint),
        Stage(
            "5_calibrate",
            flops=layers * (calibration * (3 * model.forward + pairs) + fit),
            kept=checkpoint,
            scratch=16 * hidden * calibration + 4 * layers * hidden * neurons,
            memory=2 * float32_layer + 10 * square + SHARD_BYTES + 5 * calibration * experts,
            moved=3 * checkpoint,
        ),
        Stage(
            "evaluate", flops=2 * layers * counts["EVAL_TOKENS"] * model.forward, kept=0, scratch=0, memory=in_memory
        ),
    ]


def read_measured(path: Path) -> dict[str, float]:
    """Minutes by stage; of several runs of one, together."""
    minutes: dict[str, float] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        minutes[row["stage"]] = minutes.get(row["stage"], 0.0) + row["minutes"]
    return minutes


def require_room(work: Path, disk: float, memory: float) -> None:
    """Refuse a machine that the conversion does not fit on."""
    place = next(folder for folder in [work.absolute(), *work.absolute().parents] if folder.is_dir())
    free = shutil.disk_usage(place).free
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if disk > free:
        raise MoEficationError(f"--work {work} needs {disk / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")
    if memory > total:
        raise MoEficationError(f"{memory / 1e9:.1f} GB of memory are needed, and this machine has {total / 1e9:.1f} GB")


if __name__ == "__main__":
    sys.exit(main())
