"""Checkpoints of LLaMA-MoE v1 (Zhu et al. 2024, arXiv 2406.16554), and the LlamaMoE that computes the same.

The gates that were published add noise to their scores in training alone. Otherwise they take the best experts of each
token, and weigh them by the softmax over these experts' scores, times a factor. A LlamaMoE does that under other names,
with the experts of a layer packed into two tensors.
"""

import re
import reprlib
from collections.abc import Iterator
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from llama_moe import LlamaMoEConfig
from run_moefication.moefication.checkpoints.dense import UNUSED_TENSORS, LlamaCheckpoint
from run_moefication.moefication.checkpoints.dense_config import (
    KINDS,
    REFUSED_FIELDS,
    built_config,
    expected_shapes,
    llama_config,
)
from run_moefication.moefication.checkpoints.headers import HEAD, HEADS
from run_moefication.moefication.checkpoints.model_card import Origin, import_card
from run_moefication.moefication.checkpoints.tokenizers import carried_over
from run_moefication.moefication.checkpoints.writer import (
    MAX_SHARD_BYTES,
    PlannedTensor,
    plan_shards,
    write_checkpoint_files,
    write_shard,
)
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.progress import progress
from run_moefication.moefication.storage.files import read_json_object
from run_moefication.moefication.storage.folder import ArtifactWriter
from run_moefication.moefication.storage.manifest import ArtifactSpec, environment

CAUSAL_LM = "LlamaMoEForCausalLM"
V1_FIELDS = {"num_selects", "size_experts"}  # by these its config.json is told from that of a LlamaMoE
# What the class of its configs says of the fields that a config.json leaves out.
DEFAULTS = {
    "architectures": [CAUSAL_LM],
    "num_experts": 16,
    "num_selects": 4,
    "size_experts": None,
    "gate_type": "TopKBalancedNoisyGate",
    "gate_network": "mlp",
    "gate_use_softmax": True,
    "calculator_type": "UniversalCalculator",
    "multiply_gate_scores": True,
    "score_scale_factor": 1.0,
    "add_weight_norm": False,
    "mlp_bias": False,  # its class knows no such field
}
# These have no other value that a LlamaMoE could compute.
FIXED = ("gate_type", "calculator_type", "add_weight_norm", "mlp_bias")
# A LlamaMoE's gate: its parameters, and their names in v1.
GATES = {
    "mlp": {"input_weight": "gate_network.0.weight", "output_weight": "gate_network.2.weight"},
    "linear": {"weight": "gate_network.weight"},
}
EXPERT = "layers.{}.mlp.calculator.experts.weight_{}.{}"


class LlamaMoEv1Checkpoint(LlamaCheckpoint):
    """A validated checkpoint of LLaMA-MoE v1. `moe_config` is that of the LlamaMoE which computes the same.

    Raises MoEficationError, which names the file, field or tensor that is missing, surplus or wrong, or that a LlamaMoE
    has no place for.
    """

    MLP_TENSOR = EXPERT.format(0, "gate", 0)
    # Training learns how much noise each score gets.
    UNUSED = re.compile(rf"{UNUSED_TENSORS.pattern}|(model\.)?layers\.\d+\.mlp\.gate\.weight_noise\.weight")

    def __init__(self, model_path: str | Path):
        super().__init__(model_path)
        fields = self.config.to_dict() | self._experts | {"dtype": str(self.dtype).removeprefix("torch.")}
        for name in ("model_type", "transformers_version", "_name_or_path"):
            fields.pop(name, None)
        self.moe_config = built_config(LlamaMoEConfig, self.path / "config.json", fields)

    @property
    def model_class(self) -> str:
        """The name of its class, which is also that of the LlamaMoE."""
        return self._experts["architectures"][0]

    def plan(self) -> list[PlannedTensor]:
        """All tensors of the LlamaMoE, each with the dtype that it has here."""
        copied = [*self.body_tensors(), *([HEAD] if self.lm_head == HEAD else [])]
        plan = [self._planned(name, name) for name in copied if ".mlp." not in name]
        for layer in range(self.config.num_hidden_layers):
            mlp = f"layers.{layer}.mlp"
            plan += [self._planned(f"{mlp}.gate.{new}", f"{mlp}.gate.{old}") for new, old in self._gate.items()]
            plan.append(self._packed(f"{mlp}.experts.gate_up_proj", layer, ("gate", "up")))
            plan.append(self._packed(f"{mlp}.experts.down_proj", layer, ("down",)))
        return plan

    def _read_config(self, path: Path) -> tuple[dict[str, Any], LlamaConfig]:
        file = path / "config.json"
        raw = read_json_object(file, "is this the folder of a LLaMA-MoE v1 checkpoint?")
        kind = raw.get("model_type")
        if kind in KINDS:
            raise MoEficationError(f"{path} is a dense model ({kind}): convert it, run_moefication/1_split.sh first")
        if kind != LlamaMoEConfig.model_type:
            raise MoEficationError(f"{path} is a {kind!r} model, no LLaMA-MoE v1")
        if not V1_FIELDS & raw.keys():
            raise MoEficationError(f"{path} is a LlamaMoE, no LLaMA-MoE v1: use it as it is")
        if raw.get("quantization_config"):
            raise MoEficationError(f"{path} {REFUSED_FIELDS['quantization_config']}")
        config = llama_config(file, raw)
        self._experts = read_experts(file, raw, config)
        return raw, config

    @property
    def _gate(self) -> dict[str, str]:
        return GATES[self._experts["gate_network"]]

    def _expected_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        is_causal = self.model_class == CAUSAL_LM
        if is_causal and self.lm_head is None:
            raise MoEficationError(f"{self.path} lacks the tensor {HEAD}, which its config.json calls for")
        for name, shape in expected_shapes(self.path, self.config):
            if ".mlp." not in name and (name != HEAD or is_causal):
                yield name, shape
        experts, hidden = self._experts["num_experts"], self.config.hidden_size
        width = self.config.intermediate_size // experts
        shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        for layer in range(self.config.num_hidden_layers):
            for new, old in self._gate.items():
                yield f"layers.{layer}.mlp.gate.{old}", (experts, experts if new == "output_weight" else hidden)
            for kind, shape in shapes.items():
                yield from ((EXPERT.format(layer, kind, expert), shape) for expert in range(experts))

    def _tell_unread(self, unused: list[str]) -> None:
        super()._tell_unread([])  # every checkpoint of v1 has such tensors: that is no cause for a warning

    def _planned(self, name: str, source: str) -> PlannedTensor:
        tensor = self.tensor(source)
        return PlannedTensor(self._new_name(name), tuple(tensor.shape), tensor.dtype, partial(self.tensor, source))

    def _packed(self, name: str, layer: int, kinds: tuple[str, ...]) -> PlannedTensor:
        """These matrices of all experts as one `[experts, rows, columns]`, an expert's own below each other."""
        experts = [
            [self.tensor(EXPERT.format(layer, kind, expert)) for kind in kinds]
            for expert in range(self._experts["num_experts"])
        ]
        rows, columns = experts[0][0].shape
        dtype = reduce(torch.promote_types, [part.dtype for parts in experts for part in parts])
        shape = (len(experts), rows * len(kinds), columns)
        return PlannedTensor(self._new_name(name), shape, dtype, lambda: torch.stack([*map(torch.cat, experts)]))

    def _new_name(self, name: str) -> str:
        return name if name in HEADS or self.model_class != CAUSAL_LM else f"model.{name}"


def read_experts(file: Path, raw: dict[str, Any], config: LlamaConfig) -> dict[str, Any]:
    """The fields of a LlamaMoE's config that say what experts and gates of this config.json do. Raises MoEficationError
    for a value that it cannot compute."""
    fields = DEFAULTS | {name: value for name, value in raw.items() if value is not None}
    layers, neurons = config.num_hidden_layers, config.intermediate_size
    experts, selects, is_weighted = (fields[name] for name in ("num_experts", "num_selects", "multiply_gate_scores"))
    network = str(fields["gate_network"]).lower()
    width = neurons // experts if type(experts) is int and 0 < experts <= neurons and neurons % experts == 0 else None
    size = _common(_common(fields["size_experts"], layers), experts)
    # v1 multiplies scores by it, and so experts only where these are multiplied by their scores.
    scale = _common(fields["score_scale_factor"], layers) if is_weighted else 1.0
    classes = [[CAUSAL_LM], ["LlamaMoEModel"]]
    checks = {name: (fields[name] == DEFAULTS[name], repr(DEFAULTS[name])) for name in FIXED} | {
        "architectures": (fields["architectures"] in classes, " or ".join(map(str, classes))),
        "gate_network": (network in GATES, " or ".join(map(repr, GATES))),
        "num_experts": (width is not None, f"a number of equal parts of intermediate_size {neurons}"),
        "num_selects": (type(selects) is int and width and 0 < selects <= experts, f"1 to num_experts {experts}"),
        "size_experts": (size in (None, width), f"{width} for every expert of every layer"),
        "multiply_gate_scores": (isinstance(is_weighted, bool), "True or False"),
        "gate_use_softmax": (fields["gate_use_softmax"] is True or not is_weighted, "True beside multiply_gate_scores"),
        "score_scale_factor": (not isinstance(scale, list), "one number for all layers"),
    }
    for name, (holds, wanted) in checks.items():
        if not holds:
            found = f"{file}: {name} is {reprlib.repr(fields[name])}"
            raise MoEficationError(f"{found}; {wanted} is imported, other models run by their own code alone")
    return {
        "architectures": fields["architectures"],
        "num_experts": experts,
        "num_experts_per_tok": selects,
        "gate_network": network,
        "multiply_gate_scores": is_weighted,
        "score_scale_factor": scale,
    }


def _common(values: Any, count: int) -> Any:
    """The value that a list of so many holds throughout; anything else as it is."""
    is_list = isinstance(values, list) and values and len(values) == count
    return values[0] if is_list and all(value == values[0] for value in values) else values


def import_checkpoint(model_path: str | Path, save_path: str | Path, *, overwrite: bool = False) -> ArtifactWriter:
    """Write a LLaMA-MoE v1 checkpoint, a folder or a hub id, as a LlamaMoE: config, safetensors shards, tokenizer
    files, code and model card. Memory: twice one shard of at most 2 GiB (or one tensor, where that is larger)."""
    checkpoint = LlamaMoEv1Checkpoint(model_path)
    config = checkpoint.moe_config
    shards = plan_shards(checkpoint.plan(), MAX_SHARD_BYTES)
    spec = ArtifactSpec(stage="import", options={}, source=checkpoint.source, environment=environment("cpu"))
    writer = ArtifactWriter(Path(save_path), spec, [*shards, "config"], overwrite=overwrite)
    missing = writer.missing()
    tokenizer = carried_over(checkpoint.path) if missing else {}
    if missing:
        checkpoint.check_finite()
    for file in progress([file for file in shards if file in missing], "import", "shard"):
        write_shard(writer, file, shards[file])
    if "config" in missing:
        # Last of all, so that nothing loads a folder whose weights are not complete.
        origin = Origin.of_source(checkpoint.path, checkpoint.name, checkpoint.hub_id)
        card = import_card(origin, config, checkpoint.model_class)
        write_checkpoint_files(writer, "config", checkpoint.path, shards, config, card, tokenizer)
    writer.finish()
    return writer
