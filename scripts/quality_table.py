"""The quality bench's results as a table and a plot; as a script, those of several files of rows together.

cd scripts; python quality_table.py bench_quality_h200.json bench_quality.json --plot bench_quality.png

`results`: by row, each text's block losses and shares, as `bench_quality.py --json` writes them, the dense model first;
`texts`: the names of the texts; `seed`: of the bootstrap.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run_moefication import command_line

DRAWS = 2000  # of the bootstrap
DENSE = "dense at 1"


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument(
        "rows", type=Path, nargs="+", help="files of bench_quality.py --json; the first one's rows count"
    )
    parser.add_argument("--methods", nargs="+", help="rows to show, in this order (default: all)")
    parser.add_argument("--plot", type=Path, help="draw perplexity against active fraction into this file")
    parser.add_argument("--seed", type=command_line.seed_number, default=0, help="of the bootstrap")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), show, argv)


def show(arguments: argparse.Namespace) -> None:
    """Print the table of some files' rows, and draw them."""
    from run_moefication.moefication.errors import MoEficationError
    from run_moefication.moefication.storage.files import read_json_object

    files = [read_json_object(path, "give files of bench_quality.py --json") for path in arguments.rows]
    if any(DENSE not in file for file in files):
        raise MoEficationError("a file without the dense model's row is not one of bench_quality.py --json")
    results = merged(files)
    dense = results.pop(DENSE)
    methods = list(dict.fromkeys(numbers["method"] for numbers in results.values()))
    for method in (method for method in arguments.methods or () if method not in methods):
        raise MoEficationError(f"--methods {method!r}: there are {', '.join(methods)}")
    methods = arguments.methods or methods
    order = sorted(
        (key for key, numbers in results.items() if numbers["method"] in methods),
        key=lambda key: (-results[key]["budget"], methods.index(results[key]["method"])),
    )
    results = {DENSE: dense} | {key: results[key] for key in order}
    texts = [name for name, numbers in dense.items() if isinstance(numbers, dict) and "losses" in numbers]
    print(table(results, texts, arguments.seed, " or ".join(sorted({n["machine"] for n in results.values()}))))
    if arguments.plot:
        plot(results, texts, arguments.seed, arguments.plot)


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


def table(results: dict[str, Any], texts: Sequence[str], seed: int, caption: str) -> str:
    """All rows, in markdown."""
    heads = [group for group, *_ in summary(next(iter(results.values())), results, texts, seed)]
    lines = [f"Perplexity over dense, in brackets the 95 % interval; {caption}", ""]
    columns = "".join(f" active | neurons | {head} |" for head in heads)
    lines += [f"| budget | method |{columns} minutes |", "|---|---|" + "---|" * (3 * len(heads) + 1)]
    for numbers in list(results.values())[1:]:
        cells = ""
        for _, names, (ratio, low, high), active in summary(numbers, results, texts, seed):
            neurons = sum(numbers[name]["neurons"] for name in names) / len(names)
            over = "*" if active > numbers["budget"] + 1e-9 else ""
            cells += f" {active:.3f}{over} | {neurons:.3f} | {ratio:.3f} ({low:.3f} to {high:.3f}) |"
        lines.append(f"| {numbers['budget']:.0%} | {numbers['method']} |{cells} {numbers['minutes']:.0f} |")
    return "\n".join(lines)


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
