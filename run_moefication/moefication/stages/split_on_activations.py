"""Stage 1 on activations: the hottest neurons become shared experts, the rest are clustered by which tokens need them.

What counts is the need that a gate can foresee: a linear map of low rank, fitted to how much each neuron adds to the
MLP's output, predicts it from the MLP's inputs, and a token needs the neurons whose prediction is among the
`keep_fraction` of all that are largest. That is a row of bits per neuron. Neurons that are needed together belong into
one expert. Only the Gram matrix of these rows is kept, `[intermediate_size, intermediate_size]`, and the importance of
each neuron.

Axes: T tokens, I neurons of the MLP, H hidden size.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ...settings import SplitSettings
from ..artifacts.features import Features
from ..artifacts.split import require_template, write_labels
from ..artifacts.streams import Streams
from ..checkpoints.dense import TEMPLATES, DenseCheckpoint
from ..checkpoints.tokenizers import carried_over
from ..fitting.balanced_kmeans import Clustering, balanced_kmeans
from ..fitting.ridge import NormalEquations, gram, low_rank_map, token_weights
from ..layers.decoder import Batch, DenseLayer, batches_of, embed
from ..layers.scores import TOKENS_PER_CHUNK, LayerActivations, token_stride
from ..names import split_folder
from ..progress import Progress, no_progress
from ..storage.folder import ArtifactWriter, require_place
from ..storage.manifest import Claim, environment
from ..text.corpus import Corpus

# Added to the diagonal of the Gram matrix of normalised rows, so that it has a Cholesky factor in float64.
JITTER = 1e-6
PREDICTION_RANK = 64  # from 32 to 96 the experts are as good, and better than at full rank
RIDGE_STRENGTH = 1e-2  # of the prediction, in mean diagonals of the Gram matrix of the inputs


class NeuronStatistics:
    """How much each neuron of a layer adds to the MLP's output, and which neurons are needed together.

    Attributes:
        importance: float64 `[I]`, sum over tokens of weight * (activation * norm of the neuron's down_proj column)^2.
        together: float32 `[I, I]`, tokens that need both neurons (exact up to 2^24).
    """

    def __init__(self, column_norms: torch.Tensor, hidden_size: int):
        """`column_norms`: float32 `[I]`, of down_proj."""
        num_neurons, device = len(column_norms), column_norms.device
        self._column_norms = column_norms
        self._equations = NormalEquations(hidden_size + 1, num_neurons, device)
        self.importance = torch.zeros(num_neurons, dtype=torch.float64, device=device)
        self.together = torch.zeros(num_neurons, num_neurons, device=device)

    def add(self, inputs: torch.Tensor, activations: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens: the MLP's inputs, float32 `[T, H]`, what enters down_proj, `[T, I]`, and their weights `[T]`.

        Without weights each token weighs 1 over what all its neurons add, which keeps few of them from owning the sum.
        """
        added = activations.abs() * self._column_norms
        if weights is None:
            weights = token_weights(added.square().sum(dim=1))
        self.importance += (added.square() * weights[:, None]).sum(dim=0, dtype=torch.float64)
        self._equations.add(F.pad(inputs, (0, 1), value=1.0), added, weights)

    def count(self, inputs: list[torch.Tensor], keep_fraction: float) -> None:
        """Count which neurons are needed together, once all tokens have been added: the same inputs again, in parts."""
        solution = self._equations.solve(RIDGE_STRENGTH)
        rank = min(PREDICTION_RANK, len(solution) - 1, len(self.importance))
        factors = [part.float() for part in low_rank_map(self._equations, solution, RIDGE_STRENGTH, rank)]
        stride = token_stride(sum(map(len, inputs)) * len(self.importance))
        # Of the same products as below: the least score that counts is then one of those that are counted.
        sample = torch.cat([_predicted(part, *factors)[::stride] for part in inputs]).flatten().cpu().numpy()
        rank_of_least = int((1 - keep_fraction) * (len(sample) - 1))
        least = float(np.partition(sample, rank_of_least)[rank_of_least])  # PyTorch's kthvalue takes ten times as long
        for part in inputs:
            added = _predicted(part, *factors)
            needed = ((added >= least) & (added > 0)).float()
            self.together += gram(needed, needed)

    def split(self, num_experts: int, num_shared_experts: int, distance: str, seed: int) -> tuple[torch.Tensor, Any]:
        """Labels int64 `[I]`, shared experts last and hottest of all, and the clustering of the others."""
        width = len(self.importance) // num_experts
        hottest = self.importance.argsort(descending=True, stable=True)
        shared, rest = hottest[: num_shared_experts * width], hottest[num_shared_experts * width :].sort().values
        clusters = self._cluster(rest, num_experts - num_shared_experts, distance, seed)
        labels = torch.empty(len(self.importance), dtype=torch.long)
        labels[rest.cpu()] = clusters.labels
        shared_labels = torch.arange(num_experts - num_shared_experts, num_experts)
        labels[shared.cpu()] = shared_labels.repeat_interleave(width)
        return labels, clusters

    def _cluster(self, neurons: torch.Tensor, num_clusters: int, distance: str, seed: int) -> Clustering:
        cosines = self.together[neurons][:, neurons].double()
        norms = cosines.diagonal().clamp(min=1).sqrt()
        cosines /= norms[:, None] * norms
        cosines.diagonal().add_(JITTER)
        # The rows of the Cholesky factor have the Gram matrix of the rows of bits, which is all that k-means sees.
        rows = torch.linalg.cholesky(cosines).float()
        return balanced_kmeans(rows, num_clusters, distance=distance, seed=seed, device=str(rows.device))


def split_by_activations(
    checkpoint: DenseCheckpoint,
    text: Corpus | Features,
    save_path: str | Path,
    template: str,
    settings: SplitSettings,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ArtifactWriter:
    """Split the neurons of every layer by what they do on text.

    Memory: one layer's weights, its inputs for all tokens, and eight square matrices of its neurons, in float32. Disk,
    for a corpus and until the split is finished: 8 * hidden_size bytes a token.

    Args:
        text: a corpus, which the dense model reads layer by layer, or recorded features.
        template: gives the files their names; the activations are those that enter down_proj.

    Returns: the writer of the folder, finished.
    """
    num_experts, num_shared_experts = settings.num_experts, settings.num_shared_experts
    keep_fraction = settings.keep_fraction
    checkpoint.require_experts(num_experts)
    require_template(template)
    from_corpus = isinstance(text, Corpus)
    folder = split_folder(save_path, checkpoint.name, num_experts)
    require_place(folder, "split")
    options = {
        "cluster_on": "activations",
        "templates": [template],
        "num_experts": num_experts,
        "num_shared_experts": num_shared_experts,
        "keep_fraction": keep_fraction,
        "distance": settings.distance,
        "seed": settings.seed,
    }
    inputs = {"train_data_path": text.digest} if from_corpus else {"hidden_features_path": text.artifact.digest}
    if from_corpus:
        options |= {"batch_size": settings.batch_size} | text.options
    claim = Claim("split", options, checkpoint.source, environment(device), inputs)
    names = [template.format(layer) for layer in range(checkpoint.config.num_hidden_layers)]
    writer = ArtifactWriter(folder, claim, names, overwrite=overwrite, exclusive=True)
    missing = writer.missing()
    layers = [layer for layer, name in enumerate(names) if name in missing]
    if layers:
        carried_over(checkpoint.path)  # what the last stage needs is better refused in the first
        checkpoint.check_finite(progress)  # before anything is written
    if from_corpus and layers:
        streams = Streams(writer, (1, text.num_tokens, checkpoint.config.hidden_size))
        layers = streams.layers_to_walk(layers, len(names))
        filled = _walk(checkpoint, text, streams, layers, keep_fraction, settings.batch_size, device)
    else:
        filled = (_from_features(checkpoint, text, layer, keep_fraction, device) for layer in layers)
    for layer, statistics in zip(progress(layers, "split", "layer"), filled, strict=True):
        labels, clusters = statistics.split(num_experts, num_shared_experts, settings.distance, settings.seed)
        write_labels(writer, names[layer], labels, clusters)
    writer.finish()
    return writer


def _from_features(
    checkpoint: DenseCheckpoint, features: Features, layer: int, keep_fraction: float, device: str
) -> NeuronStatistics:
    """The statistics of one layer, from the recorded inputs of its MLP."""
    activations = LayerActivations(checkpoint, layer, TEMPLATES[1], device)
    statistics = NeuronStatistics(_column_norms(checkpoint, layer, device), checkpoint.config.hidden_size)
    chunks = [chunk.to(device) for shard in features.inputs(layer) for chunk in shard.split(TOKENS_PER_CHUNK)]
    for inputs in chunks:
        statistics.add(inputs.float(), activations(inputs))
    statistics.count(chunks, keep_fraction)
    return statistics


def _walk(
    checkpoint: DenseCheckpoint,
    corpus: Corpus,
    streams: Streams,
    layers: list[int],
    keep_fraction: float,
    batch_size: int,
    device: str,
) -> Iterator[NeuronStatistics]:
    """The statistics of the layers, which are the last ones, while the dense model reads the corpus."""
    batches = batches_of(corpus.blocks, batch_size)
    if layers[0] == 0 and not streams.has(0):
        embed(streams.begin(0)[0], corpus.blocks, batches, checkpoint.finite_tensor("embed_tokens.weight"))
        streams.commit(0)
    for layer in layers:
        statistics = NeuronStatistics(_column_norms(checkpoint, layer, device), checkpoint.config.hidden_size)
        inputs = _run_layer(
            checkpoint, layer, batches, streams.before(layer)[0], streams.begin(layer + 1)[0], statistics
        )
        statistics.count(inputs, keep_fraction)
        streams.commit(layer + 1)
        yield statistics
        streams.remove(layer)


@torch.inference_mode()
def _run_layer(
    checkpoint: DenseCheckpoint,
    layer: int,
    batches: list[Batch],
    before: torch.Tensor,
    after: torch.Tensor,
    statistics: NeuronStatistics,
) -> list[torch.Tensor]:
    """Add all tokens to the statistics, and fill the stream after the layer; returns the MLP's inputs."""
    device = statistics.together.device
    dense = DenseLayer(checkpoint, layer, device)
    seen = []
    for batch in batches:
        stream, inputs = dense.attention_half(before[batch.rows].to(device), batch)
        hidden = dense.activations(inputs)
        statistics.add(inputs, hidden, token_weights(stream.square().sum(dim=1)))
        after[batch.rows] = (stream + dense.output(hidden)).cpu()
        seen.append(inputs)
    return seen


def _predicted(
    inputs: torch.Tensor, output_weight: torch.Tensor, input_weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """What each neuron is expected to add, `[T, H]` -> `[T, I]`."""
    return F.linear(F.linear(inputs.to(bias), input_weight), output_weight, bias)


def _column_norms(checkpoint: DenseCheckpoint, layer: int, device: str) -> torch.Tensor:
    return checkpoint.mlp_tensor(layer, "down_proj.weight", device).norm(dim=0)
