r"""Stage 3, select: train the gates that choose experts.

  python llama_select_mlp.py --model_path MODEL --save_path ../llama_moe_temp_files \
    --split_file_path ../llama_moe_temp_files/NAME-8Expert-Split-Clustering \
    --hidden_features_path ../llama_moe_temp_files/NAME-Hidden-Features --num_experts 8 --num_selects 2 --use_softmax
  ... --specify_layer 0-7 (and 8-15, ... in other processes: together they fill one folder)

Writes SAVE_PATH/NAME-8Expert-Select-MLP, a gate per layer. Memory: one layer's inputs (LLaMA-7B: 8 kB a token).
"""

import argparse
import sys

from run_moefication import command_line
from run_moefication.settings import GateSettings


def build_parser() -> argparse.ArgumentParser:
    """The options of this stage."""
    parser = command_line.stage_parser(
        __doc__,
        GateSettings,
        leave_out=("patience",),
        split_file_path=command_line.SPLIT,
        hidden_features_path="folder that llama_get_hidden_features.py wrote",
        save_path="folder in which NAME-nExpert-Select-MLP is made",
    )
    parser.add_argument(
        "--specify_layer",
        nargs="*",
        help="layers to train: 0-7 (ends included), 0 1 2, or both (default: all)",
    )
    return parser


def select(arguments: argparse.Namespace) -> None:
    """Run the stage and print how good the gates are."""
    run = command_line.run_options(arguments)
    from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
    from run_moefication.moefication.stages.select import parse_layers, train_gates

    settings = command_line.settings_of(arguments, GateSettings)
    checkpoint = DenseCheckpoint(arguments.model_path)
    layers = parse_layers(arguments.specify_layer or [], checkpoint.config.num_hidden_layers)
    paths = arguments.split_file_path, arguments.hidden_features_path, arguments.save_path
    writer = train_gates(checkpoint, *paths, settings, layers=layers, **run)
    print_quality(writer.metrics(), settings.num_selects)
    command_line.report(arguments, writer, "llama_convert.py (4_convert.sh)")


def print_quality(metrics: dict, num_selects: int) -> None:
    """A row per layer, in held-out tokens' means, and how many layers beat the best constant choice."""
    print(f"{'gate':<32} {'recall':>7} {'constant':>9} {'mass recall':>12} {'constant':>9} {'epoch':>6}")
    for name, m in metrics.items():
        print(
            f"{name:<32} {m['recall']:>7.3f} {m['constant_recall']:>9.3f} "
            f"{m['mass_recall']:>12.3f} {m['constant_mass_recall']:>9.3f} {m.get('best_epoch', '-'):>6}"
        )
    if all(m["constant_recall"] == 1.0 for m in metrics.values()):
        return  # every expert is selected, or always the same: there is nothing to beat
    better = sum(m["mass_recall"] > m["constant_mass_recall"] for m in metrics.values())
    print(f"{better} of {len(metrics)} gates beat the best constant choice of {num_selects} experts by mass recall")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), select, argv)


if __name__ == "__main__":
    sys.exit(main())
