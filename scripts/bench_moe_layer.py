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
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from llama_moe import LlamaMoEConfig
from llama_moe.gates import LinearGate
from llama_moe.moe_layers import MoEBlock
from run_moefication import command_line

SHAPES = {"7B": (4096, 11008), "SmolLM2": (576, 1536), "1B": (2048, 8192)}  # hidden and intermediate size
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
    device = timing.check_options(arguments, [SHAPES[shape][1] for shape in arguments.shapes])
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
    fields = dict(zip(("hidden_size", "intermediate_size"), SHAPES[shape], strict=True))
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


def filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with random weights of a trained layer's size, without gradients."""
    for parameter in module.requires_grad_(False).parameters():
        parameter.normal_(std=0.02)
    return module.to(dtype)


def cost_bounds(num_experts: int) -> tuple[int, int]:
    """5 and 95 % of the experts, at least one."""
    return max(1, round(0.05 * num_experts)), round(0.95 * num_experts)


def spread_costs(gate: LinearGate, x: Tensor, budget: int) -> None:
    """Set the threshold to 0, and move the tokens `x [T, H]` so that they run from 5 to 95 % of the experts with the
    budget as average (one token: just it)."""
    low, high = cost_bounds(gate.num_experts)
    high = max(high, budget)
    counts = torch.tensor([budget])
    if len(x) > 1:
        # A curve low + (high - low) u^p between the ends, whose mean low + (high - low) / (p + 1) is the budget.
        places = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
        counts = (low + (high - low) * places ** ((high - low) / (budget - low) - 1)).round().long()
    # The gate's map times this is all ones: a multiple of it, added to a token, shifts all its scores alike.
    weight = gate.weight if gate.rank is None else gate.output_weight @ gate.input_weight
    direction = torch.linalg.pinv(weight.float()).sum(-1)  # [H]
    scores = gate.score(x).float().sort(dim=-1, descending=True).values
    counts = counts.to(x.device)[:, None]  # [T, 1]
    middles = (scores.gather(1, counts - 1) + scores.gather(1, counts)) / 2
    x.sub_((middles * direction).to(x.dtype))
    gate.threshold.zero_()


def run(block: MoEBlock, x: Tensor, implementation: str) -> Tensor:
    """The block's output, its experts run in this way."""
    block.experts.config._experts_implementation = implementation
    return block(x)


@torch.inference_mode()
def measure(
    dense: LlamaMLP, block: MoEBlock, x: Tensor, rounds: int, rates: tuple[float, float], at_least: float = 0.02
) -> dict[str, Any]:
    """Times of one case, as ratios to the dense MLP's."""
    gate, num_tokens = block.gate, x.shape[1]
    expert_bytes = sum(parameter[0].nbytes for parameter in block.experts.parameters())
    alternatives = {"dense": partial(dense, x), "ours": partial(run, block, x, "llama_moe")}
    if gate.routing == "top_k":
        alternatives |= {name: partial(run, block, x, name) for name in IMPLEMENTATIONS}
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
