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
    parser = command_line.stage_parser(
        __doc__,
        DistillSettings,
        moe_path="the checkpoint to train, as llama_convert.py or llama_calibrate.py (or this script) wrote it",
        save_path=command_line.NEW_CHECKPOINT,
    )
    command_line.add_corpus(parser)
    command_line.add_local_rank(parser)
    return parser


def distill(arguments: argparse.Namespace) -> None:
    """Run the stage in this process of one or several, and print what the training gained."""
    place = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'MASTER_PORT')}"
    process = command_line.this_process(arguments, f"it trains with the others, and waits for them at {place}")
    run = command_line.run_options(arguments, process)
    from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
    from run_moefication.moefication.stages import distill as stage

    settings = command_line.settings_of(arguments, DistillSettings)
    checkpoint = DenseCheckpoint(arguments.model_path)
    corpus = command_line.read_corpus(arguments, checkpoint)
    writer = stage.distill(checkpoint, arguments.moe_path, corpus, arguments.save_path, settings, **run)
    if process.rank != 0:
        return
    command_line.print_mix(checkpoint, corpus)
    metrics = writer.metrics()[stage.RESULT]
    shares = metrics["active_share"]
    print(f"KL to the dense model, held out: {metrics['loss_before']:.4f} before, {metrics['loss_after']:.4f} after")
    print(
        f"routed experts that run: {sum(shares) / len(shares):.1%} "
        f"({min(shares):.1%} to {max(shares):.1%} in {len(shares)} layers)"
    )
    command_line.report(arguments, writer, "llama_evaluate.py (evaluate.sh)")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), distill, argv)


if __name__ == "__main__":
    sys.exit(main())
