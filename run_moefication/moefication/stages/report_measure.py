"""What a report measures of models: perplexity and routing on texts, the time that reading and writing take, and what
they write.

Axes: T tokens, L layers, E routed experts.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from llama_moe.gates import Gate
from llama_moe.modeling_llama_moe import CACHE

from ..errors import MoEficationError
from ..progress import progress
from .evaluate import Evaluation, evaluate_model

# Tokens of the first text that both models read, and that they write after the first PROMPT of these, to be timed.
READ, WRITTEN, PROMPT = 256, 12, 8
MEASURED = ("perplexity", "predicted_tokens", "agreement", "active")

Row = dict[str, Any]  # what a report needs of an `Evaluation`, and how many "blocks" it has read
Blocks = list[torch.Tensor]


class Choices:
    """What the gate of one layer chose, token by token, in the order in which tokens came."""

    def __init__(self, num_experts: int):
        self.together = torch.zeros(num_experts, num_experts, dtype=torch.int64)  # tokens that both experts ran for
        self.counts: list[torch.Tensor] = []  # routed experts that ran, `[T]` of each forward pass

    def add(self, weights: torch.Tensor, index: torch.Tensor) -> None:
        """Count one forward pass: weights and experts of the slots, `[T, K]` each."""
        ran = torch.zeros(len(index), len(self.together), device=index.device).scatter_(
            1, index, (weights != 0).float()
        )
        self.together += (ran.T @ ran).long().cpu()
        self.counts.append(ran.sum(1).short().cpu())


@contextmanager
def record_choices(model: PreTrainedModel) -> Iterator[list[Choices]]:
    """Within the context, the choices of every gate are kept, by layer."""
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    choices = [Choices(gate.num_experts) for gate in gates]
    with ExitStack() as hooks:
        for gate, layer in zip(gates, choices, strict=True):
            hooks.enter_context(gate.register_forward_hook(lambda _, __, output, layer=layer: layer.add(*output[1:])))
        yield choices


@dataclass(frozen=True)
class Routing:
    """Which routed experts ran on a text."""

    together: torch.Tensor  # int64 [L, E, E]: tokens that both experts ran for; on the diagonal, that each ran for
    counts: torch.Tensor  # int64 [T, L]: routed experts that ran for a token

    @classmethod
    def of(cls, choices: list[Choices]) -> "Routing":
        """What was recorded."""
        counts = torch.stack([torch.cat(layer.counts) for layer in choices], dim=1).long()
        return cls(torch.stack([layer.together for layer in choices]), counts)

    @property
    def load(self) -> torch.Tensor:
        """Share of the tokens that each expert ran for, float64 `[L, E]`."""
        return self.together.diagonal(dim1=1, dim2=2).double() / len(self.counts)


def read_evaluation(path: Path | None) -> list[Row]:
    """The rows of a file that llama_evaluate.py --json wrote; none without a file."""
    if path is None:
        return []
    what = "give a file of llama_evaluate.py --json"
    if not path.is_file():
        raise MoEficationError(f"{path} is not a file; {what}")
    try:
        rows = [_row(row) for row in json.loads(path.read_bytes())]
        if not rows or any(not isinstance(row[name], (int, float)) for row in rows for name in MEASURED):
            raise TypeError
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise MoEficationError(f"{path} holds no rows of an evaluation as this version writes them; {what}") from error
    return rows


def _row(data: Mapping[str, Any]) -> Row:
    """Of an evaluation as JSON holds it."""
    names = (*MEASURED, "model", "num_experts", "num_selects", "tokens_sha256")
    return {name: data[name] for name in names} | {"blocks": len(data["block_losses"])}


def known_rows(rows: Sequence[Row], digest: str, dense: str | None, moe: str, own: int) -> list[Row] | None:
    """Rows of an evaluation of these tokens: of the model `dense`, then of `moe`. None unless agreement there is with
    the dense model, and the MoE's `own` budget is among them."""
    if not rows or (rows[0]["model"], rows[0]["tokens_sha256"]) != (dense, digest):
        return None
    found = [row for row in rows[1:] if row["model"] == moe and row["num_experts"]]
    return [rows[0], *found] if own in [row["num_selects"] for row in found] else None


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: torch.Tensor, count: int) -> list[int]:
    """The most likely tokens after a prompt `[1, T]`, one after the other, past the end of a document as well."""
    tokens, cache, made = prompt, {CACHE: DynamicCache()}, []
    for _ in range(count):
        tokens = model(tokens, use_cache=True, logits_to_keep=1, **cache).logits[:, -1:].argmax(-1)
        made.append(tokens.item())
    return made


@torch.inference_mode()
def read(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """One forward pass over tokens `[1, T]`, as before writing on: the logits of the last one."""
    return model(tokens, use_cache=True, logits_to_keep=1).logits


def continued(
    models: Mapping[str, PreTrainedModel], tokenizer: Any, prompts: Sequence[str], new_tokens: int
) -> list[dict[str, str]]:
    """How each model goes on after each prompt, up to the end of a document: its "prompt", and by model the text."""
    spoken = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        row = {"prompt": prompt}
        for which, model in models.items():
            made = greedy(model, tokens.to(model.device), new_tokens)
            end = made.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in made else len(made)
            read = tokens[0].tolist()
            whole, beginning = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (read + made[:end], read))
            row[which] = whole.removeprefix(beginning)
        spoken.append(row)
    return spoken


def time_both(models: Mapping[str, PreTrainedModel], text: torch.Tensor, rounds: int) -> Row:
    """Seconds that "dense" and "moe" take to read the beginning of a text `[T]`, and to write."""
    device = models["moe"].device
    tokens = text[None, :READ].long().to(device)
    tasks = {
        "read": (tokens.shape[1], partial(read, tokens=tokens)),
        "write": (WRITTEN, partial(greedy, prompt=tokens[:, :PROMPT], count=WRITTEN)),
    }
    return {
        name: {"tokens": tokens, "rounds": rounds} | _paired(models, run, rounds, device, name)
        for name, (tokens, run) in tasks.items()
    }


def _paired(
    models: Mapping[str, PreTrainedModel], run: Callable, rounds: int, device: torch.device, name: str
) -> dict[str, float]:
    """Median seconds of both models, which run in turn, and how many times as fast the MoE is: the median over rounds,
    the least and the most. A slow moment of a shared machine meets both alike."""
    wait = torch.get_device_module(device).synchronize  # does nothing for CPUs

    def seconds(model: PreTrainedModel) -> float:
        wait(device)
        start = time.perf_counter()
        run(model)
        wait(device)
        return time.perf_counter() - start

    for model in models.values():
        seconds(model)
    times = []
    for number in progress(range(rounds), f"time: {name}", "round"):
        order = [*models] if number % 2 else [*models][::-1]  # neither always comes first
        times.append({which: seconds(models[which]) for which in order})
    speedups = [one["dense"] / one["moe"] for one in times]
    return {
        "dense_seconds": statistics.median(one["dense"] for one in times),
        "moe_seconds": statistics.median(one["moe"] for one in times),
        "speedup": statistics.median(speedups),
        "least_speedup": min(speedups),
        "most_speedup": max(speedups),
    }


class Measured:
    """Texts read by both models, at the MoE's own budget first, then at others.

    `rows` are, by text, the dense model's, if there is one, and then the MoE's; `routings` say of each text what the
    experts did; `own` is the MoE's own budget.

    Args:
        models: "moe", and "dense" where there is one; names: what rows call them.
        texts: blocks of each text, by its name.
        known: rows of an evaluation, by text. Such a text is not evaluated again; only its routing is recorded, on
            `max_tokens` at most.
    """

    def __init__(
        self,
        models: Mapping[str, PreTrainedModel],
        names: Mapping[str, str],
        texts: Mapping[str, Blocks],
        known: Mapping[str, list[Row]],
        *,
        max_tokens: int,
        batch_size: int,
    ):
        self._moe, self._name, self._texts, self._batch_size = models["moe"], names["moe"], texts, batch_size
        self.own = self._moe.config.num_selects
        self.rows: dict[str, list[Row]] = {}
        self.routings: list[Routing] = []
        self._dense: dict[str, Evaluation] = {}  # of the texts that are evaluated here
        self._evaluated: list[str] = []  # their names
        for text, blocks in texts.items():
            if text in known:
                blocks = blocks[: max(1, max_tokens // len(blocks[0]))]
            else:
                self._evaluated.append(text)
                if "dense" in models:
                    self._dense[text] = evaluate_model(models["dense"], names["dense"], blocks, None, batch_size)
            with record_choices(self._moe) as choices:
                own_row = self._row_of(text, blocks, None)
            self.routings.append(Routing.of(choices))
            dense = [_row(self._dense[text].as_data())] if text in self._dense else []
            self.rows[text] = known.get(text, [*dense, own_row])

    def run_at(self, num_selects: int) -> None:
        """Add rows of another budget; SettingError if the model cannot run it. It stays at that budget."""
        for text in self._evaluated:
            self.rows[text].append(self._row_of(text, self._texts[text], num_selects))

    def _row_of(self, text: str, blocks: Blocks, num_selects: int | None) -> Row:
        how = (num_selects, self._batch_size, self._dense.get(text))
        return _row(evaluate_model(self._moe, self._name, blocks, *how).as_data())
