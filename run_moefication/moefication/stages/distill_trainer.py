"""The training of a distillation: the transformers `Trainer`, with the dense model's logits as the target."""

import gc
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from llama_moe import LlamaMoEForCausalLM

from ...settings import DistillSettings
from ..checkpoints.transformers_library import first_line
from ..errors import MoEficationError, SettingError
from ..fitting.clone import clone_loss, recorded_layers
from ..fitting.losses import TeacherKL
from ..layers.straight_through import StraightThroughBlock, set_budget, update_thresholds
from ..progress import progress
from ..storage.files import file_sizes, read_json_object, sync, write_json
from ..storage.manifest import CURE_OF_DAMAGE
from ..text.batches import batches_of

logger = logging.getLogger(__name__)

WARMUP = 0.05  # share of the steps in which the learning rate rises to --lr; it falls as a cosine afterwards
DDP_TIMEOUT = 24 * 3600  # seconds; the first process measures the KL alone, while the others wait
WHOLE = "whole.json"  # in a saved step's folder: says that all other files are there, and their sizes
TRAINED = {
    "gates": lambda name: ".mlp.gate." in name,
    "experts": lambda name: ".mlp." in name and ".mlp.gate." not in name,
    "all": lambda name: ".mlp." in name,
}


def collate(blocks: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch: `input_ids [B, N]`, and `kept`, which of them are text."""
    (batch,) = batches_of(blocks, len(blocks))
    return {"input_ids": batch.padded(torch.cat(blocks).long()), "kept": batch.mask()}


def final_states(model: PreTrainedModel, tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """What enters the head of a causal LM: tokens `[B, N]` -> `[T, H]`, of the T that `kept [B, N]` says are text."""
    # After a training in bfloat16, `model` itself would still compute in it; its body does not.
    return model.model(input_ids=tokens, use_cache=False).last_hidden_state[kept]


@torch.no_grad()
def mean_kl(
    model: LlamaMoEForCausalLM,
    moe_blocks: list[StraightThroughBlock],
    teacher: PreTrainedModel,
    blocks: list[torch.Tensor],
    batch_size: int,
) -> list[float]:
    """KL(dense || MoE) in nats at each budget of the model's `moe_blocks`, on average over the tokens of the blocks;
    the model runs in its own dtype."""
    model.eval()
    totals = [0.0] * len(moe_blocks[0].shares)
    for index in progress(range(0, len(blocks), batch_size), "measure the KL", "batch"):
        batch = [tensor.to(model.device) for tensor in collate(blocks[index : index + batch_size]).values()]
        kl = TeacherKL(final_states(teacher, *batch), model.lm_head.weight)
        for budget in reversed(range(len(totals))):  # the first last, which the model keeps
            set_budget(moe_blocks, budget)
            totals[budget] += kl(final_states(model, *batch)).sum(dtype=torch.float64).item()
    return [total / sum(map(len, blocks)) for total in totals]


def training_arguments(settings: DistillSettings, seed: int, device: str) -> TrainingArguments:
    """The settings in the Trainer's words, but for its `output_dir`; joins the processes that torchrun started."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "MASTER_ADDR" not in os.environ:
        raise MoEficationError(
            "WORLD_SIZE says that there are several processes, but MASTER_ADDR does not say where they meet: "
            "start them with torchrun, or unset RANK and WORLD_SIZE"
        )
    on_cpu = torch.device(device).type == "cpu"
    try:
        arguments = TrainingArguments(
            seed=seed,
            use_cpu=on_cpu,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            save_strategy="steps",
            logging_strategy="no",
            disable_tqdm=True,
            report_to="none",
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=not on_cpu,
            learning_rate=settings.lr,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            bf16=settings.bf16,
            ddp_timeout=DDP_TIMEOUT,
            save_steps=settings.save_steps,
        )
    except ValueError as error:  # for example, the GPU has no bfloat16
        raise SettingError(f"device {device} does not serve here: {first_line(error)}") from error
    except torch.distributed.DistError as error:
        raise MoEficationError(f"the other processes of this run did not come ({first_line(error)})") from error
    if torch.device(device).index not in (None, arguments.device.index):
        raise SettingError(f"device {device}: one process trains on the first GPU; set CUDA_VISIBLE_DEVICES")
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process uses one GPU; torchrun starts more
    return arguments


def leave_group() -> None:
    """Part from the processes that `training_arguments` joined, once nothing refers to the trainer any more.

    DDP's reducer must go before the process group: the last to hold the group waits for gloo's threads with the GIL in
    hand, and one of them may wait for the GIL (pytorch/pytorch#56297).
    """
    gc.collect()  # the trainer and what it wraps refer to each other
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first process may host the group
        torch.distributed.destroy_process_group()


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the KL from the dense model, and whose thresholds keep to their budget."""

    def __init__(
        self,
        model: LlamaMoEForCausalLM,
        moe_blocks: list[StraightThroughBlock],
        teacher: PreTrainedModel,
        blocks: list[torch.Tensor],
        arguments: TrainingArguments,
        clone_weight: float,
    ):
        self._steps = Steps(moe_blocks)
        super().__init__(model, arguments, data_collator=collate, train_dataset=blocks, callbacks=[self._steps])
        self.remove_callback(PrinterCallback)
        if ddp := self.accelerator.ddp_handler:
            ddp.gradient_as_bucket_view = True  # else DDP holds all gradients twice
        self.model_accepts_loss_kwargs = False  # compute_loss gives each batch's mean, which the Trainer then averages
        self._moe_blocks, self._teacher, self._clone_weight = moe_blocks, teacher, clone_weight

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """KL(dense || MoE), on average over the batch's tokens, and `clone_weight` times the clone loss."""
        tokens, kept = inputs["input_ids"], inputs["kept"]
        for block in self._moe_blocks:
            block.kept = kept
        with recorded_layers(self.model) as student, recorded_layers(self._teacher) as teacher:
            # Calling the wrapped model (DDP, autocast) makes logits too; here, of the last token only.
            outputs = model(input_ids=tokens, use_cache=False, output_hidden_states=True, logits_to_keep=1)
            states = final_states(self._teacher, tokens, kept)
        # Here, outside of the model's forward pass, autocast is off.
        kl = TeacherKL(states, self.model.lm_head.weight.to(torch.bfloat16 if self.args.bf16 else torch.float32))
        loss = kl(outputs.hidden_states[-1][kept]).mean()
        if self._clone_weight:
            loss = loss + self._clone_weight * clone_loss(student, teacher, kept)
        self._steps.loss = loss.detach()
        return loss

    def _save_checkpoint(self, *args, **kwargs):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            if self.is_world_process_zero():
                (folder / WHOLE).unlink(missing_ok=True)  # the step may be a damaged one, so the training began anew
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise MoEficationError(f"{folder} cannot be saved ({reason})") from error


def drawn_budget(seed: int, step: int, num_budgets: int) -> int:
    """The number of the budget that a step runs at: each of them once in so many steps, in an order drawn anew. The
    same for every process, whether the training was interrupted or not."""
    order = np.random.default_rng([seed, step // num_budgets]).permutation(num_budgets)
    return int(order[step % num_budgets])


class Steps(TrainerCallback):
    """Draws the budget of each step (nested models share weights: Matryoshka representations, Kusupati et al. 2022,
    arXiv 2205.13147; FlexRank, 2026, arXiv 2602.02680), keeps thresholds on budget, shows how far the training is, and
    marks a saved step as whole, once it is."""

    def __init__(self, moe_blocks: list[StraightThroughBlock]):
        self._moe_blocks = moe_blocks
        self.loss: torch.Tensor | None = None  # of the last batch

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = progress(range(state.global_step, state.max_steps), "distill", "step", done=state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        set_budget(self._moe_blocks, drawn_budget(args.seed, state.global_step, len(self._moe_blocks[0].shares)))

    def on_step_end(self, args, state, control, **kwargs):
        update_thresholds(self._moe_blocks)
        if self._bar.is_drawn:  # to read the loss is to wait for the GPU
            self._bar.set_postfix(loss=f"{self.loss.item():.3f}", refresh=False)
        self._bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        set_budget(self._moe_blocks, 0)
        self._bar.close()

    def on_save(self, args, state, control, **kwargs):
        """Mark the saved step as whole once every process has written its file, and remove the older ones."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes a file of its own
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        newest = folder / f"checkpoint-{state.global_step}"
        for path in newest.iterdir():
            sync(path)
        write_json(newest / WHOLE, file_sizes(newest, os.listdir(newest)))
        for older in {*folder.glob("checkpoint-*")} - {newest}:  # only now that this one is whole
            shutil.rmtree(older)


def last_whole_step(folder: Path) -> Path | None:
    """The folder of the last step that was saved whole, and still is."""
    marks = folder.glob(f"checkpoint-*/{WHOLE}")
    mark = max(marks, key=lambda path: int(path.parent.name.removeprefix("checkpoint-")), default=None)
    if mark is None:
        return None
    sizes = read_json_object(mark, CURE_OF_DAMAGE)
    if sizes != file_sizes(mark.parent, sizes):
        logger.warning("%s: files are missing or cut short; the training begins anew", mark.parent)
        return None
    return mark.parent
