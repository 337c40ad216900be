"""What each stage of a conversion takes, computed from a model's config.json: operations, disk, memory and minutes.

python scripts/conversion_cost.py --model_path /models/llama_7B --work .conversion
python scripts/conversion_cost.py --model_path /models/llama_7B --work .conversion --gpus 8 --teraflops 400

Settings come from the environment, as for the shell scripts (RECIPE, NUM_EXPERTS, CALIBRATION_TOKENS, ...). Minutes
are for a large product's speed on this machine at this moment, or the one given, of which the stages reach about
UTILISATION. Files that are mapped into memory come on top of the memory. `convert_7b.sh` asks first, and at the end
(`--measured`) puts the minutes beside that the manifests in --work tell of, interrupted runs included. Exit status 2
where disk or memory are short.
"""

import argparse
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timing
import torch

from run_moefication import command_line
from run_moefication.moefication.checkpoints.dense_config import read_dense_config
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.precision import bfloat16_products, product_dtype
from run_moefication.moefication.processes import pick_device
from run_moefication.moefication.storage.manifest import MANIFEST, read_manifest
from run_moefication.settings import shell_settings

UTILISATION = 0.4  # of a large product's speed
BYTES_PER_SECOND, MEMORY_BYTES_PER_SECOND = 5e8, 1e10  # of a disk, and of memory
PYTHON_BYTES = 8e8  # of memory, with PyTorch and transformers
BATCH = 4  # blocks that stage 2 has in a file
SHARD_BYTES = 2 << 30
EVAL_TOKENS = 65_536  # if the environment does not say
CHECK_TOKENS = 512  # that an export is checked on, one after the other
TYPE_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32}  # of a parameter
# How much longer an operation in float64 takes: on a CPU, and on an A100 or H100. GPUs for games are far slower at it.
DOUBLE_COST = {"cpu": 2, "gpu": 16}
SOLUTIONS = 5  # of a layer's normal equations, to find the strength: three or four, and the last one on all text
PARALLEL = ("2_get_hidden_features",)  # stages that run on all GPUs


@dataclass(frozen=True)
class Stage:
    """A stage's work: operations, bytes that it leaves on the disk, needs there meanwhile, and in memory."""

    name: str
    flops: float
    kept: float
    scratch: float
    memory: float
    moved: float = 0  # bytes read from the disk and written, where these decide
    read: float = 0  # bytes read from memory, likewise
    doubles: float = 0  # operations of the `flops` in float64


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
    parser.add_argument("--measured", action="store_true", help="put the minutes of finished stages beside")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return command_line.run(parser, report, argv)


def report(arguments: argparse.Namespace) -> None:
    """Print the table, and refuse a machine that is too small."""
    folder = Path(arguments.model_path)
    if not (folder / "config.json").is_file():
        raise MoEficationError(f"--model_path {folder} has no config.json: name the folder of the checkpoint")
    settings = shell_settings(os.environ | {"MODEL_PATH": str(folder), "SAVE_PATH": str(arguments.work)})
    block_size = int(os.environ.get("BLOCK_SIZE") or 2048)
    raw, config = read_dense_config(folder)
    if config.intermediate_size % int(settings["NUM_EXPERTS"]):
        found = f"NUM_EXPERTS={settings['NUM_EXPERTS']}"
        raise MoEficationError(f"{found} does not divide the MLP width {config.intermediate_size} of {folder.name}")
    model = Model(raw, config, min(block_size, config.max_position_embeddings))
    gpus = torch.cuda.device_count() if arguments.gpus is None else arguments.gpus
    rate = arguments.teraflops * 1e12 if arguments.teraflops else measured_rate(gpus)
    counts = {name: int(value) for name, value in settings.items() if value.isdigit()}
    counts["EVAL_TOKENS"] = int(os.environ.get("EVAL_TOKENS") or EVAL_TOKENS)
    stages = costs(model, counts, gpus, block_size)
    if settings["RECIPE"] == "engine":
        stages.append(export_cost(model, os.environ.get("OUTTYPE", "f16 q8_0").split()))
    measured = measured_minutes(arguments.work, folder.name, settings)
    rows = [
        vars(stage) | {"minutes": minutes(stage, rate, gpus), "measured": measured.get(stage.name)} for stage in stages
    ]
    place = f"GPUs: {gpus}" if gpus else f"threads: {torch.get_num_threads()}"
    sizes = f"{model.parameters / 1e9:.2f}B parameters, {settings['NUM_EXPERTS']} experts a layer"
    print(f"{folder.name}: {sizes}; {place}, a large product at {rate / 1e12:.2f} TFLOP/s\n")
    print(table(rows, arguments.measured))
    kept, memory = sum(stage.kept for stage in stages), max(stage.memory for stage in stages)
    disk = kept + max(stage.scratch for stage in stages)
    total = f"{sum(row['minutes'] for row in rows):,.1f} minutes computed"
    if arguments.measured:
        total += f", {sum(measured.values()):,.1f} measured"
    print(f"\nTogether {total}; {disk / 1e9:.1f} GB of disk, of which {kept / 1e9:.1f} stay")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not arguments.measured:
        there = sum(stage.kept for stage in stages if stage.name in measured)
        require_room(arguments.work, disk - there, memory)


def measured_rate(gpus: int) -> float:
    """Operations per second of a large product here, on one of `gpus` or, for 0, on the CPU."""
    if gpus and not torch.cuda.is_available():
        raise MoEficationError(f"--gpus {gpus}: none is here to measure; give --teraflops, the speed of one")
    device = torch.device(pick_device(None))
    with bfloat16_products():  # as stages compute
        dtype = torch.bfloat16 if device.type == "cuda" else product_dtype(device)
    return timing.peak_rates(dtype, device)[0]


def minutes(stage: Stage, rate: float, gpus: int) -> float:
    """What a stage takes, computed."""
    operations = stage.flops + (DOUBLE_COST["gpu" if gpus else "cpu"] - 1) * stage.doubles
    seconds = operations / (rate * UTILISATION * max(1, gpus if stage.name in PARALLEL else 1))
    return (seconds + stage.moved / BYTES_PER_SECOND + stage.read / MEMORY_BYTES_PER_SECOND) / 60


def table(rows: list[dict[str, Any]], with_measured: bool) -> str:
    """In Markdown."""
    columns = ["stage", "TFLOP", "GB kept", "GB meanwhile", "GB of memory", "minutes, computed"]
    columns += ["minutes, measured"] * with_measured
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        sizes = [f"{row[name] / 1e9:.1f}" for name in ("kept", "scratch", "memory")]
        cells = [row["name"], f"{row['flops'] / 1e12:,.1f}", *sizes, f"{row['minutes']:,.1f}"]
        found = "-" if row["measured"] is None else f"{row['measured']:.1f}"
        lines.append("| " + " | ".join(cells + [found] * with_measured) + " |")
    return "\n".join(lines)


def costs(model: Model, counts: dict[str, int], gpus: int, block_size: int) -> list[Stage]:
    """What each stage up to the evaluation takes; `counts` are the shell scripts' settings that are numbers."""
    hidden, neurons, layers, experts = model.hidden, model.neurons, model.layers, counts["NUM_EXPERTS"]
    split, features = counts["SPLIT_TOKENS"], counts["FEATURE_TOKENS"]
    calibration, checkpoint = counts["CALIBRATION_TOKENS"], model.parameters * model.bytes_each
    float32_layer, square = 4 * model.layer, 4 * neurons**2
    in_memory = model.parameters * (model.bytes_each if gpus else 4)
    # Sums over tokens: of pairs of neurons (half of a square), of a map from inputs to neurons, of gates.
    pairs, maps = 1.2 * neurons**2, 2 * hidden * (hidden + neurons)
    shard = 2 * hidden * layers * BATCH * block_size
    fit = 3 * model.forward * calibration / 2  # a quarter of the text, twice, forward and backward
    # A Cholesky decomposition, with it the solution, and the error on text that is held out.
    solutions = layers * SOLUTIONS * (neurons**3 / 3 + 4 * neurons**2 * hidden)
    stages = [
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
            memory=in_memory + max(1, gpus) * (2 * shard + PYTHON_BYTES) - PYTHON_BYTES,  # all map the same weights
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
            flops=layers * (calibration * (3 * model.forward + pairs) + fit) + solutions,
            doubles=solutions,
            kept=checkpoint,
            scratch=16 * hidden * calibration + 4 * layers * hidden * neurons,
            memory=2 * float32_layer + 10 * square + SHARD_BYTES + 5 * calibration * experts,
            moved=3 * checkpoint,
        ),
        Stage(
            "evaluate", flops=2 * layers * counts["EVAL_TOKENS"] * model.forward, kept=0, scratch=0, memory=in_memory
        ),
    ]
    return [replace(stage, memory=stage.memory + PYTHON_BYTES) for stage in stages]


def export_cost(model: Model, outtypes: list[str]) -> Stage:
    """What GGUF files of these types take, llama.cpp's check included, which reads all weights for each token."""
    if unknown := [name for name in outtypes if name not in TYPE_BYTES]:
        raise MoEficationError(f"OUTTYPE={unknown[0]}: choose of {', '.join(TYPE_BYTES)}")
    files = sum(TYPE_BYTES[name] for name in outtypes) * model.parameters
    memory = 4 * model.parameters + PYTHON_BYTES
    flops = CHECK_TOKENS * model.forward * model.layers
    return Stage("export", flops, files, 0, memory, moved=2 * files, read=CHECK_TOKENS * files)


def measured_minutes(work: Path, name: str, settings: dict[str, str]) -> dict[str, float]:
    """Of the stages that `convert_7b.sh` has finished: by their manifests, and the times of the evaluation's rows."""
    folders = {
        "1_split": Path(settings["SPLIT_FOLDER"]),
        "2_get_hidden_features": Path(settings["FEATURES_FOLDER"]),
        "3_select": Path(settings["SELECT_FOLDER"]),
        "4_convert": work / f"{name}-MoE",
        "5_calibrate": work / f"{name}-MoE-Calibrated",
        "export": work / f"{name}-GGUF",
    }
    finished = {stage: folder / MANIFEST for stage, folder in folders.items() if (folder / MANIFEST).is_file()}
    minutes = {stage: read_manifest(file).get("seconds", math.nan) / 60 for stage, file in finished.items()}
    evaluation = work / "evaluation.json"
    if evaluation.is_file():
        minutes["evaluate"] = sum(row["seconds"] for row in json.loads(evaluation.read_text())) / 60
    return minutes


def require_room(work: Path, disk: float, memory: float) -> None:
    """Refuse a machine that the conversion does not fit on."""
    place = next(folder for folder in [work.absolute(), *work.absolute().parents] if folder.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise MoEficationError(f"{place} is no folder to write to: set WORK to another one than {work}")
    free = shutil.disk_usage(place).free
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if disk > free:
        raise MoEficationError(f"--work {work} needs {disk / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")
    if memory > total:
        raise MoEficationError(f"{memory / 1e9:.1f} GB of memory are needed, and this machine has {total / 1e9:.1f} GB")


if __name__ == "__main__":
    sys.exit(main())
