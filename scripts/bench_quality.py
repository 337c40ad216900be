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
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from quality_table import DENSE, read_rows, rounded, row_key, table, write_rows

from run_moefication import command_line
from run_moefication.moefication.errors import MoEficationError
from run_moefication.settings import CALIBRATED, PLAIN, Recipe

METHODS = ("plain", "cmoe", "oracle", "static", "steps", "top_k", "calibrated", "dialled")
METHODS_HELP = (
    "rows to measure (plain, calibrated: the recipes; top_k: the calibrated one with that routing; steps: what each "
    "part of it adds; dialled: calibrated at one of --budgets and run at the others; the rest are other methods)"
)


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = command_line.new_parser(__doc__)
    command_line.add_model_path(parser)
    parser.add_argument("--train_data_path", type=command_line.path, required=True, help="calibration text, a folder")
    parser.add_argument(
        "--heldout_path", type=command_line.path, required=True, help="folder of .jsonl files never calibrated on"
    )
    parser.add_argument("--wikitext_path", type=command_line.path, help="WikiText-2 test, raw; never calibrated on")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and results")
    tokens, distillation_tokens = CALIBRATED.calibration_tokens, CALIBRATED.distillation_tokens
    parser.add_argument("--calibration_tokens", type=int, default=tokens, help="the same for every method")
    parser.add_argument("--heldout_tokens", type=int, default=4096, help="of each held-out file")
    parser.add_argument("--wikitext_tokens", type=int, default=16384, help="of --wikitext_path")
    parser.add_argument("--block_size", type=int, default=512, help="tokens per block, of all texts")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="shares of the experts")
    parser.add_argument(
        "--experts", type=int, nargs="+", default=[CALIBRATED.num_experts], help="for our rows; the first for --methods"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help=METHODS_HELP)
    parser.add_argument("--distill", action="store_true", help="distil the calibrated model, and the static mask alike")
    parser.add_argument("--distillation_tokens", type=int, default=distillation_tokens, help="one pass over so many")
    parser.add_argument("--bf16", action="store_true", help="distil in bfloat16")
    command_line.add_device(parser)
    parser.add_argument("--json", type=Path, help="JSON lines, one row each (default: rows.jsonl in --work)")
    parser.add_argument("--seed", type=command_line.seed_number, default=0, help="of blocks, clustering and bootstrap")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), bench, argv)


@dataclass(frozen=True)
class Row:
    """One row of the table: its name, its budget, how to measure it, and the settings that its numbers depend on beside
    those of all rows."""

    method: str
    budget: float
    measure: Callable[[Any], dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)


def bench(arguments: argparse.Namespace) -> None:
    """Measure all that was asked for, printing as it goes."""
    import timing
    import torch
    from quality_methods import prepare

    check(arguments)
    setup = prepare(arguments)
    arguments.work.mkdir(parents=True, exist_ok=True)
    machine = timing.machine(torch.device(setup.device))
    store = Store(setup, arguments.json or arguments.work / "rows.jsonl", machine)
    print(f"{setup.dense.name}; {machine}; {arguments.calibration_tokens:,} calibration tokens, seed {arguments.seed}")
    results = {}
    for row in rows(arguments):
        key = row_key(row.method, row.budget)
        results[key] = store.numbers(row)
        if key != DENSE:
            *head, cells = table({DENSE: results[DENSE], key: results[key]}, arguments.seed).splitlines()
            print("\n".join([*head, cells] if len(results) == 2 else [cells]), flush=True)


def check(arguments: argparse.Namespace) -> None:
    """Refuse what no row could be measured with, before any work."""
    for name in ("calibration_tokens", "heldout_tokens", "wikitext_tokens", "distillation_tokens"):
        if getattr(arguments, name) < 1:
            raise MoEficationError(f"--{name} {getattr(arguments, name)} must be at least 1")
    for budget in arguments.budgets:
        if not 0.05 <= budget < 1:
            raise MoEficationError(f"--budgets {budget:g}: shares from 0.05 to below 1 are measured")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise MoEficationError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")


class Store:
    """The file of rows: what an earlier run measured with the same settings is not measured again."""

    def __init__(self, setup: Any, path: Path, machine: str):
        import torch

        self._setup, self._path, self._machine = setup, path, machine
        self._rows = read_rows(path) if path.exists() else {}
        arguments = setup.arguments
        self._settings = {
            "model": setup.dense.fingerprint,
            "corpus": setup.text(arguments.calibration_tokens).digest,
            "calibration_tokens": arguments.calibration_tokens,
            "seed": arguments.seed,
            "texts": {name: sha256(torch.cat(blocks).numpy()).hexdigest() for name, blocks in setup.texts.items()},
        }

    def numbers(self, row: Row) -> dict[str, Any]:
        """A row's numbers, measured now unless they are there."""
        key, settings = row_key(row.method, row.budget), self._settings | row.settings
        if self._rows.get(key, {}).get("settings") != settings:
            start = time.time()
            numbers = row.measure(self._setup)
            minutes = (time.time() - start) / 60
            about = {"method": row.method, "budget": row.budget, "minutes": minutes, "machine": self._machine}
            about |= {"date": datetime.date.today().isoformat(), "settings": settings}
            self._rows[key] = about | rounded(numbers)
            write_rows(self._path, self._rows)
        return self._rows[key]


def as_data(recipe: Recipe) -> dict[str, Any]:
    """A recipe as it looks in a file of rows."""
    return json.loads(json.dumps(asdict(recipe), default=str))


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """All rows, the dense model first."""
    import quality_methods as quality

    tokens, methods = arguments.calibration_tokens, arguments.methods

    def row(method: str, measure: Callable[..., dict[str, Any]], *inputs: Any, **settings: Any) -> Row:
        recipe = next((one for one in inputs if isinstance(one, Recipe)), None)
        settings |= {"recipe": as_data(recipe)} if recipe else {}
        return Row(method, budget, lambda bench: measure(bench, *inputs), settings)

    def recipe_at(budget: float, experts: int = arguments.experts[0], **changes: Any) -> Recipe:
        return replace(CALIBRATED.at(budget), num_experts=experts, calibration_tokens=tokens, **changes)

    yield Row("dense", 1.0, quality.measure_dense)
    for budget in arguments.budgets:
        chosen, name = recipe_at(budget), f"calibrated, {arguments.experts[0]} experts"
        if "plain" in methods:
            yield row("plain recipe", quality.measure_recipe, PLAIN.at(budget))
        if "cmoe" in methods:
            yield row("CMoE's recipe", quality.measure_cmoe, budget)
        if "static" in methods:
            yield row("static mask", quality.measure_static, chosen)
            yield row("static mask, refitted", quality.measure_static, chosen, True)
        for step in quality.STEPS if "steps" in methods else ():
            yield row(f"step: {step}", quality.measure_step, chosen, step)
        for experts in arguments.experts if "top_k" in methods else ():
            recipe = recipe_at(budget, experts, name="top_k", routing="top_k")
            yield row(f"calibrated, {experts} experts, top_k", quality.measure_recipe, recipe)
        for experts in arguments.experts if "calibrated" in methods else ():
            yield row(f"calibrated, {experts} experts", quality.measure_recipe, recipe_at(budget, experts))
        for other in arguments.budgets if "dialled" in methods else ():
            if other != budget:
                num_selects = chosen.num_selects(chosen.num_experts)
                yield row(f"{name}, made for {other:.0%}", quality.measure_recipe, recipe_at(other), num_selects)
        if arguments.distill:
            settings = {"distillation_tokens": arguments.distillation_tokens, "bf16": arguments.bf16}
            if "static" in methods:
                method = "static mask, refitted and distilled"
                yield row(method, quality.measure_static, chosen, True, True, **settings)
            if "calibrated" in methods:
                yield row(f"{name}, distilled", quality.measure_distilled, chosen, **settings)
        if "oracle" in methods:
            yield row("neuron oracle", quality.measure_oracle, budget)


if __name__ == "__main__":
    sys.exit(main())
