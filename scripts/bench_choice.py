"""What perplexity hides: how far models speak like the dense one, and how well they choose, as one table.

python scripts/bench_choice.py --model_path .cache/SmolLM2-135M-Instruct --heldout_path .cache/llama_data/heldout \\
  --moe_path .quickstart/SmolLM2-135M-Instruct-48Expert-MoE-Calibrated --num_selects 36 24 12 --json choice.jsonl

Agreement: share of the held-out tokens whose most likely successor is the dense model's. Equal tokens: how many of 64
tokens after a prompt of 64, cut from the held-out text, are said as by the dense model before the first other one; both
say the most likely token. Continuation and cloze: accuracy on the tasks of make_eval_tasks.py, by log-likelihood over
the answer's length in characters (acc_norm of EleutherAI's lm-evaluation-harness). choice_table.py prints the table of
a --json file again.
"""

import argparse
import datetime
import sys
import time
from pathlib import Path
from typing import Any

import torch
from choice_table import table
from make_eval_tasks import EXAMPLES, Example, make_tasks
from quality_table import DENSE, write_rows
from timing import machine, positive
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import run_moefication as rm
from llama_moe.modeling_llama_moe import CACHE
from run_moefication import command_line
from run_moefication.moefication.checkpoints.moe import require_num_selects
from run_moefication.moefication.checkpoints.tokenizers import load_tokenizer
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.processes import pick_device
from run_moefication.moefication.progress import progress
from run_moefication.moefication.stages.evaluate import Evaluation, evaluate_model
from run_moefication.moefication.text.tokens import first_tokens

BLOCK, PROMPT, NEW = 512, 64, 64  # tokens: of a block, of the prompt that it begins with, and made after a prompt
BATCH = 8  # prompts


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--model_path", **command_line.MODEL)
    parser.add_argument("--moe_path", **command_line.path_option("LlamaMoE checkpoints made from it", nargs="+"))
    parser.add_argument("--num_selects", type=positive, nargs="+", default=[None], help="budgets (default: their own)")
    parser.add_argument("--heldout_path", type=command_line.path, required=True, help="folder of .jsonl, one a domain")
    parser.add_argument("--heldout_tokens", type=positive, default=4096, help="of each file, for all but the tasks")
    parser.add_argument("--examples", **EXAMPLES)
    parser.add_argument("--device", **command_line.DEVICE)
    parser.add_argument("--json", type=Path, help="also write the rows to this file, one JSON object a line")
    return command_line.run(parser, bench, argv)


def bench(arguments: argparse.Namespace) -> None:
    """Measure the dense model, then each checkpoint at each budget, and print the table."""
    dense = rm.DenseCheckpoint(arguments.model_path)
    moes = [rm.MoECheckpoint(path, dense) for path in arguments.moe_path]
    for moe in moes:
        for budget in filter(None, arguments.num_selects):
            require_num_selects(budget, moe.config)
    device = pick_device(arguments.device)
    setup = Bench(arguments, dense, device)
    rows = {DENSE: setup.measure(dense.load_causal_lm(device, torch.float32), dense.name, None)}
    for moe in moes:
        moe.verify()
        model = moe.load(torch.float32).to(device)
        for budget in arguments.num_selects:
            rows[f"{moe.path}, {budget}"] = setup.measure(model, moe.path.name, budget)
            if arguments.json:  # what is measured is kept, whatever comes after
                write_rows(arguments.json, rows)
    print(table([*rows.values()]))


class Bench:
    """The texts, prompts and tasks, and what the first model, the dense one, says of them."""

    def __init__(self, arguments: argparse.Namespace, dense: rm.DenseCheckpoint, device: str):
        tokenizer = load_tokenizer(dense.path)
        self.tasks = {
            name: [(example, encode(example, tokenizer, device)) for example in examples]
            for name, examples in make_tasks(arguments.heldout_path, arguments.examples).items()
        }
        files = sorted(Path(arguments.heldout_path).glob("*.jsonl"))
        texts = [first_tokens(file, dense.path, arguments.heldout_tokens, dense.config.vocab_size) for file in files]
        self.blocks = [block for text in texts for block in text.split(BLOCK) if len(block) == BLOCK]
        if not self.blocks:
            raise MoEficationError(f"--heldout_path {arguments.heldout_path}: no file holds {BLOCK} tokens")
        self.prompts = torch.stack(self.blocks)[:, :PROMPT].long().to(device).split(BATCH)
        self.reference: Evaluation | None = None
        self.spoken: list[torch.Tensor] = []  # after the prompts, by the dense model
        counts = {name: getattr(arguments, name) for name in ("heldout_tokens", "examples")}
        self.about = {"machine": machine(torch.device(device)), "settings": {"model": dense.fingerprint} | counts}

    def measure(self, model: PreTrainedModel, name: str, budget: int | None) -> dict[str, Any]:
        """The row of a model at a budget, shared experts included (None: as it is)."""
        start = time.time()
        row = evaluate_model(model, name, self.blocks, budget, reference=self.reference)
        self.reference = self.reference or row
        self.spoken = self.spoken or [greedy(model, prompts) for prompts in self.prompts]
        pairs = zip(self.prompts, self.spoken, strict=True)
        numbers = {"model": row.label, "active": row.active, "perplexity": row.perplexity, "agreement": row.agreement}
        numbers["equal_tokens"] = [count for pair in pairs for count in equal_tokens(model, *pair)]
        for task, examples in self.tasks.items():
            work = progress(examples, f"{task}: {row.label}", "example")
            numbers[task] = [int(chosen(model, *example) == example[0]["label"]) for example in work]
        date = datetime.date.today().isoformat()
        return numbers | {"minutes": (time.time() - start) / 60, "date": date} | self.about


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, device: str) -> list[torch.Tensor]:
    """The tokens of the context and of each choice after it, cut apart as lm-evaluation-harness does."""
    context = tokenizer(example["context"])["input_ids"]
    whole = [tokenizer(example["context"] + choice)["input_ids"] for choice in example["choices"]]
    return [torch.tensor(tokens, device=device) for tokens in (context, *(ids[len(context) :] for ids in whole))]


def chosen(model: PreTrainedModel, example: Example, tokens: list[torch.Tensor]) -> int:
    """Which choice is the likeliest for its length in characters."""
    scores = log_likelihoods(model, tokens[0], tokens[1:])
    scores = [score / len(choice) for score, choice in zip(scores, example["choices"], strict=True)]
    return scores.index(max(scores))


@torch.inference_mode()
def log_likelihoods(model: PreTrainedModel, context: torch.Tensor, answers: list[torch.Tensor]) -> list[float]:
    """Of each answer's tokens after those of the context, in nats, summed; the context is read once for all."""
    before = model.model(input_ids=context[None], use_cache=True)
    before[CACHE].batch_repeat_interleave(len(answers))
    padded = pad_sequence(answers, batch_first=True)  # [answers, tokens]; a token sees nothing of what fills up the end
    states = model.model(input_ids=padded, **{CACHE: before[CACHE]}).last_hidden_state
    first = before.last_hidden_state[:, -1:].expand(len(answers), -1, -1)
    log_p = model.lm_head(torch.cat([first, states[:, :-1]], dim=1)).float().log_softmax(-1)
    log_p = log_p.gather(-1, padded[..., None])[..., 0]
    return [row[: len(answer)].sum().item() for row, answer in zip(log_p, answers, strict=True)]


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompts: torch.Tensor) -> torch.Tensor:
    """The most likely tokens after prompts `[B, PROMPT]`, one after the other, past the end of a document as well:
    `[B, NEW]`."""
    tokens, cache, made = prompts, None, []
    for _ in range(NEW):
        output = model(tokens, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        tokens, cache = output.logits.argmax(-1), output[CACHE]
        made.append(tokens)
    return torch.cat(made, dim=1)


@torch.inference_mode()
def equal_tokens(model: PreTrainedModel, prompts: torch.Tensor, spoken: torch.Tensor) -> list[int]:
    """How many tokens the model would say after each prompt as they were `spoken` before it says another one. Up to
    there it would read the same text, so it needs not speak: it reads what was spoken."""
    logits = model(torch.cat([prompts, spoken], dim=1), logits_to_keep=NEW + 1).logits[:, :-1]
    return (logits.argmax(-1) == spoken).int().cumprod(dim=1).sum(dim=1).tolist()


if __name__ == "__main__":
    sys.exit(main())
