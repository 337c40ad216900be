"""Stage 4: dense tensors, a split and gates become a LlamaMoE checkpoint, tensor by tensor."""

from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path

import torch

import llama_moe
from llama_moe import LlamaMoEConfig
from llama_moe.gates import Gate

from ...settings import ConvertSettings, require_selects
from ..artifacts.gates import TrainedGates
from ..artifacts.split import Split
from ..checkpoints.dense import DTYPES, DenseCheckpoint
from ..checkpoints.headers import HEAD, HEADS
from ..checkpoints.model_card import Origin, conversion_card
from ..checkpoints.tokenizers import carried_over, require_same_tokenizer
from ..checkpoints.writer import MAX_SHARD_BYTES, PlannedTensor, plan_shards, write_checkpoint_files, write_shard
from ..errors import MoEficationError, SettingError
from ..progress import progress
from ..storage.artifact import history_of
from ..storage.folder import ArtifactWriter
from ..storage.manifest import ArtifactSpec, environment

GATE_BUFFERS = ("gate.threshold", "gate.score_quantiles")  # of threshold routing, in float32 whatever the weights are
Maker = Callable[[], torch.Tensor]


def convert(
    checkpoint: DenseCheckpoint,
    split_path: str | Path,
    select_path: str | Path,
    save_path: str | Path,
    settings: ConvertSettings,
    *,
    overwrite: bool = False,
) -> ArtifactWriter:
    """Write a LlamaMoE checkpoint: config, safetensors shards, tokenizer files, code and model card.

    Every neuron keeps its weights; it only moves to its expert's place. Memory: twice one shard of at most 2 GiB (or
    one tensor, where that is larger), whatever the model's size.
    """
    split = Split(split_path, checkpoint, settings.templates, settings.num_experts)
    gates = TrainedGates(select_path, checkpoint, split)
    num_labels = _num_labels(checkpoint, settings)
    config = _moe_config(checkpoint, gates, settings, split.num_shared_experts, num_labels)
    shards = plan_shards(_plan(checkpoint, split, gates, config, settings), MAX_SHARD_BYTES)
    spec = ArtifactSpec(
        stage="convert",
        options=settings.recorded() | {"num_labels": num_labels},
        source=checkpoint.source,
        environment=environment("cpu"),
        inputs={"split_file_path": split.artifact.digest, "select_file_path": gates.artifact.digest},
        earlier=history_of(split.artifact, gates.artifact),
    )
    if Path(save_path).resolve() == checkpoint.path:
        raise SettingError(f"save_path {save_path} is the source checkpoint itself; choose another folder")
    with ArtifactWriter(Path(save_path), spec, [*shards, "config"], overwrite=overwrite, exclusive=True) as writer:
        missing = writer.missing()
        if not missing:
            require_same_tokenizer(checkpoint.path, Path(save_path))
        tokenizer = carried_over(checkpoint.path) if missing else {}
        for name in progress(checkpoint.tensors if missing else [], f"check {checkpoint.name}", "tensor"):
            tensor = checkpoint.finite_tensor(name)
            if settings.dtype and tensor.abs().max() > torch.finfo(DTYPES[settings.dtype]).max:
                raise SettingError(
                    f"{checkpoint.path}: {name} has values beyond {settings.dtype}; choose another dtype"
                )
        for file in progress([file for file in shards if file in missing], "convert", "shard"):
            write_shard(writer, file, shards[file])
        if "config" in missing:
            # Last of all, so that nothing loads a folder whose weights are not complete.
            origin = Origin.of_source(checkpoint.path, checkpoint.name, settings.base_model_id or checkpoint.hub_id)
            card = conversion_card(origin, config, settings.convert_type, gates.artifact.manifest["metrics"])
            write_checkpoint_files(writer, "config", checkpoint.path, shards, config, card, tokenizer)
        writer.finish()
    return writer


def _plan(
    checkpoint: DenseCheckpoint, split: Split, gates: TrainedGates, config: LlamaMoEConfig, settings: ConvertSettings
) -> list[PlannedTensor]:
    """All tensors of the new checkpoint, in the order they are written."""
    with torch.device("meta"):
        model = getattr(llama_moe, settings.convert_type)(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    copied = [name for name in checkpoint.body_tensors() if ".mlp." not in name]
    makers: dict[str, Maker] = {name: partial(checkpoint.finite_tensor, name) for name in copied}
    for layer in range(config.num_hidden_layers):
        block = _expert_makers(checkpoint, split, config, layer) | _gate_makers(gates, config, layer)
        makers |= {f"layers.{layer}.mlp.{name}": make for name, make in block.items()}
    for name in shapes.keys() & set(HEADS):
        # Zeros favour no label and need no seed; the first training step moves them.
        is_new = name not in checkpoint.tensors
        makers[name] = partial(torch.zeros, shapes[name]) if is_new else partial(checkpoint.finite_tensor, name)
    prefix, plan = "" if settings.convert_type == "LlamaMoEModel" else "model.", []
    for name, make in makers.items():
        dtype = checkpoint.tensors[name].dtype if name in checkpoint.tensors else _dtype_beside(checkpoint, name)
        dtype = DTYPES[settings.dtype] if settings.dtype else dtype
        new_name = name if name in HEADS else prefix + name
        dtype = torch.float32 if name.endswith(GATE_BUFFERS) else dtype
        plan.append(PlannedTensor(new_name, shapes[new_name], dtype, make))
    return plan


def _dtype_beside(checkpoint: DenseCheckpoint, name: str) -> torch.dtype:
    """That of a new tensor: of an MLP the one that holds the values of all of its projections."""
    mlp, found, _ = name.partition(".mlp.")
    dtypes = [info.dtype for other, info in checkpoint.tensors.items() if found and other.startswith(mlp + found)]
    return reduce(torch.promote_types, dtypes, dtypes[0]) if dtypes else checkpoint.dtype


def _expert_makers(checkpoint: DenseCheckpoint, split: Split, config: LlamaMoEConfig, layer: int) -> dict[str, Maker]:
    """Makers of one layer's experts by name in the MLP: packed ones `gate_up_proj [E, 2W, H]` (gate rows first),
    `down_proj [E, H, W]`, and the shared ones as one MLP."""

    def source(projection: str) -> torch.Tensor:
        return checkpoint.finite_tensor(f"layers.{layer}.mlp.{projection}")

    def gate_up(kind: str) -> torch.Tensor:
        neurons = split.routed_neurons(layer)
        return torch.cat([source(f"gate_proj.{kind}")[neurons], source(f"up_proj.{kind}")[neurons]], dim=1)

    makers: dict[str, Maker] = {
        "experts.gate_up_proj": partial(gate_up, "weight"),
        "experts.down_proj": lambda: source("down_proj.weight").T[split.routed_neurons(layer)].transpose(1, 2),
    }
    if config.mlp_bias:
        makers["experts.gate_up_proj_bias"] = partial(gate_up, "bias")
        makers["output_bias"] = partial(source, "down_proj.bias")
    if config.num_shared_experts:
        kinds = ("weight", "bias") if config.mlp_bias else ("weight",)
        names = [f"{projection}.{kind}" for projection in ("gate_proj", "up_proj") for kind in kinds]
        shared = split.shared_neurons
        makers |= {f"shared_experts.{name}": lambda n=name: source(n)[shared(layer)] for name in names}
        makers["shared_experts.down_proj.weight"] = lambda: source("down_proj.weight")[:, shared(layer)]
    return makers


def _gate_makers(gates: TrainedGates, config: LlamaMoEConfig, layer: int) -> dict[str, Maker]:
    """Makers of one layer's gate by name in the MLP, with the threshold of its budget if it routes by one."""
    makers: dict[str, Maker] = {f"gate.{name}": lambda n=name: gates.state(layer)[n] for name in gates.shapes}
    if config.routing != "threshold":
        return {name: make for name, make in makers.items() if name not in GATE_BUFFERS}
    share = config.num_experts_per_tok / config.num_experts
    try:
        # Now, so that gates without one are refused before anything is written.
        threshold = torch.tensor([Gate.quantile_threshold(gates.state(layer)["score_quantiles"], share)])
    except ValueError as error:
        raise MoEficationError(f"{gates.artifact.folder}: layer {layer}: {error}") from error
    return makers | {"gate.threshold": lambda: threshold}


def _num_labels(checkpoint: DenseCheckpoint, settings: ConvertSettings) -> int | None:
    """Labels of the classification head; None for the other two classes, whose heads are checked here too."""
    convert_type, num_labels = settings.convert_type, settings.num_labels
    if convert_type == "LlamaMoEForCausalLM" and checkpoint.lm_head is None:
        raise SettingError(
            f"{checkpoint.path} has no lm_head.weight: use convert_type LlamaMoEModel, or, if its "
            f"embedding is its head, set tie_word_embeddings to true in its config.json"
        )
    if convert_type != "LlamaMoEForSequenceClassification":
        return None
    if "score.weight" in checkpoint.tensors:
        found = checkpoint.tensors["score.weight"].shape[0]
        if num_labels not in (None, found):
            raise SettingError(f"num_labels {num_labels}, but the source's score.weight has {found} labels")
        return found
    if num_labels is not None and num_labels < 1:
        raise SettingError(f"num_labels {num_labels} must be at least 1")
    return checkpoint.config.num_labels if num_labels is None else num_labels


def _moe_config(
    checkpoint: DenseCheckpoint, gates: TrainedGates, settings: ConvertSettings, num_shared: int, num_labels: int | None
) -> LlamaMoEConfig:
    num_experts, num_selects = settings.num_experts, settings.num_selects
    require_selects(num_selects, num_experts, num_shared)
    least = num_shared if settings.min_selects is None else settings.min_selects
    most = num_experts if settings.max_selects is None else settings.max_selects
    if not num_shared <= least <= num_selects <= most <= num_experts:
        raise SettingError(
            f"min_selects {least}, num_selects {num_selects} and max_selects {most} must not decrease, "
            f"from {num_shared} shared experts to {num_experts}"
        )
    fields = checkpoint.config.to_dict() | gates.config_fields
    fields |= {
        "architectures": [settings.convert_type],
        "dtype": settings.dtype or str(checkpoint.dtype).removeprefix("torch."),
        "num_experts": num_experts - num_shared,
        "num_experts_per_tok": num_selects - num_shared,
        "num_shared_experts": num_shared,
        "routing": settings.routing,
        "min_experts_per_tok": least - num_shared,
        "max_experts_per_tok": None if settings.max_selects is None else most - num_shared,
    }
    gone = ["model_type", "transformers_version", "_name_or_path"]
    if num_labels not in (None, checkpoint.config.num_labels):
        fields["num_labels"] = num_labels
        gone += ["id2label", "label2id"]
    return LlamaMoEConfig.from_dict({name: value for name, value in fields.items() if name not in gone})
