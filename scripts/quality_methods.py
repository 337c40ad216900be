"""What the quality bench measures: how each method's model is made, and what it loses and runs on each text.

Our models are made by `run_moefication.moefy`, from a recipe of `run_moefication.settings` or one with some parts left
out. What is made stays in the bench's work folder and is not made again.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality_baselines import Choice, cmoe, masked, oracle
from transformers import PreTrainedModel

import run_moefication as rm
from run_moefication.command_line import pick_device, progress_bar
from run_moefication.moefication.artifacts.split import Split
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.stages.evaluate import evaluate_model, first_tokens
from run_moefication.moefication.stages.split import split_at_random
from run_moefication.moefication.text.corpus import Corpus, pack
from run_moefication.settings import TEMPLATES, RandomSplitSettings, Recipe

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
        return {"device": self.device, "progress": progress_bar}

    def text(self, tokens: int) -> Corpus:
        """So many tokens of the training text, every domain alike, as the recipe calibrates on them."""
        options = dict(block_size=self.arguments.block_size, domain_weights="equal", seed=self.arguments.seed)
        cache = self.work / "tokens"
        return rm.read_text(self.dense, self.arguments.train_data_path, cache, max_tokens=tokens, **options)


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
    return Bench(dense, texts, arguments, pick_device(arguments))


# ---------------------------------------------------------------------------------------------------- measuring


def measure_dense(bench: Bench) -> dict[str, Any]:
    """The dense model."""
    model = bench.dense.load_causal_lm(bench.device, torch.float32)
    rows = {name: evaluate_model(model, name, blocks) for name, blocks in bench.texts.items()}
    return {name: {"losses": row.block_losses, "active": row.active} for name, row in rows.items()}


def measure_masked(bench: Bench, make: Callable[[PreTrainedModel], list[Choice]]) -> dict[str, Any]:
    """The dense model with masks on its MLPs; what the choice itself costs is not counted."""
    model = bench.dense.load_causal_lm(bench.device, torch.float32)
    choices, numbers = make(model), {}
    for name, blocks in bench.texts.items():
        with masked(model, choices) as shares:
            row = evaluate_model(model, name, blocks)
        active = torch.cat(shares).mean().item()
        numbers[name] = {"losses": row.block_losses, "active": active, "neurons": active}
    return numbers


def measure_moe(
    bench: Bench,
    moe: rm.MoECheckpoint,
    *,
    num_selects: int | None = None,
    is_static: bool = False,
    has_dense_norm: bool = False,
) -> dict[str, Any]:
    """A LlamaMoE checkpoint.

    Args:
        num_selects: the budget, if not its own.
        is_static: its shared experts run alone, for which no gate is needed.
        has_dense_norm: it gets the dense model's final norm.
    """
    model = moe.load(torch.float32).to(bench.device)
    if has_dense_norm:
        model.model.norm.weight.data.copy_(bench.dense.tensor("norm.weight"))
    gate = 0.0
    if is_static:
        for layer in model.model.layers:
            layer.mlp.gate.set_active_share(0)
        gate = sum(weights.numel() for weights in model.model.layers[0].mlp.gate.parameters())
        gate /= 3 * bench.dense.config.hidden_size * bench.dense.config.intermediate_size
    numbers: dict[str, Any] = {}
    for name, blocks in bench.texts.items():
        row = evaluate_model(model, name, blocks, num_selects)
        routed = sum(map(sum, row.expert_load)) / len(row.expert_load)
        neurons = (routed + model.config.num_shared_experts) / row.num_experts
        numbers[name] = {"losses": row.block_losses, "active": row.active - gate, "neurons": neurons}
    return {name: getattr(model.config, name) for name in ("num_selects", "num_shared_experts", "gate_rank")} | numbers


# ---------------------------------------------------------------------------------------------------- baselines


def measure_cmoe(bench: Bench, budget: float) -> dict[str, Any]:
    """CMoE's recipe."""
    blocks = bench.text(bench.arguments.calibration_tokens).blocks
    return measure_masked(bench, partial(cmoe, blocks, budget))


def measure_oracle(bench: Bench, budget: float) -> dict[str, Any]:
    """The best neurons of every token, known beforehand."""
    return measure_masked(bench, partial(oracle, budget))


def measure_static(bench: Bench, recipe: Recipe, refit: bool = False, is_distilled: bool = False) -> dict[str, Any]:
    """The neurons that add most, for every token alike: as shared experts, which use up the recipe's budget."""
    experts = recipe.num_experts
    shared = recipe.num_selects(experts)
    recipe = replace(
        recipe,
        name="static",
        selects=shared + 1,
        shared=((Fraction(0), Fraction(shared, experts)),),
        gate_rank=1,
        rank_from=0,
        is_calibrated=False,
    )
    moe = made(bench, recipe)
    if refit:
        moe = calibrated(bench, moe, rm.CalibrateSettings(num_selects=shared, output_bias=recipe.output_bias))
    if is_distilled:
        moe = distilled(bench, moe)
    return measure_moe(bench, moe, is_static=True)


# ---------------------------------------------------------------------------------------------------- ours


def measure_recipe(bench: Bench, recipe: Recipe, num_selects: int | None = None) -> dict[str, Any]:
    """A recipe; run at `num_selects` experts per token instead of its own, if given."""
    return measure_moe(bench, made(bench, recipe), num_selects=num_selects)


def measure_distilled(bench: Bench, recipe: Recipe) -> dict[str, Any]:
    """A recipe, distilled."""
    return measure_moe(bench, distilled(bench, made(bench, recipe)))


def measure_step(bench: Bench, recipe: Recipe, step: str) -> dict[str, Any]:
    """A recipe up to a step, with the dense model's final norm."""
    if STEPS[step]:
        name = next(name for name, changes in STEPS.items() if changes == STEPS[step])
        recipe = replace(recipe, name=name, **STEPS[step])
    experts = None
    if step == RANDOM_EXPERTS:
        settings = RandomSplitSettings(num_experts=recipe.num_experts, seed=bench.arguments.seed)
        folder = split_at_random(bench.dense, bench.work, [TEMPLATES[0]], settings).folder
        experts = Split(folder, bench.dense, TEMPLATES[0], recipe.num_experts)
    moe = made(bench, recipe, experts)
    if step == KEPT_GATES:
        moe = calibrated(bench, moe, rm.CalibrateSettings(output_bias=recipe.output_bias))
    return measure_moe(bench, moe, has_dense_norm=True)


def made(bench: Bench, recipe: Recipe, experts: Split | None = None) -> rm.MoECheckpoint:
    """The recipe's checkpoint, made unless it is there."""
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
        features_path=bench.work,
        **bench.run,
    )


def calibrated(bench: Bench, moe: rm.MoECheckpoint, settings: rm.CalibrateSettings) -> rm.MoECheckpoint:
    """The checkpoint calibrated, with the gates that it has."""
    text = bench.text(bench.arguments.calibration_tokens)
    return rm.calibrate(bench.dense, moe, text, moe.path.with_name("Refitted"), settings, **bench.run)


def distilled(bench: Bench, moe: rm.MoECheckpoint) -> rm.MoECheckpoint:
    """The checkpoint distilled at its budget."""
    tokens, bf16 = bench.arguments.distillation_tokens, bench.arguments.bf16
    folder = moe.path.with_name(f"{moe.path.name}-Distilled-{tokens}{'-bf16' if bf16 else ''}")
    return rm.distill(bench.dense, moe, bench.text(tokens), folder, rm.DistillSettings(bf16=bf16), **bench.run)
