r"""Stage 5, calibrate: refit gates, thresholds and down_proj of a converted model, layer by layer in closed form, and
the final norm.

  python llama_calibrate.py --model_path MODEL --moe_path NAME-MoE --save_path NAME-MoE-Calibrated \
    --train_data_path ../llama_data --max_tokens 131072 --refit_gates

Writes a LlamaMoE checkpoint like the one it read. Memory: a layer of each model, five matrices of its neurons squared
(LLaMA-7B: 6.5 GB together), and up to 2 GB of activations; disk, until it is done: 16 bytes a token for each of
hidden_size (LLaMA-7B: 66 kB a token).
"""

import argparse
import sys

from run_moefication import command_line
from run_moefication.settings import CalibrateSettings


def build_parser() -> argparse.ArgumentParser:
    """The options of this stage."""
    parser = command_line.stage_parser(
        __doc__,
        CalibrateSettings,
        moe_path="the converted checkpoint, as llama_convert.py (or this script, or llama_distill.py) wrote it",
        save_path=command_line.NEW_CHECKPOINT,
    )
    command_line.add_corpus(parser)
    return parser


def calibrate(arguments: argparse.Namespace) -> None:
    """Run the stage and print what each layer's fit gained."""
    run = command_line.run_options(arguments)
    from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
    from run_moefication.moefication.stages import calibrate as stage

    settings = command_line.settings_of(arguments, CalibrateSettings)
    checkpoint = DenseCheckpoint(arguments.model_path)
    corpus = command_line.read_corpus(arguments, checkpoint)
    writer = stage.calibrate(checkpoint, arguments.moe_path, corpus, arguments.save_path, settings, **run)
    command_line.print_mix(checkpoint, corpus)
    print(f"{'layer':>5} {'routed that run':>17} {'error before':>13} {'after':>8} {'strength':>9}")
    for layer, m in enumerate(stage.layer_metrics(writer)):
        print(
            f"{layer:>5} {m['active_share']:>17.1%} {m['error_before']:>13.4f} {m['error_after']:>8.4f} "
            f"{m['strength']:>9g}"
        )
    if final := stage.final_norm_metrics(writer):
        before, after = final["divergence_before"], final["divergence_after"]
        print(f"divergence from the dense model: {before:.4f} nats a token, {after:.4f} with the final norm fitted")
    command_line.report(arguments, writer, "llama_distill.py (6_distill.sh), or llama_evaluate.py (evaluate.sh)")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), calibrate, argv)


if __name__ == "__main__":
    sys.exit(main())
