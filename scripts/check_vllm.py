"""Greedy tokens of checkpoints in vLLM and in transformers; `check_vllm.sh` makes the environment and calls this.

Prints a line for each checkpoint. Exit status 1 where tokens differ.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

import llama_moe  # noqa: F401 (registers LlamaMoE with the Auto classes; vLLM runs the checkpoint's own code)

PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time, there was")
NEW_TOKENS = 24


def main(paths: list[str]) -> int:
    """Returns the exit status."""
    are_equal = [check(path) for path in paths]
    return 0 if all(are_equal) else 1


def check(path: str) -> bool:
    """Whether both say the same."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    how = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = [model.generate(torch.tensor([ids]), **how)[0, len(ids) :].tolist() for ids in prompts]
    del model
    engine = LLM(
        path, enforce_eager=True, dtype="float32", trust_remote_code=True, skip_tokenizer_init=True, max_model_len=256
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    equal = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), NEW_TOKENS)
        for pair in zip(found, expected, strict=True)
    ]
    print(f"{path}: equal tokens before the first other one: {equal} of {NEW_TOKENS}", flush=True)
    return found == expected


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
