"""The quality bench's results as a table and a plot; as a script, those of several files of rows together.

cd scripts/results
python ../quality_table.py 2026-11-h200.jsonl 2026-11-cpu.jsonl --plot quality.png
python ../quality_table.py 2026-11-cpu.jsonl --short --budgets 0.5 --methods 'neuron oracle=best neurons' 'plain recipe'

`results`: by row, each text's block losses and shares, as `bench_quality.py --json` writes them, the dense model first;
`texts`: the names of the texts; `seed`: of the bootstrap. The table gives perplexity over the dense model's, and in
brackets its 95 % interval; * marks a row that ran more than its budget.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run_moefication import command_line

DRAWS = 2000  # of the bootstrap
DECIMALS = 5  # of the losses in a file of rows
DENSE = "dense at 1"


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument(
        "rows", type=Path, nargs="+", help="files of bench_quality.py --json; the first one's rows count"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD[=NAME]",
        help="rows to show, in this order, and what to call them (default: all)",
    )
    parser.add_argument("--budgets", type=float, nargs="+", help="budgets to show (default: all)")
    parser.add_argument("--short", action="store_true", help="no intervals, shares of neurons and minutes in the table")
    parser.add_argument("--plot", type=Path, help="draw perplexity against active fraction into this file")
    parser.add_argument("--seed", type=command_line.seed_number, default=0, help="of the bootstrap")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), show, argv)


def show(arguments: argparse.Namespace) -> None:
    """Print the table of some files' rows, and draw them."""
    from run_moefication.moefication.errors import MoEficationError

    files = [read_rows(path) for path in arguments.rows]
    if any(DENSE not in file for file in files):
        raise MoEficationError("a file without the dense model's row is not one of bench_quality.py --json")
    results = merged(files)
    dense = results.pop(DENSE)
    methods = list(dict.fromkeys(numbers["method"] for numbers in results.values()))
    names = {}
    for option in arguments.methods or methods:
        method, _, name = option.partition("=")
        names[method] = name or method
    for method in (method for method in names if method not in methods):
        raise MoEficationError(f"--methods {method!r}: there are {', '.join(methods)}")
    methods = list(names)
    there = sorted({numbers["budget"] for numbers in results.values()}, reverse=True)
    budgets = arguments.budgets or there
    for budget in (budget for budget in budgets if budget not in there):
        raise MoEficationError(f"--budgets {budget:g}: there are {', '.join(f'{budget:g}' for budget in there)}")
    order = sorted(
        (key for key, row in results.items() if row["method"] in methods and row["budget"] in budgets),
        key=lambda key: (-results[key]["budget"], methods.index(results[key]["method"])),
    )
    results = {DENSE: dense} | {key: results[key] | {"method": names[results[key]["method"]]} for key in order}
    texts = [name for name, numbers in dense.items() if isinstance(numbers, dict) and "losses" in numbers]
    print(table(results, texts, arguments.seed, short=arguments.short))
    if arguments.plot:
        plot(results, texts, arguments.seed, arguments.plot)


def row_key(method: str, budget: float) -> str:
    """The name of a row among others."""
    return f"{method} at {budget:g}"


def read_rows(path: Path) -> dict[str, Any]:
    """The rows of a file, one JSON object a line, by their `row_key`."""
    from run_moefication.moefication.errors import MoEficationError

    what = "give files of bench_quality.py --json"
    if not path.is_file():
        raise MoEficationError(f"{path} is not a file; {what}")
    rows = {}
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(text)
            rows[row_key(row["method"], row["budget"])] = row
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise MoEficationError(f"{path}: line {number} is not a row; {what}") from error
    return rows


def write_rows(path: Path, rows: dict[str, Any]) -> None:
    """Write a file of rows anew, whole or not at all."""
    from run_moefication.moefication.storage.files import write_atomically

    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows.values()]
    write_atomically(path, lambda file: file.write("".join(lines).encode()))


def rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    """A row's numbers with its block losses as a file keeps them."""
    texts = {name: value for name, value in numbers.items() if isinstance(value, dict) and "losses" in value}
    return numbers | {
        name: value | {"losses": [round(loss, DECIMALS) for loss in value["losses"]]} for name, value in texts.items()
    }


def merged(files: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of several files, each from the first that has it. What they lose beside their own file's dense model
    they lose beside the first one's: ratios stay what they are, whatever the tokens."""
    rows: dict[str, Any] = {}
    for file in files:
        dense = file[DENSE], files[0][DENSE]
        rows |= {key: _moved(numbers, *dense) for key, numbers in file.items() if key not in rows}
    return rows


def _moved(numbers: dict[str, Any], dense: dict[str, Any], to_dense: dict[str, Any]) -> dict[str, Any]:
    """A row whose block losses lie as far from `to_dense`'s as the given ones do from `dense`'s."""
    moved = dict(numbers)
    for name in (name for name, value in numbers.items() if isinstance(value, dict) and "losses" in value):
        losses = zip(*(row[name]["losses"] for row in (numbers, dense, to_dense)), strict=True)
        moved[name] = numbers[name] | {"losses": [loss - away + towards for loss, away, towards in losses]}
    return moved


def ratios(numbers: dict[str, Any], dense: dict[str, Any], names: list[str], seed: int) -> tuple[float, float, float]:
    """Perplexity over the dense model's, the geometric mean over the texts, with the ends of its 95 % interval: paired
    bootstrap over the blocks of each text."""
    import numpy as np

    generator = np.random.default_rng(seed)
    means, draws = [], []
    for name in names:
        differences = np.array(numbers[name]["losses"]) - np.array(dense[name]["losses"])
        chosen = generator.integers(len(differences), size=(DRAWS, len(differences)))
        means.append(differences.mean())
        draws.append(differences[chosen].mean(axis=1))
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    return tuple(float(np.exp(value)) for value in (np.mean(means), low, high))


def summary(
    numbers: dict[str, Any], results: dict[str, Any], texts: Sequence[str], seed: int
) -> list[tuple[str, list[str], tuple, float]]:
    """For held-out text and WikiText-2: name, texts, ratio with its interval, and active share (mean over texts)."""
    heldout = [name for name in texts if name != "WikiText-2"]
    groups = [("held-out", heldout)] + ([("WikiText-2", ["WikiText-2"])] if "WikiText-2" in texts else [])
    dense = next(iter(results.values()))
    return [
        (
            group,
            names,
            ratios(numbers, dense, names, seed),
            sum(numbers[name]["active"] for name in names) / len(names),
        )
        for group, names in groups
    ]


def line(key: str, results: dict[str, Any], texts: Sequence[str], seed: int) -> str:
    """One row for the terminal."""
    parts = summary(results[key], results, texts, seed)
    cells = "  ".join(f"{group} {ratio[0]:.3f} (active {active:.3f})" for group, _, ratio, active in parts)
    return f"{key:<42} {cells}  {results[key]['minutes']:.1f} min"


def table(results: dict[str, Any], texts: Sequence[str], seed: int, *, short: bool = False) -> str:
    """All rows but the dense model's, in markdown; `short`: active shares and ratios alone."""
    heads = [group for group, *_ in summary(next(iter(results.values())), results, texts, seed)]
    columns = [column for head in heads for column in (("active", head) if short else ("active", "neurons", head))]
    columns = ["budget", "method", *columns, *([] if short else ["minutes"])]
    lines = [_cells(columns), "|" + "---|" * len(columns)]
    for row in list(results.values())[1:]:
        cells = [f"{100 * row['budget']:.0f} %", row["method"]]
        for _, members, (ratio, low, high), active in summary(row, results, texts, seed):
            neurons = sum(row[name]["neurons"] for name in members) / len(members)
            cells.append(_percent(active) + ("*" if active > row["budget"] + 1e-9 else ""))
            interval = f"{_ratio(ratio)} ({_ratio(low)} to {_ratio(high)})"
            cells += [_ratio(ratio)] if short else [_percent(neurons), interval]
        lines.append(_cells(cells if short else [*cells, f"{row['minutes']:.0f}"]))
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _ratio(ratio: float) -> str:
    return f"{ratio:#.4g}" if ratio < 1000 else f"{ratio:,.0f}"


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(results: dict[str, Any], texts: Sequence[str], seed: int, path: Path) -> None:
    """Perplexity over dense against active fraction, a line per method, held-out text and WikiText-2 side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = summary(next(iter(results.values())), results, texts, seed)
    figure, axes = pyplot.subplots(1, len(groups), figsize=(6 * len(groups), 5), squeeze=False)
    methods = list(dict.fromkeys(numbers["method"] for numbers in list(results.values())[1:]))
    for place, axis in enumerate(axes[0]):
        for method in methods:
            points = sorted(
                (part[3], part[2][0])
                for numbers in results.values()
                if numbers["method"] == method
                for part in [summary(numbers, results, texts, seed)[place]]
            )
            axis.plot(*zip(*points, strict=True), marker="o", label=method)
        axis.set(xlabel="active parameters of the MLPs", ylabel="perplexity over dense", title=groups[place][0])
        axis.set_yscale("log")
        axis.grid(True, which="both", alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
