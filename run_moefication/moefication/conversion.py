"""Stage 4: dense tensors, a split and gates become a LlamaMoE checkpoint, tensor by tensor."""

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import llama_moe
from llama_moe import LlamaMoEConfig
from llama_moe.gates import GATE_CLASSES, LinearGate

from . import artifacts
from .checkpoints import DTYPES, TEMPLATES, TOKENIZER_FILES, Checkpoint
from .errors import MoEficationError
from .gate_settings import GATE_NETWORKS, require_selects
from .manifests import Claim, environment
from .model_card import model_card
from .progress import Progress, no_progress
from .sharding import WEIGHTS_INDEX, PlannedTensor, plan_shards, shard_index
from .splitting import Split

CONVERT_TYPES = ("LlamaMoEModel", "LlamaMoEForCausalLM", "LlamaMoEForSequenceClassification")
CODE_FILES = ("configuration_llama_moe.py", "modeling_llama_moe.py", "moe_layers.py", "gates.py")
# Copied as they are: loading and saving them again loses templates, and refuses some generation configs.
COPIED_FILES = (
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
)
MAX_SHARD_BYTES = 2 << 30


class Gates:
    """A finished select folder, checked against the model and the split its gates were trained for."""

    def __init__(self, folder: str | Path, checkpoint: Checkpoint, split: Split):
        self.artifact = artifacts.open_finished(folder, "select")
        self.artifact.require_source(checkpoint.fingerprint, checkpoint.name)
        self.artifact.require_option("num_experts", split.num_experts)
        self.artifact.require_option("templates", split.template)
        if self.artifact.manifest["inputs"].get("split_file_path") != split.artifact.digest:
            raise MoEficationError(f"{folder} holds gates of another split than {split.artifact.folder}")
        options = self.artifact.options
        self.config_fields = {
            "gate_network": GATE_NETWORKS[options["gate_network"]],
            "gate_rank": options["gate_rank"],
            "gate_bias": options["gate_fit"] == "ridge",
        }
        self._template = split.template
        gate_class = GATE_CLASSES[self.config_fields["gate_network"]]
        of_linear = {"rank": options["gate_rank"], "has_bias": self.config_fields["gate_bias"]}
        with torch.device("meta"):
            gate = gate_class(
                checkpoint.config.hidden_size,
                split.num_experts,
                **(of_linear if gate_class is LinearGate else {}),
                num_experts_per_tok=split.num_experts,
            )
        self.shapes = {name: tuple(parameter.shape) for name, parameter in gate.named_parameters()}
        for layer in range(checkpoint.config.num_hidden_layers):
            self.state(layer)  # small, and better refused before work than in its middle

    def state(self, layer: int) -> dict[str, torch.Tensor]:
        """The gate's state dict, its names and shapes checked."""
        name = self._template.format(layer)
        state = self.artifact.load(name)
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()} if isinstance(state, dict) else None
        if shapes != self.shapes:
            network = self.config_fields["gate_network"]
            raise MoEficationError(f"{self.artifact.folder / name} is not a {network} gate of shape {self.shapes}")
        if not all(tensor.isfinite().all() for tensor in state.values()):
            raise MoEficationError(f"{self.artifact.folder / name} holds NaN or infinite values; train it again")
        return state


def convert(
    checkpoint: Checkpoint,
    split_path: str | Path,
    select_path: str | Path,
    save_path: str | Path,
    *,
    template: str = TEMPLATES[0],
    num_experts: int,
    num_selects: int,
    convert_type: str = "LlamaMoEForCausalLM",
    dtype: str | None = None,
    num_labels: int | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> artifacts.ArtifactWriter:
    """Write a LlamaMoE checkpoint: config, safetensors shards, tokenizer files, code and model card.

    Every neuron keeps its weights; it only moves to its expert's place. Memory: twice one shard of at most 2 GiB (or
    one tensor, where that is larger), whatever the model's size.

    Args:
        dtype: of the new weights; None keeps that of the source.
        num_labels: of a new classification head (zeros, to be trained), where the source has none.

    Returns: the folder's writer, finished.
    """
    require_selects(num_selects, num_experts)
    split = Split(split_path, checkpoint, template, num_experts)
    gates = Gates(select_path, checkpoint, split)
    if convert_type not in CONVERT_TYPES:
        raise MoEficationError(f"--convert_type {convert_type!r} is not one of {', '.join(CONVERT_TYPES)}")
    num_labels = _num_labels(checkpoint, convert_type, num_labels)
    new_dtype = None if dtype is None else DTYPES[dtype]
    config = _moe_config(
        checkpoint,
        num_experts,
        num_selects,
        gates.config_fields,
        convert_type,
        new_dtype or checkpoint.dtype,
        num_labels,
    )
    shards = plan_shards(_plan(checkpoint, split, gates, config, convert_type, new_dtype), MAX_SHARD_BYTES)

    options = {
        "templates": template,
        "num_experts": num_experts,
        "num_selects": num_selects,
        "convert_type": convert_type,
        "dtype": dtype,
        "num_labels": num_labels,
    }
    claim = Claim(
        stage="convert",
        options=options,
        source=checkpoint.source,
        environment=environment("cpu"),
        inputs={"split_file_path": split.artifact.digest, "select_file_path": gates.artifact.digest},
    )
    if Path(save_path).resolve() == checkpoint.path:
        raise MoEficationError(f"--save_path {save_path} is the source checkpoint itself; choose another folder")
    writer = artifacts.ArtifactWriter(Path(save_path), claim, [*shards, "config"], overwrite=overwrite)
    missing = writer.missing()
    for name in progress(checkpoint.tensors if missing else [], "check", "tensor"):
        _require_fit(checkpoint, name, new_dtype)
    for file in progress([file for file in shards if file in missing], "convert", "shard"):
        tensors = {planned.name: planned.made() for planned in shards[file]}
        writer.write_piece(file, {file: writer.write(file, lambda f, t=tensors: f.write(save(t, {"format": "pt"})))})
    if "config" in missing:
        # Last of all, so that nothing loads a folder whose weights are not complete.
        files = _write_text_files(writer, checkpoint, shards, config, claim, gates)
        writer.write_piece("config", files)
    writer.finish()
    return writer


# ---------------------------------------------------------------------------------------------------- tensors


def _plan(
    checkpoint: Checkpoint,
    split: Split,
    gates: Gates,
    config: LlamaMoEConfig,
    convert_type: str,
    dtype: torch.dtype | None,
) -> list[PlannedTensor]:
    """All tensors of the new checkpoint, in the order they are written; a dtype of None keeps each tensor's own."""

    def copied(name: str, new_name: str) -> PlannedTensor:
        info = checkpoint.tensors[name]
        return PlannedTensor(new_name, info.shape, dtype or info.dtype, lambda: checkpoint.finite_tensor(name))

    prefix = "" if convert_type == "LlamaMoEModel" else "model."
    plan = [copied(name, prefix + name) for name in checkpoint.body_tensors() if ".mlp." not in name]
    for layer in range(config.num_hidden_layers):
        mlp = f"{prefix}layers.{layer}.mlp."
        plan += _plan_layer(checkpoint, split, gates, config, mlp, layer, dtype or checkpoint.dtype)
    if convert_type == "LlamaMoEForCausalLM" and not config.tie_word_embeddings:
        plan.append(copied("lm_head.weight", "lm_head.weight"))
    if convert_type == "LlamaMoEForSequenceClassification":
        if "score.weight" in checkpoint.tensors:
            plan.append(copied("score.weight", "score.weight"))
        else:
            # Zeros favour no label and need no seed; the first training step moves them.
            shape = (config.num_labels, config.hidden_size)
            plan.append(PlannedTensor("score.weight", shape, dtype or checkpoint.dtype, lambda: torch.zeros(shape)))
    return plan


def _plan_layer(
    checkpoint: Checkpoint,
    split: Split,
    gates: Gates,
    config: LlamaMoEConfig,
    prefix: str,
    layer: int,
    dtype: torch.dtype,
) -> list[PlannedTensor]:
    """One layer's packed experts and its gate: `gate_up_proj [E, 2W, H]` (gate rows first), `down_proj [E, H, W]`."""
    num_experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size

    def source(projection: str) -> torch.Tensor:
        return checkpoint.finite_tensor(f"layers.{layer}.mlp.{projection}")

    def gate_up(kind: str) -> torch.Tensor:
        neurons = split.neurons(layer)
        return torch.cat([source(f"gate_proj.{kind}")[neurons], source(f"up_proj.{kind}")[neurons]], dim=1)

    def down() -> torch.Tensor:
        return source("down_proj.weight").T[split.neurons(layer)].transpose(1, 2)

    plan = [
        PlannedTensor(
            f"{prefix}experts.gate_up_proj", (num_experts, 2 * width, hidden), dtype, lambda: gate_up("weight")
        ),
        PlannedTensor(f"{prefix}experts.down_proj", (num_experts, hidden, width), dtype, down),
    ]
    if config.mlp_bias:
        plan += [
            PlannedTensor(
                f"{prefix}experts.gate_up_proj_bias", (num_experts, 2 * width), dtype, lambda: gate_up("bias")
            ),
            PlannedTensor(f"{prefix}output_bias", (hidden,), dtype, lambda: source("down_proj.bias")),
        ]
    return plan + [
        PlannedTensor(f"{prefix}gate.{name}", shape, dtype, lambda n=name: gates.state(layer)[n])
        for name, shape in gates.shapes.items()
    ]


def _require_fit(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None) -> None:
    """Refuse a source tensor that is not finite, or would not be in the new dtype."""
    tensor = checkpoint.finite_tensor(name)
    if dtype is not None and tensor.abs().max() > torch.finfo(dtype).max:
        raise MoEficationError(f"{checkpoint.path}: {name} has values beyond {dtype}; choose another --dtype")


# ---------------------------------------------------------------------------------------------------- other files


def _num_labels(checkpoint: Checkpoint, convert_type: str, num_labels: int | None) -> int | None:
    """Labels of the classification head; None for the other two classes, whose heads are checked here too."""
    if convert_type == "LlamaMoEForCausalLM" and not checkpoint.has_lm_head:
        raise MoEficationError(f"{checkpoint.path} has no lm_head.weight; use --convert_type LlamaMoEModel")
    if convert_type != "LlamaMoEForSequenceClassification":
        if num_labels is not None:
            raise MoEficationError(f"--num_labels is for LlamaMoEForSequenceClassification, not for {convert_type}")
        return None
    if "score.weight" in checkpoint.tensors:
        found = checkpoint.tensors["score.weight"].shape[0]
        if num_labels not in (None, found):
            raise MoEficationError(f"--num_labels {num_labels}, but the source's score.weight has {found} labels")
        return found
    if num_labels is not None and num_labels < 1:
        raise MoEficationError(f"--num_labels {num_labels} must be at least 1")
    return checkpoint.config.num_labels if num_labels is None else num_labels


def _moe_config(
    checkpoint: Checkpoint,
    num_experts: int,
    num_selects: int,
    gate_fields: dict[str, Any],
    convert_type: str,
    dtype: torch.dtype,
    num_labels: int | None,
) -> LlamaMoEConfig:
    fields = checkpoint.config.to_dict() | {
        "architectures": [convert_type],
        "dtype": str(dtype).removeprefix("torch."),
        "num_experts": num_experts,
        "num_experts_per_tok": num_selects,
        **gate_fields,
    }
    for name in ("model_type", "transformers_version", "_name_or_path"):
        fields.pop(name, None)
    if num_labels is not None and num_labels != checkpoint.config.num_labels:
        fields.pop("id2label", None)
        fields.pop("label2id", None)
        fields["num_labels"] = num_labels
    return LlamaMoEConfig.from_dict(fields)


def _write_text_files(
    writer: artifacts.ArtifactWriter,
    checkpoint: Checkpoint,
    shards: dict[str, list[PlannedTensor]],
    config: LlamaMoEConfig,
    claim: artifacts.Claim,
    gates: Gates,
) -> dict[str, dict[str, Any]]:
    """Everything beside the weights; returns the files' manifest entries."""
    contents = {file: (resources.files(llama_moe) / file).read_bytes() for file in CODE_FILES}
    if len(shards) > 1:
        contents[WEIGHTS_INDEX] = (json.dumps(shard_index(shards), indent=2) + "\n").encode()
    contents["README.md"] = model_card(checkpoint, claim, config, gates.artifact.manifest["metrics"]).encode()
    contents["config.json"] = config.to_json_string().encode()

    files = {}
    for name in COPIED_FILES:
        if (checkpoint.path / name).is_file():
            with (checkpoint.path / name).open("rb") as source:
                files[name] = writer.write(name, lambda file, s=source: shutil.copyfileobj(s, file))
    for name, content in contents.items():
        files[name] = writer.write(name, lambda file, c=content: file.write(c))
    return files
