"""The calibration of one layer: passes over the text that fit its gate, set its threshold and fit its down_proj."""

from typing import Any

import torch
from torch.nn import functional as F

from llama_moe import LlamaMoEConfig
from llama_moe.gates import Gate

from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.moe import MoECheckpoint
from ..fitting.ridge import NormalEquations, best_strength, token_weights
from ..fitting.ridge_gates import GateEquations
from ..layers.decoder import AttentionHalf, DenseLayer
from ..layers.mlp import PackedMLP
from ..layers.scores import OutputNorms, token_stride
from ..text.batches import Batch

STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the pull to the original down_proj, in mean diagonals of the Gram
MOST_KEPT_BYTES = 2 << 30  # of a layer's activations on all tokens; where they are more, each pass computes them anew


class LayerCalibration:
    """One layer of both models, and the passes over the text that fit the second one.

    Axes: T tokens of a batch, I neurons, E routed experts, H hidden size.
    """

    def __init__(
        self,
        checkpoint: DenseCheckpoint,
        moe: MoECheckpoint,
        config: LlamaMoEConfig,
        layer: int,
        *,
        share: float,
        refit_gate: bool,
        device: str,
    ):
        """`config`: of the calibrated model; `share`: of the routed experts, that run per token on average."""
        prefix = f"layers.{layer}."
        self._share, self._refit_gate, self._device, self._mlp_prefix = share, refit_gate, device, f"{prefix}mlp."
        self._dtype = moe.tensors[f"{prefix}mlp.experts.down_proj"].dtype
        self._dense = DenseLayer(checkpoint, layer, device)
        self._half = AttentionHalf(config, lambda name: moe.tensor(prefix + name), device)
        self._mlp = PackedMLP.of(moe, config, layer, device)
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
            self.gate.store_score_quantiles(scores[:: token_stride(scores.numel())])
            self.gate.set_active_share(self._share)
            metrics["threshold"] = self.gate.threshold.item()
        selected = torch.cat([self.gate.selected(chunk) for chunk in scores.split(4096)])  # bool [tokens, E]
        metrics["active_share"] = selected.mean(dtype=torch.float64).item()
        metrics |= self._refit(batches, after, weights, selected)
        for batch in batches:
            hidden = self._hidden(after, batch, selected)
            after[1, batch.rows] += self._mlp.output(hidden).cpu()
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
        if self._refit_gate:
            equations = GateEquations(before.shape[2], self.gate.num_experts, self._device)
            norms = OutputNorms(self._mlp.down, self._mlp.routed_neurons)
        for batch in batches:
            dense, inputs = self._dense.attention_half(before[0, batch.rows].to(self._device), batch)
            after[0, batch.rows] = (dense + self._dense.output(self._dense.activations(inputs))).cpu()
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
