"""The quality bench's results as a table and a plot.

`results`: by row, each text's block losses and shares, as `bench_quality.py --json` writes them, the dense model first;
`texts`: the names of the texts; `seed`: of the bootstrap.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

DRAWS = 2000  # of the bootstrap


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
