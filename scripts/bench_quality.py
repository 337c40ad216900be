"""How much each method costs in perplexity at 75, 50 and 25 % active: one table, the same tokens for every method.

python scripts/bench_quality.py --model_path .cache/SmolLM2-135M-Instruct --train_data_path .cache/llama_data \\
  --heldout_path .cache/llama_data/heldout --work .quality --wikitext_path wiki.test.raw

A budget counts what --num_selects of the stages counts: the experts that run per token, shared ones included. Active is
what ran on the evaluation text, over the dense MLPs' parameters: gates and biases count, too. A row whose active share
is above its budget is marked with *. Rows are kept in the --json file, one JSON object a line, of which
quality_table.py makes tables and plots, and checkpoints in --work: run again, it goes on where it stopped, and measures
no row twice.
"""

import argparse
import datetime
import sys
import time
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import torch
from quality_methods import Bench, rows
from quality_table import DENSE, compared, read_rows, row_key, table, write_rows
from timing import machine, positive

from run_moefication import command_line
from run_moefication.moefication.errors import MoEficationError
from run_moefication.settings import CALIBRATED

RECIPES = ("plain", "engine", "calibrated")
OTHERS = ("cmoe", "oracle", "sparse", "quantized", "hqq", "static", "steps", "graph", "top_k", "dialled", "nested")
WANTING = {"hqq": ("torchao", "torchao"), "graph": ("pymetis", "-e '.[graph]'")}  # a package, and how pip calls it
METHODS_HELP = (
    "rows to measure (plain, engine, calibrated: the recipes; top_k: the calibrated one with that routing; steps: what "
    "each part of it adds; graph: a split by METIS beside those of steps; dialled: calibrated at one of --budgets and "
    "run at the others; nested: with --distill, one model for all --budgets; quantized and hqq: dense and calibrated "
    "models of fewer bits, the latter by torchao; the rest are other methods)"
)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--model_path", **command_line.MODEL)
    parser.add_argument("--train_data_path", type=command_line.path, required=True, help="calibration text, a folder")
    parser.add_argument("--heldout_path", type=command_line.path, required=True, help="folder of .jsonl, to measure on")
    parser.add_argument("--wikitext_path", type=command_line.path, help="WikiText-2 test, raw; never calibrated on")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and results")
    tokens = CALIBRATED.calibration_tokens
    parser.add_argument("--calibration_tokens", type=positive, default=tokens, help="the same for every method")
    parser.add_argument("--heldout_tokens", type=positive, default=4096, help="of each held-out file")
    parser.add_argument("--wikitext_tokens", type=positive, default=16384, help="of --wikitext_path")
    parser.add_argument("--block_size", type=positive, default=512, help="tokens per block, of all texts")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="shares of the experts")
    help_of_experts = "of our models (default: the recipe's); static, steps, dialled and nested take the first"
    parser.add_argument("--experts", type=positive, nargs="+", help=help_of_experts)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=RECIPES + OTHERS,
        default=[method for method in RECIPES + OTHERS if method not in WANTING],
        help=METHODS_HELP,
    )
    help_of_distill = "distil the models of engine, calibrated, top_k and static, too"
    parser.add_argument("--distill", action="store_true", help=help_of_distill)
    tokens = CALIBRATED.distillation_tokens
    parser.add_argument("--distillation_tokens", type=positive, default=tokens, help="one pass over so many")
    parser.add_argument("--bf16", action="store_true", help="distil in bfloat16")
    parser.add_argument("--device", **command_line.DEVICE)
    parser.add_argument("--json", type=Path, help="JSON lines, one row each (default: rows.jsonl in --work)")
    parser.add_argument("--seed", type=command_line.seed_number, default=0, help="of blocks, clustering and bootstrap")
    return command_line.run(parser, bench, argv)


def bench(arguments: argparse.Namespace) -> None:
    """Measure all that was asked for and is not in the file of rows with the same settings, printing as it goes."""
    for budget in arguments.budgets:
        if not 0.05 <= budget < 1:
            raise MoEficationError(f"--budgets {budget:g}: shares from 0.05 to below 1 are measured")
    for method, (package, name) in WANTING.items():
        if method in arguments.methods and find_spec(package) is None:
            raise MoEficationError(f"--methods {method} needs the package {package}: pip install {name}")
    path = arguments.json or arguments.work / "rows.jsonl"
    if arguments.json and not path.absolute().parent.is_dir():
        raise MoEficationError(f"--json {path}: there is no folder {path.parent}")
    setup = Bench(arguments)
    kept = read_rows(path) if path.exists() else {}
    where = machine(torch.device(setup.run["device"]))
    print(f"{setup.dense.name}; {where}; {arguments.calibration_tokens:,} calibration tokens, seed {arguments.seed}")
    common = {
        "model": setup.dense.fingerprint,
        "corpus": setup.text(arguments.calibration_tokens).digest,
        "calibration_tokens": arguments.calibration_tokens,
        "seed": arguments.seed,
        "texts": {name: sha256(torch.cat(blocks).numpy()).hexdigest() for name, blocks in setup.texts.items()},
    }
    head = 0  # lines of it that have been printed
    for row in rows(setup):
        key, settings = row_key(row.method, row.budget), common | row.settings
        if kept.get(key, {}).get("settings") != settings:
            start = time.time()
            numbers = row.measure()
            about = {"method": row.method, "budget": row.budget, "minutes": (time.time() - start) / 60}
            about |= {"machine": where, "date": datetime.date.today().isoformat(), "settings": settings}
            kept[key] = about | numbers
            write_rows(path, kept)
        if key != DENSE:
            own = compared({"": {DENSE: kept[DENSE], key: kept[key]}})
            print(*table([own[key]], arguments.seed).splitlines()[head:], sep="\n", flush=True)
            head = 2


if __name__ == "__main__":
    sys.exit(main())
