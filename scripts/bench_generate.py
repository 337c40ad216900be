"""Whole models: prefill and decode of a random LLaMA and of the LlamaMoE with the same tensors around its experts.

python scripts/bench_generate.py --layers 2 --new_tokens 8 --rounds 2     # half a minute
python scripts/bench_generate.py --json generate.json                     # 16 layers, LLaMA-3.2-1B's shape
python scripts/bench_generate.py --device cuda --dtype bf16

`possible` is what the MLPs' share of the dense model's time allows: that share times the active fraction, and the rest.
Threshold routing: with linear gates, and thresholds that give the active fraction on average over the prompt.
"""

import argparse
import sys
import time
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import timing

from run_moefication import command_line
from run_moefication.moefication.errors import MoEficationError

INTERMEDIATE_SIZE = 8192


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--layers", type=int, default=16, help="decoder layers")
    parser.add_argument("--prompt_tokens", type=int, default=512, help="length of the prompt")
    parser.add_argument("--new_tokens", type=int, default=16, help="tokens to decode after it")
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
    for option in ("layers", "prompt_tokens", "new_tokens"):
        if getattr(arguments, option) < 1:
            raise MoEficationError(f"--{option} {getattr(arguments, option)} must be at least 1")
    dtype = getattr(torch, timing.DTYPES[arguments.dtype])
    print(f"{timing.machine(device)}; {arguments.dtype}, {arguments.layers} layers")
    dense, *moes = make_models(arguments, dtype, device)
    rows = []
    columns = "".join(f"{name:>14}" for name in ("dense tokens/s", "MoE tokens/s", "time ratio", "possible"))
    print(f"{'':8}{'routing':>10}{'active':>8}{columns}")
    with torch.inference_mode():
        for phase, tokens in (("prefill", arguments.prompt_tokens), ("decode", arguments.new_tokens)):
            run = Phase(phase, arguments, device)
            mlp_share = run.mlp_share(dense)
            for moe, active in product(moes, arguments.active):
                moe.set_active_fraction(active)
                alternatives = {"dense": partial(run, dense), "moe": partial(run, moe)}
                seconds = timing.median_seconds(alternatives, rounds=arguments.rounds, device=device)
                row = {
                    "phase": phase,
                    "routing": moe.config.routing,
                    "active": active,
                    "dense_tokens_per_second": tokens / seconds["dense"],
                    "moe_tokens_per_second": tokens / seconds["moe"],
                    "time_ratio": seconds["moe"] / seconds["dense"],
                    "mlp_share": mlp_share,
                    "possible": 1 - mlp_share * (1 - active),
                }
                rows.append(row)
                numbers = [row[name] for name in list(row)[3:5]] + [row["time_ratio"], row["possible"]]
                print(
                    f"{phase:8}{row['routing']:>10}{active:8.2f}" + "".join(f"{n:14.3f}" for n in numbers), flush=True
                )
    timing.write_json(arguments.json, device, rows)


def make_models(arguments: argparse.Namespace, dtype: Any, device: Any) -> list[Any]:
    """A random LLaMA of LLaMA-3.2-1B's shape, and a LlamaMoE for either kind of routing, which share all its tensors
    but the MLPs', and one another's experts."""
    import torch
    from bench_moe_layer import fill
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
    fields_of_moe = fields | dict(num_experts=arguments.num_experts, num_experts_per_tok=1)
    threshold = LlamaMoEConfig(**fields_of_moe, gate_network="linear", routing="threshold")
    generator = torch.Generator().manual_seed(0)
    models = []
    for model_class, config in (
        (LlamaForCausalLM, LlamaConfig(**fields)),
        (LlamaMoEForCausalLM, LlamaMoEConfig(**fields_of_moe)),
        (LlamaMoEForCausalLM, threshold),
    ):
        with torch.device("meta"):
            model = model_class(config)
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
        if models:
            shared = {name: tensor for name, tensor in models[-1].state_dict().items() if ".mlp.gate." not in name}
            model.load_state_dict(shared, strict=False, assign=True)
        fill(model, dtype, device, generator)
        models.append(model.eval())
    prompt = Phase("prefill", arguments, device).prompt
    with torch.inference_mode():
        scores = models[2](prompt, output_router_logits=True).router_logits
    for layer, layer_scores in zip(models[2].model.layers, scores, strict=True):
        layer.mlp.gate.store_score_quantiles(layer_scores)
    return models


class Phase:
    """Prefill: one forward pass over the prompt. Decode: one token at a time after it, each the most likely."""

    def __init__(self, name: str, arguments: argparse.Namespace, device: Any):
        import torch

        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(3, 32000, (1, arguments.prompt_tokens), generator=generator).to(device)
        self.name = name
        self.new_tokens = arguments.new_tokens
        self.caches: dict[Any, Any] = {}

    def __call__(self, model: Any) -> None:
        if self.name == "prefill":
            model(self.prompt, logits_to_keep=1, use_cache=True)
            return
        if model not in self.caches:
            self.caches[model] = model(self.prompt, logits_to_keep=1, use_cache=True).past_key_values
        cache, token = self.caches[model], self.prompt[:, -1:]
        for _ in range(self.new_tokens):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        cache.crop(-self.new_tokens)

    def mlp_share(self, dense: Any) -> float:
        """The share of the dense model's time that its MLPs take."""
        self(dense)
        with timed([layer.mlp for layer in dense.model.layers]) as seconds:
            start = time.perf_counter()
            for _ in range(3):
                self(dense)
            timing.synchronize(self.prompt.device)
            total = time.perf_counter() - start
        return sum(seconds) / total


@contextmanager
def timed(modules: list[Any]):
    """Collects how long each call of each module takes."""
    seconds: list[float] = []
    starts: list[float] = []

    def before(module, inputs):
        timing.synchronize(inputs[0].device)
        starts.append(time.perf_counter())

    def after(module, inputs, output):
        timing.synchronize(output.device)
        seconds.append(time.perf_counter() - starts.pop())

    hooks = [module.register_forward_pre_hook(before) for module in modules]
    hooks += [module.register_forward_hook(after) for module in modules]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


if __name__ == "__main__":
    sys.exit(main())
