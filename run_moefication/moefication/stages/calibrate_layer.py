"""The calibration of one layer: passes over the text that fit its gate, set its threshold and fit its down_proj."""

from typing import Any

import torch
from torch.nn import functional as F

from llama_moe import LlamaMoEConfig

from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.moe import MoECheckpoint
from ..fitting.ridge import NormalEquations, best_strength, token_weights
from ..fitting.ridge_gates import GateEquations
from ..layers.decoder import PreMLP
from ..layers.mlp import GatedMLP, MoEMLP
from ..layers.scores import OutputNorms
from ..layers.thresholds import set_threshold
from ..text.batches import Batch

# Strengths of the pull to the original down_proj, in mean diagonals of the Gram matrix.
DOWN_STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# Activations of a layer on all tokens are kept in memory up to this size; else each pass computes them anew.
MOST_KEPT_BYTES = 2 << 30


class LayerCalibration:
    """One layer of both models, and the passes over the text that fit the second one.

    The stream after the layer `[2, tokens, H]` is filled in two steps: at first `after[0]` is the dense model's, and
    `after[1]` what enters the norm before the other model's MLP; that MLP's output is added when it is fitted.

    Axes: T tokens of a batch, I neurons, E routed experts, H hidden size.
    """

    def __init__(
        self, checkpoint: DenseCheckpoint, moe: MoECheckpoint, config: LlamaMoEConfig, layer: int, *, device: str
    ):
        """`config`: of the calibrated model."""
        self._prefix = f"layers.{layer}."
        self._device, self._dtype = device, moe.tensors[f"{self._prefix}mlp.experts.down_proj"].dtype
        self._dense_half = PreMLP.of_dense(checkpoint, layer, device)
        self._dense_mlp = GatedMLP.of_dense(checkpoint, layer, device)
        self._half = PreMLP(config, lambda name: moe.tensor(self._prefix + name), device)
        self._mlp = MoEMLP.of_moe(moe, config, layer, device)
        self._gate, self._share = self._mlp.gate, config.experts_per_tok_of(layer) / config.num_experts
        self._kept: dict[int, torch.Tensor] = {}  # activations with all experts, by the first row of their batch

    @torch.no_grad()
    def run(
        self, batches: list[Batch], before: torch.Tensor, after: torch.Tensor, *, refit_gate: bool, spares: bool
    ) -> dict[str, Any]:
        """Fit the layer, and fill `after` with the streams after it, given those before it. Returns the metrics.

        `spares`: held-out batches choose strengths only, since a later fit needs text that no layer was fitted to.
        """
        weights = self._attend(batches, before, after)
        metrics: dict[str, Any] = {}
        if refit_gate:
            metrics["gate"] = self._refine_gate(batches, after, weights, spares)
        scores = torch.cat([self._gate.score(self._inputs(batch, after)) for batch in batches])  # [tokens, E]
        runs = set_threshold(self._gate, scores, self._share)
        if self._gate.routing == "threshold":
            metrics["threshold"] = self._gate.threshold.item()
        metrics["active_share"] = runs.mean(dtype=torch.float64).item()
        metrics |= self._refit_down(batches, after, weights, runs, spares)
        for batch in batches:
            hidden = self._mlp.masked(self._activations(batch, after), runs[batch.rows])
            after[1, batch.rows] += self._mlp.output(hidden).cpu()
        return metrics

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors for which `is_fitted` holds, by name, in the dtype that the checkpoint holds."""
        tensors = self._mlp.down_tensors() | {f"gate.{name}": t for name, t in self._gate.named_parameters()}
        if self._mlp.bias is not None:
            tensors["output_bias"] = self._mlp.bias
        stored = {name: tensor.detach().to(self._dtype) for name, tensor in tensors.items()}
        stored |= {f"gate.{name}": tensor for name, tensor in self._gate.named_buffers()}
        return {
            f"{self._prefix}mlp.{name}": tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in stored.items()
        }

    def _attend(self, batches: list[Batch], before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Fill `after` as far as the MLP of the model that is fitted. Returns the tokens' weights `[tokens]`."""
        squares = torch.empty(before.shape[1], device=self._device)
        for batch in batches:
            dense, inputs = self._dense_half(before[0, batch.rows].to(self._device), batch)
            after[0, batch.rows] = (dense + self._dense_mlp.output(self._dense_mlp.activations(inputs))).cpu()
            stream, _ = self._half(before[1, batch.rows].to(self._device), batch)
            after[1, batch.rows] = stream.cpu()
            # Where only one model has a massive activation, this layer cannot repair the gap, and the token must not
            # dominate the fit: the larger of the two norms counts.
            squares[batch.rows] = torch.maximum(dense.square().sum(dim=1), stream.square().sum(dim=1))
        return token_weights(squares)

    def _refine_gate(
        self, batches: list[Batch], after: torch.Tensor, weights: torch.Tensor, spares: bool
    ) -> dict[str, float]:
        """Fit the gate, in place, to the scores of its experts on what the layers before really produce."""
        has_bias = self._gate.bias is not None
        equations = GateEquations(after.shape[2], self._gate.num_experts, self._device, has_bias)
        norms = OutputNorms(self._mlp.down, self._mlp.routed_neurons)
        for batch in batches:
            scores = norms(self._activations(batch, after))
            equations.add(self._inputs(batch, after), scores, weights[batch.rows], held_out=batch.held_out)
        metrics = equations.fit(self._gate, refines=True, spares=spares)
        for parameter in self._gate.parameters():
            parameter.copy_(self._as_stored(parameter))
        return metrics

    def _refit_down(
        self, batches: list[Batch], after: torch.Tensor, weights: torch.Tensor, runs: torch.Tensor, spares: bool
    ) -> dict[str, float]:
        """Fit down_proj, and the output bias if there is one, given which experts run, bool `[tokens, E]`."""
        has_bias = self._mlp.bias is not None
        prior = torch.cat([self._mlp.down, self._mlp.bias[None]]) if has_bias else self._mlp.down
        train, held_out = (NormalEquations(*prior.shape, self._device) for _ in range(2))
        for batch in batches:
            features = self._mlp.masked(self._activations(batch, after), runs[batch.rows])
            if has_bias:
                features = F.pad(features, (0, 1), value=1.0)
            target = (after[0, batch.rows] - after[1, batch.rows]).to(self._device)
            (held_out if batch.held_out else train).add(features, target, weights[batch.rows])
        before = held_out.error(prior)
        strength, error = best_strength(train, held_out, DOWN_STRENGTHS, prior)
        if not spares:
            train += held_out
        solution = self._as_stored(train.solve(strength, prior))
        self._mlp.down = solution[: len(self._mlp.down)]
        if has_bias:
            self._mlp.bias = solution[-1]
        return {"error_before": before, "error_after": error, "strength": strength}

    def _as_stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Float32 with the values that the checkpoint will hold, which the next layers see."""
        return tensor.to(self._dtype).float()

    def _inputs(self, batch: Batch, after: torch.Tensor) -> torch.Tensor:
        """What the MLP sees, `[T, H]`, while `after` is without the MLP's output."""
        return self._half.mlp_norm(after[1, batch.rows].to(self._device))

    def _activations(self, batch: Batch, after: torch.Tensor) -> torch.Tensor:
        """What would enter down_proj if every expert ran, `[T, I]`; not to be written to."""
        if batch.rows.start in self._kept:
            return self._kept[batch.rows.start]
        activations = self._mlp.activations(self._inputs(batch, after))
        if after.shape[1] * 4 * len(self._mlp.down) <= MOST_KEPT_BYTES:
            self._kept[batch.rows.start] = activations
        return activations


def is_fitted(name: str) -> bool:
    """Whether the calibration of a layer gives the tensor of this name new values."""
    return ".mlp.gate." in name or name.endswith((".down_proj", ".down_proj.weight", ".mlp.output_bias"))
