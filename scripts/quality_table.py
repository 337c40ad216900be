"""The quality bench's results as a table and a plot; as a script, those of several files of rows together.

cd scripts/results
python ../quality_table.py 2026-11-h200.jsonl 2026-11-cpu.jsonl --plot quality.png
python ../quality_table.py 2026-11-cpu.jsonl --short --budgets 0.5 --methods 'neuron oracle=best neurons' 'plain recipe'

The table gives perplexity over the dense model's, and in brackets its 95 % interval; * marks a row whose active share
is above its budget. Rows of several files say which file they are from, whose name says when and where it was made.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from run_moefication import command_line
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.storage.files import write_atomically

Row = dict[str, Any]  # as `bench_quality.py --json` writes it
Rows = dict[str, Row]  # by `row_key`
DRAWS = 2000  # of the bootstrap
COLOURS = 10  # that matplotlib gives lines in turn
DENSE = "dense at 1"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("rows", type=Path, nargs="+", help="of bench_quality.py --json; the first file's rows count")
    names = "rows to show, in this order, and what to call them (default: all)"
    parser.add_argument("--methods", nargs="+", metavar="METHOD[=NAME]", help=names)
    parser.add_argument("--budgets", type=float, nargs="+", help="budgets to show (default: all)")
    parser.add_argument("--short", action="store_true", help="no intervals, shares of neurons and minutes in the table")
    parser.add_argument("--plot", type=Path, help="draw perplexity against active fraction into this file")
    parser.add_argument("--seed", type=command_line.seed_number, default=0, help="of the bootstrap")
    return command_line.run(parser, show, argv)


def show(arguments: argparse.Namespace) -> None:
    """Print the table of some files' rows, and draw them."""
    files = {path.stem: read_rows(path) for path in arguments.rows}
    if any(DENSE not in rows for rows in files.values()):
        raise MoEficationError("a file without the dense model's row is not one of bench_quality.py --json")
    rows = compared(files)
    methods = list(dict.fromkeys(row["method"] for row in rows.values()))
    budgets = sorted({row["budget"] for row in rows.values()}, reverse=True)
    names = dict(option.partition("=")[::2] for option in arguments.methods or methods)
    wanted = arguments.budgets or budgets
    for option, values, known in (("methods", names, methods), ("budgets", wanted, budgets)):
        for value in values:
            if value not in known:
                raise MoEficationError(f"--{option} {value!r}: there are {', '.join(map(str, known))}")
    chosen = [
        rows[row_key(method, budget)] | {"method": name or method}
        for budget in budgets
        for method, name in names.items()
        if budget in wanted and row_key(method, budget) in rows
    ]
    print(table(chosen, arguments.seed, short=arguments.short))
    if arguments.plot:
        plot(chosen, arguments.seed, arguments.plot)


def row_key(method: str, budget: float) -> str:
    """The name of a row among others."""
    return f"{method} at {budget:g}"


def read_rows(path: Path) -> Rows:
    """The rows of a file, one JSON object a line, by their `row_key`."""
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


def write_rows(path: Path, rows: Rows) -> None:
    """Write a file of rows anew, whole or not at all."""
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows.values()]
    write_atomically(path, lambda file: file.write("".join(lines).encode()))


def text_names(row: Row) -> list[str]:
    """The texts that a row was measured on."""
    return [name for name, value in row.items() if isinstance(value, dict) and "losses" in value]


def compared(files: dict[str, Rows]) -> Rows:
    """The rows of several files by their names, each from the first that has it, without the dense models.

    A row says its "file", and of each text its "excess": by block, how much more it loses than the dense model of its
    own file. So rows can be compared though their files cut the texts into other tokens.
    """
    result: Rows = {}
    for file, rows in files.items():
        dense = rows[DENSE]
        for key in (key for key in rows if key != DENSE and key not in result):
            result[key] = rows[key] | {"file": file}
            for name in text_names(rows[key]):
                losses = zip(rows[key][name]["losses"], dense[name]["losses"], strict=True)
                result[key][name] = rows[key][name] | {"excess": [loss - of_dense for loss, of_dense in losses]}
    return result


def ratios(row: Row, names: list[str], seed: int) -> tuple[float, float, float]:
    """Perplexity over the dense model's, the geometric mean over the texts, with the ends of its 95 % interval: paired
    bootstrap over the blocks of each text."""
    import numpy as np

    generator = np.random.default_rng(seed)
    means, draws = [], []
    for name in names:
        excess = np.array(row[name]["excess"])
        chosen = generator.integers(len(excess), size=(DRAWS, len(excess)))
        means.append(excess.mean())
        draws.append(excess[chosen].mean(axis=1))
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    return tuple(float(np.exp(value)) for value in (np.mean(means), low, high))


def groups(row: Row) -> dict[str, list[str]]:
    """The texts of each column: held-out text, and WikiText-2 where it was measured."""
    heldout = [name for name in text_names(row) if name != "WikiText-2"]
    return {"held-out": heldout} | ({"WikiText-2": ["WikiText-2"]} if "WikiText-2" in row else {})


def mean_share(row: Row, names: list[str], share: str) -> float:
    """A row's share of `active` parameters, or of `neurons`, over some texts."""
    return sum(row[name][share] for name in names) / len(names)


def table(rows: list[Row], seed: int, *, short: bool = False) -> str:
    """Rows of `compared` in markdown; `short`: active shares and ratios alone."""
    has_files = len({row["file"] for row in rows}) > 1
    lines = []
    for row in rows:
        cells = [("budget", f"{100 * row['budget']:.0f} %"), ("method", row["method"])]
        for group, names in groups(rows[0]).items():
            active, neurons = mean_share(row, names, "active"), mean_share(row, names, "neurons")
            numbers = ratios(row, names, seed)
            ratio, low, high = (f"{number:#.4g}" if number < 1000 else f"{number:,.0f}" for number in numbers)
            cells.append(("active", f"{100 * active:.1f} %" + "*" * (active > row["budget"] + 1e-9)))
            if short:
                cells.append((group, ratio))
            else:
                cells += [("neurons", f"{100 * neurons:.1f} %"), (group, f"{ratio} ({low} to {high})")]
        cells += [] if short else [("minutes", f"{row['minutes']:.0f}")]
        cells += [("file", row["file"])] if has_files else []
        columns, texts = zip(*cells, strict=True)
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join([f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *lines])


def plot(rows: list[Row], seed: int, path: Path) -> None:
    """Perplexity over dense against active fraction, a line per method, held-out text and WikiText-2 side by side."""
    from matplotlib.figure import Figure

    columns = groups(rows[0])
    figure = Figure(figsize=(6 * len(columns), 5), layout="tight")
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for axis, (group, names) in zip(axes, columns.items(), strict=True):
        for index, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            style = "-" if index < COLOURS else "--"  # colours come again
            mine = [row for row in rows if row["method"] == method]
            points = sorted((mean_share(row, names, "active"), ratios(row, names, seed)[0]) for row in mine)
            axis.plot(*zip(*points, strict=True), style, marker="o", label=method)
        axis.set(xlabel="active parameters of the MLPs", ylabel="perplexity over dense", title=group, yscale="log")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
