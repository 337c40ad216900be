"""One MoE block against the dense MLP it replaces, gate included: our kernels, and transformers' ways to run experts.

python scripts/bench_moe_layer.py --shapes SmolLM2 --rounds 3     # a minute
python scripts/bench_moe_layer.py --json layer.json               # LLaMA-7B's layer and SmolLM2's, fp32 and bf16
python scripts/bench_moe_layer.py --busy --shapes 7B --tokens 1 512    # while another process takes one of the cores
python scripts/bench_moe_layer.py --device cuda --tokens 1 4096 --dtypes bf16 --shapes 7B

Every number is a time over the dense MLP's, measured in turn in one process. `bound` is what the machine's arithmetic
and memory allow: the active fraction of the flops, or the share of experts whose weights some token needs.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import timing
import torch
from random_models import SHAPES, cost_bounds, filled, run_block, spread_costs
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from llama_moe import LlamaMoEConfig
from llama_moe.moe_layers import MoEBlock
from run_moefication import command_line

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")  # transformers' own
COLUMNS = ("routing", "tokens", "active", "dense_ms", "bound", "ours", *IMPLEMENTATIONS, "ours_over_best")
BUSY_SECONDS = 0.3  # per measurement: many of the time slices, of some ms, that processes get in turn
MOST_COPIED_BYTES = 4 * 2**30  # batched_mm, which copies the weights of every slot, is left out beyond these


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["7B", "SmolLM2"], help="layers to measure")
    parser.add_argument("--dtypes", nargs="+", choices=timing.DTYPES, default=["fp32", "bf16"], help="of weights")
    parser.add_argument("--tokens", nargs="+", type=timing.positive, default=[1, 8, 64, 512], help="per forward pass")
    parser.add_argument("--busy", action="store_true", help="measure while another process takes one of the cores")
    timing.add_options(parser)
    return command_line.run(parser, bench, argv)


def bench(arguments: argparse.Namespace) -> None:
    """Measure all that was asked for, printing as it goes."""
    device = timing.check_options(arguments, [SHAPES[shape]["intermediate_size"] for shape in arguments.shapes])
    print(timing.machine(device))
    rows = []
    for dtype_name in arguments.dtypes:
        dtype = timing.DTYPES[dtype_name]
        rates = timing.peak_rates(dtype, device)
        print(f"{dtype_name}: a large product reaches {rates[0] / 1e9:,.0f} GFLOP/s, reading {rates[1] / 1e9:.1f} GB/s")
        for shape in arguments.shapes:
            print(f"\n{shape} layer, {arguments.num_experts} experts, {dtype_name}: time over dense")
            print(timing.table_line(COLUMNS))
            for case in cases(arguments, shape, dtype, device):
                with timing.busy_core() if arguments.busy else nullcontext():
                    row = measure(*case, arguments.rounds, rates, at_least=BUSY_SECONDS if arguments.busy else 0.02)
                rows.append({"shape": shape, "dtype": dtype_name, "busy": arguments.busy} | row)
                print(timing.table_line(COLUMNS, rows[-1]), flush=True)
    timing.write_json(arguments.json, device, rows)


def cases(
    arguments: argparse.Namespace, shape: str, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[LlamaMLP, MoEBlock, Tensor]]:
    """The dense MLP, our block, and inputs, for every number of tokens and budget; threshold routing at the first."""
    torch.manual_seed(0)
    fields = {name: SHAPES[shape][name] for name in ("hidden_size", "intermediate_size")}
    with device:
        dense = filled(LlamaMLP(LlamaConfig(**fields)), dtype)
    num_experts = arguments.num_experts
    fields |= dict(num_experts=num_experts, num_experts_per_tok=1, gate_network="linear")
    budgets = [round(active * num_experts) for active in arguments.active]
    spread = [budget for budget in budgets if cost_bounds(num_experts)[0] < budget < num_experts]
    for routing, budgets_of_routing in (("top_k", budgets), ("threshold", spread[:1])):
        with device:
            block = filled(MoEBlock(LlamaMoEConfig(**fields, routing=routing)), dtype)
        for tokens, budget in product(arguments.tokens, budgets_of_routing):
            block.gate.num_experts_per_tok = budget
            x = torch.randn(1, tokens, fields["hidden_size"], device=device, dtype=dtype)
            if routing == "threshold":
                spread_costs(block.gate, x[0], budget)
            yield dense, block, x


@torch.inference_mode()
def measure(
    dense: LlamaMLP, block: MoEBlock, x: Tensor, rounds: int, rates: tuple[float, float], at_least: float = 0.02
) -> dict[str, Any]:
    """Times of one case, as ratios to the dense MLP's."""
    gate, num_tokens = block.gate, x.shape[1]
    expert_bytes = sum(parameter[0].nbytes for parameter in block.experts.parameters())
    alternatives = {"dense": partial(dense, x), "ours": partial(run_block, block, x, "llama_moe")}
    if gate.routing == "top_k":
        alternatives |= {name: partial(run_block, block, x, name) for name in IMPLEMENTATIONS}
        if num_tokens * gate.num_experts_per_tok * expert_bytes > MOST_COPIED_BYTES:
            del alternatives["batched_mm"]
        if block.experts.down_proj[0, 0].nbytes % 16:  # it wants rows of whole 16 bytes
            del alternatives["grouped_mm"]
    selected = gate.mask(gate.score(x[0]))
    seconds = timing.median_seconds(alternatives, rounds=rounds, device=x.device, at_least=at_least)
    active = selected.float().mean().item()
    touched = selected.any(dim=0).float().mean().item()
    weights = gate.num_experts * expert_bytes
    flops, transfer = 2 * num_tokens * weights / x.element_size() / rates[0], weights / rates[1]
    ratios = {name: value / seconds["dense"] for name, value in seconds.items() if name != "dense"}
    best = min((ratios[name] for name in IMPLEMENTATIONS if name in ratios), default=None)
    return {
        "routing": gate.routing,
        "tokens": num_tokens,
        "active": active,
        "experts_per_token": [selected.sum(-1).min().item(), selected.sum(-1).max().item()],
        "dense_ms": seconds["dense"] * 1e3,
        "limit": "arithmetic" if flops > transfer else "memory",
        "bound": max(active * flops, touched * transfer) / max(flops, transfer),
        **ratios,
        "ours_over_best": ratios["ours"] / best if best else None,
    }


if __name__ == "__main__":
    sys.exit(main())
