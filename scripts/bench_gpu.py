"""What a GPU must show: the kernels' errors and times, layer by layer, and whole models. `bench_gpu.sh` runs it.

python scripts/bench_gpu.py --json gpu.jsonl      # on a GPU; parts: layers, models
python scripts/bench_gpu.py --plan                # anywhere: bytes, launches and bounds of the layers on an H200

Layers are LLaMA-7B's, gate and routing included. `ours` is the default, `triton` "llama_moe_triton", both over the
dense MLP's time, in a CUDA graph where a column says so. `error` is the greatest difference from the reference loop
over its largest output; if one is too large, the exit status is 2. Every row becomes a line of --json at once.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import timing
import torch
from random_models import SHAPES, filled, make_models, run_block, spread_costs
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from llama_moe import LlamaMoEConfig
from llama_moe.expert_kernels import IMPLEMENTATION, PackedExperts, choose_kernel, grouped, one_by_one
from llama_moe.moe_layers import MoEBlock
from llama_moe.triton_kernels import FEW_TOKENS, TRITON_IMPLEMENTATION, output_columns
from run_moefication import command_line
from run_moefication.moefication.errors import MoEficationError

HIDDEN, NEURONS = SHAPES["7B"]["hidden_size"], SHAPES["7B"]["intermediate_size"]
EXPERTS = (16, 43, 86, 172, 256)  # of 688, 256, 128, 64 and 43 neurons
TOKENS = (1, 8, 64, 512, 4096)
BUDGETS = (0.25, 0.5)
ROUTINGS = ("top_k", "threshold")
H200 = (680e12, 4.8e12)  # bf16 operations and bytes a second, of large products and reads
LARGEST_ERROR = {"bf16": 8 * 2**-8, "fp32": 2e-5}  # sums in other orders, float32 in three products of 11 bits
MODEL_EXPERTS, MODEL_LAYERS, PROMPT_TOKENS, NEW_TOKENS = (43, 86), 8, 4096, 64
WAYS = {"ours": IMPLEMENTATION, "triton": TRITON_IMPLEMENTATION}
PLAN = ("experts", "routing", "tokens", "active", "megabytes", "launches", "bound_us", "dense_us", "bound")
LAYER = ("dtype", *PLAN[:6], "dense_us", "bound", "ours", "triton")
GRAPHS = ("dense_graph_us", "ours_graph", "triton_graph", "ours_error", "triton_error")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--plan", action="store_true", help="only compute bytes, launches and bounds, for an H200")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--dtypes", nargs="+", choices=timing.DTYPES, default=["bf16", "fp32"], help="of layers")
    parser.add_argument("--minutes", type=float, default=6, help="after which nothing more is begun")
    parser.add_argument("--rounds", type=timing.positive, default=3, help="rounds, of which the median counts")
    parser.add_argument("--json", type=Path, help="file of JSON lines (.jsonl), to which rows are added")
    return command_line.run(parser, bench, argv)


def bench(arguments: argparse.Namespace) -> None:
    """Print and write each row."""
    if arguments.minutes <= 0:
        raise MoEficationError(f"--minutes {arguments.minutes:g} must be a positive number")
    if arguments.plan:
        if arguments.json:
            raise MoEficationError("--json is for what is measured, and --plan only computes")
        print("Layers of LLaMA-7B's shape in bf16, where nothing but reading, writing and arithmetic took time:")
        print(timing.table_line(PLAN))
        for row in plans():
            print(timing.table_line(PLAN, row))
        return
    if not torch.cuda.is_available():
        raise MoEficationError("no GPU is here; --plan computes what one would have to do")
    device, end, wrong = torch.device("cuda"), time.monotonic() + 60 * arguments.minutes, 0
    print(timing.machine(device))
    for part in arguments.parts:
        columns, rows = PARTS[part]
        print("\n" + timing.table_line(columns))
        for row in rows(arguments, device):
            print(timing.table_line(columns, row), flush=True)
            wrong += row.get("is_wrong", False)
            timing.write_json(arguments.json, device, [{"part": part} | row])
            if time.monotonic() > end:
                print(f"the time is over: the rest of {part} is left out")
                break
    if wrong:
        raise MoEficationError(f"{wrong} rows differ from the reference by more than {LARGEST_ERROR}")


def plans() -> Iterator[dict[str, Any]]:
    """Each layer in bf16 on an H200: bytes that kernels read and write, how many these are, and the least time."""
    for experts, routing, tokens, active in product(EXPERTS, ROUTINGS, TOKENS, BUDGETS):
        selects = round(active * experts)
        touched = 1 - (1 - selects / experts) ** tokens
        yield plan(experts, routing, tokens, tokens * selects, touched * experts, 2, H200)


def plan(
    experts: int, routing: str, tokens: int, pairs: int, touched: float, size: int, rates: tuple[float, float]
) -> dict[str, Any]:
    """`pairs` of tokens and experts run, and weights of `touched` experts of `size` bytes an element are read."""
    width = NEURONS // experts
    weights = 3 * HIDDEN * width * touched * size + 2 * experts * HIDDEN
    # Rows are gathered and outputs of pairs are written and read; few tokens' rows stay in caches.
    moved = 2 * tokens * HIDDEN * size + (pairs * (3 * HIDDEN + 2 * width) * size if tokens > FEW_TOKENS else 0)
    slots = tokens * (experts if routing == "threshold" else pairs // tokens)
    launches = 3 if tokens <= FEW_TOKENS else 4 + 2 * -(-HIDDEN // output_columns(slots, size))
    bound = max(6 * HIDDEN * width * pairs / rates[0], (weights + moved) / rates[1])
    dense = max(6 * HIDDEN * NEURONS * tokens / rates[0], 3 * HIDDEN * NEURONS * size / rates[1])
    return {
        "experts": f"{experts}x{width}",
        "routing": routing,
        "tokens": tokens,
        "active": pairs / tokens / experts,
        "megabytes": (weights + moved) / 1e6,
        "launches": launches,
        "bound_us": bound * 1e6,
        "dense_us": dense * 1e6,
        "bound": bound / dense,
    }


@torch.inference_mode()
def layers(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for every type, number of experts, routing, number of tokens and budget."""
    torch.manual_seed(0)
    for dtype_name in arguments.dtypes:
        dtype = timing.DTYPES[dtype_name]
        rates = timing.peak_rates(dtype, device)
        with device:
            dense = filled(LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=NEURONS)), dtype)
        for experts, routing in product(EXPERTS, ROUTINGS):
            fields = dict(num_experts=experts, num_experts_per_tok=1, gate_network="linear", routing=routing)
            with device:
                config = LlamaMoEConfig(hidden_size=HIDDEN, intermediate_size=NEURONS, **fields)
                block = filled(MoEBlock(config), dtype)
            for tokens, active in product(TOKENS, BUDGETS):
                x = torch.randn(1, tokens, HIDDEN, device=device, dtype=dtype)
                block.gate.num_experts_per_tok = round(active * experts)
                if routing == "threshold":
                    spread_costs(block.gate, x[0], block.gate.num_experts_per_tok)
                yield {"dtype": dtype_name} | measure(dense, block, x, arguments.rounds, rates)


def measure(dense: LlamaMLP, block: MoEBlock, x: Tensor, rounds: int, rates: tuple[float, float]) -> dict[str, Any]:
    """One row: errors, times over dense, and what was to be done."""
    gate, device = block.gate, x.device
    selected = gate.mask(gate.score(x[0]))
    pairs, touched = selected.sum().item(), selected.any(dim=0).sum().item()
    row = plan(gate.num_experts, gate.routing, x.shape[1], pairs, touched, x.element_size(), rates)
    ways = {"dense": partial(dense, x)} | {way: partial(run_block, block, x, name) for way, name in WAYS.items()}
    expected = run_block(block, x, "eager").float()
    for way in WAYS:
        error = (ways[way]().float() - expected).abs().max() / expected.abs().max()
        row[f"{way}_error"] = error.item()
    limit = LARGEST_ERROR["bf16" if x.dtype == torch.bfloat16 else "fp32"]
    row["is_wrong"] = not all(row[f"{way}_error"] <= limit for way in WAYS)
    seconds = timing.median_seconds(ways, rounds=rounds, device=device, at_least=0.01)
    row |= {"launches": launches(ways["triton"]), "dense_us": seconds["dense"] * 1e6}
    row |= {way: seconds[way] / seconds["dense"] for way in WAYS}
    if not may_be_captured(block, x):
        del ways["ours"]
    graphs = {way: captured(function) for way, function in ways.items()}
    seconds = timing.median_seconds(graphs, rounds=rounds, device=device, at_least=0.01)
    row["dense_graph_us"] = seconds["dense"] * 1e6
    return row | {f"{way}_graph": seconds[way] / seconds["dense"] for way in WAYS if way in seconds}


def may_be_captured(block: MoEBlock, x: Tensor) -> bool:
    """Whether the default's kernel here waits for no value of the device."""
    _, weights, _ = block.gate(x[0])
    kernel = choose_kernel(PackedExperts.of(block.experts), x[0], weights, block.gate.routing)
    return kernel not in (grouped, one_by_one)


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """The function as a CUDA graph, which one call launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def launches(function: Callable[[], object]) -> int:
    """How many kernels the device ran, copies and fills counted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


@torch.inference_mode()
def models(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Prefill and decode at batch 1 of a 7B-shaped model of few layers, in bf16, a quarter active."""
    prompt = torch.randint(3, 32000, (1, PROMPT_TOKENS), device=device)
    for experts in MODEL_EXPERTS:
        dense, *moes = make_models(SHAPES["7B"], MODEL_LAYERS, experts, prompt, torch.bfloat16)
        dense_seconds = phases(dense, prompt, arguments.rounds)
        for moe, way in product(moes, WAYS):
            moe.set_num_experts_per_tok(round(0.25 * experts))
            moe.set_experts_implementation(WAYS[way])
            torch.compiler.reset()
            seconds = phases(moe, prompt, arguments.rounds)
            row = {"experts": f"{experts}x{NEURONS // experts}", "routing": moe.config.routing, "way": way}
            for phase, value in seconds.items():
                row |= {f"{phase}_ms": value * 1e3, f"{phase}_over": value / dense_seconds[phase]}
            yield row


def phases(model: PreTrainedModel, prompt: Tensor, rounds: int) -> dict[str, float]:
    """Seconds of a prefill, and of a token decoded in a static cache, which `generate` compiles to CUDA graphs."""

    def generate(count: int) -> Callable[[], object]:
        options = dict(do_sample=False, max_new_tokens=count, min_new_tokens=count, cache_implementation="static")
        return partial(model.generate, prompt[:, :64], attention_mask=torch.ones_like(prompt[:, :64]), **options)

    ways = {"prefill": partial(model, prompt, logits_to_keep=1), "one": generate(1), "all": generate(NEW_TOKENS + 1)}
    seconds = timing.median_seconds(ways, rounds=rounds, device=prompt.device)
    return {"prefill": seconds["prefill"], "decode": (seconds["all"] - seconds["one"]) / NEW_TOKENS}


MODEL = ("experts", "routing", "way", "prefill_ms", "prefill_over", "decode_ms", "decode_over")
PARTS = {"layers": ((*LAYER, *GRAPHS), layers), "models": (MODEL, models)}


if __name__ == "__main__":
    sys.exit(main())
