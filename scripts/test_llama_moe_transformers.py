"""Using a LlamaMoE checkpoint: load it with `from_pretrained`, generate, and see how much of each MLP ran per token.

python scripts/test_llama_moe_transformers.py --model_path .quickstart/SmolLM2-135M-Instruct-48Expert-MoE
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from run_moefication import command_line
from run_moefication.moefication.errors import MoEficationError

PROMPTS = ["The capital of France is", "Once upon a time, there was", "To bake bread you need"]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--model_path", required=True, help="folder that llama_convert.py or save_pretrained wrote")
    parser.add_argument("--dense_path", help="folder of the dense model, to continue the texts first")
    parser.add_argument("--prompt", nargs="+", default=PROMPTS, help="texts to continue")
    parser.add_argument("--max_new_tokens", type=int, default=24, help="length of each continuation")
    parser.add_argument("--num_selects", type=int, nargs="+", help="experts per token (default: the checkpoint's own)")
    return command_line.run(parser, show, argv)


def show(arguments: argparse.Namespace) -> None:
    """Load the model, and let it write with each number of experts."""
    for name in ("model_path", "dense_path"):
        path = getattr(arguments, name)
        if path and not Path(path, "config.json").is_file():
            raise MoEficationError(f"--{name} {path} holds no checkpoint (no config.json)")
    if arguments.max_new_tokens < 1:
        raise MoEficationError(f"--max_new_tokens {arguments.max_new_tokens} must be at least 1")
    if not all(arguments.prompt):
        raise MoEficationError("--prompt: there is nothing to continue in an empty text")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import llama_moe
    from run_moefication.moefication.checkpoints.moe import require_num_selects, set_num_selects
    from run_moefication.moefication.stages.evaluate import active_share

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_path, trust_remote_code=False)
    # A program that does not import llama_moe says True instead: the checkpoint carries its code.
    model = AutoModelForCausalLM.from_pretrained(arguments.model_path, trust_remote_code=False).eval()
    if not isinstance(model, llama_moe.LlamaMoEForCausalLM):
        kind = type(model).__name__
        raise MoEficationError(f"--model_path {arguments.model_path} is a {kind}, not a LlamaMoEForCausalLM")
    if arguments.dense_path:
        print("dense:")
        dense = AutoModelForCausalLM.from_pretrained(arguments.dense_path, trust_remote_code=False).eval()
        complete(dense, tokenizer, arguments)
    config = model.config
    shared, total = config.num_shared_experts, config.num_experts + config.num_shared_experts
    for num_selects in arguments.num_selects or [config.num_selects]:
        if arguments.num_selects:
            require_num_selects(num_selects, config)
            set_num_selects(model, num_selects, arguments.model_path)
        print(f"{num_selects} of {total} experts:")
        with llama_moe.record_routing(model) as routing:
            complete(model, tokenizer, arguments)
        ran, share = sum(layer.experts_per_tok for layer in routing) / len(routing), active_share(model, routing)
        print(f"{shared + ran:.4g} of {total} experts: {share:.1%} of the MLP parameters ran per token, gate included")


def complete(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Continue the prompts greedily."""
    for prompt in arguments.prompt:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
        print(f"> {tokenizer.decode(output[0], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    sys.exit(main())
