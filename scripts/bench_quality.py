"""How much each method costs in perplexity at 75, 50 and 25 % active: one table, the same tokens for every method.

python scripts/bench_quality.py --model_path .cache/SmolLM2-135M-Instruct --train_data_path .cache/llama_data \\
  --heldout_path .cache/llama_data/heldout --work .quality --wikitext_path wiki.test.raw

Active is what ran per token on the evaluation text, over the dense MLPs' parameters: shared experts, gates and biases
count. A row over its budget is marked with *. Rows are kept in the --json file, one JSON object a line, and checkpoints
in --work: run again, it goes on where it stopped, and measures no row twice.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from quality_table import line, plot, read_rows, rounded, row_key, table, write_rows

from run_moefication import command_line

METHODS = ("plain", "cmoe", "oracle", "static", "steps", "top_k", "threshold", "dialled")
METHODS_HELP = (
    "rows to measure (steps: what each ingredient of the recipe adds; dialled: the chosen model, calibrated at one of "
    "--budgets and run at the others; the rest are methods)"
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
    parser.add_argument("--calibration_tokens", type=int, default=131072, help="the same for every method")
    parser.add_argument("--heldout_tokens", type=int, default=4096, help="of each held-out file")
    parser.add_argument("--wikitext_tokens", type=int, default=16384, help="of --wikitext_path")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="active fractions")
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 128, 256, 512], help="for our rows")
    parser.add_argument(
        "--gate_rank", type=int, default=64, help="of gates, where it makes them smaller; 0: full gates"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help=METHODS_HELP)
    parser.add_argument(
        "--chosen", type=int, default=512, help="experts of the model that runs at other budgets, too, and is distilled"
    )
    parser.add_argument("--distill", action="store_true", help="distil the chosen model, and the static mask alike")
    parser.add_argument("--distillation_tokens", type=int, default=737280, help="one pass over so many")
    parser.add_argument("--bf16", action="store_true", help="distil in bfloat16")
    command_line.add_device(parser)
    parser.add_argument("--json", type=Path, help="JSON lines, one row each (default: rows.jsonl in --work)")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--plot", type=Path, help="draw perplexity against active fraction into this file")
    parser.add_argument("--seed", type=command_line.seed_number, default=0, help="of blocks, clustering and bootstrap")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), bench, argv)


@dataclass(frozen=True)
class Row:
    """One row of the table: its name, its budget, and how to measure it."""

    method: str
    budget: float
    measure: Callable[[], dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)  # that its numbers depend on, beside those of all rows

    @property
    def key(self) -> str:
        return row_key(self.method, self.budget)


def bench(arguments: argparse.Namespace) -> None:
    """Measure all that was asked for, printing as it goes."""
    import timing
    import torch
    from quality_methods import prepare

    check(arguments)
    arguments.work.mkdir(parents=True, exist_ok=True)
    setup = prepare(arguments)
    store = Store(setup, arguments.json or arguments.work / "rows.jsonl", timing.machine(torch.device(setup.device)))
    calibration = f"{setup.corpus.num_tokens:,} calibration tokens, seed {arguments.seed}"
    print(f"{setup.checkpoint.name}; {store.machine}; {calibration}")
    results, names_and_seed = {}, (list(setup.texts), arguments.seed)
    for row in rows(setup):
        results[row.key] = store.numbers(row)
        if len(results) > 1:
            print(line(row.key, results, *names_and_seed), flush=True)
    machines = " or ".join(sorted({numbers["machine"] for numbers in results.values()}))
    caption = f"Perplexity over dense, in brackets the 95 % interval; {calibration}; {machines}"
    markdown = f"{caption}\n\n{table(results, *names_and_seed)}"
    print(f"\n{markdown}")
    if arguments.markdown:
        arguments.markdown.write_text(markdown + "\n")
    if arguments.plot:
        plot(results, *names_and_seed, arguments.plot)


def check(arguments: argparse.Namespace) -> None:
    """Refuse what no row could be measured with, before any work."""
    from run_moefication.moefication.errors import MoEficationError

    for name in ("calibration_tokens", "heldout_tokens", "wikitext_tokens", "distillation_tokens"):
        if getattr(arguments, name) < 1:
            raise MoEficationError(f"--{name} {getattr(arguments, name)} must be at least 1")
    for budget in arguments.budgets:
        if not 0.05 <= budget <= 1:
            raise MoEficationError(f"--budgets {budget:g}: active fractions from 0.05 to 1 are measured")
    for name in ("json", "markdown", "plot"):
        path = getattr(arguments, name)
        if path and not path.absolute().parent.is_dir():
            raise MoEficationError(f"--{name} {path}: there is no folder {path.parent}")


class Store:
    """The file of rows: what an earlier run measured with the same settings is not measured again."""

    def __init__(self, setup: Any, path: Path, machine: str):
        import torch
        from quality_methods import FEATURE_TOKENS

        self.machine = machine
        self._path = path
        self._rows = read_rows(path) if path.exists() else {}
        self._settings = {
            "model": setup.checkpoint.fingerprint,
            "corpus": setup.corpus.digest,
            "texts": {name: sha256(torch.cat(blocks).numpy()).hexdigest() for name, blocks in setup.texts.items()},
            "feature_tokens": FEATURE_TOKENS,
        }

    def numbers(self, row: Row) -> dict[str, Any]:
        """A row's numbers, measured now unless they are there."""
        settings = self._settings | row.settings
        if self._rows.get(row.key, {}).get("settings") != settings:
            start = time.time()
            numbers = row.measure()
            minutes = (time.time() - start) / 60
            about = {"method": row.method, "budget": row.budget, "minutes": minutes, "machine": self.machine}
            self._rows[row.key] = about | {"settings": settings} | rounded(numbers)
            write_rows(self._path, self._rows)
        return self._rows[row.key]


def rows(setup: Any) -> Iterator[Row]:
    """All rows, the dense model first."""
    import quality_methods as quality

    from run_moefication.moefication.fitting.final_norm import PRIOR_TOKENS
    from run_moefication.moefication.stages.calibrate import HELD_OUT, MOST_FINAL_TOKENS

    arguments = setup.arguments
    calibrated = {"held_out": HELD_OUT, "final_tokens": MOST_FINAL_TOKENS, "prior_tokens": PRIOR_TOKENS}  # of the fits

    def row(method: str, measure: Callable[..., dict[str, Any]], *inputs: Any, **settings: Any) -> Row:
        for recipe in inputs:
            if isinstance(recipe, quality.Recipe):
                settings |= {"recipe": asdict(recipe), "margin": quality.MARGIN[recipe.routing]}
                settings |= calibrated if recipe.refit else {}
        return Row(method, budget, partial(measure, setup, *inputs), settings)

    yield Row("dense", 1.0, partial(quality.measure_dense, setup))
    for budget in arguments.budgets:
        chosen = quality.recipe_at(setup, arguments.chosen, "threshold", budget)
        name = f"ours, {arguments.chosen} experts, threshold"
        if "plain" in arguments.methods:
            yield row("plain recipe", quality.measure_plain, budget)
        if "cmoe" in arguments.methods:
            yield row("CMoE's recipe", quality.measure_cmoe, budget)
        if "static" in arguments.methods:
            yield row("static mask", quality.measure_static, budget, False)
            yield row("static mask, refitted", quality.measure_static, budget, True, **calibrated)
        for step, changes in quality.STEPS.items() if "steps" in arguments.methods else ():
            yield row(f"step: {step}", quality.measure_ours, replace(chosen, **changes), budget)
        for routing in ("top_k", "threshold"):
            for experts in arguments.experts if routing in arguments.methods else ():
                recipe = quality.recipe_at(setup, experts, routing, budget)
                yield row(f"ours, {experts} experts, {routing}", quality.measure_ours, recipe, budget)
        for other in arguments.budgets if "dialled" in arguments.methods else ():
            if other != budget:
                recipe = quality.recipe_at(setup, arguments.chosen, "threshold", other)
                yield row(f"{name}, calibrated at {other:.0%}", quality.measure_dialled, recipe, other, budget)
        if arguments.distill:
            settings = {"distillation_tokens": arguments.distillation_tokens, "bf16": arguments.bf16}
            settings |= {"lr": quality.DISTILLATION_LR} | calibrated
            if "static" in arguments.methods:
                yield row("static mask, refitted and distilled", quality.measure_static, budget, True, True, **settings)
            if "threshold" in arguments.methods:
                yield row(f"{name}, distilled", quality.measure_distilled, chosen, budget, **settings)
        if "oracle" in arguments.methods:
            yield row("neuron oracle", quality.measure_oracle, budget)


if __name__ == "__main__":
    sys.exit(main())
