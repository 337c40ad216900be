"""How much each method costs in perplexity at 75, 50 and 25 % active: one table, the same tokens for every method.

python scripts/bench_quality.py --model_path .cache/SmolLM2-135M-Instruct --train_data_path .cache/llama_data \\
  --heldout_path .cache/llama_data/heldout --work .quality --wikitext_path wiki.test.raw

Active is what ran per token on the evaluation text, over the dense MLPs' parameters: shared experts, gates and biases
count. A row over its budget is marked with *. Rows are kept in the --json file and checkpoints in --work: run again, it
goes on where it stopped, and measures no row twice.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from run_moefication import command_line

BLOCK = 512
BATCH = 8  # blocks at a time
FEATURE_TOKENS = 32768  # for the splits, and for the gates of stage 3, which calibration fits anew
DISTILLATION_LR = 2e-4  # for a long run: the stage's default, 1e-4, is for shorter ones
METHODS = ("plain", "cmoe", "oracle", "static", "top_k", "threshold")


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = command_line.new_parser(__doc__)
    command_line.add_model_path(parser)
    parser.add_argument("--train_data_path", type=command_line.path, required=True, help="calibration text, a folder")
    parser.add_argument(
        "--heldout_path", type=command_line.path, required=True, help="folder of .jsonl files never calibrated on"
    )
    parser.add_argument("--wikitext_path", type=command_line.path, help="WikiText-2 test, raw; never calibrated on")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--calibration_tokens", type=int, default=131072, help="the same for every method")
    parser.add_argument("--heldout_tokens", type=int, default=4096, help="of each held-out file")
    parser.add_argument("--wikitext_tokens", type=int, default=16384, help="of --wikitext_path")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="active fractions")
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 128, 256, 512], help="for our rows")
    parser.add_argument(
        "--gate_rank", type=int, default=96, help="of gates, where it makes them smaller; 0: full gates"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="rows to measure")
    parser.add_argument(
        "--chosen", type=int, default=256, help="experts of the model that runs at other budgets, too, and is distilled"
    )
    parser.add_argument("--distill", action="store_true", help="distil the chosen model, and the static mask alike")
    parser.add_argument("--distillation_tokens", type=int, default=737280, help="one pass over so many")
    parser.add_argument("--bf16", action="store_true", help="distil in bfloat16")
    parser.add_argument("--json", type=Path, help="file of the numbers (default: rows.json in --work)")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--plot", type=Path, help="draw perplexity against active fraction into this file")
    parser.add_argument("--seed", type=command_line.seed_number, default=0, help="of blocks, clustering and bootstrap")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), bench, argv)


# ---------------------------------------------------------------------------------------------------- texts


@dataclass
class Setup:
    """The model, the text, and where things are kept."""

    checkpoint: Any
    corpus: Any
    features: Path
    texts: dict[str, list[Any]]  # blocks of each held-out file, and of "WikiText-2"
    arguments: argparse.Namespace

    @property
    def work(self) -> Path:
        return self.arguments.work


def prepare(arguments: argparse.Namespace) -> Setup:
    """Open the model, cut the texts, and record a few features for stage 3."""
    from run_moefication.moefication.checkpoints import Checkpoint
    from run_moefication.moefication.errors import MoEficationError
    from run_moefication.moefication.evaluation import first_tokens
    from run_moefication.moefication.hidden_features import extract_features

    checkpoint = Checkpoint(arguments.model_path)
    files = {
        path.stem: (path, arguments.heldout_tokens) for path in sorted(Path(arguments.heldout_path).glob("*.jsonl"))
    }
    if not files:
        raise MoEficationError(f"--heldout_path {arguments.heldout_path} holds no .jsonl file")
    if arguments.wikitext_path:
        files["WikiText-2"] = (Path(arguments.wikitext_path), arguments.wikitext_tokens)
    texts = {
        name: [block for block in first_tokens(path, checkpoint.path, count).split(BLOCK) if len(block) == BLOCK]
        for name, (path, count) in files.items()
    }
    features = extract_features(
        checkpoint,
        _corpus(checkpoint, arguments, FEATURE_TOKENS),
        arguments.work,
        template="layers.{}.mlp.gate_proj.weight",
        feature_format="inputs",
        batch_size=BATCH,
        progress=command_line.progress_bar,
    )
    corpus = _corpus(checkpoint, arguments, arguments.calibration_tokens)
    return Setup(checkpoint, corpus, features.folder, texts, arguments)


def _corpus(checkpoint: Any, arguments: argparse.Namespace, tokens: int) -> Any:
    from run_moefication.moefication.corpus import training_corpus

    return training_corpus(
        checkpoint,
        arguments.train_data_path,
        arguments.work / "cache",
        block_size=BLOCK,
        domain_weights="equal",  # as the table weighs them
        max_tokens=tokens,
        seed=arguments.seed,
        progress=command_line.progress_bar,
    )


# ---------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One row of the table: its name, its budget, and how to measure it."""

    method: str
    budget: float
    measure: Callable[[], dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)  # that its numbers depend on, beside those of all rows

    @property
    def key(self) -> str:
        return f"{self.method} at {self.budget:g}"


def bench(arguments: argparse.Namespace) -> None:
    """Measure all that was asked for, printing as it goes."""
    import timing
    import torch
    from quality_table import line, plot, table

    arguments.work.mkdir(parents=True, exist_ok=True)
    setup = prepare(arguments)
    store = Store(setup, arguments.json or arguments.work / "rows.json", timing.machine(torch.device("cpu")))
    calibration = f"{setup.corpus.num_tokens:,} calibration tokens, seed {arguments.seed}"
    print(f"{setup.checkpoint.name}; {store.machine}; {calibration}")
    results, names_and_seed = {}, (list(setup.texts), arguments.seed)
    for row in rows(setup):
        results[row.key] = store.numbers(row)
        if len(results) > 1:
            print(line(row.key, results, *names_and_seed), flush=True)
    machines = " or ".join(sorted({numbers["machine"] for numbers in results.values()}))
    markdown = table(results, *names_and_seed, f"{calibration}; {machines}")
    print(f"\n{markdown}")
    if arguments.markdown:
        arguments.markdown.write_text(markdown + "\n")
    if arguments.plot:
        plot(results, *names_and_seed, arguments.plot)


class Store:
    """The JSON file of rows: what an earlier run measured with the same settings is not measured again."""

    def __init__(self, setup: Setup, path: Path, machine: str):
        self.machine = machine
        self._path = path
        self._rows = json.loads(path.read_text()) if path.is_file() else {}
        self._settings = {
            "model": setup.checkpoint.fingerprint,
            "corpus": setup.corpus.digest,
            "texts": {name: len(blocks) for name, blocks in setup.texts.items()},
            "gate_rank": setup.arguments.gate_rank,
        }

    def numbers(self, row: Row) -> dict[str, Any]:
        """A row's numbers, measured now unless they are there."""
        from run_moefication.moefication.files import write_json

        settings = self._settings | row.settings
        if self._rows.get(row.key, {}).get("settings") != settings:
            start = time.time()
            numbers = row.measure()
            minutes = (time.time() - start) / 60
            about = {"method": row.method, "budget": row.budget, "minutes": minutes, "machine": self.machine}
            self._rows[row.key] = {"settings": settings} | about | numbers
            write_json(self._path, self._rows)
        return self._rows[row.key]


def rows(setup: Setup) -> Iterator[Row]:
    """All rows, the dense model first."""
    from quality_baselines import cmoe, oracle

    arguments = setup.arguments
    yield Row("dense", 1.0, partial(measure_dense, setup))
    for budget in arguments.budgets:
        if "plain" in arguments.methods:
            yield Row("plain recipe", budget, partial(measure_plain, setup, budget))
        if "cmoe" in arguments.methods:
            yield Row(
                "CMoE's recipe", budget, lambda b=budget: measure_masked(setup, partial(cmoe, setup.corpus.blocks, b))
            )
        if "static" in arguments.methods:
            yield Row("static mask", budget, partial(measure_static, setup, budget, refit=False))
            yield Row("static mask, refitted", budget, partial(measure_static, setup, budget, refit=True))
        for routing in ("top_k", "threshold"):
            for experts in arguments.experts if routing in arguments.methods else ():
                yield Row(_ours(experts, routing), budget, partial(measure_ours, setup, experts, routing, budget))
        if "threshold" in arguments.methods:
            name = _ours(arguments.chosen, "threshold")
            for other in (other for other in arguments.budgets if other != budget):
                yield Row(f"{name}, calibrated at {other:.0%}", budget, partial(measure_dialled, setup, other, budget))
        if arguments.distill:
            settings = {"distillation_tokens": arguments.distillation_tokens, "bf16": arguments.bf16}
            if "static" in arguments.methods:
                static = partial(measure_static, setup, budget, refit=True, is_distilled=True)
                yield Row("static mask, refitted and distilled", budget, static, settings)
            if "threshold" in arguments.methods:
                yield Row(f"{name}, distilled", budget, partial(measure_distilled, setup, budget), settings)
        if "oracle" in arguments.methods:
            yield Row("neuron oracle", budget, partial(measure_masked, setup, partial(oracle, budget)))


# ---------------------------------------------------------------------------------------------------- measuring


def measure_dense(setup: Setup) -> dict[str, Any]:
    """The dense model."""
    from quality_baselines import block_losses

    model = _load(setup.checkpoint.path)
    return {name: {"losses": block_losses(model, blocks), "active": 1.0} for name, blocks in setup.texts.items()}


def measure_masked(setup: Setup, make: Callable[[Any], list[Any]]) -> dict[str, Any]:
    """The dense model with masks on its MLPs; what the choice itself costs is not counted."""
    from quality_baselines import block_losses, masked

    model = _load(setup.checkpoint.path)
    choices = make(model)
    numbers = {}
    for name, blocks in setup.texts.items():
        with masked(model, choices) as shares:
            losses = block_losses(model, blocks)
        active = sum(shares) / len(shares)
        numbers[name] = {"losses": losses, "active": active, "neurons": active}
    return numbers


def measure_moe(setup: Setup, folder: Path, *, budget: float | None = None, is_static: bool = False) -> dict[str, Any]:
    """A LlamaMoE checkpoint, at a `budget` other than its own if one is given; or its shared experts alone: a static
    mask, which has no use for the gate's parameters."""
    from quality_baselines import block_losses

    from llama_moe import record_routing
    from run_moefication.moefication.evaluation import active_share

    model = _load(folder)
    if is_static:
        for layer in model.model.layers:
            layer.mlp.gate.set_active_share(0)
    config = model.config
    experts = config.num_experts + config.num_shared_experts
    gate = sum(p.numel() for p in model.model.layers[0].mlp.gate.parameters())
    gate /= 3 * config.hidden_size * config.intermediate_size
    if budget is not None:
        model.set_active_fraction(budget - MARGIN["threshold"] - gate - _bias_share(setup))
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


def _load(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    import llama_moe  # noqa: F401 (registers LlamaMoE)
    from run_moefication.moefication.checkpoints import quiet_transformers

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def measure_plain(setup: Setup, budget: float) -> dict[str, Any]:
    """The description's recipe: 8 experts clustered on weights, MLP gates on l2_norm, top-k."""
    from run_moefication.moefication.conversion import ConversionSettings, convert
    from run_moefication.moefication.gate_settings import GateSettings
    from run_moefication.moefication.gate_training import train_gates
    from run_moefication.moefication.splitting import split_by_weights

    template, progress = "layers.{}.mlp.gate_proj.weight", command_line.progress_bar
    work, checkpoint = setup.work / "plain", setup.checkpoint
    split = split_by_weights(
        checkpoint, work, templates=[template], num_experts=8, seed=setup.arguments.seed, progress=progress
    )
    settings = GateSettings(template, num_experts=8, num_selects=2, use_softmax=True, seed=setup.arguments.seed)
    layers = list(range(checkpoint.config.num_hidden_layers))
    gates = train_gates(checkpoint, split.folder, setup.features, work, settings, layers=layers, progress=progress)
    conversion = ConversionSettings(num_experts=8, num_selects=round(8 * budget))
    moe = convert(checkpoint, split.folder, gates.folder, work / f"{budget:g}", conversion, progress=progress)
    return measure_moe(setup, moe.folder)


def measure_static(setup: Setup, budget: float, refit: bool, is_distilled: bool = False) -> dict[str, Any]:
    """The neurons that add most, for every token alike: the shared ones of many experts, of which no other runs."""
    experts = math.gcd(512, setup.checkpoint.config.intermediate_size)
    shared = math.floor((budget - _bias_share(setup)) * experts)
    folder = _converted(setup, experts, shared, "threshold", 1, shared + 1)
    if refit:
        folder = _calibrated(setup, folder, num_selects=shared)
    if is_distilled:
        folder = _distilled(setup, folder)
    return measure_moe(setup, folder, is_static=True)


def measure_ours(setup: Setup, experts: int, routing: str, budget: float) -> dict[str, Any]:
    """Split on activations, ridge gates, calibrated: as many experts as the budget has room for beside the gate."""
    return measure_moe(setup, _ours_at(setup, experts, routing, budget))


def measure_dialled(setup: Setup, calibrated_at: float, budget: float) -> dict[str, Any]:
    """The chosen model, calibrated at one budget and run at another, as `set_active_fraction` does it."""
    return measure_moe(setup, _ours_at(setup, setup.arguments.chosen, "threshold", calibrated_at), budget=budget)


def measure_distilled(setup: Setup, budget: float) -> dict[str, Any]:
    """The chosen model, distilled."""
    return measure_moe(setup, _distilled(setup, _ours_at(setup, setup.arguments.chosen, "threshold", budget)))


def _ours(experts: int, routing: str) -> str:
    return f"ours, {experts} experts, {routing}"


def _ours_at(setup: Setup, experts: int, routing: str, budget: float) -> Path:
    """The folder of our checkpoint, calibrated at a budget."""
    config = setup.checkpoint.config
    shared, rank = shared_experts(experts, budget), setup.arguments.gate_rank
    routed, hidden = experts - shared, config.hidden_size
    gate = hidden * routed
    if 0 < rank * (hidden + routed) < gate:
        gate = rank * (hidden + routed)
    else:
        rank = None
    gate_share = (gate + routed) / (3 * hidden * config.intermediate_size)
    room = budget - MARGIN[routing] - _bias_share(setup) - gate_share
    num_selects = math.floor(room * experts)
    return _calibrated(setup, _converted(setup, experts, shared, routing, rank, num_selects), num_selects)


def _bias_share(setup: Setup) -> float:
    """The output bias, in the dense MLP's parameters."""
    return 1 / (3 * setup.checkpoint.config.intermediate_size)


# How much text the thresholds were not set on may run beyond the budget.
MARGIN = {"top_k": 0.0, "threshold": 0.008}


def shared_experts(experts: int, budget: float) -> int:
    """An eighth of the experts is shared, at small budgets a sixteenth."""
    return experts // 8 if budget > 0.4 else experts // 16


def _converted(setup: Setup, experts: int, shared: int, routing: str, rank: int | None, num_selects: int) -> Path:
    """The folder of a checkpoint split on activations, with ridge gates."""
    from run_moefication.moefication.activation_split import split_by_activations
    from run_moefication.moefication.conversion import ConversionSettings, convert
    from run_moefication.moefication.gate_settings import GateSettings
    from run_moefication.moefication.gate_training import train_gates
    from run_moefication.moefication.hidden_features import Features

    checkpoint, seed, progress = setup.checkpoint, setup.arguments.seed, command_line.progress_bar
    work = setup.work / f"{experts}-{shared}-{rank or 'full'}"
    template = "layers.{}.mlp.gate_proj.weight"
    features = Features(setup.features, checkpoint, template)
    split = split_by_activations(
        checkpoint, features, work, num_experts=experts, num_shared_experts=shared, seed=seed, progress=progress
    )
    settings = GateSettings(
        template,
        num_experts=experts,
        num_selects=shared + 1,
        select_criterion="output_norm",
        gate_network="linear",
        gate_rank=rank,
    )
    layers = list(range(checkpoint.config.num_hidden_layers))
    gates = train_gates(checkpoint, split.folder, setup.features, work, settings, layers=layers, progress=progress)
    conversion = ConversionSettings(num_experts=experts, num_selects=num_selects, routing=routing)
    folder = work / f"{routing}-{num_selects}"
    return convert(checkpoint, split.folder, gates.folder, folder, conversion, progress=progress).folder


def _calibrated(setup: Setup, moe: Path, num_selects: int) -> Path:
    """The folder of the checkpoint calibrated at a budget."""
    from run_moefication.moefication.calibration import CalibrationSettings, calibrate

    settings = CalibrationSettings(num_selects=num_selects, refit_gates=True, output_bias=True, batch_size=BATCH)
    folder = moe.with_name(f"{moe.name}-calibrated")
    progress = command_line.progress_bar
    return calibrate(setup.checkpoint, moe, setup.corpus, folder, settings, progress=progress).folder


def _distilled(setup: Setup, moe: Path) -> Path:
    """The folder of the checkpoint distilled at its budget."""
    from run_moefication.moefication.distillation import DistillationSettings, distill

    settings = DistillationSettings(lr=DISTILLATION_LR, bf16=setup.arguments.bf16)
    corpus = _corpus(setup.checkpoint, setup.arguments, setup.arguments.distillation_tokens)
    folder = moe.with_name(f"{moe.name}-distilled")
    progress = command_line.progress_bar
    return distill(setup.checkpoint, moe, corpus, folder, settings, progress=progress).folder


if __name__ == "__main__":
    sys.exit(main())
