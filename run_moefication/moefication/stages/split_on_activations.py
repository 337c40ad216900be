"""Stage 1 on activations: the hottest neurons become shared experts, the rest are split by which tokens need them.

What counts is the need that a gate can foresee: a linear map of low rank, fitted to how much each neuron adds to the
MLP's output, predicts it from the MLP's inputs, and a token needs the neurons whose prediction is among the
`keep_fraction` of all that are largest. That is a row of bits per neuron. Neurons that are needed together belong into
one expert. Only the Gram matrix of these rows, `[I, I]`, and the importance of each neuron are kept.

Either balanced k-means clusters the rows, or METIS cuts the co-activation graph of MoEfication (Zhang et al. 2022,
section 3.1). There two neurons are active together where a ReLU lets both through; no SiLU switches a neuron off, so
here it is where the token needs both. An edge weighs how often that is, over the geometric mean of how often each one
is needed: by the mere number, neurons that every token needs would be everyone's nearest.

Axes: T tokens, I neurons of the MLP, H hidden size.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ...settings import GraphSplitSettings, SplitSettings
from ..artifacts.features import Features
from ..artifacts.split import require_template, split_writer, write_labels
from ..artifacts.streams import Streams
from ..checkpoints.dense import DenseCheckpoint
from ..fitting.balanced_kmeans import Clustering, balanced_kmeans
from ..fitting.balanced_partition import Partition, balanced_partition
from ..fitting.ridge import NormalEquations, gram, low_rank_map, token_weights
from ..layers.decoder import PreMLP, embed
from ..layers.mlp import GatedMLP
from ..layers.scores import TOKENS_PER_CHUNK, token_stride
from ..names import split_folder
from ..precision import bfloat16_products
from ..progress import progress
from ..storage.folder import ArtifactWriter, require_place
from ..text.batches import Batch, batches_of
from ..text.corpus import Corpus

# Added to the diagonal of the Gram matrix of normalised rows, so that it has a Cholesky factor in float64.
JITTER = 1e-6
PREDICTION_RANK = 64  # from 32 to 96 the experts are as good, and better than at full rank
RIDGE_STRENGTH = 1e-2  # ridge strength of the prediction, in mean diagonals of the Gram matrix of the inputs


class NeuronStatistics:
    """How much each neuron of a layer adds to the MLP's output, and which neurons are needed together.

    Holds the MLP's inputs of all tokens that are added, in the dtype that they have. `importance`, float64 `[I]`, is
    the sum over tokens of weight * (activation * norm of the neuron's down_proj column)^2.
    """

    def __init__(self, mlp: GatedMLP):
        num_neurons, hidden_size = mlp.down.shape
        device = mlp.down.device
        self._column_norms = mlp.down.norm(dim=1)  # of down_proj
        self._equations = NormalEquations(hidden_size + 1, num_neurons, device)
        self._inputs: list[torch.Tensor] = []
        self.importance = torch.zeros(num_neurons, dtype=torch.float64, device=device)

    def added(self, activations: torch.Tensor) -> torch.Tensor:
        """How much each neuron adds to the output, `[T, I]`, of what enters down_proj."""
        return activations.abs() * self._column_norms

    def add(self, inputs: torch.Tensor, activations: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens: the MLP's inputs `[T, H]`, what enters down_proj, float32 `[T, I]`, and their weights `[T]`."""
        added = self.added(activations)
        self.importance += weights @ added.square()
        self._equations.add(F.pad(inputs.float(), (0, 1), value=1.0), added, weights)
        self._inputs.append(inputs)

    @bfloat16_products()
    def together(self, keep_fraction: float) -> torch.Tensor:
        """Tokens that need both neurons, float32 `[I, I]` (exact up to 2^24)."""
        solution = self._equations.solve(RIDGE_STRENGTH)
        rank = min(PREDICTION_RANK, len(solution) - 1, len(self.importance))
        factors = low_rank_map(self._equations, solution, RIDGE_STRENGTH, rank)
        output_weight, input_weight, bias = (factor.float() for factor in factors)

        def predicted(inputs: torch.Tensor) -> torch.Tensor:
            """What each neuron is expected to add, `[T, H]` -> `[T, I]`."""
            return F.linear(F.linear(inputs.to(bias), input_weight), output_weight, bias)

        stride = token_stride(sum(map(len, self._inputs)) * len(self.importance))
        # The sample comes from the same products as below, so that the least score that counts is one of those.
        sample = torch.cat([predicted(part)[::stride] for part in self._inputs]).flatten().cpu().numpy()
        rank_of_least = int((1 - keep_fraction) * (len(sample) - 1))
        least = float(np.partition(sample, rank_of_least)[rank_of_least])  # PyTorch's kthvalue takes ten times as long
        together = torch.zeros(2 * self.importance.shape, device=self.importance.device)
        for part in self._inputs:
            added = predicted(part)
            needed = ((added >= least) & (added > 0)).float()
            together += gram(needed)
        return together

    def split(self, settings: SplitSettings | GraphSplitSettings) -> tuple[torch.Tensor, Clustering | Partition]:
        """Labels int64 `[I]`, shared experts last and hottest of all, and how the others were split."""
        num_experts, num_shared_experts = settings.num_experts, settings.num_shared_experts
        width = len(self.importance) // num_experts
        hottest = self.importance.argsort(descending=True, stable=True)
        shared, rest = hottest[: num_shared_experts * width], hottest[num_shared_experts * width :].sort().values
        cosines = self.together(settings.keep_fraction)[rest][:, rest].double()
        norms = cosines.diagonal().clamp(min=1).sqrt()
        cosines /= norms[:, None] * norms
        num_routed = num_experts - num_shared_experts
        if isinstance(settings, GraphSplitSettings):
            parts = balanced_partition(cosines.fill_diagonal_(0), num_routed, settings.num_neighbours, settings.seed)
        else:
            cosines.diagonal().add_(JITTER)
            # The rows of the Cholesky factor have the Gram matrix of the rows of bits, which is all that k-means sees.
            rows = torch.linalg.cholesky(cosines).float().contiguous()  # by columns, seeds take six times as long
            parts = balanced_kmeans(rows, num_routed, settings.distance, settings.seed)
        labels = torch.empty(len(self.importance), dtype=torch.long)
        labels[rest.cpu()] = parts.labels
        labels[shared.cpu()] = torch.arange(num_routed, num_experts).repeat_interleave(width)
        return labels, parts


def split_by_activations(
    checkpoint: DenseCheckpoint,
    text: Corpus | Features,
    save_path: str | Path,
    template: str,
    settings: SplitSettings | GraphSplitSettings,
    *,
    device: str = "cpu",
    overwrite: bool = False,
) -> ArtifactWriter:
    """Split the neurons of every layer by what they do on text: a corpus, which the dense model reads layer by layer,
    or recorded features. `template` only gives the files their names.

    Memory: one layer's weights, its inputs for all tokens, and eight square matrices of its neurons, in float32. Disk,
    for a corpus and until the split is finished: 8 * hidden_size bytes a token.
    """
    checkpoint.require_experts(settings.num_experts)
    require_template(template)
    require_place(split_folder(save_path, checkpoint.name, settings.num_experts, settings.method), "split")
    options, told = settings.recorded(), {"facts": {"tokens": text.num_tokens}}
    if isinstance(text, Corpus):
        options |= text.options
        inputs = {"train_data_path": text.digest}
    else:
        del options["batch_size"]
        inputs = {"hidden_features_path": text.artifact.digest}
        told["earlier"] = text.artifact.history
    how = dict(method=settings.method, told=told, device=device, overwrite=overwrite)
    with split_writer(checkpoint, save_path, [template], options, inputs=inputs, **how) as writer:
        names, missing = writer.parts, writer.missing()
        layers = [layer for layer, name in enumerate(names) if name in missing]
        if layers:
            checkpoint.check_finite()  # before anything is written
        if isinstance(text, Features):
            for layer in progress(layers, "split", "layer"):
                labels, parts = _of_features(checkpoint, text, layer, device).split(settings)
                write_labels(writer, names[layer], labels, parts.metrics)
        else:
            streams = Streams(writer, (1, text.num_tokens, checkpoint.config.hidden_size))
            batches = batches_of(text.blocks, settings.batch_size)
            layers = streams.layers_to_walk(layers, len(names))
            if layers and layers[0] == 0 and not streams.has(0):
                with streams.filling(0) as first:
                    embed(first[0], text.blocks, batches, checkpoint.finite_tensor("embed_tokens.weight"))
            for layer in progress(layers, "split", "layer", done=len(names) - len(layers)):
                with streams.filling(layer + 1) as after:
                    statistics = _of_text(checkpoint, layer, batches, streams.before(layer)[0], after[0], device)
                labels, parts = statistics.split(settings)
                write_labels(writer, names[layer], labels, parts.metrics)
                del statistics  # before those of the next layer are made
                streams.remove(layer)
        writer.finish()
    return writer


@bfloat16_products()
def _of_features(checkpoint: DenseCheckpoint, features: Features, layer: int, device: str) -> NeuronStatistics:
    """The statistics of one layer, from the recorded inputs of its MLP.

    A token's weight is 1 over what all its neurons add, which keeps few tokens from owning the sums.
    """
    mlp = GatedMLP.of_dense(checkpoint, layer, device)
    statistics = NeuronStatistics(mlp)
    chunks = [chunk.to(device) for shard in features.inputs(layer) for chunk in shard.split(TOKENS_PER_CHUNK)]
    squares = torch.cat([statistics.added(mlp.activations(inputs)).square().sum(dim=1) for inputs in chunks])
    for inputs, weights in zip(chunks, token_weights(squares).split([len(chunk) for chunk in chunks]), strict=True):
        statistics.add(inputs, mlp.activations(inputs), weights)
    return statistics


@bfloat16_products()
@torch.inference_mode()
def _of_text(
    checkpoint: DenseCheckpoint,
    layer: int,
    batches: list[Batch],
    before: torch.Tensor,
    after: torch.Tensor,
    device: str,
) -> NeuronStatistics:
    """The statistics of one layer, from the stream before it `[tokens, H]`; fills the stream after it.

    A token's weight is 1 over its squared norm in the stream before the MLP.
    """
    half, mlp = PreMLP.of_dense(checkpoint, layer, device), GatedMLP.of_dense(checkpoint, layer, device)
    statistics = NeuronStatistics(mlp)
    squares = torch.empty(len(before), device=device)
    for batch in batches:
        stream, _ = half(before[batch.rows].to(device), batch)
        after[batch.rows] = stream.cpu()
        squares[batch.rows] = stream.square().sum(dim=1)
    weights = token_weights(squares)
    for batch in batches:
        stream = after[batch.rows].to(device)
        inputs = half.mlp_norm(stream)
        activations = mlp.activations(inputs)
        statistics.add(inputs, activations, weights[batch.rows])
        after[batch.rows] = (stream + mlp.output(activations)).cpu()
    return statistics
