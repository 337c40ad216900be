"""Stage 5: gates, thresholds and down_proj of a converted model, refitted layer by layer in closed form.

The dense and the converted model read the same text, a layer of each at a time. A layer is fitted on what the layers
before it, already calibrated, really produce, and towards the residual stream of the dense model after it: so later
layers repair what earlier ones lost. Then a few parameters of all layers are fitted together.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from llama_moe import LlamaMoEConfig

from ...settings import OFF, CalibrateSettings
from ..artifacts.fits import Fits
from ..artifacts.streams import Streams
from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.model_card import Origin, calibration_card
from ..checkpoints.moe import MoECheckpoint, require_num_selects
from ..checkpoints.tokenizers import require_same_tokenizer, tokenizer_files
from ..checkpoints.writer import PlannedTensor, write_checkpoint_files, write_shard
from ..errors import MoEficationError, SettingError
from ..layers.decoder import embed
from ..precision import bfloat16_products
from ..progress import progress
from ..storage.folder import ArtifactWriter, require_place
from ..storage.manifest import ArtifactSpec, environment
from ..text.batches import batches_of
from ..text.corpus import Corpus, require_held_out_block
from .calibrate_layer import LayerCalibration, is_fitted
from .calibrate_logits import MOST_STEP_TOKENS, fit_to_logits, with_factors

HELD_OUT_EVERY_NTH_BLOCK = 4  # one block of this many is held out to choose strengths on, and for the last fit
TOGETHER = "together"  # the fit of all layers


@bfloat16_products()
def calibrate(
    checkpoint: DenseCheckpoint,
    moe_path: str | Path,
    corpus: Corpus,
    save_path: str | Path,
    settings: CalibrateSettings,
    *,
    device: str = "cpu",
    overwrite: bool = False,
) -> ArtifactWriter:
    """Write a calibrated copy of a LlamaMoE checkpoint.

    Memory: one layer of each model, five matrices of its neurons squared in float64, its activations on all tokens if
    they are at most MOST_KEPT_BYTES, and 5 bytes a token and expert. Disk, until the checkpoint is finished:
    16 * hidden_size bytes a token, and every fitted tensor once more. Runs in float32, with `bfloat16_products`.
    """
    moe = MoECheckpoint(moe_path, checkpoint)
    if moe.model_class != "LlamaMoEForCausalLM":
        settings = replace(settings, fit_logits=False)  # it has none
    config = _new_config(moe, settings)
    if Path(save_path).resolve() in (checkpoint.path, moe.artifact.folder.resolve()):
        raise SettingError(f"save_path {save_path} is one of the source checkpoints; choose another folder")
    unfinished, finished = require_place(Path(save_path), "calibrate")
    if overwrite or unfinished or not finished:  # else there is nothing to do, and to read all weights takes long
        moe.verify()
    require_held_out_block(corpus)
    spec = ArtifactSpec(
        stage="calibrate",
        options=settings.recorded() | corpus.options,
        source=checkpoint.source,
        environment=environment(device),
        inputs={"moe_path": moe.artifact.digest, "train_data_path": corpus.digest},
        facts={"tokens": corpus.num_tokens, "mix": [asdict(share) for share in corpus.mix]},
        earlier=moe.artifact.history,
    )
    shards, names = _plan(moe, config, settings), [*_layer_fits(config), TOGETHER]
    with ArtifactWriter(Path(save_path), spec, [*shards, "config"], overwrite=overwrite, exclusive=True) as writer:
        missing = writer.missing()
        fits = Fits(writer)
        if missing:
            require_same_tokenizer(checkpoint.path, moe.path)
            checkpoint.check_finite()  # before anything is written
            together, tensor = _fit(checkpoint, moe, config, corpus, settings, writer, fits, device)
            if missing == writer.parts:  # the first part counts the time of all fits
                writer.add_to_lap(sum(fits.seconds(name) for name in names if fits.has(name)))
            fit_of_file = dict(zip(shards, names, strict=True))
            for index, (file, fit) in enumerate(progress(fit_of_file.items(), "write the calibrated model", "file")):
                if file in missing:
                    to_make = [planned.name for planned in shards[file] if planned.make is None]
                    values = {name: with_factors(together, tensor, name.removeprefix("model.")) for name in to_make}
                    metrics = fits.metrics(fit) if fits.has(fit) else None
                    if (moved := together.get(f"layers.{index}.mlp.gate.threshold")) is not None:
                        metrics["threshold"] = moved.item()
                    write_shard(writer, file, shards[file], values, metrics)
        if "config" in missing:
            origin, tokens = Origin.of_moe(moe.path, checkpoint.name), {row.domain: row.got for row in corpus.mix}
            card = calibration_card(origin, config, moe.model_class, tokens, *gains(writer))
            write_checkpoint_files(writer, "config", moe.path, shards, config, card, tokenizer_files(moe.path))
        writer.finish()
    return writer


def _layer_fits(config: LlamaMoEConfig) -> list[str]:
    """The names of the layers' fits."""
    return [f"layer.{layer}" for layer in range(config.num_hidden_layers)]


def _fit(
    checkpoint: DenseCheckpoint,
    moe: MoECheckpoint,
    config: LlamaMoEConfig,
    corpus: Corpus,
    settings: CalibrateSettings,
    writer: ArtifactWriter,
    fits: Fits,
    device: str,
) -> tuple[dict[str, torch.Tensor], Callable[[str], torch.Tensor]]:
    """Do the fits that are missing. Returns the tensors of the fit of all layers together (none, if it is not asked
    for), and what gives the other tensors by their names, as the layers' fits left them."""
    names = _layer_fits(config)
    num_held_out = -(-len(corpus.blocks) // HELD_OUT_EVERY_NTH_BLOCK)
    held_out = corpus.blocks[-num_held_out:]
    if settings.fit_logits:  # which takes a step for each
        held_out = [piece for block in held_out for piece in block.split(MOST_STEP_TOKENS)]
    blocks = corpus.blocks[:-num_held_out] + held_out
    batches = batches_of(blocks, settings.batch_size, len(held_out))
    streams = Streams(writer, (2, corpus.num_tokens, config.hidden_size))
    layers = streams.layers_to_walk([i for i, name in enumerate(names) if not fits.has(name)], len(names))
    if layers and layers[0] == 0 and not streams.has(0):
        with streams.filling(0) as first:
            for stream, model in zip(first, (checkpoint, moe), strict=True):
                embed(stream, blocks, batches, model.tensor("embed_tokens.weight"))
    how = dict(refit_gate=settings.refit_gates, spares=settings.fit_logits)
    for layer in progress(layers, "calibrate", "layer", done=len(names) - len(layers)):
        calibration = LayerCalibration(checkpoint, moe, config, layer, device=device)
        with streams.filling(layer + 1) as after:
            metrics = calibration.run(batches, streams.before(layer), after, **how)
        fits.save(names[layer], calibration.tensors(), metrics)
        streams.remove(layer)
    fitted = {name: tensor for fit in names for name, tensor in fits.tensors(fit).items()}

    def tensor(name: str) -> torch.Tensor:
        return fitted[name] if name in fitted else moe.tensor(name)

    if not settings.fit_logits:
        return {}, tensor
    if not fits.has(TOGETHER):
        dense = streams.before(len(names))[0, -sum(map(len, held_out)) :]
        # As many of the others as are held out, spread over the text.
        others = corpus.blocks[:-num_held_out][:: HELD_OUT_EVERY_NTH_BLOCK - 1]
        how = dict(batch_size=settings.batch_size, device=device)
        fits.save(TOGETHER, *fit_to_logits(checkpoint, config, tensor, held_out, dense, others, **how))
    return fits.tensors(TOGETHER), tensor


def gains(writer: ArtifactWriter) -> tuple[list[dict[str, Any]], dict[str, float] | None]:
    """The metrics of the layers, in order, and of the fit of all together (None: there was none)."""
    *layer_files, rest, _ = writer.parts
    metrics = writer.metrics()
    return [metrics[file] for file in layer_files], metrics.get(rest)


def _new_config(moe: MoECheckpoint, settings: CalibrateSettings) -> LlamaMoEConfig:
    """The config of the calibrated checkpoint."""
    config = moe.config
    if config.multiply_gate_scores or config.score_scale_factor != 1:
        raise MoEficationError(f"{moe.artifact.folder} weighs its experts by gate scores; that is not calibrated")
    if settings.gate_bias == OFF and config.gate_rank is not None:
        raise SettingError(f"gate_bias off is for full gates, and {moe.artifact.folder} has gates of a rank")
    if settings.refit_gates and config.gate_network != "linear":
        raise SettingError(f"refit_gates is for linear gates, not for the {config.gate_network!r} ones given")
    counts = moe.experts_per_tok
    converted = config.num_shared_experts + round(sum(counts) / len(counts))
    num_selects = converted if settings.num_selects is None else settings.num_selects
    # With a threshold, the shared experts may be all that run.
    some = config.routing == "top_k" or not config.num_shared_experts
    require_num_selects(num_selects, config, least_routed=int(some))
    return moe.new_config(
        num_experts_per_tok=num_selects - config.num_shared_experts,
        layer_num_experts_per_tok=None,
        gate_bias=settings.gate_bias != OFF if settings.refit_gates else config.gate_bias,
        output_bias=config.output_bias or (settings.output_bias and not config.mlp_bias),
    )


def _plan(moe: MoECheckpoint, config: LlamaMoEConfig, settings: CalibrateSettings) -> dict[str, list[PlannedTensor]]:
    """File name -> its tensors: a file for each layer, then one of what lies outside. Fitted ones have no maker."""
    num_layers = config.num_hidden_layers
    new = {"gate.bias": (config.num_experts,)} if config.gate_bias else {}
    new |= {"output_bias": (config.hidden_size,)} if config.output_bias else {}
    gone = () if config.gate_bias else (".gate.bias",)
    infos = {name: (info.shape, info.dtype) for name, info in moe.tensors.items() if not name.endswith(gone)}
    weight_dtype = moe.tensors["layers.0.mlp.experts.down_proj"].dtype
    for layer, (name, shape) in product(range(num_layers), new.items()):
        infos.setdefault(f"layers.{layer}.mlp.{name}", (shape, weight_dtype))
    groups: list[list[PlannedTensor]] = [[] for _ in range(num_layers + 1)]
    for name, (shape, dtype) in infos.items():
        has_fit = is_fitted(name) or (settings.fit_logits and name.endswith("norm.weight"))
        make = None if has_fit else partial(moe.tensor, name)
        group = int(name.split(".")[1]) if name.startswith("layers.") else num_layers
        groups[group].append(PlannedTensor(moe.stored_name(name), shape, dtype, make))
    names = (f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1))
    return dict(zip(names, groups, strict=True))
