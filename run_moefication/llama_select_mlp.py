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
    parser = command_line.new_parser(__doc__)
    command_line.add_model_path(parser)
    command_line.add_split(parser)
    parser.add_argument(
        "--hidden_features_path",
        type=command_line.path,
        required=True,
        help="folder that llama_get_hidden_features.py wrote",
    )
    command_line.add_save_path(parser, "NAME-nExpert-Select-MLP")
    command_line.add_settings(parser, GateSettings, leave_out=("patience",))
    parser.add_argument(
        "--specify_layer",
        nargs="*",
        default=[],
        help="layers to train: 0-7 (ends included), 0 1 2, or both (default: all)",
    )
    command_line.add_common(parser)
    return parser


def select(arguments: argparse.Namespace) -> None:
    """Run the stage and print how good the gates are."""
    device = command_line.pick_device(arguments)
    from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
    from run_moefication.moefication.stages.select import parse_layers, train_gates

    settings = command_line.settings_of(arguments, GateSettings)
    checkpoint = DenseCheckpoint(arguments.model_path)
    writer = train_gates(
        checkpoint,
        arguments.split_file_path,
        arguments.hidden_features_path,
        arguments.save_path,
        settings,
        layers=parse_layers(arguments.specify_layer, checkpoint.config.num_hidden_layers),
        device=device,
        overwrite=arguments.overwrite,
        progress=command_line.progress_bar,
    )
    print_quality(writer.metrics(), settings.num_selects)
    command_line.report(writer, "llama_convert.py (4_convert.sh)")


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
