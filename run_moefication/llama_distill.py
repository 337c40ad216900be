r"""Stage 6, distill: train gates and experts of a LlamaMoE checkpoint to predict as the dense model does.

  python llama_distill.py --model_path MODEL --moe_path NAME-MoE-Calibrated --save_path NAME-MoE-Distilled \
    --train_data_path ../llama_data --max_tokens 131072 --block_size 512
  torchrun --nproc_per_node=8 llama_distill.py (the same options) --bf16

Writes a LlamaMoE checkpoint like the one it read. Memory: the dense model, the MoE in float32, and 12 more bytes for
each parameter that is trained; disk, until it is done: 12, and twice that while a step is saved.
"""

import argparse
import os
import sys

from run_moefication import command_line
from run_moefication.settings import DistillSettings


def build_parser() -> argparse.ArgumentParser:
    """The options of this stage."""
    parser = command_line.new_parser(__doc__)
    command_line.add_model_path(parser)
    parser.add_argument(
        "--moe_path",
        type=command_line.path,
        required=True,
        help="the checkpoint to train, as llama_convert.py or llama_calibrate.py (or this script) wrote it",
    )
    parser.add_argument(
        "--save_path",
        type=command_line.path,
        required=True,
        help="folder of the new checkpoint itself, absent or empty",
    )
    group = parser.add_argument_group("training")
    command_line.add_settings(group, DistillSettings)
    group.add_argument(
        "--save_steps", type=int, default=100, help="training steps after which an interrupted run can go on"
    )
    command_line.add_corpus(parser)
    # The old launcher still passes this; torchrun says it by LOCAL_RANK.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    command_line.add_common(parser)
    return parser


def distill(arguments: argparse.Namespace) -> None:
    """Run the stage in this process of one or several, and print what the training gained."""
    process = command_line.this_process(arguments, f"it trains with the others, and waits for them at {_meeting()}")
    rank = process.rank
    device = command_line.pick_device(arguments, process.local_rank)
    from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
    from run_moefication.moefication.progress import no_progress
    from run_moefication.moefication.stages.distill import RESULT
    from run_moefication.moefication.stages.distill import distill as distill_checkpoint

    settings = command_line.settings_of(arguments, DistillSettings)
    progress = command_line.progress_bar if rank == 0 else no_progress
    checkpoint = DenseCheckpoint(arguments.model_path)
    corpus = command_line.read_corpus(arguments, checkpoint, progress)
    writer = distill_checkpoint(
        checkpoint,
        arguments.moe_path,
        corpus,
        arguments.save_path,
        settings,
        save_steps=arguments.save_steps,
        device=device,
        overwrite=arguments.overwrite,
        progress=progress,
    )
    if rank == 0:
        command_line.print_mix(checkpoint, corpus)
        metrics = writer.metrics()[RESULT]
        shares = metrics["active_share"]
        print(
            f"KL to the dense model, held out: {metrics['loss_before']:.4f} before, {metrics['loss_after']:.4f} after"
        )
        print(
            f"routed experts that run: {sum(shares) / len(shares):.1%} "
            f"({min(shares):.1%} to {max(shares):.1%} in {len(shares)} layers)"
        )
        command_line.report(writer, "llama_evaluate.py (evaluate.sh)")


def _meeting() -> str:
    return f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'MASTER_PORT')}"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), distill, argv)


if __name__ == "__main__":
    sys.exit(main())
