"""Stage 5: gates, thresholds and down_proj of a converted model, refitted layer by layer in closed form.

The dense and the converted model read the same text, a layer of each at a time. A layer is fitted on what the layers
before it, already calibrated, really produce, and towards the residual stream of the dense model after it: so later
layers repair what earlier ones lost.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from llama_moe import LlamaMoEConfig
from llama_moe.gates import Gate

from . import artifacts
from .checkpoint_files import write_checkpoint_files
from .checkpoints import TEMPLATES, Checkpoint
from .conversion import write_shard
from .corpus import Corpus
from .errors import MoEficationError
from .expert_scores import LayerActivations, OutputNorms
from .layer_walk import AttentionHalf, Batch, Streams, batches_of, embed
from .manifests import Claim, environment
from .model_card import calibration_card
from .moe_checkpoints import MoECheckpoint
from .packed_mlp import PackedMLP
from .progress import Progress, no_progress
from .ridge import NormalEquations, best_strength, token_weights
from .ridge_gates import GateEquations
from .sharding import PlannedTensor

STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the pull to the original down_proj, in units of the Gram's mean diagonal
HELD_OUT = 6  # one block of so many is held out to choose strengths on
MOST_QUANTILE_SCORES = 1 << 24  # more than so many are thinned out, token by token, before they are sorted
MOST_KEPT_BYTES = 2 << 30  # of a layer's activations on all tokens; where they are more, each pass computes them anew


@dataclass(frozen=True)
class CalibrationSettings:
    """Options of the calibrate stage; see `llama_calibrate.py --help`."""

    num_selects: int | None = None  # counts shared experts, and may be them alone; None: as converted
    refit_gates: bool = False
    output_bias: bool = False
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise MoEficationError(f"--batch_size {self.batch_size} must be at least 1")


def calibrate(
    checkpoint: Checkpoint,
    moe_path: str | Path,
    corpus: Corpus,
    save_path: str | Path,
    settings: CalibrationSettings,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> artifacts.ArtifactWriter:
    """Write a calibrated copy of a LlamaMoE checkpoint.

    Memory: one layer of each model and twice the Gram matrix of its neurons, in float64. Disk, until the checkpoint is
    finished: 16 * hidden_size bytes a token. Runs in float32 on every device.

    Returns: the folder's writer, finished; its metrics say by layer what the fit gained.
    """
    moe = MoECheckpoint(moe_path, checkpoint)
    config = _new_config(moe, settings)
    if len(corpus.blocks) < 2:
        raise MoEficationError("the corpus is a single block, and one is held out; use a smaller --block_size")
    if Path(save_path).resolve() in (checkpoint.path, moe.artifact.folder.resolve()):
        raise MoEficationError(f"--save_path {save_path} is one of the source checkpoints; choose another folder")
    claim = Claim(
        stage="calibrate",
        options=asdict(settings) | corpus.options,
        source=checkpoint.source,
        environment=environment(device),
        inputs={"moe_path": moe.artifact.digest, "train_data_path": corpus.digest},
        facts={"tokens": corpus.num_tokens, "mix": [asdict(share) for share in corpus.mix]},
    )
    fitted: dict[str, torch.Tensor] = {}  # of the layer at work
    rest, *by_layer = shards = _plan(moe, config, fitted)
    writer = artifacts.ArtifactWriter(Path(save_path), claim, [*shards, "config"], overwrite=overwrite)
    missing = writer.missing()
    if rest in missing:
        write_shard(writer, rest, shards[rest])
    layers = [layer for layer, file in enumerate(by_layer) if file in missing]
    for layer, metrics in _walk(checkpoint, moe, config, corpus, writer, layers, settings, fitted, device, progress):
        write_shard(writer, by_layer[layer], shards[by_layer[layer]], metrics)
    if "config" in missing:
        card = calibration_card(checkpoint.name, config, moe.model_class, corpus.num_tokens, writer.metrics())
        writer.write_piece("config", write_checkpoint_files(writer, moe.artifact.folder, shards, config, card))
    writer.finish()
    return writer


def _new_config(moe: MoECheckpoint, settings: CalibrationSettings) -> LlamaMoEConfig:
    """The config of the calibrated checkpoint."""
    config = moe.config
    if config.multiply_gate_scores or config.score_scale_factor != 1:
        raise MoEficationError(f"{moe.artifact.folder} weighs its experts by gate scores; that is not calibrated")
    if settings.refit_gates and config.gate_network != "linear":
        raise MoEficationError(f"--refit_gates is for linear gates, not for the {config.gate_network!r} ones given")
    least = config.num_shared_experts + (config.routing == "top_k")
    num_selects, num_experts = _num_selects(moe, settings), config.num_experts + config.num_shared_experts
    if not least <= num_selects <= num_experts:
        raise MoEficationError(
            f"--num_selects {num_selects} is outside of {least} to {num_experts}, the model's experts"
        )
    fields = config.to_dict() | {
        "num_experts_per_tok": max(1, num_selects - config.num_shared_experts),
        "gate_bias": config.gate_bias or settings.refit_gates,
        "output_bias": config.output_bias or (settings.output_bias and not config.mlp_bias),
    }
    fields.pop("transformers_version", None)
    return LlamaMoEConfig.from_dict(fields)


def _num_selects(moe: MoECheckpoint, settings: CalibrationSettings) -> int:
    return moe.config.num_selects if settings.num_selects is None else settings.num_selects


def _plan(
    moe: MoECheckpoint, config: LlamaMoEConfig, fitted: dict[str, torch.Tensor]
) -> dict[str, list[PlannedTensor]]:
    """File name -> its tensors: a file of what lies outside of the layers, then one for each layer. Tensors come from
    `fitted` where they are there, else from the uncalibrated checkpoint."""
    num_layers = config.num_hidden_layers
    weight_dtype = moe.tensors["layers.0.mlp.experts.down_proj"][1]
    groups = [[name for name in moe.tensors if not name.startswith("layers.")]]
    groups += [moe.layer_tensors(layer) for layer in range(num_layers)]
    infos = dict(moe.tensors)
    for layer in range(num_layers):
        mlp = f"layers.{layer}.mlp."
        new = {"gate.bias": (config.num_experts,)} if config.gate_bias else {}
        new |= {"output_bias": (config.hidden_size,)} if config.output_bias else {}
        for name in (name for name in new if mlp + name not in infos):
            infos[mlp + name] = (new[name], weight_dtype)
            groups[layer + 1].append(mlp + name)

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
    checkpoint: Checkpoint,
    moe: MoECheckpoint,
    config: LlamaMoEConfig,
    corpus: Corpus,
    writer: artifacts.ArtifactWriter,
    layers: list[int],
    settings: CalibrationSettings,
    fitted: dict[str, torch.Tensor],
    device: str,
    progress: Progress,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Calibrate the layers, the last ones, leaving the tensors of each in `fitted`; yields layer and metrics."""
    num_held_out = -(-len(corpus.blocks) // HELD_OUT)
    batches = batches_of(corpus.blocks, settings.batch_size, num_held_out)
    streams = Streams(writer, (2, corpus.num_tokens, config.hidden_size))
    if layers and layers[0] == 0 and not streams.has(0):
        first = streams.begin(0)
        for stream, weight in zip(
            first, (checkpoint.finite_tensor("embed_tokens.weight"), moe.tensor("embed_tokens.weight")), strict=True
        ):
            embed(stream, corpus.blocks, batches, weight)
        streams.commit(0)
    for layer in progress(layers, "calibrate", "layer"):
        calibration = LayerCalibration(checkpoint, moe, config, layer, settings, device)
        metrics = calibration.run(batches, streams.before(layer), streams.begin(layer + 1))
        streams.commit(layer + 1)
        fitted.clear()
        fitted.update(calibration.tensors())
        yield layer, metrics
        streams.remove(layer)


class LayerCalibration:
    """One layer of both models, and the passes over the text that fit the second one.

    Axes: T tokens of a batch, I neurons, E routed experts, H hidden size.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        moe: MoECheckpoint,
        config: LlamaMoEConfig,
        layer: int,
        settings: CalibrationSettings,
        device: str,
    ):
        prefix = f"layers.{layer}."
        self._device, self._settings, self._mlp_prefix = device, settings, f"{prefix}mlp."
        self._dtype = moe.tensors[f"{prefix}mlp.experts.down_proj"][1]
        self._dense_half = AttentionHalf(
            checkpoint.config, lambda name: checkpoint.finite_tensor(prefix + name), device
        )
        self._dense_activations = LayerActivations(checkpoint, layer, TEMPLATES[1], device)
        self._dense_down = checkpoint.mlp_tensor(layer, "down_proj.weight", device)
        self._dense_bias = checkpoint.mlp_tensor(layer, "down_proj.bias", device) if config.mlp_bias else None
        self._half = AttentionHalf(config, lambda name: moe.tensor(prefix + name), device)
        new = {
            f"{prefix}mlp.gate.bias": torch.zeros(config.num_experts),
            f"{prefix}mlp.output_bias": torch.zeros(config.hidden_size),
        }

        def tensor(name: str) -> torch.Tensor:
            name = f"{prefix}mlp.{name}"
            return moe.tensor(name) if name in moe.tensors else new[name]

        self._mlp = PackedMLP(config, layer, tensor, device)
        self._share = (_num_selects(moe, settings) - config.num_shared_experts) / config.num_experts
        self._keeps, self._kept = False, {}  # activations by the first row of their batch

    @property
    def gate(self) -> Gate:
        """The gate of the layer."""
        return self._mlp.gate

    @torch.no_grad()
    def run(self, batches: list[Batch], before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
        """Fit the layer, given the streams of the dense and the other model before it `[2, tokens, H]`, and fill
        `after` with those after it. Returns the metrics."""
        self._keeps = before.shape[1] * 4 * len(self._mlp.down) <= MOST_KEPT_BYTES
        weights, gate_equations = self._attend(batches, before, after)
        metrics = {}
        if gate_equations is not None:
            metrics["gate"] = gate_equations.fit(self.gate, to_all=True)
            self._round_gate()
        scores = torch.cat([self.gate.score(self._inputs(after, batch)) for batch in batches])  # [tokens, E]
        if self.gate.routing == "threshold":
            thinning = -(-scores.numel() // MOST_QUANTILE_SCORES)
            self.gate.store_score_quantiles(scores[::thinning])
            self.gate.set_active_share(self._share)
            metrics["threshold"] = self.gate.threshold.item()
        selected = torch.cat([self.gate.selected(chunk) for chunk in scores.split(4096)])  # bool [tokens, E]
        metrics["active_share"] = selected.mean(dtype=torch.float64).item()
        metrics |= self._refit(batches, after, weights, selected)
        for batch in batches:
            hidden = self._hidden(after, batch, selected)
            after[1, batch.rows] += self._output(hidden).cpu()
        return metrics

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fitted tensors by their names in the checkpoint."""
        tensors = self._mlp.down_tensors() | {f"gate.{name}": t for name, t in self.gate.state_dict().items()}
        if self._mlp.bias is not None:
            tensors["output_bias"] = self._mlp.bias
        return {self._mlp_prefix + name: tensor.cpu() for name, tensor in tensors.items()}

    def _attend(
        self, batches: list[Batch], before: torch.Tensor, after: torch.Tensor
    ) -> tuple[torch.Tensor, GateEquations | None]:
        """Fill `after` with the dense stream after the layer, and the other model's before its MLP. Returns the tokens'
        weights, and the normal equations of the gate if it is to be fitted."""
        weights, equations, norms = [], None, None
        if self._settings.refit_gates:
            equations = GateEquations(before.shape[2], self.gate.num_experts, self._device)
            norms = OutputNorms(self._mlp.down, self._mlp.routed_neurons)
        for batch in batches:
            dense, inputs = self._dense_half(before[0, batch.rows].to(self._device), batch)
            output = F.linear(self._dense_activations(inputs), self._dense_down, self._dense_bias)
            after[0, batch.rows] = (dense + output).cpu()
            stream, inputs = self._half(before[1, batch.rows].to(self._device), batch)
            after[1, batch.rows] = stream.cpu()
            # Of the larger of the two: a massive activation that one of them lacks is beyond what this layer can mend.
            squares = torch.maximum(dense.square().sum(dim=1), stream.square().sum(dim=1))
            weights.append(token_weights(squares))
            if equations is not None:
                scores = norms(self._activations(inputs, batch))
                equations.add(inputs, scores, weights[-1], held_out=batch.held_out)
        return torch.cat(weights), equations

    def _refit(
        self, batches: list[Batch], after: torch.Tensor, weights: torch.Tensor, selected: torch.Tensor
    ) -> dict[str, float]:
        """Fit down_proj, and the output bias if there is one, in place."""
        has_bias = self._mlp.bias is not None
        prior = self._mlp.down if not has_bias else torch.cat([self._mlp.down, self._mlp.bias[None]])
        train, held_out = (NormalEquations(*prior.shape, self._device) for _ in range(2))
        for batch in batches:
            features = self._hidden(after, batch, selected)
            if has_bias:
                features = F.pad(features, (0, 1), value=1.0)
            target = (after[0, batch.rows] - after[1, batch.rows]).to(self._device)
            (held_out if batch.held_out else train).add(features, target, weights[batch.rows])
        before = held_out.error(prior)
        strength, error = best_strength(train, held_out, STRENGTHS, prior)
        train += held_out
        # As it will be stored, so that the next layers see what the checkpoint will give.
        solution = train.solve(strength, prior).to(self._dtype).float()
        self._mlp.down = solution[: len(self._mlp.down)]
        if has_bias:
            self._mlp.bias = solution[-1]
        return {"error_before": before, "error_after": error, "strength": strength}

    def _round_gate(self) -> None:
        for parameter in self.gate.parameters():
            parameter.copy_(parameter.to(self._dtype).float())

    def _inputs(self, after: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self._half.mlp_norm(after[1, batch.rows].to(self._device))

    def _hidden(self, after: torch.Tensor, batch: Batch, selected: torch.Tensor) -> torch.Tensor:
        """What enters down_proj with the true routing, `[T, I]`."""
        return self._mlp.mask_(self._activations(self._inputs(after, batch), batch), selected[batch.rows])

    def _activations(self, inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What would enter down_proj if every expert ran, `[T, I]`; perhaps masked already, which does no harm."""
        kept = self._kept.get(batch.rows.start)
        if kept is None:
            kept = self._mlp.activations(inputs)
            if self._keeps:
                self._kept[batch.rows.start] = kept
        return kept

    def _output(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self._mlp.down.T, self._mlp.bias)
