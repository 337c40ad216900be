"""The rows of bench_choice.py as a table in markdown.

python scripts/choice_table.py choice.jsonl

Perplexity and accuracies stand beside the first row's, the dense model's: a ratio, and in brackets the 95 % interval of
the difference, by a paired bootstrap over the examples. Equal tokens: the mean, its 95 % interval, and the median.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from run_moefication import command_line
from run_moefication.moefication.errors import MoEficationError

DRAWS = 2000  # of the bootstrap


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("rows", type=Path, help="of bench_choice.py --json")
    return command_line.run(parser, show, argv)


def show(arguments: argparse.Namespace) -> None:
    """Print the table of a file's rows."""
    try:
        print(table([json.loads(line) for line in arguments.rows.read_bytes().splitlines()]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise MoEficationError(f"{arguments.rows} is not a file of bench_choice.py --json") from error


def table(rows: list[dict[str, Any]]) -> str:
    """The first row is the dense model's."""
    dense = rows[0]
    lines = []
    for row in rows:
        equal = row["equal_tokens"]
        low, high = interval(equal)
        cells = {
            "model": row["model"],
            "active": "-" if row["active"] is None else f"{100 * row['active']:.1f} %",
            "perplexity": f"{row['perplexity'] / dense['perplexity']:.3f}",
            "agreement": f"{100 * row['agreement']:.1f} %",
            "equal tokens": f"{np.mean(equal):.1f} ({low:.1f} to {high:.1f}), {np.median(equal):g}",
        }
        for task in ("continuation", "cloze"):
            low, high = interval(100 * np.subtract(row[task], dense[task]))
            difference = "" if row is dense else f" ({low:+.1f} to {high:+.1f})"
            cells[task] = f"{100 * np.mean(row[task]):.1f} %{difference}"
        lines.append(f"| {' | '.join(cells.values())} |")
    return "\n".join([f"| {' | '.join(cells)} |", "|" + "---|" * len(cells), *lines])


def interval(values: Any) -> tuple[float, float]:
    """The 95 % interval of the mean of some numbers."""
    chosen = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(np.asarray(values)[chosen].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    sys.exit(main())
