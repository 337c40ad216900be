r"""Perplexity of checkpoints, dense or MoE, on one text, and how often they agree.

  python llama_evaluate.py --model_path MODEL NAME-MoE --num_selects 8 6 4 2 \
    --text_path ../llama_data/heldout/wikipedia.jsonl

Prints ratios to the first row, and how evenly an MoE uses its experts. Active: share of the MLPs that ran, with gates.
Agreement: share of tokens whose most likely successor is that of the first row, which should be the dense model's.
"""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from run_moefication.command_line import DEVICE, Run, path_option, stage_script, took
from run_moefication.moefication.errors import MoEficationError, SettingError
from run_moefication.settings import EvaluateSettings


@stage_script(
    __doc__,
    EvaluateSettings,
    model_path=path_option("checkpoint folders or hub ids, dense or MoE", nargs="+"),
    text_path=path_option('text file, or .jsonl with a "text" a line'),
    device=DEVICE,
    card={"action": "store_true", "help": "put the results into the README.md of the MoE checkpoints"},
    json={"nargs": "?", "const": "-", "metavar": "FILE", "help": "write results as JSON to a file, or to stdout"},
)
def main(run: Run) -> None:
    """Evaluate, and print the tables or the JSON."""
    from llama_moe import LlamaMoEConfig
    from run_moefication.moefication.checkpoints.dense import resolve_model_path
    from run_moefication.moefication.checkpoints.model_card import add_evaluation
    from run_moefication.moefication.stages import evaluate as stage
    from run_moefication.moefication.stages.report_measure import read_evaluation
    from run_moefication.moefication.storage.files import write_atomically
    from run_moefication.moefication.storage.manifest import CARD

    given = run.arguments
    file = Path(given.json) if given.json not in (None, "-") else None
    if file and (file.is_dir() or not file.parent.is_dir()):
        raise SettingError(f"json {file} cannot be written: name a file in a folder that exists")
    if file and file.exists():
        try:
            read_evaluation(file)
        except MoEficationError as error:
            raise SettingError(f"json {file} is in the way, and no evaluation: name another file") from error
    names = [Path(path).name for path in given.model_path]
    if given.card and len({*names}) < len(names):
        raise SettingError("card tells checkpoints apart by the last part of model_path, which two of these share")
    if given.card and isinstance(stage.read_config(resolve_model_path(given.model_path[0])), LlamaMoEConfig):
        raise SettingError("card compares with the dense model: name that first of model_path")
    results = stage.evaluate(given.model_path, given.text_path, **vars(run.settings), **run.options)
    as_json = json.dumps([row.as_data() for row in results], indent=1)
    if file:
        write_atomically(file, lambda json: json.write(as_json.encode() + b"\n"))
    if given.card:
        for path in map(Path, given.model_path):
            rows = [row for row in results if row.model == path.name and row.num_experts]
            if rows and (path / CARD).is_file():
                add_evaluation(path, card_table(rows, results[0], Path(given.text_path).name))
                print(f"written: {path / CARD}", file=sys.stderr)
    if given.json == "-":
        print(as_json)
        return
    for name, rows in groupby((row for row in results if row.expert_load), lambda row: row.model):
        print_load(name, list(rows))
    width = max(len(row.label) for row in results)
    print(f"\n{'model':<{width}} {'active':>7} {'perplexity':>12} {'ratio':>9} {'agreement':>9} {'tokens':>9}")
    for row in results:
        perplexity = f"{row.perplexity:>12.3f} {row.perplexity / results[0].perplexity:>9.4f}"
        active = "-" if row.active is None else f"{row.active:.1%}"
        print(f"{row.label:<{width}} {active:>7} {perplexity} {row.agreement:>9.1%} {row.predicted_tokens:>9,}")
    print(f"evaluated in {took(given)}")


def card_table(rows: list, first: Any, text: str) -> str:
    """The results of a checkpoint as its card has them; `first`: the row that it is compared with."""
    lines = [
        f"| {row.num_selects} of {row.num_experts} | {row.active:.1%} | {row.perplexity:.3f} "
        f"| {row.perplexity / first.perplexity:.4f} | {row.agreement:.1%} |"
        for row in rows
    ]
    head = f"Perplexity on `{text}` ({first.predicted_tokens:,} tokens), over {first.label}'s, and agreement with it:"
    columns = "| experts per token | MLP parameters that run | perplexity | ratio | agreement |"
    return "\n".join([head, "", columns, "|---|---|---|---|---|", *lines])


def print_load(name: str, rows: list) -> None:
    """Per layer and budget, the share of tokens that the least and the most used expert ran for, and how many never."""
    print(f"\n{name}: share of tokens that each layer's least and most used expert ran for (experts never used)")
    print("layer" + "".join(f"{f'{row.num_selects} of {row.num_experts}':>20}" for row in rows))
    for layer, loads in enumerate(zip(*(row.expert_load for row in rows), strict=True)):
        print(f"{layer:>5}" + "".join(f"{f'{min(load):.3f} {max(load):.3f} ({load.count(0)})':>20}" for load in loads))


if __name__ == "__main__":
    sys.exit(main())
