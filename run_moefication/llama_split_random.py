r"""Stage 1, split, as a control: deal the neurons of every MLP out to experts at random.

  python llama_split_random.py --model_path MODEL --save_path ../llama_moe_temp_files --num_experts 8

Writes SAVE_PATH/NAME-8Expert-Split-Random, which the later stages take as they take a clustering.
"""

import argparse
import sys

from run_moefication import command_line
from run_moefication.settings import RandomSplitSettings


def build_parser() -> argparse.ArgumentParser:
    """The options of this stage."""
    parser = command_line.stage_parser(
        __doc__, RandomSplitSettings, has_device=False, save_path="folder in which NAME-nExpert-Split-Random is made"
    )
    command_line.add_templates(parser)
    return parser


def split(arguments: argparse.Namespace) -> None:
    """Run the stage and print what came out."""
    from run_moefication.moefication.artifacts.split import parse_templates
    from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
    from run_moefication.moefication.stages.split import split_at_random

    settings = command_line.settings_of(arguments, RandomSplitSettings)
    templates = parse_templates(arguments.templates)
    checkpoint = DenseCheckpoint(arguments.model_path)
    writer = split_at_random(checkpoint, arguments.save_path, templates, settings, overwrite=arguments.overwrite)
    width = checkpoint.config.intermediate_size // arguments.num_experts
    layers = checkpoint.config.num_hidden_layers
    print(f"{checkpoint.name}: {layers} layers, {arguments.num_experts} experts of {width} neurons")
    command_line.report(arguments, writer, "llama_get_hidden_features.py (2_get_hidden_features.sh)")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), split, argv)


if __name__ == "__main__":
    sys.exit(main())
