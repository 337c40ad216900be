"""Reading what the select stage wrote."""

from pathlib import Path

import torch

from llama_moe import LlamaMoEConfig
from llama_moe.gates import make_gate

from ...settings import GATE_NETWORKS
from ..checkpoints.dense import DenseCheckpoint
from ..errors import MoEficationError, SettingError
from ..storage.folder import open_finished
from .split import Split


class TrainedGates:
    """A finished select folder, checked against the model and the split its gates were trained for.

    Attributes:
        config_fields: how a `LlamaMoEConfig` describes these gates.
        shapes: of each gate's tensors by name: its parameters, and the quantiles of its scores.
    """

    def __init__(self, folder: str | Path, checkpoint: DenseCheckpoint, split: Split):
        self.artifact = open_finished(folder, "select")
        self.artifact.require_source(checkpoint.fingerprint, checkpoint.name)
        self.artifact.require_option("num_experts", split.num_experts)
        self.artifact.require_option("templates", split.template)
        if self.artifact.manifest["inputs"].get("split_file_path") != split.artifact.digest:
            raise MoEficationError(f"{folder} holds gates of another split than {split.artifact.folder}")
        options = self.artifact.options
        self.config_fields = {
            "gate_network": GATE_NETWORKS[options["gate_network"]],
            "gate_rank": options.get("gate_rank"),
            "gate_bias": options.get("gate_fit") == "ridge",
        }
        self._template = split.template
        config = LlamaMoEConfig(
            hidden_size=checkpoint.config.hidden_size,
            num_attention_heads=checkpoint.config.num_attention_heads,  # or the default, which may not fit
            intermediate_size=checkpoint.config.intermediate_size,
            num_experts=split.num_routed_experts,
            num_experts_per_tok=split.num_routed_experts,
            num_shared_experts=split.num_shared_experts,
            routing="threshold",
            **self.config_fields,
        )
        with torch.device("meta"):
            gate = make_gate(config)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in gate.state_dict().items()}
        for layer in range(checkpoint.config.num_hidden_layers):
            self.state(layer)  # small, and better refused before work than in its middle

    def state(self, layer: int) -> dict[str, torch.Tensor]:
        """The gate's state dict, its names and shapes checked."""
        name = self._template.format(layer)
        state = self.artifact.load(name)
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()} if isinstance(state, dict) else None
        if isinstance(state, dict) and "score_quantiles" not in state:
            raise SettingError(f"{self.artifact.folder / name} is of an older version; run it again with overwrite")
        if shapes != self.shapes:
            network = self.config_fields["gate_network"]
            raise MoEficationError(f"{self.artifact.folder / name} is not a {network} gate of shape {self.shapes}")
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise MoEficationError(f"{self.artifact.folder / name} holds NaN or infinite values; train it again")
        return state
