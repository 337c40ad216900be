"""Using a LlamaMoE checkpoint: load it with `from_pretrained`, generate, and see how much of each MLP ran per token.

python scripts/test_llama_moe_transformers.py --model_path .quickstart/SmolLM2-135M-Instruct-256Expert-MoE
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from run_moefication import command_line

PROMPTS = ["The capital of France is", "Once upon a time, there was", "To bake bread you need"]


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--model_path", required=True, help="folder that llama_convert.py or save_pretrained wrote")
    parser.add_argument("--dense_path", help="folder of the dense model, to continue the texts first")
    parser.add_argument("--prompt", nargs="+", default=PROMPTS, help="texts to continue")
    parser.add_argument("--max_new_tokens", type=int, default=24, help="length of each continuation")
    parser.add_argument("--num_selects", type=int, nargs="+", help="experts per token (default: the checkpoint's own)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    for name in ("model_path", "dense_path"):
        path = getattr(arguments, name)
        if path and not Path(path, "config.json").is_file():
            parser.error(f"--{name} {path} holds no checkpoint (no config.json)")
    if arguments.max_new_tokens < 1:
        parser.error(f"--max_new_tokens {arguments.max_new_tokens} must be at least 1")
    if not all(arguments.prompt):
        parser.error("--prompt: there is nothing to continue in an empty text")

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import llama_moe
    from run_moefication.moefication.checkpoints.moe import require_num_selects
    from run_moefication.moefication.errors import MoEficationError

    if not sys.stderr.isatty():
        logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model_path, trust_remote_code=False)
    # A program that does not import llama_moe says True instead: the checkpoint carries its code.
    model = AutoModelForCausalLM.from_pretrained(arguments.model_path, trust_remote_code=False).eval()
    if not isinstance(model, llama_moe.LlamaMoEForCausalLM):
        parser.error(f"--model_path {arguments.model_path} is a {type(model).__name__}, not a LlamaMoEForCausalLM")
    if arguments.dense_path:
        print("dense:")
        dense = AutoModelForCausalLM.from_pretrained(arguments.dense_path, trust_remote_code=False).eval()
        complete(dense, tokenizer, arguments)
    for num_selects in arguments.num_selects or [None]:
        if num_selects is not None:
            try:
                require_num_selects(num_selects, model.config)
                model.set_num_experts_per_tok(num_selects - model.config.num_shared_experts)
            except (MoEficationError, ValueError) as error:
                parser.error(str(error))
        speak(model, tokenizer, arguments)
    return 0


def speak(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Continue the prompts; then say how much of the MLPs ran."""
    import llama_moe

    config, block = model.config, model.model.layers[0].mlp
    total = config.num_experts + config.num_shared_experts
    print(f"{config.num_selects} of {total} experts:")
    with llama_moe.record_routing(model) as routing:
        complete(model, tokenizer, arguments)
    experts = sum(parameter.numel() for parameter in block.experts.parameters())
    everything = sum(parameter.numel() for parameter in block.parameters())
    gate = sum(parameter.numel() for parameter in block.gate.parameters())
    routed = sum(layer.experts_per_tok for layer in routing) / len(routing)
    share = (everything - experts + experts * routed / config.num_experts) / (everything - gate)
    ran = f"{routed + config.num_shared_experts:.4g} of {total} experts"
    print(f"{ran}: {share:.1%} of the MLP parameters ran per token, gate included")


def complete(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Continue the prompts greedily."""
    import torch

    for prompt in arguments.prompt:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
        print(f"> {tokenizer.decode(output[0], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    sys.exit(main())
