"""Stage 5: gates, thresholds and down_proj of a converted model, refitted layer by layer in closed form.

The dense and the converted model read the same text, a layer of each at a time. A layer is fitted on what the layers
before it, already calibrated, really produce, and towards the residual stream of the dense model after it: so later
layers repair what earlier ones lost. The final norm comes last.
"""

from dataclasses import asdict
from functools import partial
from itertools import product
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
from ..layers.decoder import embed
from ..precision import bfloat16_products, product_dtype
from ..progress import progress
from ..storage.folder import ArtifactWriter, require_place
from ..storage.manifest import ArtifactSpec, environment
from ..text.batches import batches_of
from ..text.corpus import Corpus, require_held_out_block
from .calibrate_layer import LayerCalibration, is_fitted

HELD_OUT_EVERY_NTH_BLOCK = 6  # one block of this many is held out to choose strengths on
FINAL_NORM = "norm.weight"
# The final norm is fitted to and measured on an eighth of all tokens, within these bounds, half of them each. They come
# from all blocks, for a few documents are too special.
LEAST_FINAL_TOKENS, MOST_FINAL_TOKENS = 8192, 16384


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
    16 * hidden_size bytes a token. Runs in float32, with `bfloat16_products`.
    """
    moe = MoECheckpoint(moe_path, checkpoint)
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
    )
    shards = _plan(moe, config)
    *layer_files, rest = shards
    writer = ArtifactWriter(Path(save_path), spec, [*shards, "config"], overwrite=overwrite, exclusive=True)
    missing = writer.missing()
    if missing:
        checkpoint.check_finite()  # before anything is written
    streams = Streams(writer, (2, corpus.num_tokens, config.hidden_size))
    batches = batches_of(corpus.blocks, settings.batch_size, -(-len(corpus.blocks) // HELD_OUT_EVERY_NTH_BLOCK))
    layers = streams.layers_to_walk([i for i, file in enumerate(layer_files) if file in missing], len(layer_files))
    if layers and layers[0] == 0 and not streams.has(0):
        with streams.filling(0) as first:
            for stream, model in zip(first, (checkpoint, moe), strict=True):
                embed(stream, corpus.blocks, batches, model.tensor("embed_tokens.weight"))
    for layer in progress(layers, "calibrate", "layer"):
        calibration = LayerCalibration(checkpoint, moe, config, layer, device=device)
        with streams.filling(layer + 1) as after:
            before = streams.before(layer)
            metrics = calibration.run(batches, before, after, refit_gate=settings.refit_gates)
        values = {moe.stored_name(name): tensor for name, tensor in calibration.tensors().items()}
        write_shard(writer, layer_files[layer], shards[layer_files[layer]], values, metrics)
        streams.remove(layer)
    if rest in missing:
        values, metrics = {}, None
        if moe.model_class == "LlamaMoEForCausalLM":
            last = streams.before(config.num_hidden_layers)
            weight, metrics = _fit_final_norm(checkpoint, moe, last, corpus.options["seed"], device)
            values = {moe.stored_name(FINAL_NORM): weight}
        write_shard(writer, rest, shards[rest], values, metrics)
    if "config" in missing:
        card = calibration_card(checkpoint.name, config, moe.model_class, corpus.num_tokens, *gains(writer))
        write_checkpoint_files(writer, "config", moe.path, shards, config, card, tokenizer_files(moe.path))
    writer.finish()
    return writer


def gains(writer: ArtifactWriter) -> tuple[list[dict[str, Any]], dict[str, float] | None]:
    """The metrics of the layers, in order, and of the final norm; None for a model that predicts no tokens."""
    *layer_files, rest, _ = writer.parts
    metrics = writer.metrics()
    return [metrics[file] for file in layer_files], metrics.get(rest)


def _new_config(moe: MoECheckpoint, settings: CalibrateSettings) -> LlamaMoEConfig:
    """The config of the calibrated checkpoint."""
    config = moe.config
    if config.multiply_gate_scores or config.score_scale_factor != 1:
        raise MoEficationError(f"{moe.artifact.folder} weighs its experts by gate scores; that is not calibrated")
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
        gate_bias=config.gate_bias or settings.refit_gates,
        output_bias=config.output_bias or (settings.output_bias and not config.mlp_bias),
    )


def _plan(moe: MoECheckpoint, config: LlamaMoEConfig) -> dict[str, list[PlannedTensor]]:
    """File name -> its tensors: a file for each layer, then one of what lies outside. Fitted ones have no maker."""
    num_layers = config.num_hidden_layers
    new = {"gate.bias": (config.num_experts,)} if config.gate_bias else {}
    new |= {"output_bias": (config.hidden_size,)} if config.output_bias else {}
    infos = {name: (info.shape, info.dtype) for name, info in moe.tensors.items()}
    weight_dtype = moe.tensors["layers.0.mlp.experts.down_proj"].dtype
    for layer, (name, shape) in product(range(num_layers), new.items()):
        infos.setdefault(f"layers.{layer}.mlp.{name}", (shape, weight_dtype))
    groups: list[list[PlannedTensor]] = [[] for _ in range(num_layers + 1)]
    for name, (shape, dtype) in infos.items():
        has_fit = moe.model_class == "LlamaMoEForCausalLM" if name == FINAL_NORM else is_fitted(name)
        make = None if has_fit else partial(moe.tensor, name)
        group = int(name.split(".")[1]) if name.startswith("layers.") else num_layers
        groups[group].append(PlannedTensor(moe.stored_name(name), shape, dtype, make))
    names = (f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1))
    return dict(zip(names, groups, strict=True))


def _fit_final_norm(
    checkpoint: DenseCheckpoint, moe: MoECheckpoint, streams: torch.Tensor, seed: int, device: str
) -> tuple[torch.Tensor, dict[str, float]]:
    """The final norm's weight, and the divergence from the dense model before and after, in nats a token, on tokens
    that it is not fitted to. `streams`: those after the last layer, float32 `[2, tokens, H]`."""
    config, weight = checkpoint.config, moe.tensor(FINAL_NORM)
    num_tokens = min(max(streams.shape[1] // 8, LEAST_FINAL_TOKENS), MOST_FINAL_TOKENS)
    order = torch.randperm(streams.shape[1], generator=torch.Generator().manual_seed(seed))
    fit_to, measured_on = order[:num_tokens].chunk(2)
    head = checkpoint.finite_tensor(checkpoint.lm_head).to(device, product_dtype(device))
    dense_weight = checkpoint.finite_tensor(FINAL_NORM).to(device, torch.float32)

    def divergence(tokens: torch.Tensor) -> Divergence:
        dense, normed = F.rms_norm(streams[:, tokens].to(device), [config.hidden_size], eps=config.rms_norm_eps)
        return Divergence(head, dense * dense_weight, normed)

    found = fit_final_norm(divergence(fit_to), weight.to(device, torch.float32)).to(weight.dtype).cpu()
    measure = divergence(measured_on)
    before, after = (measure(w.to(device, torch.float32)).item() for w in (weight, found))
    metrics = {"divergence_before": before, "divergence_after": min(before, after)}
    return found if after < before else weight, metrics
