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
from itertools import product
from typing import Any

import timing

from run_moefication import command_line

INTERMEDIATE_SIZE = 8192


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--layers", type=timing.positive, default=16, help="decoder layers")
    parser.add_argument("--prompt_tokens", type=timing.positive, default=512, help="length of the prompt")
    parser.add_argument("--new_tokens", type=timing.positive, default=16, help="tokens to decode after it")
    parser.add_argument("--dtype", choices=timing.DTYPES, default="fp32", help="of weights")
    timing.add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), bench, argv)


def bench(arguments: argparse.Namespace) -> None:
    """Measure prefill, then decode, printing as it goes."""
    import torch

    device = timing.check_options(arguments, [INTERMEDIATE_SIZE])
    dtype = getattr(torch, timing.DTYPES[arguments.dtype])
    print(f"{timing.machine(device)}; {arguments.dtype}, {arguments.layers} layers")
    prompt = random_prompt(arguments.prompt_tokens, device)
    dense, *moes = make_models(arguments, prompt, dtype)
    columns = "".join(f"{name:>14}" for name in ("dense tokens/s", "MoE tokens/s", "time ratio", "possible"))
    print(f"{'':8}{'routing':>10}{'active':>8}{columns}")
    rows = []
    with torch.inference_mode():
        for phase, moe, active in product(("prefill", "decode"), moes, arguments.active):
            moe.set_active_fraction(active)
            models = {"dense": dense, "moe": moe}
            alternatives = {name: runs(phase, model, prompt, arguments.new_tokens) for name, model in models.items()}
            passes = (len(prompt[0]), 1) if phase == "prefill" else (1, arguments.new_tokens)
            alternatives["mlps"] = mlps(dense, *passes)
            seconds = timing.median_seconds(alternatives, rounds=arguments.rounds, device=device)
            tokens = passes[0] * passes[1]
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
            rows.append(row)
            cells = "".join(f"{number:14.3f}" for number in list(row.values())[4:])
            print(f"{phase:8}{row['routing']:>10}{active:8.2f}{cells}", flush=True)
    timing.write_json(arguments.json, device, rows)


def random_prompt(tokens: int, device: Any) -> Any:
    """Token ids `[1, tokens]`."""
    import torch

    return torch.randint(3, 32000, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)


def make_models(arguments: argparse.Namespace, prompt: Any, dtype: Any) -> list[Any]:
    """A random LLaMA of LLaMA-3.2-1B's shape, and a LlamaMoE for either kind of routing, which share all its tensors
    but the MLPs', and one another's experts. The thresholds can be set to any active fraction over the prompt."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_moe import LlamaMoEConfig, LlamaMoEForCausalLM

    fields = dict(
        hidden_size=2048,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=arguments.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=32000,
        max_position_embeddings=8192,
    )
    counts = dict(num_experts=arguments.num_experts, num_experts_per_tok=1)
    threshold = dict(gate_network="linear", routing="threshold")
    generator = torch.Generator().manual_seed(0)
    models = []
    for model_class, config in (
        (LlamaForCausalLM, LlamaConfig(**fields)),
        (LlamaMoEForCausalLM, LlamaMoEConfig(**fields, **counts)),
        (LlamaMoEForCausalLM, LlamaMoEConfig(**fields, **counts, **threshold)),
    ):
        with torch.device("meta"):
            model = model_class(config)
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(prompt.device)
        if models:
            shared = {name: tensor for name, tensor in models[-1].state_dict().items() if ".mlp.gate." not in name}
            model.load_state_dict(shared, strict=False, assign=True)
        timing.fill(model, dtype, prompt.device, generator)
        models.append(model.eval())
    with torch.inference_mode():
        scores = models[2](prompt, output_router_logits=True).router_logits
    for layer, layer_scores in zip(models[2].model.layers, scores, strict=True):
        layer.mlp.gate.store_score_quantiles(layer_scores)
    return models


def runs(phase: str, model: Any, prompt: Any, new_tokens: int) -> Callable[[], Any]:
    """Prefill: one forward pass over the prompt. Decode: one token at a time after it, each the most likely; it returns
    the last one."""
    import torch

    def prefill() -> Any:
        return model(prompt, logits_to_keep=1, use_cache=True)

    if phase == "prefill":
        return prefill
    with torch.inference_mode():
        cache = prefill().past_key_values
        # The last token of the prompt is read again by each run, which gives the first new one.
        cache.crop(-1)

    def decode() -> Any:
        token = prompt[:, -1:]
        for _ in range(new_tokens):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        cache.crop(-new_tokens)
        return token

    return decode


def mlps(dense: Any, tokens: int, passes: int) -> Callable[[], None]:
    """All MLPs of the dense model, so many times over so many tokens."""
    import torch

    weight = dense.model.layers[0].mlp.gate_proj.weight
    x = torch.randn(1, tokens, weight.shape[1], device=weight.device).to(weight.dtype)

    def run() -> None:
        for _ in range(passes):
            for layer in dense.model.layers:
                layer.mlp(x)

    return run


if __name__ == "__main__":
    sys.exit(main())
