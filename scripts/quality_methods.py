"""What the quality bench measures: how each method's model is made, and its losses and active shares on the texts.

Everything made stands in the bench's work folder and is not made again.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quality_baselines import block_losses, cmoe, masked, oracle
from transformers import AutoModelForCausalLM

from llama_moe import record_routing
from run_moefication.command_line import pick_device, progress_bar
from run_moefication.moefication.artifacts.features import Features
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.checkpoints.transformers_library import quiet_transformers
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.stages.calibrate import calibrate
from run_moefication.moefication.stages.convert import convert
from run_moefication.moefication.stages.distill import distill
from run_moefication.moefication.stages.evaluate import active_share, first_tokens
from run_moefication.moefication.stages.features import extract_features
from run_moefication.moefication.stages.select import train_gates
from run_moefication.moefication.stages.split import split_at_random, split_by_weights
from run_moefication.moefication.stages.split_on_activations import split_by_activations
from run_moefication.moefication.text.corpus import Corpus, training_corpus
from run_moefication.settings import (
    TEMPLATES,
    CalibrateSettings,
    ConvertSettings,
    CorpusSettings,
    DistillSettings,
    FeatureSettings,
    GateSettings,
    RandomSplitSettings,
    SplitSettings,
)

BLOCK = 512
BATCH = 8  # blocks at a time
FEATURE_TOKENS = 32768  # for the splits, and for the gates of stage 3, which calibration fits anew
DISTILLATION_LR = 2e-4  # for a long run: the stage's default, 1e-4, is for shorter ones
# How much text the thresholds were not set on may run beyond the budget, as a share of it.
MARGIN = {"top_k": 0.0, "threshold": 0.016}


@dataclass
class Setup:
    """The model, the text, and where things are kept."""

    checkpoint: DenseCheckpoint
    corpus: Corpus
    features: Path
    texts: dict[str, list[torch.Tensor]]  # blocks of each held-out file, and of "WikiText-2"
    arguments: argparse.Namespace
    device: str

    @property
    def work(self) -> Path:
        return _work(self.arguments)


def prepare(arguments: argparse.Namespace) -> Setup:
    """Open the model, cut the texts, and record a few features for stages 1 and 3."""
    device, checkpoint = pick_device(arguments), DenseCheckpoint(arguments.model_path)
    files = {
        path.stem: (path, arguments.heldout_tokens) for path in sorted(Path(arguments.heldout_path).glob("*.jsonl"))
    }
    if not files:
        raise MoEficationError(f"--heldout_path {arguments.heldout_path} holds no .jsonl file")
    if arguments.wikitext_path:
        files["WikiText-2"] = (Path(arguments.wikitext_path), arguments.wikitext_tokens)
    texts = {}
    for name, (path, count) in files.items():
        blocks = first_tokens(path, checkpoint.path, count, checkpoint.config.vocab_size).split(BLOCK)
        texts[name] = [block for block in blocks if len(block) == BLOCK]
        if not texts[name]:
            raise MoEficationError(f"{path}: less than a block of {BLOCK} tokens to measure on")
    features = extract_features(
        checkpoint,
        _corpus(checkpoint, arguments, FEATURE_TOKENS),
        _work(arguments),
        FeatureSettings(feature_format="inputs", batch_size=BATCH),
        device=device,
        progress=progress_bar,
    )
    corpus = _corpus(checkpoint, arguments, arguments.calibration_tokens)
    return Setup(checkpoint, corpus, features.folder, texts, arguments, device)


def _work(arguments: argparse.Namespace) -> Path:
    """The folder of what is made with these tokens and this seed."""
    return arguments.work / f"{arguments.calibration_tokens}-tokens-seed-{arguments.seed}"


def _corpus(checkpoint: DenseCheckpoint, arguments: argparse.Namespace, tokens: int) -> Corpus:
    # Every domain alike, as the table weighs them.
    settings = CorpusSettings(block_size=BLOCK, domain_weights="equal", max_tokens=tokens, seed=arguments.seed)
    return training_corpus(
        checkpoint, arguments.train_data_path, arguments.work / "cache", settings, progress=progress_bar
    )


# ---------------------------------------------------------------------------------------------------- measuring


def measure_dense(setup: Setup) -> dict[str, Any]:
    """The dense model."""
    model = _load(setup.checkpoint.path, setup.device)
    return {name: {"losses": block_losses(model, blocks), "active": 1.0} for name, blocks in setup.texts.items()}


def measure_masked(setup: Setup, make: Callable[[Any], list[Any]]) -> dict[str, Any]:
    """The dense model with masks on its MLPs; what the choice itself costs is not counted."""
    model = _load(setup.checkpoint.path, setup.device)
    choices = make(model)
    numbers = {}
    for name, blocks in setup.texts.items():
        with masked(model, choices) as shares:
            losses = block_losses(model, blocks)
        active = sum(shares) / len(shares)
        numbers[name] = {"losses": losses, "active": active, "neurons": active}
    return numbers


def measure_moe(
    setup: Setup, folder: Path, *, budget: float | None = None, is_static: bool = False, final_norm: bool = True
) -> dict[str, Any]:
    """A LlamaMoE checkpoint, at a `budget` other than its own if one is given; or its shared experts alone: a static
    mask, which has no use for the gate's parameters. Without its `final_norm` it has the dense model's."""
    model = _load(folder, setup.device)
    if not final_norm:
        model.model.norm.weight.data.copy_(setup.checkpoint.tensor("norm.weight"))
    if is_static:
        for layer in model.model.layers:
            layer.mlp.gate.set_active_share(0)
    config = model.config
    experts = config.num_experts + config.num_shared_experts
    gate = sum(p.numel() for p in model.model.layers[0].mlp.gate.parameters())
    gate /= 3 * config.hidden_size * config.intermediate_size
    if budget is not None:
        model.set_active_fraction(budget * (1 - MARGIN["threshold"]) - gate - _bias_share(setup))
    names = ("num_selects", "num_shared_experts", "gate_rank")
    numbers = {name: getattr(config, name) for name in names}
    for name, blocks in setup.texts.items():
        with record_routing(model) as routing:
            losses = block_losses(model, blocks)
        routed = sum(layer.experts_per_tok for layer in routing) / len(routing)
        numbers[name] = {
            "losses": losses,
            "active": active_share(model, routing) - (gate if is_static else 0),
            "neurons": (config.num_shared_experts + routed) / experts,
        }
    return numbers


def _load(path: Path, device: str) -> Any:
    with quiet_transformers():
        return (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval().to(device)
        )


# ---------------------------------------------------------------------------------------------------- baselines


def measure_cmoe(setup: Setup, budget: float) -> dict[str, Any]:
    """CMoE's recipe."""
    return measure_masked(setup, partial(cmoe, setup.corpus.blocks, budget))


def measure_oracle(setup: Setup, budget: float) -> dict[str, Any]:
    """The best neurons of every token, known beforehand."""
    return measure_masked(setup, partial(oracle, budget))


def measure_plain(setup: Setup, budget: float) -> dict[str, Any]:
    """The description's recipe: 8 experts clustered on weights, MLP gates on l2_norm, top-k."""
    work, checkpoint, seed = setup.work / "plain", setup.checkpoint, setup.arguments.seed
    settings = SplitSettings(num_experts=8, seed=seed)
    split = split_by_weights(checkpoint, work, [TEMPLATES[0]], settings, device=setup.device, progress=progress_bar)
    settings = GateSettings(num_experts=8, num_selects=2, use_softmax=True, seed=seed)
    gates = _gates(setup, split.folder, work, settings)
    conversion = ConvertSettings(num_experts=8, num_selects=round(8 * budget))
    moe = convert(checkpoint, split.folder, gates, work / f"{budget:g}", conversion, progress=progress_bar)
    return measure_moe(setup, moe.folder)


def measure_static(setup: Setup, budget: float, refit: bool, is_distilled: bool = False) -> dict[str, Any]:
    """The neurons that add most, for every token alike: the shared ones of many experts, of which no other runs."""
    experts = math.gcd(512, setup.checkpoint.config.intermediate_size)
    shared = math.floor((budget - _bias_share(setup)) * experts)
    recipe = Recipe(experts, shared, "threshold", rank=1)
    folder = _converted(setup, recipe, shared + 1)
    if refit:
        folder = _calibrated(setup, folder, shared, refit_gates=False)
    if is_distilled:
        folder = _distilled(setup, folder)
    return measure_moe(setup, folder, is_static=True)


# ---------------------------------------------------------------------------------------------------- ours


@dataclass(frozen=True)
class Recipe:
    """How one of our models is made, up to its budget."""

    experts: int
    shared: int
    routing: str
    rank: int | None  # of the gates; None: full
    split: str = "activations"
    refit: str | None = "gates and down_proj"  # or "down_proj"; None: not calibrated
    final_norm: bool = True  # as it was fitted, if the recipe is calibrated

    def gate_share(self, setup: Setup) -> float:
        """The gates' parameters over those of the dense MLPs."""
        config, routed = setup.checkpoint.config, self.experts - self.shared
        hidden = config.hidden_size
        weights = self.rank * (hidden + routed) if self.rank else hidden * routed
        return (weights + routed) / (3 * hidden * config.intermediate_size)


def recipe_at(setup: Setup, experts: int, routing: str, budget: float, **changes: Any) -> Recipe:
    """The default recipe for a budget, but for `changes`: an eighth of the experts is shared, at small budgets a
    sixteenth; gates have --gate_rank where that makes them smaller."""
    recipe = Recipe(experts, experts // (8 if budget > 0.4 else 16), routing, setup.arguments.gate_rank or None)
    recipe = replace(recipe, **changes)
    full = replace(recipe, rank=None)
    return full if full.gate_share(setup) <= recipe.gate_share(setup) else recipe


# What each ingredient adds: names and changes to the recipe, from the least to all but the last.
STEPS = {
    "random experts, top_k": dict(split="random", shared=0, routing="top_k", refit=None),
    "split on weights": dict(split="weights", shared=0, routing="top_k", refit=None),
    "split on activations": dict(shared=0, routing="top_k", refit=None),
    "and shared experts": dict(routing="top_k", refit=None),
    "and a threshold": dict(refit=None),
    "and down_proj refitted": dict(refit="down_proj", final_norm=False),
    "and gates refitted": dict(final_norm=False),
}


def measure_ours(setup: Setup, recipe: Recipe, budget: float) -> dict[str, Any]:
    """A recipe, with as many experts as the budget has room for beside the gate."""
    return measure_moe(setup, _at(setup, recipe, budget), final_norm=recipe.final_norm)


def measure_dialled(setup: Setup, recipe: Recipe, calibrated_at: float, budget: float) -> dict[str, Any]:
    """A recipe calibrated at one budget and run at another, as `set_active_fraction` does it."""
    return measure_moe(setup, _at(setup, recipe, calibrated_at), budget=budget)


def measure_distilled(setup: Setup, recipe: Recipe, budget: float) -> dict[str, Any]:
    """A recipe, distilled."""
    return measure_moe(setup, _distilled(setup, _at(setup, recipe, budget)))


def _at(setup: Setup, recipe: Recipe, budget: float) -> Path:
    """The folder of a recipe's checkpoint at a budget."""
    parts = recipe.gate_share(setup) + (_bias_share(setup) if recipe.refit else 0)
    room = budget * (1 - MARGIN[recipe.routing]) - parts
    num_selects = math.floor(room * recipe.experts)
    folder = _converted(setup, recipe, num_selects)
    return _calibrated(setup, folder, num_selects, recipe.refit != "down_proj") if recipe.refit else folder


def _bias_share(setup: Setup) -> float:
    """The output bias, in the dense MLP's parameters."""
    return 1 / (3 * setup.checkpoint.config.intermediate_size)


def _converted(setup: Setup, recipe: Recipe, num_selects: int) -> Path:
    """The folder of a recipe's checkpoint, with ridge gates, before calibration."""
    checkpoint, seed = setup.checkpoint, setup.arguments.seed
    work = setup.work / f"{recipe.split}-{recipe.experts}-{recipe.shared}-{recipe.rank or 'full'}"
    common = dict(device=setup.device, progress=progress_bar)
    if recipe.split == "activations":
        features = Features(setup.features, checkpoint, TEMPLATES[0])
        counts = dict(num_experts=recipe.experts, num_shared_experts=recipe.shared)
        settings = SplitSettings(cluster_on="activations", seed=seed, **counts)
        split = split_by_activations(checkpoint, features, work, TEMPLATES[0], settings, **common)
    elif recipe.split == "weights":
        settings = SplitSettings(num_experts=recipe.experts, seed=seed)
        split = split_by_weights(checkpoint, work, [TEMPLATES[0]], settings, **common)
    else:
        settings = RandomSplitSettings(num_experts=recipe.experts, seed=seed)
        split = split_at_random(checkpoint, work, [TEMPLATES[0]], settings)
    settings = GateSettings(
        num_experts=recipe.experts,
        num_selects=recipe.shared + 1,
        select_criterion="output_norm",
        gate_network="linear",
        gate_rank=recipe.rank,
    )
    gates = _gates(setup, split.folder, work, settings)
    conversion = ConvertSettings(num_experts=recipe.experts, num_selects=num_selects, routing=recipe.routing)
    folder = work / f"{recipe.routing}-{num_selects}"
    return convert(checkpoint, split.folder, gates, folder, conversion, progress=progress_bar).folder


def _gates(setup: Setup, split: Path, work: Path, settings: GateSettings) -> Path:
    """The folder of stage 3's gates."""
    layers = list(range(setup.checkpoint.config.num_hidden_layers))
    arguments = (setup.checkpoint, split, setup.features, work, settings)
    return train_gates(*arguments, layers=layers, device=setup.device, progress=progress_bar).folder


def _calibrated(setup: Setup, moe: Path, num_selects: int, refit_gates: bool = True) -> Path:
    """The folder of the checkpoint calibrated at a budget."""
    settings = CalibrateSettings(num_selects=num_selects, refit_gates=refit_gates, output_bias=True, batch_size=BATCH)
    folder = moe.with_name(f"{moe.name}-{'calibrated' if refit_gates else 'refitted'}")
    inputs = (setup.checkpoint, moe, setup.corpus, folder, settings)
    return calibrate(*inputs, device=setup.device, progress=progress_bar).folder


def _distilled(setup: Setup, moe: Path) -> Path:
    """The folder of the checkpoint distilled at its budget."""
    tokens, bf16 = setup.arguments.distillation_tokens, setup.arguments.bf16
    settings = DistillSettings(lr=DISTILLATION_LR, bf16=bf16)
    corpus = _corpus(setup.checkpoint, setup.arguments, tokens)
    folder = moe.with_name(f"{moe.name}-distilled-{tokens}{'-bf16' if bf16 else ''}")
    inputs = (setup.checkpoint, moe, corpus, folder, settings)
    return distill(*inputs, device=setup.device, progress=progress_bar).folder
