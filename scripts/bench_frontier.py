"""What a user buys: perplexity over dense against time over dense, for each number of experts and each routing.

python scripts/bench_frontier.py rows.jsonl --times times.json --plot frontier.png

Perplexities are rows of `bench_quality.py` (methods `calibrated` and `top_k`), of SmolLM2. Times are those of one MoE
block at LLaMA-7B's shape, as the recipe makes it, over the dense MLP's; the number of experts there is the nearest
whose width suits hardware. Times that the --times file lacks are measured, in turn with the dense MLP's, and added.
"""

import argparse
import math
import sys
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import timing
import torch
from quality_table import compared, groups, ratios, read_rows, row_key
from random_models import SHAPES, filled, run_block, spread_costs
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from llama_moe import LlamaMoEConfig
from llama_moe.moe_layers import MoEBlock
from run_moefication import command_line
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.processes import pick_device
from run_moefication.moefication.storage.files import read_json_object, write_json
from run_moefication.settings import CALIBRATED

EXPERTS = {16: 16, 48: 43, 96: 86, 192: 172, 256: 256}  # of SmolLM2's 1,536 neurons: of LLaMA-7B's 11,008
ROUTINGS = {"threshold": tuple(EXPERTS), "top_k": (16, 48, 96)}  # engines hold no more
BUDGETS = (0.25, 0.5, 0.75)
TOKENS = (1, 512)
LOSS = 0.03  # that the default may be beaten by at equal time


class Point(NamedTuple):
    """A configuration at a budget: perplexity over dense by text, and time over dense by dtype and tokens."""

    experts: int  # of SmolLM2
    routing: str
    budget: float
    perplexity: dict[str, float]
    times: dict[str, float]

    @property
    def name(self) -> str:
        """Of the configuration, in tables and plots."""
        width = SHAPES["7B"]["intermediate_size"] // EXPERTS[self.experts]
        return f"{EXPERTS[self.experts]} x {width}" + (", top_k" if self.routing == "top_k" else "")

    def time(self, dtype: str) -> float:
        """Of one token and of many, taken together."""
        return math.prod(self.times[f"{dtype}, {tokens}"] for tokens in TOKENS) ** (1 / len(TOKENS))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("rows", type=Path, nargs="+", help="of bench_quality.py --json; the first file's rows count")
    parser.add_argument("--times", type=Path, required=True, help="JSON file of times, which is made or completed")
    parser.add_argument("--dtypes", nargs="+", choices=timing.DTYPES, default=["fp32", "bf16"], help="of weights")
    parser.add_argument("--rounds", type=timing.positive, default=7, help="rounds, of which the median counts")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--default", type=int, choices=EXPERTS, default=48, help="the number of experts to judge")
    parser.add_argument("--plot", type=Path, help="draw perplexity against time into this file")
    parser.add_argument("--seed", type=command_line.seed_number, default=0, help="of times' inputs")
    return command_line.run(parser, bench, argv)


def bench(arguments: argparse.Namespace) -> None:
    """Measure what is missing, print the table and what beats the default, and draw the plot."""
    rows = compared({path.stem: read_rows(path) for path in arguments.rows})
    cases = [
        (experts, routing, budget)
        for routing, counts in ROUTINGS.items()
        for experts, budget in product(counts, BUDGETS)
        if method_key(experts, routing, budget) in rows
    ]
    if not cases:
        raise MoEficationError("no row is of a number of experts and a routing that are compared here")
    device = torch.device(pick_device(arguments.device))
    times = read_json_object(arguments.times, "name another file") if arguments.times.exists() else {}
    times.setdefault("machine", timing.machine(device))
    for dtype, case in product(arguments.dtypes, cases):
        if f"{dtype}, {TOKENS[-1]}" not in times.setdefault(case_key(*case), {}):
            times[case_key(*case)] |= measured(*case, dtype, device, arguments.rounds, arguments.seed)
            write_json(arguments.times, times)
    points = []
    for case in cases:
        row = rows[method_key(*case)]
        perplexity = {group: ratios(row, names, arguments.seed)[0] for group, names in groups(row).items()}
        points.append(Point(*case, perplexity, times[case_key(*case)]))
    print(f"times: {times['machine']}\n{table(points, arguments.dtypes)}")
    for dtype in arguments.dtypes:
        for line in judged(points, arguments.default, dtype):
            print(line)
    if arguments.plot:
        plot(points, arguments.dtypes, arguments.plot)


def method_key(experts: int, routing: str, budget: float) -> str:
    """The row's name in the quality bench's files."""
    return row_key(f"calibrated, {experts} experts" + (", top_k" if routing == "top_k" else ""), budget)


def case_key(experts: int, routing: str, budget: float) -> str:
    """The name of a block in the file of times."""
    return f"{EXPERTS[experts]} experts, {routing}, {budget:g}"


@torch.inference_mode()
def measured(
    experts: int, routing: str, budget: float, dtype: str, device: torch.device, rounds: int, seed: int
) -> dict[str, float]:
    """Times of a block at LLaMA-7B's shape over the dense MLP's, by dtype and tokens."""
    torch.manual_seed(seed)
    fields = {name: SHAPES["7B"][name] for name in ("hidden_size", "intermediate_size")}
    recipe, count = CALIBRATED.at(budget), EXPERTS[experts]
    selects = recipe.num_selects(count)
    shared = recipe.num_shared_experts(count, selects)
    config = LlamaMoEConfig(
        **fields,
        num_experts=count - shared,
        num_shared_experts=shared,
        num_experts_per_tok=selects - shared,
        routing=routing,
        gate_network=recipe.gate_network,
        gate_rank=recipe.rank(count),
        gate_bias=True,
        output_bias=recipe.output_bias,
    )
    with device:
        dense = filled(LlamaMLP(LlamaConfig(**fields)), timing.DTYPES[dtype])
        block = filled(MoEBlock(config), timing.DTYPES[dtype])
    if block.gate.rank:
        block.gate.output_weight[:, 0] = 0.02  # so that there are inputs that shift all scores alike
    times = {}
    for tokens in TOKENS:
        x = torch.randn(1, tokens, fields["hidden_size"], device=device, dtype=timing.DTYPES[dtype])
        if routing == "threshold":
            spread_costs(block.gate, x[0], selects - shared)
        alternatives = {"dense": lambda x=x: dense(x), "ours": lambda x=x: run_block(block, x, "llama_moe")}
        seconds = timing.median_seconds(alternatives, rounds=rounds, device=device)
        times[f"{dtype}, {tokens}"] = seconds["ours"] / seconds["dense"]
    return times


def table(points: list[Point], dtypes: list[str]) -> str:
    """All points in markdown, by budget and time."""
    texts, columns = list(points[0].perplexity), [f"{d}, {tokens}" for d, tokens in product(dtypes, TOKENS)]
    lines = [f"| experts | budget | {' | '.join([*texts, *(f'{name} tokens' for name in columns)])} |"]
    lines.append("|" + "---|" * (2 + len(texts) + len(columns)))
    for point in sorted(points, key=lambda point: (-point.budget, point.time(dtypes[0]))):
        cells = [f"{point.perplexity[text]:#.4g}" for text in texts] + [f"{point.times[name]:.2f}" for name in columns]
        lines.append(f"| {point.name} | {100 * point.budget:.0f} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def at_equal_time(line: list[tuple[float, float]], time: float) -> float:
    """Perplexity of a configuration, given as `(time, perplexity)` in ascending times, at this time: the logarithm is
    interpolated. More time than its last point takes does not help; less than the first one takes, it cannot do."""
    if time >= line[-1][0]:
        return line[-1][1]
    for (t0, p0), (t1, p1) in pairwise(line):
        if t0 <= time <= t1:
            return math.exp(math.log(p0) + (math.log(p1) - math.log(p0)) * (time - t0) / (t1 - t0))
    return math.inf


def judged(points: list[Point], default: int, dtype: str) -> list[str]:
    """What beats the default at equal time, a line for each budget and text."""
    lines = []
    configurations = {point.name: [p for p in points if p.name == point.name] for point in points}
    for mine, text in product(points, points[0].perplexity):
        if (mine.experts, mine.routing) != (default, "threshold"):
            continue
        found = {}
        for name, others in configurations.items():
            if name != mine.name:
                line = sorted((point.time(dtype), point.perplexity[text]) for point in others)
                found[name] = at_equal_time(line, mine.time(dtype))
        best = min(found, key=found.get, default=None)
        gain = mine.perplexity[text] / found[best] - 1 if best else 0.0
        verdict = f"{best} is {gain:.1%} better" + (f", beyond {LOSS:.0%}" if gain > LOSS else "")
        lines.append(f"{dtype}, {mine.budget:.0%}, {text}: " + (verdict if gain > 0 else "nothing beats the default"))
    return lines


def plot(points: list[Point], dtypes: list[str], path: Path) -> None:
    """Perplexity over dense against time over dense: a column for each text, a row for each dtype."""
    from matplotlib.figure import Figure

    texts = list(points[0].perplexity)
    figure = Figure(figsize=(6 * len(texts), 5 * len(dtypes)), layout="tight")
    axes = figure.subplots(len(dtypes), len(texts), squeeze=False)
    for (dtype, text), axis in zip(product(dtypes, texts), axes.flat, strict=True):
        for name in dict.fromkeys(point.name for point in points):
            line = sorted((p.time(dtype), p.perplexity[text]) for p in points if p.name == name)
            axis.plot(*zip(*line, strict=True), marker="o", linestyle=":" if "top_k" in name else "-", label=name)
        label = f"time over dense, {dtype}, {' and '.join(map(str, TOKENS))} tokens together"
        axis.set(xlabel=label, ylabel="perplexity over dense", title=text, yscale="log")
        axis.grid(True, which="both", alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
