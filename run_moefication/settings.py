"""Every setting of every stage, and the recipes: the one place of defaults, choices, checks and explanations.

There is a dataclass for each stage. Its fields are the options of the stage's script (`command_line.add_settings`), the
argument of its function, and what its folder's manifest records. Nothing heavy is imported here.

    python -m run_moefication.settings      # the recipe that the environment asks for, as shell assignments
"""

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from .moefication.errors import SettingError
from .moefication.names import features_folder, model_name, select_folder, split_folder

# The rows of these weights are the neurons of the MLP.
TEMPLATES = ("layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.up_proj.weight")
DTYPES = ("float32", "float16", "bfloat16")
DISTANCES = ("l2", "cos")
CRITERIA = ("plain", "positive", "l2_norm", "output_norm")
# What a gate computes, and which class of `llama_moe.gates` that is.
GATE_NETWORKS = {"mlp": "mlp", "linear": "linear", "similarity": "linear"}
ROUTINGS = ("top_k", "threshold")
CLUSTERED_ON = ("weights", "activations")
GRAPH = "graph"  # what a recipe or the shell calls the split by a graph, beside these two
FORMATS = ("full", "inputs")
CONVERT_TYPES = ("LlamaMoEModel", "LlamaMoEForCausalLM", "LlamaMoEForSequenceClassification")
TRAINED = ("gates", "experts", "all")
EQUAL = "equal"
ON, OFF = "on", "off"
EXPORT_FORMATS = ("gguf", "granitemoeshared", "glm4_moe")
OUTTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
# What a report has both models continue, if nothing else is asked for.
PROMPTS = ("The capital of France is", "Once upon a time, there was", "To bake bread you need")
# What the calibrated recipe aims at, by the frontier in scripts/README.md: the neurons of an expert that give the best
# perplexity at equal time at LLaMA-7B's shape, and the experts of a layer below which small models lose much.
EXPERT_WIDTH, FEWEST_EXPERTS = 256, 40
# Least and most experts of a layer with a fixed number per token, for engines: few and wide, as their kernels want.
ENGINE_EXPERTS = (16, 48)


class Check(NamedTuple):
    """Which values are right, and the rest of the sentence about one that is not."""

    is_right: Callable[[Any], Any]
    otherwise: str


def at_least(minimum: int) -> Check:
    """The check of a whole number."""
    return Check(lambda value: value >= minimum, f"must be at least {minimum}")


COUNT = at_least(1)
POSITIVE = Check(lambda value: 0 < value < math.inf, "must be a positive number")
NOT_NEGATIVE = Check(lambda value: 0 <= value < math.inf, "must be a number, 0 or more")
FRACTION = Check(lambda value: 0 < value < 1, "is not a fraction between 0 and 1")
SHARE = Check(lambda value: 0 < value <= 1, "is not a fraction in (0, 1]; one percent is 0.01")
HUB_ID = Check(re.compile(r"([\w.-]+/)?[\w.-]+").fullmatch, "is no id of the hub, such as owner/name")
SEED = Check(lambda value: 0 <= value < 2**32, "is outside of 0 to 2^32 - 1")


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: Collection[str] | None = None,
    check: Check | None = None,
    only: str | None = None,
    is_recorded: bool = True,
    is_option: bool = True,
) -> Any:
    """A field of a stage's settings.

    Args:
        default: None where the stage finds a value of its own; without one the setting must be given.
        only: "field value", or "field value or value": the values of a field above with which this one has an effect.
            With other values it is None.
        is_recorded: whether it shapes the result, so that manifests name it.
        is_option: whether the stage's script has it.
    """
    rules = dict(choices=choices, check=check, only=only, default=default, is_recorded=is_recorded, is_option=is_option)
    if only:
        known = f"{help} (default: {default})" if default else help
        help = (f"{known[:-1]}; " if known.endswith(")") else f"{known} (") + f"with --{only})"
    return field(default=None if only else default, metadata=rules | {"help": help})


def template(**rules: Any) -> Any:
    """The one template of a stage."""
    help = "weight whose rows are the neurons, {} standing for the layer"
    return setting(TEMPLATES[0], help, choices=TEMPLATES, **rules)


def seed(what: str, **rules: Any) -> Any:
    """The seed of `what`."""
    return setting(0, f"seed of {what}, 0 to 2^32 - 1", check=SEED, **rules)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Checks each field by its own rule when it is made, and then, by `check`, what fields say together."""

    def __post_init__(self) -> None:
        for one in fields(self):
            name, value, rules = one.name, getattr(self, one.name), one.metadata
            if value is None and rules["only"] and self._has_effect(one):
                value = rules["default"]
                object.__setattr__(self, name, value)
            if value is None:
                continue
            if not self._has_effect(one):
                raise SettingError(f"{name} is for {rules['only']}")
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if rules["choices"] and item not in rules["choices"]:
                    raise SettingError(f"{name} {item!r} is not one of {', '.join(rules['choices'])}")
            if rules["check"] and not rules["check"].is_right(value):
                raise SettingError(f"{name} {value} {rules['check'].otherwise}")
        self.check()

    def _has_effect(self, one: Field) -> bool:
        name, _, values = (one.metadata["only"] or "").partition(" ")
        return not name or getattr(self, name) in values.split(" or ")

    def recorded(self) -> dict[str, Any]:
        """The settings that shape the result, as manifests record them."""
        shaping = (one for one in fields(self) if one.metadata["is_recorded"] and self._has_effect(one))
        values = {one.name: getattr(self, one.name) for one in shaping}
        return {name: [*value] if isinstance(value, tuple) else value for name, value in values.items()}  # as JSON does

    def check(self) -> None:
        """Refuse fields that do not go together."""


def require_shared(num_shared_experts: int, num_experts: int) -> None:
    """Refuse shared experts that leave none to route, or none to share."""
    if not 0 <= num_shared_experts < num_experts:
        limits = f"0 to {num_experts - 1}: one at least of num_experts {num_experts} is routed"
        raise SettingError(f"num_shared_experts {num_shared_experts} is outside of {limits}")


def require_selects(num_selects: int, num_experts: int, num_shared_experts: int = 0) -> None:
    """Refuse a budget that is not between one routed expert beside the shared ones, and all experts."""
    minimum = num_shared_experts + 1
    if not minimum <= num_selects <= num_experts:
        shared = f" ({num_shared_experts} are shared)" if num_shared_experts else ""
        raise SettingError(f"num_selects {num_selects} is outside of {minimum} to num_experts {num_experts}{shared}")


def require_rank(rank: int | None, hidden_size: int, num_routed_experts: int) -> None:
    """Refuse a rank that no gate of this shape has."""
    limit = min(hidden_size, num_routed_experts)
    if rank is not None and not 1 <= rank <= limit:
        raise SettingError(f"gate_rank {rank} is outside of 1 to {limit}, the smaller side of the gate")


EXPERTS_HELP = "experts per layer; must divide the MLP's width"
SPLIT_EXPERTS_HELP = "experts per layer, those of the split"
SHARED_HELP = "experts that always run; --num_experts counts them"
KEEP_HELP = "share of neurons a token needs, on average"
BATCH_HELP = "blocks of --train_data_path at a time"
for_activations = partial(setting, only="cluster_on activations")
for_adam = partial(setting, only="gate_fit adam")


@dataclass(frozen=True, kw_only=True)
class CorpusSettings(Settings):
    """Which text a stage reads, and how it is cut into blocks."""

    block_size: int | None = setting(None, "tokens per block (default: 2048, or what the model takes)")
    domain_weights: Mapping[str, float] | str | None = setting(
        None, "domain=weight,..., by words in the names of files or folders; or equal (default: LLaMA's training mix)"
    )
    data_use_percent: float = setting(1.0, "fraction of the tokens that the mix allows; 0.01: one percent", check=SHARE)
    max_tokens: int | None = setting(None, "most tokens, all domains together (default: no limit)", check=COUNT)
    skip_bad_lines: bool = setting(False, "count lines that hold no document, and go on without them")
    seed: int = seed("the choice and order of blocks")


@dataclass(frozen=True, kw_only=True)
class SplitSettings(Settings):
    """Stage 1: how neurons are cut into experts."""

    method: ClassVar[str] = "Clustering"  # the last word of the folder's name
    num_experts: int = setting(help=EXPERTS_HELP)
    cluster_on: str = setting("weights", "by weight rows, or by the tokens that need a neuron", choices=CLUSTERED_ON)
    num_shared_experts: int = setting(0, "those of --num_experts that always run (with --cluster_on activations)")
    keep_fraction: float | None = for_activations(0.3, KEEP_HELP, check=FRACTION)
    distance: str = setting("l2", "of rows to centres: squared Euclidean, or one minus the cosine", choices=DISTANCES)
    batch_size: int | None = for_activations(4, BATCH_HELP, check=COUNT)
    seed: int = seed("k-means++, and the choice of blocks")

    def check(self) -> None:
        """Refuse shared experts where no activations choose them."""
        if self.cluster_on == "activations":
            require_shared(self.num_shared_experts, self.num_experts)
        elif self.num_shared_experts:
            raise SettingError("num_shared_experts is for cluster_on activations")

    @property
    def reads_text(self) -> bool:
        """Whether a text decides, and not the weights."""
        return self.cluster_on == "activations"


@dataclass(frozen=True, kw_only=True)
class GraphSplitSettings(Settings):
    """Stage 1 by a graph of which neurons the same tokens need."""

    method: ClassVar[str] = "Graph"
    reads_text: ClassVar[bool] = True
    num_experts: int = setting(help=EXPERTS_HELP)
    num_shared_experts: int = setting(0, SHARED_HELP)
    keep_fraction: float = setting(0.3, KEEP_HELP, check=FRACTION)
    num_neighbours: int = setting(128, "edges that a neuron keeps: its strongest", check=COUNT)
    batch_size: int = setting(4, BATCH_HELP, check=COUNT)
    seed: int = seed("METIS, and the choice of blocks")

    def check(self) -> None:
        """Refuse to begin without METIS."""
        require_shared(self.num_shared_experts, self.num_experts)
        if find_spec("pymetis") is None:
            cure = "pip install -e '.[graph]' -c constraints.txt"
            raise SettingError(f"a split by the graph needs the package pymetis: {cure}")


@dataclass(frozen=True, kw_only=True)
class RandomSplitSettings(Settings):
    """Stage 1 at random, the control."""

    method: ClassVar[str] = "Random"
    num_experts: int = setting(help=EXPERTS_HELP)
    num_shared_experts: int = setting(0, SHARED_HELP)
    seed: int = seed("the random deal")


@dataclass(frozen=True, kw_only=True)
class FeatureSettings(Settings):
    """Stage 2: what is recorded while the dense model reads text."""

    feature_format: str = setting("full", "full: MLP inputs and activations; inputs: only those", choices=FORMATS)
    templates: str | None = template(only="feature_format full")
    batch_size: int = setting(4, "blocks per forward pass; limits device memory", check=COUNT)
    save_interval: int = setting(1, "batches per file; two files lie in host memory at a time", check=COUNT)
    dtype: str = setting("bfloat16", "dtype of the stored features", choices=DTYPES)


@dataclass(frozen=True, kw_only=True)
class GateSettings(Settings):
    """Stage 3: what shapes a gate."""

    templates: str = template()
    num_experts: int = setting(help=SPLIT_EXPERTS_HELP)
    num_selects: int = setting(help="experts per token that gates are trained for; conversion may choose otherwise")
    select_criterion: str = setting(
        "l2_norm",
        "score of an expert, whose neurons have activations a: plain, |sum a|; positive, sum max(a, 0); l2_norm, sum "
        "a^2; output_norm, the norm of what the expert adds to the MLP's output",
        choices=CRITERIA,
    )
    gate_network: str = setting(
        "mlp", "mlp: Linear-Tanh-Linear; linear: one Linear; similarity: fixed expert centres", choices=GATE_NETWORKS
    )
    gate_fit: str | None = setting(
        None,
        "ridge: in closed form; adam: by training (default: ridge for linear, adam for mlp)",
        choices=("ridge", "adam"),
        only="gate_network mlp or linear",
    )
    gate_rank: int | None = setting(
        None, "rank of a gate of two factors, cheaper with many experts (default: full)", only="gate_fit ridge"
    )
    gate_bias: str | None = setting(
        None,
        "off: scores without a bias, which some engines cannot have (default: on)",
        choices=(ON, OFF),
        only="gate_fit ridge",
    )
    use_softmax: bool | None = for_adam(False, "learn scores (KL divergence) instead of the top-k set; recommended")
    epochs: int | None = for_adam(30, "passes over the tokens, at most", check=at_least(0))
    batch_size: int | None = for_adam(1024, "tokens per step", check=COUNT)
    lr: float | None = for_adam(0.01, "peak of the one-cycle learning rate", check=POSITIVE)
    valid_percent: float = setting(0.1, "fraction of the tokens held out to measure on", check=FRACTION)
    patience: int | None = for_adam(10, "epochs without a gain that end the training", check=COUNT, is_option=False)
    seed: int | None = seed("the order of tokens in training", only="gate_fit adam")

    def __post_init__(self) -> None:
        if self.gate_fit is None and self.gate_network != "similarity":
            object.__setattr__(self, "gate_fit", "ridge" if self.gate_network == "linear" else "adam")
        super().__post_init__()

    def check(self) -> None:
        """Refuse a closed form of gates that are not linear, and a budget of more experts than there are."""
        if self.gate_fit == "ridge" and self.gate_network != "linear":
            raise SettingError("gate_fit ridge is for gate_network linear")
        if self.gate_bias == OFF and self.gate_rank is not None:
            raise SettingError("gate_bias off is for gates without a gate_rank")
        require_selects(self.num_selects, self.num_experts)


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Settings):
    """Stage 4: which experts run, and what kind of checkpoint is written. Counts of experts include shared ones."""

    num_experts: int = setting(help=SPLIT_EXPERTS_HELP)
    num_selects: int = setting(help="experts per token, shared ones included; need not be what gates were trained for")
    templates: str = template()
    routing: str = setting(
        "top_k", "top_k: --num_selects for all tokens; threshold: so many on average, by their scores", choices=ROUTINGS
    )
    min_selects: int | None = setting(None, "the least experts for any token (default: 0)", only="routing threshold")
    max_selects: int | None = setting(None, "the most experts for any token (default: all)", only="routing threshold")
    convert_type: str = setting("LlamaMoEForCausalLM", "class of the new checkpoint", choices=CONVERT_TYPES)
    dtype: str | None = setting(None, "dtype of the new weights (default: as in the source)", choices=DTYPES)
    base_model_id: str | None = setting(
        None,
        "id of the dense model on the hub, for the model card (default: --model_path, of a folder its last part)",
        check=HUB_ID,
    )
    num_labels: int | None = setting(
        None,
        "labels of a new classification head (zeros, to be trained), where the source has none (default: 2)",
        only="convert_type LlamaMoEForSequenceClassification",
    )

    def check(self) -> None:
        """Refuse a budget of more experts than there are."""
        require_selects(self.num_selects, self.num_experts)


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings(Settings):
    """Stage 5: what is refitted, and for which budget."""

    num_selects: int | None = setting(None, "experts per token, shared ones included, from now on (default: as given)")
    refit_gates: bool = setting(False, "refine linear gates on what the calibrated layers before them produce")
    gate_bias: str | None = setting(
        None, "whether refitted gates have a bias, which some engines cannot have (default: on)", choices=(ON, OFF)
    )
    output_bias: bool = setting(False, "fit a bias on each MLP's output, too, which engines for other MoEs cannot have")
    fit_logits: bool = setting(
        False,
        "then fit norms, output biases and a factor per expert, all layers together, to the dense model's logits",
    )
    batch_size: int = setting(4, "blocks at a time", check=COUNT)

    def check(self) -> None:
        """Refuse to say how gates are refitted that are not."""
        if self.gate_bias and not self.refit_gates:
            raise SettingError("gate_bias is for refit_gates")


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Settings):
    """Stage 6: what is trained, and how long."""

    num_selects: int | None = setting(None, "experts per token, shared ones included, from now on (default: as given)")
    nested_selects: Sequence[int] | None = setting(
        None, "other such budgets; each step draws one of these and --num_selects, so that one model serves all"
    )
    train: str = setting("all", "gates; experts, shared ones and output biases included; or both", choices=TRAINED)
    clone_weight: float = setting(1.0, "weight of the layers' errors beside the KL divergence", check=NOT_NEGATIVE)
    lr: float = setting(2e-4, "learning rate of Adam, at the top of its cosine", check=POSITIVE)
    epochs: int = setting(1, "passes over the text", check=COUNT)
    batch_size: int = setting(2, "blocks at a time in each process", check=COUNT)
    gradient_accumulation_steps: int = setting(1, "batches of each process in a training step", check=COUNT)
    bf16: bool = setting(False, "compute in bfloat16; weights stay in float32 meanwhile")
    save_steps: int = setting(100, "steps after which an interrupted run can go on", check=COUNT, is_recorded=False)


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """What is evaluated, and on how much text."""

    num_selects: Sequence[int] | None = setting(None, "budgets to evaluate MoE checkpoints at (default: their own)")
    block_size: int | None = setting(None, "tokens per block (default: 2048, or what the models take)")
    max_tokens: int | None = setting(None, "read only so many tokens (default: all)", check=at_least(2))
    batch_size: int = setting(4, "blocks per forward pass", check=COUNT)
    dtype: str | None = setting(None, "dtype to run in (default: float32 on CPUs, else the model's)", choices=DTYPES)


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """What a report measures, and on how much text."""

    num_selects: Sequence[int] | None = setting(
        None, "other budgets to measure, for the dial (default: a quarter, half, three quarters and all of the experts)"
    )
    block_size: int | None = setting(None, "tokens per block (default: 2048, or what the models take)")
    max_tokens: int = setting(2048, "most tokens of each text", check=at_least(2))
    batch_size: int = setting(4, "blocks per forward pass", check=COUNT)
    dtype: str | None = setting(None, "dtype to run in (default: float32 on CPUs, else the model's)", choices=DTYPES)
    layer: int | None = setting(
        None, "layer whose experts are shown one by one, from 0 (default: where the texts' loads differ most)"
    )
    prompts: Sequence[str] | None = setting(
        None, "beginnings that both models continue, always by the most likely token (default: three of everyday life)"
    )
    new_tokens: int = setting(24, "tokens after each of them", check=COUNT)
    rounds: int = setting(5, "rounds in which dense and MoE are timed in turn", check=COUNT)
    passage_tokens: int = setting(160, "tokens of each text that are shown in colours", check=COUNT)

    def check(self) -> None:
        """Refuse prompts of which there is nothing to continue."""
        if not all(map(str.strip, self.prompts or PROMPTS)):
            raise SettingError("prompts: there is nothing to continue in an empty text")


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """What a LlamaMoE is written as for other programs, and how much text the result is checked on."""

    format: str = setting(
        help="gguf: a file for llama.cpp; granitemoeshared (exact, for gates without a bias) and glm4_moe (nearly "
        "exact): a checkpoint of that class of transformers, vLLM and SGLang",
        choices=EXPORT_FORMATS,
    )
    outtype: Sequence[str] | None = setting(
        None,
        "type of the weights, gates excepted; several for gguf, a file each (default: f16 for gguf, else as they are)",
        choices=OUTTYPES,
    )
    max_selects: int | None = setting(
        None, "for models that route by threshold: the most experts that a token runs; each token then costs that"
    )
    max_tokens: int = setting(512, "tokens of the text to check on", check=at_least(2))

    def check(self) -> None:
        """Refuse types that a checkpoint of transformers does not have."""
        given = self.outtype or ()
        if self.format != "gguf" and (len(given) > 1 or {*given} - {"f32", "f16", "bf16"}):
            raise SettingError(f"outtype {' '.join(given)}: format {self.format} has one of f32, f16, bf16")
        if len({*given}) < len(given):
            raise SettingError(f"outtype {' '.join(given)} names a type twice")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which settings belong together, as rules over the number of experts; the defaults are the calibrated recipe."""

    name: str = "calibrated"
    experts: int | None = None  # per layer, if no other number is asked for; None: as `num_experts` finds
    selects: int | Fraction = Fraction(1, 2)  # that run per token, shared ones included: a number, or a fraction of all
    cluster_on: str = "activations"  # or weights, or graph
    # Pairs (above, share): the first whose fraction `above` of all experts is exceeded by those that run has the
    # fraction `share` of all experts shared; without one, half of those that run are. None: none are.
    shared: tuple[tuple[Fraction, Fraction], ...] | None = (
        (Fraction(2, 5), Fraction(1, 8)),
        (Fraction(1, 8), Fraction(1, 16)),
    )
    select_criterion: str = "output_norm"
    gate_network: str = "linear"
    gate_rank: int | None = 64  # where a layer has `rank_from` experts or more; other gates have full rank
    rank_from: int = 256
    routing: str = "threshold"
    output_bias: bool = True
    is_calibrated: bool = True  # whether stage 5 belongs to it
    split_tokens: int = 32_768  # how much text each stage reads
    feature_tokens: int = 65_536
    calibration_tokens: int = 131_072
    distillation_tokens: int = 131_072
    domain_weights: str | None = EQUAL  # the mix that every stage reads; None for that of LLaMA's pretraining

    def at(self, active: float) -> "Recipe":
        """The same for another budget: this share of the experts runs per token, shared ones included."""
        return replace(self, selects=Fraction(str(active)))

    def num_experts(self, intermediate_size: int) -> int:
        """Experts of a layer, if no other number is asked for: FEWEST_EXPERTS or more, for engines as many as
        ENGINE_EXPERTS says, as far as there are neurons. Of the widths that divide `intermediate_size`, theirs is the
        one nearest to EXPERT_WIDTH, among multiples of 64, which kernels like best, or if there are none of 32, 16 or
        1. (Where no number that engines hold divides the neurons, it is the next smaller one that does.)"""
        if self.experts is not None:
            return self.experts
        fewest, most = ENGINE_EXPERTS if self.routing == "top_k" else (FEWEST_EXPERTS, intermediate_size)
        narrowest, widest = -(-intermediate_size // most), max(1, intermediate_size // fewest)
        widths = [width for width in range(narrowest, intermediate_size + 1) if intermediate_size % width == 0]
        divisors = [width for width in widths if width <= widest] or widths[:1]
        suited = ([width for width in divisors if width % unit == 0] for unit in (64, 32, 16, 1))
        return intermediate_size // min(next(filter(None, suited)), key=lambda width: abs(width - EXPERT_WIDTH))

    def num_selects(self, num_experts: int) -> int:
        """Experts that run per token, shared ones included."""
        return self.selects if isinstance(self.selects, int) else int(num_experts * self.selects)

    def num_shared_experts(self, num_experts: int, num_selects: int) -> int:
        """Experts of these that run for every token."""
        if self.shared is None:
            return 0
        for above, share in self.shared:
            if num_selects > above * num_experts:
                return int(num_experts * share)
        return num_selects // 2

    def rank(self, num_experts: int) -> int | None:
        """Rank of the gates; None for full ones."""
        return self.gate_rank if num_experts >= self.rank_from else None


CALIBRATED = Recipe()
# The original description's: 8 experts clustered on weights, MLP gates, 2 of 8 for every token.
PLAIN = Recipe(
    name="plain",
    experts=8,
    selects=2,
    cluster_on="weights",
    shared=None,
    select_criterion="l2_norm",
    gate_network="mlp",
    gate_rank=None,
    routing="top_k",
    output_bias=False,
    is_calibrated=False,
    domain_weights=None,
)
# What engines for other MoEs can hold: a fixed number of experts for every token, 29 routed ones at most (llama.cpp's
# limit) at any budget up to three quarters, and no bias on an MLP's output.
ENGINE = Recipe(
    name="engine",
    shared=((Fraction(2, 5), Fraction(1, 6)), (Fraction(1, 8), Fraction(1, 12))),
    routing="top_k",
    output_bias=False,
)
RECIPES = {recipe.name: recipe for recipe in (CALIBRATED, ENGINE, PLAIN)}


# ---------------------------------------------------------------------------------------------------- the shell's side

# Settings of the shell scripts: the recipe's by the same name, and those that are whole numbers.
TOKENS = ("SPLIT_TOKENS", "FEATURE_TOKENS", "CALIBRATION_TOKENS", "DISTILLATION_TOKENS")
OF_RECIPE = ("CLUSTER_ON", "SELECT_CRITERION", "GATE_NETWORK", "ROUTING", "DOMAIN_WEIGHTS", *TOKENS)
COUNTS = ("NUM_EXPERTS", "NUM_SELECTS", "NUM_SHARED_EXPERTS", *TOKENS, "BLOCK_SIZE", "EVAL_TOKENS", "NUM_GPUS")


def intermediate_size(model_path: str) -> int:
    """Of the model that MODEL_PATH names, a folder or hub id; LLaMA-7B's if it names none, which the stage refuses."""
    if not model_path:
        return 11_008
    config = Path(model_path, "config.json")
    try:
        if not Path(model_path).exists():
            from huggingface_hub import snapshot_download  # takes a while, and folders do without

            config = Path(snapshot_download(model_path, allow_patterns="config.json"), "config.json")
        size = json.loads(config.read_bytes())["intermediate_size"]
    except (ImportError, OSError, ValueError, LookupError, TypeError):
        size = None
    if not config.parent.exists():
        what = "is no folder here, and no hub id (owner/name) that the hub answers to"
        raise SettingError(f"MODEL_PATH={model_path} {what}")
    if not isinstance(size, int) or not 0 < size < 1 << 24:
        where = f"MODEL_PATH={model_path} has no config.json with an intermediate_size"
        raise SettingError(f"NUM_EXPERTS is not given, and {where} to propose it from")
    return size


def shell_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The shell scripts' settings of the recipe that the environment asks for; what is given there stays as it is."""
    given = {name: value for name, value in environment.items() if value}
    name = given.get("RECIPE", CALIBRATED.name)
    if name not in RECIPES:
        raise SettingError(f"RECIPE={name}: {' or '.join(RECIPES)}")
    for number in COUNTS:
        least = 0 if number == "NUM_SHARED_EXPERTS" else 1
        text = given.get(number, str(least))
        if not re.fullmatch(r"0|[1-9][0-9]{0,17}", text) or int(text) < least:
            raise SettingError(f"{number}={text}: a whole number is needed, {least} or more")
    recipe = RECIPES[name]
    model_path, save_path = given.get("MODEL_PATH", ""), given.get("SAVE_PATH", "")
    model, asked = model_name(model_path), given.get("NUM_EXPERTS")
    num_experts = int(asked or recipe.experts or recipe.num_experts(intermediate_size(model_path)))
    num_selects = int(given.get("NUM_SELECTS", recipe.num_selects(num_experts)))
    if not 1 <= num_selects <= num_experts:
        raise SettingError(f"NUM_SELECTS={num_selects} is outside of 1 to NUM_EXPERTS={num_experts}")
    of_recipe = {name: getattr(recipe, name.lower()) or "" for name in OF_RECIPE}
    of_recipe["NUM_SHARED_EXPERTS"] = recipe.num_shared_experts(num_experts, num_selects)
    settings = {name: given.get(name, value) for name, value in of_recipe.items()}
    if settings["CLUSTER_ON"] not in (*CLUSTERED_ON, GRAPH):
        raise SettingError(f"CLUSTER_ON={settings['CLUSTER_ON']}: {', '.join(CLUSTERED_ON)} or {GRAPH}")
    if settings["CLUSTER_ON"] == "weights":
        if int(given.get("NUM_SHARED_EXPERTS", 0)):
            shared = f"NUM_SHARED_EXPERTS={settings['NUM_SHARED_EXPERTS']}"
            raise SettingError(f"{shared} is for CLUSTER_ON=activations or graph, not weights")
        settings["NUM_SHARED_EXPERTS"] = 0
    gates = settings["GATE_NETWORK"], given.get("GATE_FIT", "ridge"), given.get("GATE_BIAS", ON)
    rank = recipe.rank(num_experts) if gates == ("linear", "ridge", ON) else None  # others have none
    method = GraphSplitSettings.method if settings["CLUSTER_ON"] == GRAPH else SplitSettings.method
    settings |= {
        "RECIPE": name,
        "NUM_EXPERTS": num_experts,
        "NUM_SELECTS": num_selects,
        "BUDGET": given.get("NUM_SELECTS", ""),
        # These two may be given as empty, which says none.
        "GATE_RANK": environment.get("GATE_RANK", rank or ""),
        "OUTPUT_BIAS": environment.get("OUTPUT_BIAS", 1 if recipe.output_bias else ""),
        "SPLIT_FOLDER": split_folder(save_path, model, num_experts, method),
        "FEATURES_FOLDER": features_folder(save_path, model),
        "SELECT_FOLDER": select_folder(save_path, model, num_experts),
    }
    return {name: str(value) for name, value in settings.items()}


def main() -> int:
    """Print the assignments; returns the exit status."""
    try:
        for name, value in shell_settings(os.environ).items():
            print(f"{name}={shlex.quote(value)}")
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
