"""The gates that the select stage makes, and reading what it wrote."""

from pathlib import Path
from typing import Any

import torch

from llama_moe.gates import GATE_CLASSES, Gate

from ...settings import GATE_NETWORKS, OFF
from ..checkpoints.dense import DenseCheckpoint
from ..errors import MoEficationError, SettingError
from ..storage.artifact import open_finished
from .split import Split


def new_gate(gate_network: str, hidden_size: int, num_experts: int, **of_ridge: Any) -> Gate:
    """A gate without values or a budget, with room for score quantiles; `of_ridge` are `rank` and `has_bias`."""
    budget = {"num_experts_per_tok": num_experts, "routing": "threshold"}
    return GATE_CLASSES[GATE_NETWORKS[gate_network]](hidden_size, num_experts, **budget, **of_ridge)


class TrainedGates:
    """A finished select folder, checked against the model and the split its gates were trained for.

    `config_fields` describes these gates in a `LlamaMoEConfig`; `shapes` are those of each gate's tensors, by name.
    """

    def __init__(self, folder: str | Path, checkpoint: DenseCheckpoint, split: Split):
        self.artifact = open_finished(folder, "select")
        self.artifact.require_source(checkpoint.fingerprint, checkpoint.name)
        self.artifact.require_option("num_experts", split.num_experts)
        self.artifact.require_option("templates", split.template)
        if self.artifact.manifest["inputs"].get("split_file_path") != split.artifact.digest:
            raise MoEficationError(f"{folder} holds gates of another split than {split.artifact.folder}")
        options = self.artifact.options
        network, rank, is_ridge = options["gate_network"], options.get("gate_rank"), options.get("gate_fit") == "ridge"
        has_bias = is_ridge and options.get("gate_bias") != OFF
        self.config_fields = {"gate_network": GATE_NETWORKS[network], "gate_rank": rank, "gate_bias": has_bias}
        self._template = split.template
        of_ridge = {"rank": rank, "has_bias": has_bias} if is_ridge else {}
        with torch.device("meta"):
            gate = new_gate(network, checkpoint.config.hidden_size, split.num_routed_experts, **of_ridge)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in gate.state_dict().items()}
        for layer in range(checkpoint.config.num_hidden_layers):
            self.state(layer)  # small, and better refused before work than in its middle

    def state(self, layer: int) -> dict[str, torch.Tensor]:
        """The gate's state dict, its names and shapes checked."""
        name = self._template.format(layer)
        file, state = self.artifact.folder / name, self.artifact.load(name)
        if isinstance(state, dict) and "score_quantiles" not in state:
            raise SettingError(f"{file} is of an older version; run it again with overwrite")
        if not isinstance(state, dict) or {key: tuple(tensor.shape) for key, tensor in state.items()} != self.shapes:
            raise MoEficationError(f"{file} is not a {self.config_fields['gate_network']} gate of shape {self.shapes}")
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise MoEficationError(f"{file} holds NaN or infinite values; train it again")
        return state
