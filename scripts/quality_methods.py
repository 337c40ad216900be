"""What the quality bench measures: how each row's model is made, and what it loses and runs on each text.

Our models are made by `run_moefication.moefy`, from a recipe of `run_moefication.settings` or one with some parts left
out. What is made stays in the bench's work folder and is not made again.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from quality_baselines import Mask, cats, cmoe, masked, oracle, quantize_mlps, quantized_share, teal
from transformers import PreTrainedModel

import run_moefication as rm
from run_moefication.moefication.artifacts.split import Split
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.processes import pick_device
from run_moefication.moefication.stages.evaluate import Evaluation, evaluate_model
from run_moefication.moefication.stages.split import split_at_random
from run_moefication.moefication.text.corpus import Corpus
from run_moefication.moefication.text.tokens import first_tokens
from run_moefication.settings import CALIBRATED, ENGINE, GRAPH, PLAIN, TEMPLATES, RandomSplitSettings, Recipe

# What each part of the recipe adds: changes that leave out the parts after it. The recipe itself adds a last one, the
# fit of all layers together. The split by a graph is no part of it, but another way to do what the row above does.
RANDOM_EXPERTS, BY_GRAPH, THRESHOLD = "random experts, top_k", "split by the graph of activations", "and a threshold"
KEPT_GATES, REFINED_GATES = "and down_proj refitted", "and gates refitted"
STEPS: dict[str, dict[str, Any]] = {
    RANDOM_EXPERTS: dict(cluster_on="random", shared=None, routing="top_k", is_calibrated=False),
    "split on weights": dict(cluster_on="weights", shared=None, routing="top_k", is_calibrated=False),
    "split on activations": dict(shared=None, routing="top_k", is_calibrated=False),
    BY_GRAPH: dict(cluster_on=GRAPH, shared=None, routing="top_k", is_calibrated=False),
    "and shared experts": dict(routing="top_k", is_calibrated=False),
    THRESHOLD: dict(is_calibrated=False),
    KEPT_GATES: {},  # these two are of the model above
    REFINED_GATES: {},
}


# Bits a weight and quantiser, by method.
QUANTIZED = {"quantized": ((8, ""), (4, "")), "hqq": ((4, " by HQQ"),)}


class Bench:
    """The dense model, the texts to measure on, and the options."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.dense = rm.DenseCheckpoint(arguments.model_path)
        self.run = {"device": pick_device(arguments.device)}  # how stages run
        # What is made with these tokens and this seed.
        self.work = arguments.work / f"{arguments.calibration_tokens}-tokens-seed-{arguments.seed}"
        files = sorted(Path(arguments.heldout_path).glob("*.jsonl"))
        if not files:
            raise MoEficationError(f"--heldout_path {arguments.heldout_path} holds no .jsonl file")
        self.texts = {path.stem: self._blocks(path, arguments.heldout_tokens) for path in files}  # blocks of tokens
        if arguments.wikitext_path:
            self.texts["WikiText-2"] = self._blocks(Path(arguments.wikitext_path), arguments.wikitext_tokens)

    def _blocks(self, path: Path, count: int) -> list[torch.Tensor]:
        """The first so many tokens of a text, in whole blocks."""
        size = self.arguments.block_size
        tokens = first_tokens(path, self.dense.path, count, self.dense.config.vocab_size)
        if len(tokens) < size:
            raise MoEficationError(f"{path}: less than a block of {size} tokens to measure on")
        return list(tokens[: len(tokens) // size * size].split(size))

    def text(self, tokens: int) -> Corpus:
        """So many tokens of the training text, in the mix that the default recipe calibrates on."""
        how = dict(block_size=self.arguments.block_size, seed=self.arguments.seed)
        how |= dict(max_tokens=tokens, domain_weights=CALIBRATED.domain_weights)
        return rm.read_text(self.dense, self.arguments.train_data_path, self.work / "tokens", **how)


class Row(NamedTuple):
    """One row of the table. `settings` are those that its numbers depend on beside the settings of all rows."""

    method: str
    budget: float
    measure: Callable[[], dict[str, Any]]
    settings: dict[str, Any]


def rows(bench: Bench) -> Iterator[Row]:
    """All rows that were asked for, the dense model first."""
    arguments = bench.arguments
    methods, tokens = arguments.methods, arguments.calibration_tokens
    experts = arguments.experts or [CALIBRATED.num_experts(bench.dense.config.intermediate_size)]

    def recipe_at(budget: float, num_experts: int = experts[0], recipe: Recipe = CALIBRATED, **changes: Any) -> Recipe:
        return replace(recipe.at(budget), experts=num_experts, calibration_tokens=tokens, **changes)

    def masked_row(method: str, budget: float, make: Callable[[PreTrainedModel], list[Mask]], **how: Any) -> Row:
        return Row(method, budget, partial(measure_dense, bench, make, **how), how)

    def row(method: str, recipe: Recipe, make: Callable[..., rm.MoECheckpoint], *inputs: Any, **how: Any) -> Row:
        measure = partial(measure_moe, bench, partial(make, bench, recipe, *inputs), **how)
        return Row(method, budget, measure, {"recipe": as_data(recipe)})

    def distilled(method: str, recipe: Recipe, make: Callable[..., rm.MoECheckpoint], *nested: int, **how: Any) -> Row:
        settings = rm.DistillSettings(bf16=arguments.bf16, nested_selects=nested or None)
        recorded = {"distillation_tokens": arguments.distillation_tokens, "distillation": settings.recorded()}
        whole = row(method, recipe, make_distilled, make, settings, **how)
        return whole._replace(settings=whole.settings | recorded)

    def both(method: str, *model: Any, **how: Any) -> Iterator[Row]:
        yield row(method, *model, **how)
        if arguments.distill:
            yield distilled(f"{method}, distilled", *model, **how)

    yield masked_row("dense", 1.0, lambda model: [])
    quantized = [pair for method, pairs in QUANTIZED.items() if method in methods for pair in pairs]
    for bits, quantizer in quantized:
        yield masked_row(f"dense, {bits} bits{quantizer}", 1.0, lambda model: [], bits=bits, quantizer=quantizer)
    for budget in arguments.budgets:
        chosen, name = recipe_at(budget), f"calibrated, {experts[0]} experts"
        if "plain" in methods:
            yield row("plain recipe", PLAIN.at(budget), make_model)
        if "cmoe" in methods:
            yield masked_row("CMoE's recipe", budget, partial(cmoe, bench.text(tokens).blocks, budget))
        if "sparse" in methods:
            blocks = bench.text(tokens).blocks
            yield masked_row("TEAL", budget, partial(teal, blocks, budget))
            yield masked_row("WINA", budget, partial(teal, blocks, budget, weighed=True))
            if budget > 1 / 3:
                yield masked_row("CATS", budget, partial(cats, blocks, budget))
        if "static" in methods:
            yield row("static mask", chosen, make_static, is_static=True)
            yield from both("static mask, refitted", chosen, make_refitted_static, is_static=True)
        for step in STEPS:
            if ("graph" if step == BY_GRAPH else "steps") in methods:
                yield row(f"step: {step}", chosen, make_step, step)
        for number in experts if "top_k" in methods else ():
            recipe = recipe_at(budget, number, name="top_k", routing="top_k")
            yield from both(f"calibrated, {number} experts, top_k", recipe, make_model)
        for number in experts if "engine" in methods else ():
            yield from both(f"engine recipe, {number} experts", recipe_at(budget, number, ENGINE), make_model)
        for number in experts if "calibrated" in methods else ():
            yield from both(f"calibrated, {number} experts", recipe_at(budget, number), make_model)
        for bits, quantizer in quantized if "calibrated" in methods else ():
            yield row(f"{name}, {bits} bits{quantizer}", chosen, make_model, bits=bits, quantizer=quantizer)
        for other in arguments.budgets if "dialled" in methods else ():
            if other != budget:
                num_selects = chosen.num_selects(experts[0])
                yield row(f"{name}, made for {other:.0%}", recipe_at(other), make_model, num_selects=num_selects)
        if arguments.distill and "nested" in methods:
            # One model, whose own budget is the one nearest to a half.
            base, *others = (recipe_at(one) for one in sorted(arguments.budgets, key=lambda one: abs(one - 0.5)))
            nested, num_selects = (other.num_selects(experts[0]) for other in others), chosen.num_selects(experts[0])
            yield distilled(f"{name}, distilled for all", base, make_model, *nested, num_selects=num_selects)
        if "oracle" in methods:
            yield masked_row("neuron oracle", budget, partial(oracle, budget))


def as_data(recipe: Recipe) -> dict[str, Any]:
    """A recipe as it looks in a file of rows."""
    return json.loads(json.dumps(asdict(recipe), default=str))


def measure_dense(
    bench: Bench, make: Callable[[PreTrainedModel], list[Mask]], bits: int = 16, quantizer: str = ""
) -> dict[str, Any]:
    """The dense model with masks on its MLPs, or with fewer bits a weight, which count as so much less that is read;
    what the choice itself costs is not counted."""
    model = bench.dense.load_causal_lm(bench.run["device"], torch.float32)
    if bits < 16:
        quantize_mlps(model, bits, quantizer)
    masks, numbers = make(model), {}
    for name, blocks in bench.texts.items():
        with masked(model, masks) as unread:
            row = evaluate_model(model, name, blocks)
        tokens = sum(map(len, blocks)) * model.config.num_hidden_layers
        read = 1 - sum(part.sum().item() for part in unread) / tokens
        numbers[name] = numbers_of(row, read * quantized_share(bits, quantizer), read)
    return numbers


def measure_moe(
    bench: Bench,
    make: Callable[[], rm.MoECheckpoint],
    *,
    num_selects: int | None = None,
    is_static: bool = False,
    bits: int = 16,
    quantizer: str = "",
) -> dict[str, Any]:
    """A LlamaMoE checkpoint, made first, at the budget `num_selects` or its own; if `is_static`, its shared experts run
    alone, for which no gate is needed; with fewer `bits`, those of its experts count as so much less that runs."""
    model = make().load(torch.float32).to(bench.run["device"])
    config, gate = model.config, 0.0
    if is_static:
        for layer in model.model.layers:
            layer.mlp.gate.set_active_share(0)
        gate = sum(weights.numel() for weights in model.model.layers[0].mlp.gate.parameters())
        gate /= 3 * config.hidden_size * config.intermediate_size
    if bits < 16:
        quantize_mlps(model, bits, quantizer)
    numbers = {name: getattr(config, name) for name in ("num_selects", "num_shared_experts", "gate_rank")}
    for name, blocks in bench.texts.items():
        row = evaluate_model(model, name, blocks, num_selects)
        routed = sum(map(sum, row.expert_load)) / len(row.expert_load)
        neurons = (routed + config.num_shared_experts) / row.num_experts
        saved = neurons * (1 - quantized_share(bits, quantizer))
        numbers[name] = numbers_of(row, row.active - gate - saved, neurons)
    return numbers


def numbers_of(row: Evaluation, active: float, neurons: float) -> dict[str, Any]:
    """What the file of rows says of one text."""
    return {"losses": [round(loss, 5) for loss in row.block_losses], "active": active, "neurons": neurons}


def make_model(bench: Bench, recipe: Recipe, experts: Split | None = None) -> rm.MoECheckpoint:
    """The recipe's model."""
    folder = bench.work / f"{recipe.name}-{recipe.num_selects(recipe.experts)}-of-{recipe.experts}"
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
    if step in (KEPT_GATES, REFINED_GATES):
        moe = make_step(bench, recipe, THRESHOLD)
        return refit(bench, moe, recipe, step, refit_gates=step == REFINED_GATES)
    recipe = replace(recipe, name=step, **STEPS[step])
    experts = None
    if step == RANDOM_EXPERTS:
        settings = RandomSplitSettings(num_experts=recipe.experts, seed=bench.arguments.seed)
        folder = split_at_random(bench.dense, bench.work, [TEMPLATES[0]], settings).folder
        experts = Split(folder, bench.dense, TEMPLATES[0], recipe.experts)
    return make_model(bench, recipe, experts)


def make_static(bench: Bench, recipe: Recipe) -> rm.MoECheckpoint:
    """The neurons that add most, for every token alike: as shared experts, which use up the recipe's budget."""
    shared = recipe.num_selects(recipe.experts)
    rule = ((Fraction(0), Fraction(shared, recipe.experts)),)
    small_gate = dict(gate_rank=1, rank_from=0)
    recipe = replace(recipe, name="static", selects=shared + 1, shared=rule, is_calibrated=False, **small_gate)
    return make_model(bench, recipe)


def make_refitted_static(bench: Bench, recipe: Recipe) -> rm.MoECheckpoint:
    """The same, calibrated as our models are."""
    how = dict(num_selects=recipe.num_selects(recipe.experts), fit_logits=True)
    return refit(bench, make_static(bench, recipe), recipe, "Refitted", **how)


def refit(bench: Bench, moe: rm.MoECheckpoint, recipe: Recipe, name: str, **settings: Any) -> rm.MoECheckpoint:
    """A model calibrated with these settings into a folder of this name beside it."""
    how = rm.CalibrateSettings(output_bias=recipe.output_bias, **settings)
    text = bench.text(recipe.calibration_tokens)
    return rm.calibrate(bench.dense, moe, text, moe.path.with_name(name), how, **bench.run)


def make_distilled(
    bench: Bench, recipe: Recipe, make: Callable[[Bench, Recipe], rm.MoECheckpoint], settings: rm.DistillSettings
) -> rm.MoECheckpoint:
    """A recipe's model distilled at its budget, and at nested ones."""
    moe, tokens = make(bench, recipe), bench.arguments.distillation_tokens
    kind = f"{tokens}{'-nested' if settings.nested_selects else ''}{'-bf16' if settings.bf16 else ''}"
    folder = moe.path.with_name(f"{moe.path.name}-Distilled-{kind}")
    return rm.distill(bench.dense, moe, bench.text(tokens), folder, settings, **bench.run)
