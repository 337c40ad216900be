"""What the quality bench measures: how each row's model is made, and what it loses and runs on each text.

Our models are made by `run_moefication.moefy`, from a recipe of `run_moefication.settings` or one with some parts left
out. What is made stays in the bench's work folder and is not made again.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality_baselines import Choice, all_neurons, cmoe, masked, oracle
from transformers import PreTrainedModel

import run_moefication as rm
from run_moefication.moefication.artifacts.split import Split
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.processes import pick_device
from run_moefication.moefication.stages.evaluate import evaluate_model, first_tokens
from run_moefication.moefication.stages.split import split_at_random
from run_moefication.moefication.text.corpus import Corpus, pack
from run_moefication.settings import CALIBRATED, PLAIN, TEMPLATES, RandomSplitSettings, Recipe

# What each part of the recipe adds: changes that leave out the parts after it. The recipe itself adds a last one, the
# fit of the final norm.
RANDOM_EXPERTS, KEPT_GATES = "random experts, top_k", "and down_proj refitted"
STEPS: dict[str, dict[str, Any]] = {
    RANDOM_EXPERTS: dict(cluster_on="random", shared=None, routing="top_k", is_calibrated=False),
    "split on weights": dict(cluster_on="weights", shared=None, routing="top_k", is_calibrated=False),
    "split on activations": dict(shared=None, routing="top_k", is_calibrated=False),
    "and shared experts": dict(routing="top_k", is_calibrated=False),
    "and a threshold": dict(is_calibrated=False),
    KEPT_GATES: dict(is_calibrated=False),  # stage 5 follows, but keeps the gates of stage 3
    "and gates refitted": {},
}


@dataclass
class Bench:
    """The dense model, the texts to measure on, and the options.

    Attributes:
        texts: blocks of tokens of each held-out file, and of "WikiText-2".
    """

    dense: rm.DenseCheckpoint
    texts: dict[str, list[torch.Tensor]]
    arguments: argparse.Namespace
    device: str

    @property
    def work(self) -> Path:
        """The folder of what is made with these tokens and this seed."""
        return self.arguments.work / f"{self.arguments.calibration_tokens}-tokens-seed-{self.arguments.seed}"

    @property
    def run(self) -> dict[str, Any]:
        """How stages run."""
        return {"device": self.device}

    def text(self, tokens: int) -> Corpus:
        """So many tokens of the training text, in the mix that the default recipe calibrates on."""
        mix = CALIBRATED.domain_weights
        options = dict(block_size=self.arguments.block_size, domain_weights=mix, seed=self.arguments.seed)
        cache = self.work / "tokens"
        return rm.read_text(self.dense, self.arguments.train_data_path, cache, max_tokens=tokens, **options)


@dataclass(frozen=True)
class Row:
    """One row of the table: its name, its budget, how to measure it, and the settings that its numbers depend on beside
    those of all rows."""

    method: str
    budget: float
    measure: Callable[[], dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)


def prepare(arguments: argparse.Namespace) -> Bench:
    """Open the dense model, and cut the texts into blocks."""
    dense = rm.DenseCheckpoint(arguments.model_path)
    files = {
        path.stem: (path, arguments.heldout_tokens) for path in sorted(Path(arguments.heldout_path).glob("*.jsonl"))
    }
    if not files:
        raise MoEficationError(f"--heldout_path {arguments.heldout_path} holds no .jsonl file")
    if arguments.wikitext_path:
        files["WikiText-2"] = (Path(arguments.wikitext_path), arguments.wikitext_tokens)
    texts = {}
    for name, (path, count) in files.items():
        blocks = pack(first_tokens(path, dense.path, count, dense.config.vocab_size), arguments.block_size)
        texts[name] = [block for block in blocks if len(block) == arguments.block_size]
        if not texts[name]:
            raise MoEficationError(f"{path}: less than a block of {arguments.block_size} tokens to measure on")
    return Bench(dense, texts, arguments, pick_device(arguments.device))


def rows(bench: Bench) -> Iterator[Row]:
    """All rows that were asked for, the dense model first."""
    arguments = bench.arguments
    methods, experts, tokens = arguments.methods, arguments.experts, arguments.calibration_tokens

    def recipe_at(budget: float, num_experts: int = experts[0], **changes: Any) -> Recipe:
        return replace(CALIBRATED.at(budget), num_experts=num_experts, calibration_tokens=tokens, **changes)

    def masked_row(method: str, make: Callable[[PreTrainedModel], list[Choice]]) -> Row:
        return Row(method, budget, partial(measure_masked, bench, make))

    def row(method: str, recipe: Recipe, make: Callable[..., rm.MoECheckpoint], *inputs: Any, **how: Any) -> Row:
        measure = partial(measure_moe, bench, partial(make, bench, recipe, *inputs), **how)
        return Row(method, budget, measure, {"recipe": as_data(recipe)})

    def distilled_row(method: str, *model: Any, **how: Any) -> Row:
        plain = row(method, chosen, make_distilled, *model, **how)
        settings = {"distillation_tokens": arguments.distillation_tokens, "bf16": arguments.bf16}
        return replace(plain, settings=plain.settings | settings)

    yield Row("dense", 1.0, partial(measure_masked, bench, all_neurons))
    for budget in arguments.budgets:
        chosen, name = recipe_at(budget), f"calibrated, {experts[0]} experts"
        if "plain" in methods:
            yield row("plain recipe", PLAIN.at(budget), make_model)
        if "cmoe" in methods:
            yield masked_row("CMoE's recipe", partial(cmoe, bench.text(tokens).blocks, budget))
        if "static" in methods:
            yield row("static mask", chosen, make_static, is_static=True)
            yield row("static mask, refitted", chosen, make_refitted_static, is_static=True)
        for step in STEPS if "steps" in methods else ():
            yield row(f"step: {step}", chosen, make_step, step, has_dense_norm=True)
        for number in experts if "top_k" in methods else ():
            recipe = recipe_at(budget, number, name="top_k", routing="top_k")
            yield row(f"calibrated, {number} experts, top_k", recipe, make_model)
        for number in experts if "calibrated" in methods else ():
            yield row(f"calibrated, {number} experts", recipe_at(budget, number), make_model)
        for other in (other for other in arguments.budgets if other != budget and "dialled" in methods):
            num_selects = chosen.num_selects(chosen.num_experts)
            yield row(f"{name}, made for {other:.0%}", recipe_at(other), make_model, num_selects=num_selects)
        if arguments.distill and "static" in methods:
            yield distilled_row("static mask, refitted and distilled", make_refitted_static, is_static=True)
        if arguments.distill and "calibrated" in methods:
            yield distilled_row(f"{name}, distilled", make_model)
        if "oracle" in methods:
            yield masked_row("neuron oracle", partial(oracle, budget))


def as_data(recipe: Recipe) -> dict[str, Any]:
    """A recipe as it looks in a file of rows."""
    return json.loads(json.dumps(asdict(recipe), default=str))


# ---------------------------------------------------------------------------------------------------- measuring


def measure_masked(bench: Bench, make: Callable[[PreTrainedModel], list[Choice]]) -> dict[str, Any]:
    """The dense model with masks on its MLPs; what the choice itself costs is not counted."""
    model = bench.dense.load_causal_lm(bench.device, torch.float32)
    choices, numbers = make(model), {}
    for name, blocks in bench.texts.items():
        with masked(model, choices) as shares:
            row = evaluate_model(model, name, blocks)
        active = torch.cat(shares).mean().item()
        numbers[name] = {"losses": _kept(row.block_losses), "active": active, "neurons": active}
    return numbers


def measure_moe(
    bench: Bench,
    make: Callable[[], rm.MoECheckpoint],
    *,
    num_selects: int | None = None,
    is_static: bool = False,
    has_dense_norm: bool = False,
) -> dict[str, Any]:
    """A LlamaMoE checkpoint, made first.

    Args:
        num_selects: the budget, if not its own.
        is_static: its shared experts run alone, for which no gate is needed.
        has_dense_norm: it gets the dense model's final norm.
    """
    model = make().load(torch.float32).to(bench.device)
    config, gate = model.config, 0.0
    if has_dense_norm:
        model.model.norm.weight.data.copy_(bench.dense.tensor("norm.weight"))
    if is_static:
        for layer in model.model.layers:
            layer.mlp.gate.set_active_share(0)
        gate = sum(weights.numel() for weights in model.model.layers[0].mlp.gate.parameters())
        gate /= 3 * config.hidden_size * config.intermediate_size
    numbers = {name: getattr(config, name) for name in ("num_selects", "num_shared_experts", "gate_rank")}
    for name, blocks in bench.texts.items():
        row = evaluate_model(model, name, blocks, num_selects)
        routed = sum(map(sum, row.expert_load)) / len(row.expert_load)
        neurons = (routed + config.num_shared_experts) / row.num_experts
        numbers[name] = {"losses": _kept(row.block_losses), "active": row.active - gate, "neurons": neurons}
    return numbers


def _kept(losses: list[float]) -> list[float]:
    return [round(loss, 5) for loss in losses]


# ---------------------------------------------------------------------------------------------------- models


def make_model(bench: Bench, recipe: Recipe, experts: Split | None = None) -> rm.MoECheckpoint:
    """The recipe's model."""
    folder = bench.work / f"{recipe.name}-{recipe.num_selects(recipe.num_experts)}-of-{recipe.num_experts}"
    return rm.moefy(
        bench.dense,
        bench.arguments.train_data_path,
        folder / "MoE",
        recipe,
        block_size=bench.arguments.block_size,
        seed=bench.arguments.seed,
        experts=experts,
        work_path=folder,
        features_path=bench.work / f"text-{recipe.domain_weights or 'as-pretraining'}",  # shared by all budgets
        **bench.run,
    )


def make_step(bench: Bench, recipe: Recipe, step: str) -> rm.MoECheckpoint:
    """The recipe's model up to a step of `STEPS`."""
    if STEPS[step]:
        name = next(name for name, changes in STEPS.items() if changes == STEPS[step])
        recipe = replace(recipe, name=name, **STEPS[step])
    experts = None
    if step == RANDOM_EXPERTS:
        settings = RandomSplitSettings(num_experts=recipe.num_experts, seed=bench.arguments.seed)
        folder = split_at_random(bench.dense, bench.work, [TEMPLATES[0]], settings).folder
        experts = Split(folder, bench.dense, TEMPLATES[0], recipe.num_experts)
    moe = make_model(bench, recipe, experts)
    return refit(bench, moe, recipe, None) if step == KEPT_GATES else moe


def make_static(bench: Bench, recipe: Recipe) -> rm.MoECheckpoint:
    """The neurons that add most, for every token alike: as shared experts, which use up the recipe's budget."""
    shared = recipe.num_selects(recipe.num_experts)
    rule = ((Fraction(0), Fraction(shared, recipe.num_experts)),)
    small_gate = dict(gate_rank=1, rank_from=0)
    recipe = replace(recipe, name="static", selects=shared + 1, shared=rule, is_calibrated=False, **small_gate)
    return make_model(bench, recipe)


def make_refitted_static(bench: Bench, recipe: Recipe) -> rm.MoECheckpoint:
    """The same, calibrated as our models are."""
    return refit(bench, make_static(bench, recipe), recipe, recipe.num_selects(recipe.num_experts))


def refit(bench: Bench, moe: rm.MoECheckpoint, recipe: Recipe, num_selects: int | None) -> rm.MoECheckpoint:
    """A model calibrated with the gates that it has."""
    settings = rm.CalibrateSettings(num_selects=num_selects, output_bias=recipe.output_bias)
    text = bench.text(recipe.calibration_tokens)
    return rm.calibrate(bench.dense, moe, text, moe.path.with_name("Refitted"), settings, **bench.run)


def make_distilled(bench: Bench, recipe: Recipe, make: Callable[[Bench, Recipe], rm.MoECheckpoint]) -> rm.MoECheckpoint:
    """A recipe's model distilled at its budget."""
    moe = make(bench, recipe)
    tokens, bf16 = bench.arguments.distillation_tokens, bench.arguments.bf16
    folder = moe.path.with_name(f"{moe.path.name}-Distilled-{tokens}{'-bf16' if bf16 else ''}")
    return rm.distill(bench.dense, moe, bench.text(tokens), folder, rm.DistillSettings(bf16=bf16), **bench.run)
