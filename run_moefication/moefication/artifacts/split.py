"""Which expert each neuron belongs to: what the split stage writes, a file per layer, and reading it back."""

from pathlib import Path
from typing import Any

import torch

from ...settings import TEMPLATES
from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.tokenizers import carried_over
from ..errors import MoEficationError, SettingError
from ..names import split_folder
from ..storage.artifact import open_finished
from ..storage.folder import ArtifactWriter
from ..storage.manifest import ArtifactSpec, environment


def parse_templates(text: str) -> list[str]:
    """Comma-separated templates, each one that names neurons by rows."""
    templates = [name.strip() for name in text.split(",")]
    for name in templates:
        require_template(name)
    if len(set(templates)) < len(templates):
        raise SettingError(f"templates names {max(templates, key=templates.count)} twice")
    return templates


def require_template(name: str) -> None:
    """Refuse a template that is not one of the two whose rows are the neurons."""
    if name not in TEMPLATES:
        raise SettingError(f"templates {name!r} is not one of {', '.join(TEMPLATES)}")


def split_writer(
    checkpoint: DenseCheckpoint,
    save_path: str | Path,
    templates: list[str],
    options: dict[str, Any],
    *,
    method: str,
    inputs: dict[str, str] | None = None,
    told: dict[str, Any] | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> ArtifactWriter:
    """The writer of a split's folder, with a part for each template and layer.

    `method`: the last word of the folder's name; `inputs`: digests of the text that was read; `told`: fields of the
    `ArtifactSpec` that say more of it.
    """
    checkpoint.require_experts(options["num_experts"])
    options = options | {"templates": templates}
    spec = ArtifactSpec("split", options, checkpoint.source, environment(device), inputs or {}, **(told or {}))
    folder = split_folder(save_path, checkpoint.name, options["num_experts"], method)
    names = [template.format(i) for template in templates for i in range(checkpoint.config.num_hidden_layers)]
    writer = ArtifactWriter(folder, spec, names, overwrite=overwrite, exclusive=True)
    if writer.missing():
        carried_over(checkpoint.path)  # what the last stage needs is better refused in the first
    return writer


def write_labels(
    writer: ArtifactWriter, name: str, labels: torch.Tensor, metrics: dict[str, Any] | None = None
) -> None:
    """Write one layer's labels `[intermediate_size]`, with what is to be said of how they were found."""
    writer.write_part(name, {name: writer.write_tensors(name, labels)}, metrics)


class Split:
    """A finished split, checked against the model and the number of experts it is wanted for."""

    def __init__(self, folder: str | Path, checkpoint: DenseCheckpoint, template: str, num_experts: int):
        require_template(template)
        checkpoint.require_experts(num_experts)
        self.artifact = open_finished(folder, "split")
        self.artifact.require_source(checkpoint.fingerprint, checkpoint.name)
        self.artifact.require_option("num_experts", num_experts)
        if template not in self.artifact.options["templates"]:
            raise MoEficationError(f"{folder} was not made on {template} but on {self.artifact.options['templates']}")
        self.template, self.num_experts = template, num_experts
        self.num_shared_experts = self.artifact.options.get("num_shared_experts", 0)
        self.num_routed_experts = num_experts - self.num_shared_experts
        self._width = checkpoint.config.intermediate_size
        for layer in range(checkpoint.config.num_hidden_layers):
            self.labels(layer)  # small, and better refused before work than in its middle

    def labels(self, layer: int) -> torch.Tensor:
        """int64 `[intermediate_size]`: the expert of each neuron; all have equally many, the last ones are shared."""
        name = self.template.format(layer)
        labels = self.artifact.load(name)
        if not isinstance(labels, torch.Tensor) or labels.shape != (self._width,) or labels.is_floating_point():
            raise MoEficationError(f"{self.artifact.folder / name} is not an int tensor of {self._width} neurons")
        labels = labels.long()
        equal = torch.arange(self.num_experts).repeat_interleave(self._width // self.num_experts)
        if not torch.equal(labels.sort().values, equal):
            raise MoEficationError(f"{self.artifact.folder / name} does not cut the neurons into equal experts")
        return labels

    def routed_neurons(self, layer: int) -> torch.Tensor:
        """int64 `[routed experts, width]`: the neurons of each routed expert, in their original order."""
        return self._neurons(layer)[: self.num_routed_experts]

    def shared_neurons(self, layer: int) -> torch.Tensor:
        """int64 `[shared experts * width]`: the neurons of the shared experts, which are the last ones."""
        return self._neurons(layer)[self.num_routed_experts :].flatten()

    def _neurons(self, layer: int) -> torch.Tensor:
        return self.labels(layer).argsort(stable=True).view(self.num_experts, -1)
