"""Stage 1, split: cut the neurons of every MLP into experts by balanced k-means on a weight's rows.

  python llama_split_clustering.py --model_path MODEL --save_path ../llama_moe_temp_files --num_experts 8

Writes SAVE_PATH/NAME-8Expert-Split-Clustering, one file per layer with the expert of each neuron.
"""

import argparse
import sys

from run_moefication import command_line


def build_parser() -> argparse.ArgumentParser:
    """The options of this stage."""
    parser = command_line.new_parser(__doc__)
    command_line.add_model_path(parser)
    command_line.add_save_path(parser, "NAME-nExpert-Split-Clustering")
    command_line.add_templates(parser, several=True)
    parser.add_argument("--num_experts", type=int, required=True, help="experts per layer; must divide the MLP's width")
    parser.add_argument(
        "--distance",
        default="l2",
        choices=("l2", "cos"),
        help="between a normalised row and a centre: squared Euclidean, or one minus the cosine",
    )
    command_line.add_common(parser, seed="k-means++")
    return parser


def split(arguments: argparse.Namespace) -> None:
    """Run the stage and print the balance of what came out."""
    device = command_line.pick_device(arguments)
    from run_moefication.moefication.checkpoints import Checkpoint
    from run_moefication.moefication.splitting import parse_templates, split_by_clustering

    templates = parse_templates(arguments.templates)
    checkpoint = Checkpoint(arguments.model_path)
    writer = split_by_clustering(
        checkpoint,
        arguments.save_path,
        templates=templates,
        num_experts=arguments.num_experts,
        distance=arguments.distance,
        seed=arguments.seed,
        device=device,
        overwrite=arguments.overwrite,
        progress=command_line.progress_bar,
    )
    num_layers, width = checkpoint.config.num_hidden_layers, checkpoint.config.intermediate_size
    experts = f"{arguments.num_experts} experts of {width // arguments.num_experts} neurons"
    print(f"{checkpoint.name}: {num_layers} layers, {experts}")
    metrics = writer.metrics()
    for template in templates:
        costs = [metrics[template.format(layer)]["cost"] / width for layer in range(num_layers)]
        print(f"{template}: mean {arguments.distance} distance to the centre {min(costs):.3f} to {max(costs):.3f}")
    command_line.report(writer, "llama_get_hidden_features.py (2_get_hidden_features.sh)")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), split, argv)


if __name__ == "__main__":
    sys.exit(main())
