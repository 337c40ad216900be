"""The stages as functions that take and return handles to finished folders, and all of them in turn.

Every function goes on where an interrupted call stopped, and does nothing where the folder is already finished with the
same settings and inputs. `run` may hold `overwrite` and, but for `convert`, `device`.
"""

from pathlib import Path
from typing import Any

from ...settings import (
    CALIBRATED,
    GRAPH,
    TEMPLATES,
    CalibrateSettings,
    ConvertSettings,
    CorpusSettings,
    DistillSettings,
    FeatureSettings,
    GateSettings,
    GraphSplitSettings,
    Recipe,
    SplitSettings,
)
from ..artifacts.features import Features
from ..artifacts.gates import TrainedGates
from ..artifacts.split import Split
from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.moe import MoECheckpoint
from ..errors import SettingError
from ..text.corpus import Corpus, training_corpus
from . import calibrate as calibrate_stage
from . import convert as convert_stage
from . import distill as distill_stage
from .features import extract_features
from .select import train_gates
from .split import split_by_weights
from .split_on_activations import split_by_activations

StrPath = str | Path


def read_text(dense: DenseCheckpoint, text_path: StrPath, cache_path: StrPath | None = None, **settings: Any) -> Corpus:
    """The text in a folder as the model's tokenizer cuts it; `settings` are the fields of `CorpusSettings`."""
    return training_corpus(dense, text_path, cache_path, CorpusSettings(**settings))


def split(
    dense: DenseCheckpoint,
    save_path: StrPath,
    settings: SplitSettings | GraphSplitSettings,
    text: Corpus | Features | None = None,
    *,
    template: str = TEMPLATES[0],
    **run: Any,
) -> Split:
    """Stage 1. `text` is what a split on activations, or by their graph, reads."""
    if (text is not None) != settings.reads_text:
        raise SettingError("a split on activations needs a text, and one on weights none")
    if text is None:
        writer = split_by_weights(dense, save_path, [template], settings, **run)
    else:
        writer = split_by_activations(dense, text, save_path, template, settings, **run)
    return Split(writer.folder, dense, template, settings.num_experts)


def record_features(
    dense: DenseCheckpoint, text: Corpus, save_path: StrPath, settings: FeatureSettings, **run: Any
) -> Features:
    """Stage 2, in one process."""
    folder = extract_features(dense, text, save_path, settings, **run).folder
    return Features(folder, dense, settings.templates or TEMPLATES[0])


def fit_gates(
    dense: DenseCheckpoint, experts: Split, features: Features, save_path: StrPath, settings: GateSettings, **run: Any
) -> TrainedGates:
    """Stage 3, for all layers."""
    folders = experts.artifact.folder, features.artifact.folder
    layers = list(range(dense.config.num_hidden_layers))
    writer = train_gates(dense, *folders, save_path, settings, layers=layers, **run)
    return TrainedGates(writer.folder, dense, experts)


def convert(
    dense: DenseCheckpoint,
    experts: Split,
    gates: TrainedGates,
    save_path: StrPath,
    settings: ConvertSettings,
    **run: Any,
) -> MoECheckpoint:
    """Stage 4."""
    folders = experts.artifact.folder, gates.artifact.folder
    return MoECheckpoint(convert_stage.convert(dense, *folders, save_path, settings, **run).folder, dense)


def calibrate(
    dense: DenseCheckpoint,
    moe: MoECheckpoint,
    text: Corpus,
    save_path: StrPath,
    settings: CalibrateSettings,
    **run: Any,
) -> MoECheckpoint:
    """Stage 5."""
    return MoECheckpoint(calibrate_stage.calibrate(dense, moe.path, text, save_path, settings, **run).folder, dense)


def distill(
    dense: DenseCheckpoint, moe: MoECheckpoint, text: Corpus, save_path: StrPath, settings: DistillSettings, **run: Any
) -> MoECheckpoint:
    """Stage 6, in one process."""
    return MoECheckpoint(distill_stage.distill(dense, moe.path, text, save_path, settings, **run).folder, dense)


def moefy(
    dense: DenseCheckpoint,
    text_path: StrPath,
    save_path: StrPath,
    recipe: Recipe = CALIBRATED,
    *,
    num_experts: int | None = None,
    num_selects: int | None = None,
    block_size: int | None = None,
    seed: int = 0,
    experts: Split | None = None,
    work_path: StrPath | None = None,
    features_path: StrPath | None = None,
    **run: Any,
) -> MoECheckpoint:
    """Stages 1 to 5 (1 to 4 of a recipe that calibrates nothing), as the numbered shell scripts run them.

    Args:
        text_path: a folder of text, or a file; save_path: folder of the new checkpoint.
        num_experts, num_selects: the recipe's, if not given; `num_selects` counts shared experts, too.
        block_size: tokens per block of text; None for 2048, or what the model takes.
        experts: the split to use instead of the recipe's.
        work_path: where the stages keep their files, which are needed until the checkpoint is finished; by default
            `save_path` with `-work` after it.
        features_path: where tokenised text and stage 2's features lie, which do not depend on the budget: runs for
            several budgets can share them; by default `work_path`.
    """
    num_experts = recipe.num_experts(dense.config.intermediate_size) if num_experts is None else num_experts
    num_selects = recipe.num_selects(num_experts) if num_selects is None else num_selects
    work = Path(f"{save_path}-work" if work_path is None else work_path)
    features_folder = work if features_path is None else Path(features_path)

    def text(max_tokens: int) -> Corpus:
        options = dict(domain_weights=recipe.domain_weights, block_size=block_size, seed=seed)
        return read_text(dense, text_path, features_folder / "tokens", max_tokens=max_tokens, **options)

    counts = dict(num_experts=num_experts, num_selects=num_selects)
    if experts is None:
        shared = recipe.num_shared_experts(**counts)
        options = dict(num_experts=num_experts, num_shared_experts=shared, seed=seed)
        by_graph = recipe.cluster_on == GRAPH
        settings = GraphSplitSettings(**options) if by_graph else SplitSettings(**options, cluster_on=recipe.cluster_on)
        read = text(recipe.split_tokens) if settings.reads_text else None
        experts = split(dense, work, settings, read, **run)
    settings = FeatureSettings(feature_format="inputs")
    features = record_features(dense, text(recipe.feature_tokens), features_folder, settings, **run)
    settings = GateSettings(
        **counts,
        select_criterion=recipe.select_criterion,
        gate_network=recipe.gate_network,
        gate_rank=recipe.rank(num_experts),
        **(dict(use_softmax=True, seed=seed) if recipe.gate_network == "mlp" else {}),  # the others are not trained
    )
    gates = fit_gates(dense, experts, features, work, settings, **run)
    settings = ConvertSettings(**counts, routing=recipe.routing)
    converted = work / f"{dense.name}-MoE" if recipe.is_calibrated else save_path
    moe = convert(dense, experts, gates, converted, settings, overwrite=run.get("overwrite", False))
    if not recipe.is_calibrated:
        return moe
    how = dict(refit_gates=recipe.gate_network == "linear", output_bias=recipe.output_bias)
    settings = CalibrateSettings(**how, fit_logits=True)
    return calibrate(dense, moe, text(recipe.calibration_tokens), save_path, settings, **run)
