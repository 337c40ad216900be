"""Stage 1: which expert each neuron of each MLP belongs to."""

from pathlib import Path

import torch

from ...settings import RandomSplitSettings, SplitSettings, require_shared
from ..artifacts.split import split_writer, write_labels
from ..checkpoints.dense import DenseCheckpoint
from ..errors import MoEficationError
from ..fitting.balanced_kmeans import balanced_kmeans
from ..progress import progress
from ..storage.files import digest
from ..storage.folder import ArtifactWriter


def split_by_weights(
    checkpoint: DenseCheckpoint,
    save_path: str | Path,
    templates: list[str],
    settings: SplitSettings,
    *,
    device: str = "cpu",
    overwrite: bool = False,
) -> ArtifactWriter:
    """Cluster the neurons of every layer by the direction of their weight rows (MoEfication, section 3.1).

    Writes per template and layer an int64 tensor `[intermediate_size]`. Memory: one weight at a time, in float32.
    """
    how = dict(method=settings.method, device=device, overwrite=overwrite)
    with split_writer(checkpoint, save_path, templates, settings.recorded(), **how) as writer:
        missing = writer.missing()
        for name in progress(missing, f"check {checkpoint.name}", "weight"):
            if not checkpoint.finite_tensor(name).any():
                raise MoEficationError(f"{checkpoint.path}: {name} is all zeros, there is nothing to cluster")
        for name in progress(missing, "split", "layer"):
            weight = checkpoint.finite_tensor(name).to(device, torch.float32)
            rows = torch.nn.functional.normalize(weight)
            clusters = balanced_kmeans(rows, settings.num_experts, settings.distance, settings.seed)
            write_labels(writer, name, clusters.labels, clusters.metrics)
        writer.finish()
    return writer


def split_at_random(
    checkpoint: DenseCheckpoint,
    save_path: str | Path,
    templates: list[str],
    settings: RandomSplitSettings,
    *,
    overwrite: bool = False,
) -> ArtifactWriter:
    """Deal the neurons of every layer out at random: the control that any clustering has to beat."""
    num_experts, width = settings.num_experts, checkpoint.config.intermediate_size
    require_shared(settings.num_shared_experts, num_experts)
    how = dict(method=settings.method, overwrite=overwrite)
    with split_writer(checkpoint, save_path, templates, settings.recorded(), **how) as writer:
        for name in writer.missing():
            # Each weight has a generator of its own, so that an interrupted run goes on with the same numbers.
            generator = torch.Generator().manual_seed(int(digest([settings.seed, name])[:8], 16))
            labels = torch.arange(num_experts).repeat_interleave(width // num_experts)
            write_labels(writer, name, labels[torch.randperm(width, generator=generator)])
        writer.finish()
    return writer
