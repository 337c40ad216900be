"""Stage 6: a LlamaMoE checkpoint trained to predict as its dense source does.

The loss is KL(dense || MoE) of the final logits, and beside it how far each layer is from the dense model's. Thresholds
follow the training, and are set once more after it, by a walk through the layers, so that the model ends on its budget.
With nested budgets each step draws one, and thresholds follow at each.
"""

import importlib.util
import logging
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from llama_moe import LlamaMoEConfig, LlamaMoEForCausalLM

from ...settings import DistillSettings
from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.model_card import Origin, distillation_card
from ..checkpoints.moe import MoECheckpoint, experts_per_tok, require_num_selects, set_num_selects
from ..checkpoints.tokenizers import require_same_tokenizer, tokenizer_files
from ..checkpoints.transformers_library import quiet_transformers
from ..checkpoints.writer import MAX_SHARD_BYTES, PlannedTensor, plan_shards, write_checkpoint_files, write_shard
from ..errors import MoEficationError, SettingError
from ..layers.straight_through import settle_thresholds, straight_through
from ..progress import progress
from ..storage.folder import ArtifactWriter, require_place
from ..storage.manifest import ArtifactSpec, environment
from ..text.corpus import Corpus, require_held_out_block
from .distill_trainer import TRAINED, DistillationTrainer, last_whole_step, leave_group, mean_kl, training_arguments

logger = logging.getLogger(__name__)

FEW_STEPS = 100  # a warning says that so few gain little
MEASURED_EVERY_NTH_BLOCK = 16  # one block in so many is not trained on; the loss before and after is measured there
RESULT = "distillation"  # the last part holds config, code, card, and what the training gained


def distill(
    checkpoint: DenseCheckpoint,
    moe_path: str | Path,
    corpus: Corpus,
    save_path: str | Path,
    settings: DistillSettings,
    *,
    device: str = "cpu",
    overwrite: bool = False,
) -> ArtifactWriter:
    """Write a distilled copy of a LlamaMoE checkpoint. Under torchrun, all its processes train and the first writes.

    Memory: both models whole, the MoE in float32 with its gradients and two moments of what is trained, its experts
    once more as they are multiplied (half of the bytes with bf16), and the activations of all of them for each token of
    a batch. Disk, until it is finished: the MoE in float32 with the moments.
    """
    moe = MoECheckpoint(moe_path, checkpoint)
    _check(checkpoint, moe, save_path, settings)
    unfinished, finished = require_place(Path(save_path), "distill")
    if overwrite or unfinished or not finished:  # else there is nothing to do, and to read all weights takes long
        moe.verify()
    require_held_out_block(corpus)
    arguments = training_arguments(settings, corpus.options["seed"], device)
    is_first = arguments.process_index == 0
    spec = ArtifactSpec(
        stage="distill",
        options=settings.recorded() | corpus.options,
        source=checkpoint.source,
        environment=environment(device) | {"processes": str(arguments.world_size)},
        inputs={"moe_path": moe.artifact.digest, "train_data_path": corpus.digest},
        facts={"tokens": corpus.num_tokens, "mix": [asdict(share) for share in corpus.mix]},
        earlier=moe.artifact.history,
    )
    shards = _shards(moe)
    how = dict(overwrite=overwrite, shared=not is_first, exclusive=is_first)
    with arguments.main_process_first(local=False):  # which begins the folder, and the others find it begun
        writer = ArtifactWriter(Path(save_path), spec, [*shards, RESULT], **how)
        missing = writer.missing()
        if missing:
            require_same_tokenizer(checkpoint.path, moe.path)
            require_memory(moe, settings, arguments.device)
            checkpoint.check_finite()
            model = _load(moe, settings)
            if is_first:
                writer.begin()
    with writer:
        if not missing:
            leave_group()
            if is_first:
                writer.finish()  # an interrupted run may have left this to do
            return writer
        arguments.output_dir = str(writer.temporary_path("training"))
        metrics = _train(checkpoint, moe, model, corpus, settings, arguments)
        if is_first:
            trained = model.state_dict()
            for file in progress([file for file in shards if file in missing], "write the distilled model", "shard"):
                values = {tensor.name: trained[tensor.name].cpu() for tensor in shards[file] if tensor.make is None}
                write_shard(writer, file, shards[file], values)
            budget = ("num_experts_per_tok", "layer_num_experts_per_tok")
            config = moe.new_config(**{name: getattr(model.config, name) for name in budget})
            origin, tokens = Origin.of_moe(moe.path, checkpoint.name), {row.domain: row.got for row in corpus.mix}
            card = distillation_card(origin, config, moe.model_class, settings.train, tokens, metrics)
            write_checkpoint_files(writer, RESULT, moe.path, shards, config, card, tokenizer_files(moe.path), metrics)
            writer.finish()
    return writer


def _check(checkpoint: DenseCheckpoint, moe: MoECheckpoint, save_path: str | Path, settings: DistillSettings) -> None:
    """Refuse what cannot be distilled, before any work."""
    folder, config = moe.artifact.folder, moe.config
    if importlib.util.find_spec("accelerate") is None:
        raise MoEficationError("distillation needs the package accelerate: pip install accelerate")
    if moe.model_class != "LlamaMoEForCausalLM":
        raise MoEficationError(f"{folder} is a {moe.model_class}; only a LlamaMoEForCausalLM can be distilled")
    if config.multiply_gate_scores or config.score_scale_factor != 1:
        raise MoEficationError(f"{folder} weighs its experts by gate scores; that is not distilled")
    if settings.num_selects is not None:
        require_num_selects(settings.num_selects, config)
    for num_selects in settings.nested_selects or ():
        require_num_selects(num_selects, config, name="nested_selects")
    if Path(save_path).resolve() in (checkpoint.path, folder.resolve()):
        raise SettingError(f"save_path {save_path} is one of the source checkpoints; choose another folder")


def require_memory(moe: MoECheckpoint, settings: DistillSettings, device: torch.device) -> None:
    """Refuse models of which a GPU cannot hold what they need beside their activations."""
    if device.type != "cuda":
        return
    sizes = {name: math.prod(info.shape) for name, info in moe.tensors.items()}
    trained = sum(size for name, size in sizes.items() if TRAINED[settings.train](name))
    needed, free = 6 * sum(sizes.values()) + 12 * trained, torch.cuda.mem_get_info(device)[0]
    if needed > free:
        both = f"both models, and gradients and moments of what train {settings.train} trains"
        raise SettingError(
            f"{both}, are {needed / 1e9:.0f} GB, more than the {free / 1e9:.0f} that {device} has free: "
            + ("a larger GPU is needed" if settings.train == "gates" else "train gates needs less")
        )


def _shards(moe: MoECheckpoint) -> dict[str, list[PlannedTensor]]:
    """The files of the new checkpoint and their tensors, each in the dtype it had; those of the MLPs are trained."""
    plan = []
    for name, info in moe.tensors.items():
        make = None if ".mlp." in name else partial(moe.tensor, name)
        plan.append(PlannedTensor(moe.stored_name(name), info.shape, info.dtype, make))
    return plan_shards(plan, MAX_SHARD_BYTES)


def _load(moe: MoECheckpoint, settings: DistillSettings) -> LlamaMoEForCausalLM:
    """The model to train, in float32, on its budget."""
    model = moe.load(torch.float32)
    if settings.num_selects is not None:
        set_num_selects(model, settings.num_selects, moe.path)
    try:
        with straight_through(model, _shares(model, settings)):
            pass
    except ValueError as error:  # its thresholds have no quantiles
        raise SettingError(f"{moe.path} cannot run nested_selects {settings.nested_selects}: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINED[settings.train](name))
    return model


def _nested_selects(config: LlamaMoEConfig, settings: DistillSettings) -> list[int]:
    """The budgets beside the model's own."""
    return [num for num in dict.fromkeys(settings.nested_selects or ()) if num != config.num_selects]


def _shares(model: LlamaMoEForCausalLM, settings: DistillSettings) -> list[list[float]]:
    """By layer, of its routed experts that run: at the model's own budget, and at the nested ones."""
    config, layers = model.config, model.model.layers
    own = experts_per_tok(config, lambda layer: layers[layer].mlp.gate.threshold.item())
    nested = [num_selects - config.num_shared_experts for num_selects in _nested_selects(config, settings)]
    return [[count / config.num_experts for count in (first, *nested)] for first in own]


def _train(
    checkpoint: DenseCheckpoint,
    moe: MoECheckpoint,
    model: LlamaMoEForCausalLM,
    corpus: Corpus,
    settings: DistillSettings,
    arguments: TrainingArguments,
) -> dict[str, Any]:
    """Train the model in place, as it will be stored. Returns the metrics (in the first process)."""
    device, is_first, batch_size = arguments.device, arguments.process_index == 0, settings.batch_size
    shares = _shares(model, settings)
    num_held_out = -(-len(corpus.blocks) // MEASURED_EVERY_NTH_BLOCK)
    blocks, held_out = corpus.blocks[:-num_held_out], corpus.blocks[-num_held_out:]
    step_blocks = arguments.world_size * batch_size * settings.gradient_accumulation_steps
    steps = settings.epochs * -(-len(blocks) // step_blocks)
    if is_first and steps < FEW_STEPS:
        each = f"{len(blocks)} blocks, {step_blocks} of them a step"
        logger.warning("%d training steps gain little (%s): more text or epochs gain more", steps, each)
    model.to(device)
    is_half = checkpoint.dtype.itemsize == 2
    teacher_dtype = torch.float32 if device.type == "cpu" else checkpoint.dtype if is_half else torch.bfloat16
    teacher = checkpoint.load_causal_lm(device, teacher_dtype).requires_grad_(False)
    last = last_whole_step(Path(arguments.output_dir))
    with quiet_transformers(), straight_through(model, shares) as soft:
        before = mean_kl(model, soft, teacher, held_out, batch_size) if is_first else []
        trainer = DistillationTrainer(model, soft, teacher, blocks, arguments, settings.clone_weight)
        steps = trainer.train(resume_from_checkpoint=last and str(last)).global_step
    del trainer
    leave_group()
    if not is_first:
        return {}
    _round(model, moe)
    model.eval()
    try:
        active = settle_thresholds(model, blocks, shares, batch_size, device)
    except ValueError as error:
        raise _diverged("a gate's scores are not finite, or all the same") from error
    with straight_through(model, shares) as soft:
        after = mean_kl(model, soft, teacher, held_out, batch_size)
    losses = [{"loss_before": first, "loss_after": last} for first, last in zip(before, after, strict=True)]
    metrics = {"steps": steps} | losses[0] | {"active_share": active}
    if nested := _nested_selects(model.config, settings):
        metrics["nested"] = [{"num_selects": num} | loss for num, loss in zip(nested, losses[1:], strict=True)]
    if model.config.routing == "threshold":
        metrics["threshold"] = [layer.mlp.gate.threshold.item() for layer in model.model.layers]
    return metrics


@torch.no_grad()
def _round(model: LlamaMoEForCausalLM, moe: MoECheckpoint) -> None:
    """Give the trained parameters the values they will be stored with, which thresholds must fit."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.to(moe.tensors[name.removeprefix("model.")].dtype))
            if not parameter.sum(dtype=torch.float64).isfinite():
                raise _diverged(f"{name} is not finite")


def _diverged(why: str) -> MoEficationError:
    return SettingError(f"the training diverged: {why}; use a smaller lr, and overwrite to begin anew")
