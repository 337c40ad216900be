r"""Perplexity of checkpoints, dense or MoE, on one text.

  python llama_evaluate.py --model_path MODEL NAME-MoE --num_selects 8 6 4 2 \
    --text_path ../llama_data/heldout/wikipedia.jsonl

Prints one table with ratios to the first row, and how evenly each layer of an MoE uses its experts. Active: the share
of the MLPs' parameters that ran, gates included.
"""

import argparse
import json
import sys
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from run_moefication import command_line
from run_moefication.settings import EvaluateSettings


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser, path = command_line.new_parser(__doc__), command_line.path
    models = "checkpoint folders or hub ids, dense or MoE"
    parser.add_argument("--model_path", type=path, nargs="+", required=True, help=models)
    parser.add_argument("--text_path", type=path, required=True, help='text file, or .jsonl with a "text" a line')
    command_line.add_settings(parser, EvaluateSettings)
    command_line.add_device(parser)
    json_help = "write the results as JSON to a file, or to stdout"
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help=json_help)
    return parser


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate, and print the tables or the JSON."""
    from run_moefication.moefication.errors import SettingError
    from run_moefication.moefication.processes import pick_device
    from run_moefication.moefication.stages import evaluate as stage

    file = Path(arguments.json) if arguments.json not in (None, "-") else None
    if file and (file.is_dir() or not file.parent.is_dir()):
        raise SettingError(f"json {file} cannot be written: name a file in a folder that exists")
    device, settings = pick_device(arguments.device), command_line.settings_of(arguments, EvaluateSettings)
    results = stage.evaluate(arguments.model_path, arguments.text_path, **vars(settings), device=device)
    as_json = json.dumps([asdict(row) for row in results], indent=1)
    if arguments.json == "-":
        print(as_json)
        return
    if file:
        file.write_text(as_json + "\n")
    for name, rows in groupby((row for row in results if row.expert_load), attrgetter("model")):
        print_load(name, list(rows))
    width = max(len(row.label) for row in results)
    print(f"\n{'model':<{width}} {'active':>7} {'perplexity':>12} {'ratio':>9} {'tokens':>9}")
    for row in results:
        ratio = row.perplexity / results[0].perplexity
        print(
            f"{row.label:<{width}} {row.active:>7.1%} {row.perplexity:>12.3f} {ratio:>9.4f} {row.predicted_tokens:>9,}"
        )


def print_load(name: str, rows: list) -> None:
    """Per layer and budget, the share of tokens that the least and the most used expert ran for, and how many never."""
    print(f"\n{name}: share of tokens that each layer's least and most used expert ran for (experts never used)")
    print("layer" + "".join(f"{f'{row.num_selects} of {row.num_experts}':>20}" for row in rows))
    for layer in range(len(rows[0].expert_load)):
        loads = [row.expert_load[layer] for row in rows]
        cells = (f"{min(load):.3f} {max(load):.3f} ({sum(share == 0 for share in load)})" for load in loads)
        print(f"{layer:>5}" + "".join(f"{cell:>20}" for cell in cells))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
