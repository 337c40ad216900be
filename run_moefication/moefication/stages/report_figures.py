"""The figures of a report: SVG by matplotlib, made to stand inline in a page that gives them their colours.

They are drawn for the width of a phone, with text as text. A colour is a stand-in, replaced by a variable of the page's
style sheet, so one figure serves light, dark and print. Heat maps are small images of one hue (two, where signs count)
whose opacity is the value: they look right on any background.
"""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

WIDTH = 5.0  # inches of 72 units; a unit is a pixel at the width of a phone
HIGH, LOW = (59, 130, 214), (205, 96, 20)  # hues of heat maps, of middling lightness
SERIES = tuple(f"#0000{number:02x}" for number in range(0x11, 0x19))  # of lines in turn
INK, MUTED, LINE = "#000001", "#000002", "#000003"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)"}
VARIABLES |= {colour: f"var(--s{number})" for number, colour in enumerate(SERIES, start=1)}
MARKERS = "osD^vPX*"
STYLE = {
    "svg.fonttype": "none",
    "image.composite_image": False,
    "font.size": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "grid.color": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
RATIO_TICKS = (0.5, 0.8, 1, 1.1, 1.2, 1.4, 1.7, 2, 3, 5, 10, 20, 50, 100, 1_000, 10_000, 100_000)


def _colours(name: str, *stops: tuple[float, tuple[int, int, int], float]) -> Colormap:
    """A colour map of such stops: a place from 0 to 1, a hue, an opacity."""
    colours = [(place, (*(part / 255 for part in hue), opacity)) for place, hue, opacity in stops]
    return LinearSegmentedColormap.from_list(name, colours)


RISING = _colours("rising", (0, HIGH, 0), (1, HIGH, 1))
SIGNED = _colours("signed", (0, LOW, 1), (0.5, LOW, 0), (0.5, HIGH, 0), (1, HIGH, 1))


def dial(numbers: Mapping[str, Any]) -> str:
    """Perplexity against the share that runs, a line per text: over the dense model's, where there is one."""
    texts = numbers["texts"]
    what = "perplexity" if texts[0]["dense_perplexity"] is None else "ratio"
    with mpl.rc_context(STYLE):
        figure, axes = _figure(3.4)
        for text, colour, marker in zip(texts, cycle(SERIES), cycle(MARKERS), strict=False):
            points = [(100 * row["active"], row[what]) for row in text["rows"]]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=text["name"])
            axes.plot(*points[text["own"]], color=colour, marker="o", markersize=11, fillstyle="none")
        axes.set(xlabel="MLP parameters that run, %", yscale="log")
        if what == "ratio":
            axes.axhline(1, color=MUTED, linestyle=":", linewidth=1.2)
            low, high = axes.get_ylim()
            axes.set_yticks(_apart([tick for tick in RATIO_TICKS if low <= tick <= high], (high / low) ** 0.09))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"×{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.minorticks_off()
        axes.set_ylabel("perplexity" + (", dense = 1" if what == "ratio" else ""))
        _legend(figure, axes)
        return _svg(figure, "dial", "Perplexity against the share of the MLP parameters that run, by text")


def lines(name: str, what: str, rows: Mapping[str, Sequence[float]], ylabel: str, dashed: Sequence[str] = ()) -> str:
    """Values by layer, a line for each name. The `dashed` ones, in turn, are what the others are compared with."""
    with mpl.rc_context(STYLE):
        figure, axes = _figure(2.7)
        solid = [label for label in rows if label not in dashed]
        for labels, style in ((solid, dict(marker="o", markersize=3.5)), (dashed, dict(linestyle="--", linewidth=1.5))):
            for label, colour in zip(labels, SERIES, strict=False):
                axes.plot(rows[label], color=colour, label=label, **style)
        axes.set(xlabel="layer", ylabel=ylabel)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(rows) > 1:
            _legend(figure, axes)
        return _svg(figure, name, what)


def load(numbers: Mapping[str, Any]) -> str:
    """How many tokens each expert ran for: a row per layer, from its most used expert to its least used one."""
    values = -np.sort(-np.array(numbers["experts"]["load"]), axis=1)
    labels = dict(xlabel="experts of a layer, the most used first", ylabel="layer")
    return _heat(
        "load",
        "Load of the experts of each layer",
        100 * values,
        RISING,
        (0, 100),
        "runs for % of the tokens",
        **labels,
    )


def load_by_text(numbers: Mapping[str, Any]) -> str:
    """How the load of one layer's experts differs between texts: a row per text; experts stand by the text that they
    favour."""
    values = np.array(numbers["experts"]["load_by_text"])  # [texts, E]
    apart = values - values.mean(axis=0)
    order = np.lexsort((-apart.max(axis=0), apart.argmax(axis=0)))
    limit = max(1.0, 100 * np.abs(apart).max())
    names = [text["name"] for text in numbers["texts"]]
    labels = dict(xlabel=f"experts of layer {numbers['experts']['layer']}, by the text that they favour", rows=names)
    bar = "points more or less than its mean over the texts"
    return _heat("domains", "Load of experts by text", 100 * apart[:, order], SIGNED, (-limit, limit), bar, **labels)


def together(numbers: Mapping[str, Any]) -> str:
    """Which experts of one layer run for the same tokens."""
    experts = numbers["experts"]
    values = np.array(experts["correlation"])[np.ix_(experts["order"], experts["order"])]
    np.fill_diagonal(values, 0)
    limit = max(0.05, float(np.abs(values).max()))
    labels = dict(xlabel=f"experts of layer {experts['layer']}", ylabel="the same experts", square=True)
    bar = "correlation: apart (−), together (+)"
    return _heat("together", "Which experts run together", values, SIGNED, (-limit, limit), bar, **labels)


def tokens_by_cost(numbers: Mapping[str, Any]) -> str:
    """Tokens by the share of the neurons that ran for them."""
    counts = np.array(numbers["experts"]["tokens_by_cost"])
    edges = np.linspace(0, 100, len(counts) + 1)
    used = np.flatnonzero(counts)
    first, last = max(0, used[0] - 1), min(len(counts), used[-1] + 2)
    with mpl.rc_context(STYLE):
        figure, axes = _figure(2.5)
        axes.bar(edges[first:last], counts[first:last], width=edges[1], align="edge", color=SERIES[0])
        axes.set(xlabel="neurons that ran for a token, mean over layers, %", ylabel="tokens")
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, "cost", "Tokens by the share of the neurons that ran for them")


# ---------------------------------------------------------------------------------------------------- what they share


def _apart(ticks: Sequence[float], factor: float) -> list[float]:
    """Those of the ticks of a logarithmic axis, 1 among them, that are further apart than this."""
    kept: list[float] = []
    for tick in sorted(ticks, key=lambda tick: (tick != 1, ticks.index(tick))):
        if all(max(tick / other, other / tick) > factor for other in kept):
            kept.append(tick)
    return kept


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if max(map(len, labels)) < 15 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), columnspacing=1.2)


def _heat(
    name: str,
    what: str,
    values: np.ndarray,
    colours: Colormap,
    limits: tuple[float, float],
    bar_label: str,
    *,
    rows: Sequence[str] | None = None,
    square: bool = False,
    **labels: str,
) -> str:
    """A heat map over a scale of its colours. `rows`: names of the rows, else they have numbers."""
    height = WIDTH if square else min(4.2, 1.6 + 0.09 * len(values) if rows is None else 1.5 + 0.27 * len(values))
    with mpl.rc_context(STYLE | {"axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes, scale = figure.subplots(2, 1, height_ratios=[height - 0.8, 0.12])
        how = dict(cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="none")
        axes.imshow(values, **how)
        axes.set(**labels)
        if square or rows:
            axes.set_xticks([])
        if square:
            axes.set_yticks([])
            axes.set_box_aspect(1)
        elif rows:
            axes.set_yticks(range(len(rows)), [row if len(row) < 17 else f"{row[:15]}…" for row in rows])
            axes.tick_params(axis="y", length=0)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        scale.imshow(np.linspace(*limits, 101)[None], extent=(*limits, 0, 1), **how)
        scale.set_yticks([])
        scale.set_xlabel(bar_label)
        return _svg(figure, name, what)


def _svg(figure: Figure, name: str, what: str) -> str:
    """The figure as an element of a page: scales with it, has the page's font and colours, and ids of its own."""
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()[file.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg class="figure" role="img" aria-label="{escape(what)}" \1>',
        text,
        count=1,
    )
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in all figures, and nothing refers to them
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", text).strip()
