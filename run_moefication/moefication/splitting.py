"""Stage 1: which expert each neuron of each MLP belongs to."""

from pathlib import Path

import torch

from . import artifacts
from .balanced_kmeans import balanced_kmeans
from .checkpoints import TEMPLATES, Checkpoint
from .errors import MoEficationError
from .manifests import Claim, environment
from .progress import Progress, no_progress


def parse_templates(text: str) -> list[str]:
    """Comma-separated templates, each one that names neurons by rows."""
    templates = [template.strip() for template in text.split(",")]
    for template in templates:
        require_template(template)
    if len(set(templates)) < len(templates):
        raise MoEficationError(f"--templates names {max(templates, key=templates.count)} twice")
    return templates


def require_template(template: str) -> None:
    """Refuse a template that is not one of the two whose rows are the neurons."""
    if template not in TEMPLATES:
        raise MoEficationError(f"--templates {template!r} is not one of {', '.join(TEMPLATES)}")


def split_by_clustering(
    checkpoint: Checkpoint,
    save_path: str | Path,
    *,
    templates: list[str],
    num_experts: int,
    distance: str = "l2",
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> artifacts.ArtifactWriter:
    """Cluster the neurons of every layer by the direction of their weight rows (MoEfication, section 3.1).

    Writes per template and layer an int64 tensor `[intermediate_size]`, the expert of each neuron, and records the
    assignment cost beside the lower bound that proves it. Holds one weight in float32 at a time.

    Returns: the writer of the folder, finished.
    """
    checkpoint.require_experts(num_experts)
    claim = Claim(
        stage="split",
        options={"templates": templates, "num_experts": num_experts, "distance": distance, "seed": seed},
        source=checkpoint.source,
        environment=environment(device),
    )
    names = [template.format(i) for template in templates for i in range(checkpoint.config.num_hidden_layers)]
    folder = artifacts.split_folder(save_path, checkpoint.name, num_experts)
    writer = artifacts.ArtifactWriter(folder, claim, names, overwrite=overwrite)
    missing = writer.missing()
    for name in progress(missing, "check", "weight"):
        if not checkpoint.finite_tensor(name).any():
            raise MoEficationError(f"{checkpoint.path}: {name} is all zeros, there is nothing to cluster")
    for name in progress(missing, "split", "layer"):
        weight = checkpoint.finite_tensor(name).to(device, torch.float32)
        rows = torch.nn.functional.normalize(weight)
        clusters = balanced_kmeans(rows, num_experts, distance=distance, seed=seed, device=device)
        metrics = {
            "cost": clusters.cost,
            "lower_bound_of_last_assignment": clusters.lower_bound,
            "iterations": clusters.iterations,
            "converged": clusters.converged,
        }
        writer.write_piece(name, {name: writer.write_tensors(name, clusters.labels)}, metrics)
    writer.finish()
    return writer


class Split:
    """A finished split, checked against the model and the number of experts it is wanted for."""

    def __init__(self, folder: str | Path, checkpoint: Checkpoint, template: str, num_experts: int):
        require_template(template)
        checkpoint.require_experts(num_experts)
        self.artifact = artifacts.open_finished(folder, "split")
        self.artifact.require_source(checkpoint.fingerprint, checkpoint.name)
        self.artifact.require_option("num_experts", num_experts)
        if template not in self.artifact.options["templates"]:
            raise MoEficationError(f"{folder} was not made on {template} but on {self.artifact.options['templates']}")
        self.template, self.num_experts = template, num_experts
        self._width = checkpoint.config.intermediate_size
        for layer in range(checkpoint.config.num_hidden_layers):
            self.labels(layer)  # small, and better refused before work than in its middle

    def labels(self, layer: int) -> torch.Tensor:
        """int64 `[intermediate_size]`: the expert of each neuron; every expert has equally many."""
        name = self.template.format(layer)
        labels = self.artifact.load(name)
        if not isinstance(labels, torch.Tensor) or labels.shape != (self._width,) or labels.is_floating_point():
            raise MoEficationError(f"{self.artifact.folder / name} is not an int tensor of {self._width} neurons")
        labels = labels.long()
        in_range = ((labels >= 0) & (labels < self.num_experts)).all()
        if not in_range or (labels.bincount(minlength=self.num_experts) != self._width // self.num_experts).any():
            raise MoEficationError(f"{self.artifact.folder / name} does not cut the neurons into equal experts")
        return labels

    def neurons(self, layer: int) -> torch.Tensor:
        """int64 `[num_experts, width]`: the neurons of each expert, in their original order."""
        return self.labels(layer).argsort(stable=True).view(self.num_experts, -1)
