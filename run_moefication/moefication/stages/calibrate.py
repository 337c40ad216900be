"""Stage 5: gates, thresholds and down_proj of a converted model, refitted layer by layer in closed form.

The dense and the converted model read the same text, a layer of each at a time. A layer is fitted on what the layers
before it, already calibrated, really produce, and towards the residual stream of the dense model after it: so later
layers repair what earlier ones lost. The final norm comes last.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from llama_moe import LlamaMoEConfig

from ...settings import CalibrateSettings
from ..artifacts.streams import Streams
from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.model_card import calibration_card
from ..checkpoints.moe import MoECheckpoint, require_num_selects
from ..checkpoints.tokenizers import tokenizer_files
from ..checkpoints.writer import PlannedTensor, write_checkpoint_files, write_shard
from ..errors import MoEficationError, SettingError
from ..fitting.final_norm import Divergence, fit_final_norm
from ..layers.decoder import batches_of, embed
from ..progress import Progress, no_progress
from ..storage.folder import ArtifactWriter, require_place
from ..storage.manifest import Claim, environment
from ..text.corpus import Corpus, require_held_out_block
from .calibrate_layer import LayerCalibration
from .layer_budgets import allocate, measure_sensitivity

BUDGETS = "budgets"  # the piece that says how many experts each layer runs
HELD_OUT = 6  # one block of so many is held out to choose strengths on
FINAL_NORM = "norm.weight"
# Tokens that the final norm is fitted to and measured on, half of them each: an eighth of all within these bounds, from
# all blocks, for a few documents are too special.
LEAST_FINAL_TOKENS, MOST_FINAL_TOKENS = 8192, 16384


def calibrate(
    checkpoint: DenseCheckpoint,
    moe_path: str | Path,
    corpus: Corpus,
    save_path: str | Path,
    settings: CalibrateSettings,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ArtifactWriter:
    """Write a calibrated copy of a LlamaMoE checkpoint.

    Memory: one layer of each model, five matrices of its neurons squared in float64, its activations on all tokens if
    they are at most MOST_KEPT_BYTES, and 5 bytes a token and expert. Disk, until the checkpoint is finished:
    16 * hidden_size bytes a token. Runs in float32 on every device.

    Returns: the folder's writer, finished; its metrics say by layer, and for the final norm, what the fit gained.
    """
    moe = MoECheckpoint(moe_path, checkpoint)
    config = _new_config(moe, settings)
    if Path(save_path).resolve() in (checkpoint.path, moe.artifact.folder.resolve()):
        raise SettingError(f"save_path {save_path} is one of the source checkpoints; choose another folder")
    require_place(Path(save_path), "calibrate")
    require_held_out_block(corpus)
    claim = Claim(
        stage="calibrate",
        options=settings.recorded() | corpus.options,
        source=checkpoint.source,
        environment=environment(device),
        inputs={"moe_path": moe.artifact.digest, "train_data_path": corpus.digest},
        facts={"tokens": corpus.num_tokens, "mix": [asdict(share) for share in corpus.mix]},
    )
    fitted: dict[str, torch.Tensor] = {}  # of the layer at work
    *by_layer, rest = shards = _plan(moe, config, fitted)
    writer = ArtifactWriter(Path(save_path), claim, [BUDGETS, *shards, "config"], overwrite=overwrite, exclusive=True)
    missing = writer.missing()
    if missing:
        checkpoint.check_finite(progress)  # before anything is written
    if BUDGETS in missing:
        budgets = _budgets(checkpoint, moe, config, corpus, settings, device, progress)
        writer.write_piece(BUDGETS, {}, budgets)
    config = _with_budgets(config, writer.metrics()[BUDGETS]["experts_per_tok"])
    layers = [layer for layer, file in enumerate(by_layer) if file in missing]
    for layer, metrics in _walk(checkpoint, moe, config, corpus, writer, layers, settings, fitted, device, progress):
        write_shard(writer, by_layer[layer], shards[by_layer[layer]], metrics)
    if rest in missing:
        metrics = _fit_final_norm(checkpoint, moe, corpus, writer, fitted, device, progress)
        write_shard(writer, rest, shards[rest], metrics)
    if "config" in missing:
        source, fits = moe.artifact.folder, (layer_metrics(writer), final_norm_metrics(writer))
        card = calibration_card(checkpoint.name, config, moe.model_class, corpus.num_tokens, *fits)
        files = write_checkpoint_files(writer, source, shards, config, card, tokenizer_files(source))
        writer.write_piece("config", files)
    writer.finish()
    return writer


def layer_metrics(writer: ArtifactWriter) -> list[dict[str, Any]]:
    """What each layer's fit gained, in the order of layers."""
    metrics = writer.metrics()
    return [metrics[piece] for piece in writer.pieces if "error_after" in metrics.get(piece, {})]


def final_norm_metrics(writer: ArtifactWriter) -> dict[str, float] | None:
    """What the fit of the final norm gained; None for a model that predicts no tokens."""
    return next((piece for piece in writer.metrics().values() if "divergence_after" in piece), None)


def _new_config(moe: MoECheckpoint, settings: CalibrateSettings) -> LlamaMoEConfig:
    """The config of the calibrated checkpoint."""
    config = moe.config
    if config.multiply_gate_scores or config.score_scale_factor != 1:
        raise MoEficationError(f"{moe.artifact.folder} weighs its experts by gate scores; that is not calibrated")
    if settings.layer_budgets == "sensitivity" and moe.model_class != "LlamaMoEForCausalLM":
        raise SettingError(f"layer_budgets sensitivity needs a loss, which a {moe.model_class} has not")
    if settings.refit_gates and config.gate_network != "linear":
        raise SettingError(f"refit_gates is for linear gates, not for the {config.gate_network!r} ones given")
    some = config.routing == "top_k" or not config.num_shared_experts  # with shared experts, these may be all that run
    num_selects = _num_selects(moe, settings)
    require_num_selects(num_selects, config, least_routed=int(some))
    fields = config.to_dict() | {
        "num_experts_per_tok": max(1, num_selects - config.num_shared_experts),
        "layer_num_experts_per_tok": None,
        "gate_bias": config.gate_bias or settings.refit_gates,
        "output_bias": config.output_bias or (settings.output_bias and not config.mlp_bias),
    }
    fields.pop("transformers_version", None)
    return LlamaMoEConfig.from_dict(fields)


def _num_selects(moe: MoECheckpoint, settings: CalibrateSettings) -> int:
    """The budget, shared experts included: as asked for, or else the mean of the checkpoint's layers."""
    if settings.num_selects is not None:
        return settings.num_selects
    counts = moe.experts_per_tok
    return moe.config.num_shared_experts + round(sum(counts) / len(counts))


def _budgets(
    checkpoint: DenseCheckpoint,
    moe: MoECheckpoint,
    config: LlamaMoEConfig,
    corpus: Corpus,
    settings: CalibrateSettings,
    device: str,
    progress: Progress,
) -> dict[str, list[float]]:
    """Routed experts per token of each layer, and what they follow from."""
    num_shared, num_layers = config.num_shared_experts, config.num_hidden_layers
    num_experts, routed = config.num_experts + num_shared, _num_selects(moe, settings) - num_shared
    if settings.layer_budgets == "equal" or routed == 0:
        return {"experts_per_tok": [routed] * num_layers}
    share = routed / config.num_experts
    sensitivity = measure_sensitivity(checkpoint, moe, config, corpus.blocks, share, device, progress)
    bounds = max(config.min_experts_per_tok, config.routing == "top_k"), config.most_experts_per_tok  # of each token
    least, most = ((num_shared + bound) / num_experts for bound in bounds)
    fractions = allocate(sensitivity, (num_shared + routed) / num_experts, least, most)
    experts = [round(fraction * num_experts - num_shared, 4) for fraction in fractions]
    if config.routing == "top_k":
        experts = _whole(experts)
    return {"sensitivity": sensitivity, "experts_per_tok": experts}


def _whole(counts: list[float]) -> list[int]:
    """The counts rounded up or down, those nearest to the next number up, so that their sum stays."""
    whole = [int(count) for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda layer: whole[layer] - counts[layer])
    for layer in by_remainder[: round(sum(counts)) - sum(whole)]:
        whole[layer] += 1
    return whole


def _with_budgets(config: LlamaMoEConfig, experts_per_tok: list[float]) -> LlamaMoEConfig:
    """The config with the layers' budgets, if they differ."""
    if len(set(experts_per_tok)) == 1:
        return config
    fields = config.to_dict() | {"layer_num_experts_per_tok": experts_per_tok}
    if config.routing == "top_k":
        fields["num_experts_per_tok"] = max(experts_per_tok)
    fields.pop("transformers_version", None)
    return LlamaMoEConfig.from_dict(fields)


def _plan(
    moe: MoECheckpoint, config: LlamaMoEConfig, fitted: dict[str, torch.Tensor]
) -> dict[str, list[PlannedTensor]]:
    """File name -> its tensors: a file for each layer, then one of what lies outside of them. Tensors come from
    `fitted` where they are there, else from the uncalibrated checkpoint."""
    num_layers = config.num_hidden_layers
    weight_dtype = moe.tensors["layers.0.mlp.experts.down_proj"][1]
    groups = [moe.layer_tensors(layer) for layer in range(num_layers)]
    groups.append([name for name in moe.tensors if not name.startswith("layers.")])
    infos = dict(moe.tensors)
    for layer in range(num_layers):
        mlp = f"layers.{layer}.mlp."
        new = {"gate.bias": (config.num_experts,)} if config.gate_bias else {}
        new |= {"output_bias": (config.hidden_size,)} if config.output_bias else {}
        for name in (name for name in new if mlp + name not in infos):
            infos[mlp + name] = (new[name], weight_dtype)
            groups[layer].append(mlp + name)

    def planned(name: str) -> PlannedTensor:
        shape, dtype = infos[name]
        return PlannedTensor(
            moe.stored_name(name), shape, dtype, lambda: fitted[name] if name in fitted else moe.tensor(name)
        )

    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": [planned(name) for name in group]
        for i, group in enumerate(groups, start=1)
    }


# ---------------------------------------------------------------------------------------------------- the walk


def _walk(
    checkpoint: DenseCheckpoint,
    moe: MoECheckpoint,
    config: LlamaMoEConfig,
    corpus: Corpus,
    writer: ArtifactWriter,
    layers: list[int],
    settings: CalibrateSettings,
    fitted: dict[str, torch.Tensor],
    device: str,
    progress: Progress,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Calibrate the `layers` that are missing, and those after the first of them, leaving the tensors of each in
    `fitted`; yields layer and metrics."""
    experts_per_tok = writer.metrics()[BUDGETS]["experts_per_tok"]
    num_held_out = -(-len(corpus.blocks) // HELD_OUT)
    batches = batches_of(corpus.blocks, settings.batch_size, num_held_out)
    streams = Streams(writer, (2, corpus.num_tokens, config.hidden_size))
    layers = streams.layers_to_walk(layers, config.num_hidden_layers)
    if layers and layers[0] == 0 and not streams.has(0):
        first = streams.begin(0)
        for stream, weight in zip(
            first, (checkpoint.finite_tensor("embed_tokens.weight"), moe.tensor("embed_tokens.weight")), strict=True
        ):
            embed(stream, corpus.blocks, batches, weight)
        streams.commit(0)
    for layer in progress(layers, "calibrate", "layer"):
        share = experts_per_tok[layer] / config.num_experts
        calibration = LayerCalibration(
            checkpoint, moe, config, layer, share=share, refit_gate=settings.refit_gates, device=device
        )
        metrics = calibration.run(batches, streams.before(layer), streams.begin(layer + 1))
        streams.commit(layer + 1)
        fitted.clear()
        fitted.update(calibration.tensors())
        yield layer, metrics
        streams.remove(layer)


def _fit_final_norm(
    checkpoint: DenseCheckpoint,
    moe: MoECheckpoint,
    corpus: Corpus,
    writer: ArtifactWriter,
    fitted: dict[str, torch.Tensor],
    device: str,
    progress: Progress,
) -> dict[str, float] | None:
    """Leave the final norm's weight in `fitted`, once the last layer is calibrated. Returns the divergence from the
    dense model before and after, in nats a token, on tokens that it is not fitted to; None for a model that predicts no
    tokens."""
    if moe.model_class != "LlamaMoEForCausalLM":
        return None
    config, weight = checkpoint.config, moe.tensor(FINAL_NORM)
    streams = Streams(writer, (2, corpus.num_tokens, config.hidden_size)).before(config.num_hidden_layers)
    num_tokens = min(max(corpus.num_tokens // 8, LEAST_FINAL_TOKENS), MOST_FINAL_TOKENS)
    order = torch.randperm(corpus.num_tokens, generator=torch.Generator().manual_seed(0))
    fit_to, measured_on = order[:num_tokens].chunk(2)
    head = checkpoint.finite_tensor(checkpoint.lm_head).to(device, torch.float32)
    dense_weight = checkpoint.finite_tensor(FINAL_NORM).to(device, torch.float32)

    def divergence(tokens: torch.Tensor) -> Divergence:
        dense, normed = F.rms_norm(streams[:, tokens].to(device), [config.hidden_size], eps=config.rms_norm_eps)
        return Divergence(head, dense * dense_weight, normed)

    found = fit_final_norm(divergence(fit_to), weight.to(device, torch.float32), progress).to(weight.dtype).cpu()
    measure = divergence(measured_on)
    before, after = (measure(w.to(device, torch.float32))[0] for w in (weight, found))
    if after < before:
        fitted[FINAL_NORM] = found
    return {"divergence_before": before, "divergence_after": min(before, after)}
