"""Whole models: prefill and decode of a random LLaMA and of the LlamaMoE with the same tensors around its experts.

python scripts/bench_generate.py --layers 2 --new_tokens 8 --rounds 2     # half a minute
python scripts/bench_generate.py --json generate.json                     # 16 layers, LLaMA-3.2-1B's shape
python scripts/bench_generate.py --device cuda --dtype bf16

`possible` is what the MLPs' share of the dense model's time allows: that share times the active fraction, and the rest.
Threshold routing: with linear gates, and thresholds that give the active fraction on average over the prompt.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product

import timing
import torch
from random_models import SHAPES, make_models
from transformers import LlamaForCausalLM, PreTrainedModel

from llama_moe.modeling_llama_moe import CACHE
from run_moefication import command_line

SHAPE = SHAPES["1B"]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--layers", type=timing.positive, default=16, help="decoder layers")
    parser.add_argument("--prompt_tokens", type=timing.positive, default=512, help="length of the prompt")
    parser.add_argument("--new_tokens", type=timing.positive, default=16, help="tokens to decode after it")
    parser.add_argument("--dtype", choices=timing.DTYPES, default="fp32", help="of weights")
    timing.add_options(parser)
    return command_line.run(parser, bench, argv)


def bench(arguments: argparse.Namespace) -> None:
    """Measure prefill, then decode, printing as it goes."""
    device = timing.check_options(arguments, [SHAPE["intermediate_size"]])
    dtype = timing.DTYPES[arguments.dtype]
    print(f"{timing.machine(device)}; {arguments.dtype}, {arguments.layers} layers")
    torch.manual_seed(0)
    prompt = torch.randint(3, 32000, (1, arguments.prompt_tokens), device=device)
    dense, *moes = make_models(SHAPE, arguments.layers, arguments.num_experts, prompt, dtype)
    rows = []
    with torch.inference_mode():
        for phase, moe, active in product(("prefill", "decode"), moes, arguments.active):
            moe.set_active_fraction(active)
            length, passes = (arguments.prompt_tokens, 1) if phase == "prefill" else (1, arguments.new_tokens)
            x = torch.randn(1, length, dense.config.hidden_size, device=device, dtype=dtype)
            alternatives = {
                "dense": runs(phase, dense, prompt, arguments.new_tokens),
                "moe": runs(phase, moe, prompt, arguments.new_tokens),
                "mlps": partial(run_mlps, dense, x, passes),
            }
            seconds = timing.median_seconds(alternatives, rounds=arguments.rounds, device=device)
            tokens = length * passes
            mlp_share = seconds["mlps"] / seconds["dense"]
            row = {
                "phase": phase,
                "routing": moe.config.routing,
                "active": active,
                "mlp_share": mlp_share,
                "dense_tokens_per_second": tokens / seconds["dense"],
                "moe_tokens_per_second": tokens / seconds["moe"],
                "time_ratio": seconds["moe"] / seconds["dense"],
                "possible": 1 - mlp_share * (1 - active),
            }
            if not rows:
                print(timing.table_line([*row]))
            print(timing.table_line([*row], row), flush=True)
            rows.append(row)
    timing.write_json(arguments.json, device, rows)


def runs(phase: str, model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> Callable[[], object]:
    """Prefill: one forward pass over the prompt. Decode: one token at a time after it, each the most likely; it returns
    the last one."""
    prefill = partial(model, prompt, logits_to_keep=1, use_cache=True)
    if phase == "prefill":
        return prefill
    cache = prefill()[CACHE]
    cache.crop(-1)  # each run reads the last token of the prompt again, which gives the first new one

    def decode() -> torch.Tensor:
        token = prompt[:, -1:]
        for _ in range(new_tokens):
            token = model(token, use_cache=True, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        cache.crop(-new_tokens)
        return token

    return decode


def run_mlps(dense: LlamaForCausalLM, x: torch.Tensor, passes: int) -> None:
    """All MLPs of the dense model, so many times over the tokens `x`."""
    for _ in range(passes):
        for layer in dense.model.layers:
            layer.mlp(x)


if __name__ == "__main__":
    sys.exit(main())
