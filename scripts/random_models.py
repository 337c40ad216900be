"""Random layers and models of known shapes, which the benchmarks measure: time does not depend on what weights are.

python scripts/random_models.py --output_dir .random --shape 7B --layers 2     # model/ and text/, to run the stages on
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import timing
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from llama_moe import LlamaMoEConfig
from llama_moe.gates import LinearGate
from llama_moe.moe_layers import MoEBlock
from run_moefication import command_line
from run_moefication.moefication.checkpoints.transformers_library import quiet_transformers
from run_moefication.moefication.errors import MoEficationError

SHAPES = {
    "7B": dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32),
    "SmolLM2": dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3),
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8),
}


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


def run_block(block: MoEBlock, x: Tensor, implementation: str) -> Tensor:
    """The block's output, its experts run in this way."""
    block.experts.config._experts_implementation = implementation
    return block(x)


@torch.no_grad()
def make_models(
    shape: dict[str, Any], layers: int, num_experts: int, prompt: Tensor, dtype: torch.dtype
) -> list[PreTrainedModel]:
    """A random LLaMA, and two LlamaMoEs, of top-k and threshold routing, which share all its tensors but the MLPs', and
    one another's experts. The thresholds can be set to any active fraction over the prompt."""
    fields = shape | dict(num_hidden_layers=layers, vocab_size=32000, max_position_embeddings=8192)
    counts = dict(num_experts=num_experts, num_experts_per_tok=1, gate_network="linear")
    moes = [LlamaMoEConfig(**fields, **counts, routing=routing) for routing in ("top_k", "threshold")]
    models = []
    for config in (LlamaConfig(**fields), *moes):
        with prompt.device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if models:
            shared = {name: tensor for name, tensor in models[-1].state_dict().items() if ".mlp.gate." not in name}
            model.load_state_dict(shared, strict=False, assign=True)
        models.append(model.eval())
    scores = models[2](prompt, output_router_logits=True).router_logits
    for layer, layer_scores in zip(models[2].model.layers, scores, strict=True):
        layer.mlp.gate.store_score_quantiles(layer_scores)
    return models


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to make")
    parser.add_argument("--shape", choices=SHAPES, default="7B", help="of the layers")
    parser.add_argument("--layers", type=timing.positive, default=2, help="decoder layers")
    parser.add_argument("--characters", type=timing.positive, default=100_000, help="of random text, each a token")
    return command_line.run(parser, save, argv)


def save(arguments: argparse.Namespace) -> None:
    """A dense model in bfloat16, whose tokens are bytes, and random text."""
    folder = arguments.output_dir
    if folder.exists():
        raise MoEficationError(f"--output_dir {folder} exists: name a new folder")
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {name: number for number, name in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder / "model"
    )
    fields = SHAPES[arguments.shape] | dict(num_hidden_layers=arguments.layers, vocab_size=len(words), eos_token_id=1)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**fields, bos_token_id=0), dtype=torch.bfloat16)
    with quiet_transformers():
        model.save_pretrained(folder / "model")
    letters = torch.randint(97, 123, (arguments.characters,), dtype=torch.uint8)
    letters[torch.rand(arguments.characters) < 0.2] = 32
    (folder / "text").mkdir()
    (folder / "text/text.jsonl").write_text(json.dumps({"text": bytes(letters.tolist()).decode()}) + "\n")
    print(f"written: {folder / 'model'} ({model.num_parameters():,} parameters) and {folder / 'text'}")


if __name__ == "__main__":
    sys.exit(main())
