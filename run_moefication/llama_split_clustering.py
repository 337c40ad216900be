r"""Stage 1, split: cut the neurons of every MLP into experts by balanced k-means.

  python llama_split_clustering.py --model_path MODEL --save_path ../llama_moe_temp_files --num_experts 8
  ... --num_experts 128 --cluster_on activations --num_shared_experts 16 --train_data_path ../llama_data

On weights: neurons whose weight rows point the same way. On activations: neurons that the same tokens need, as far as
a small gate can foresee it, beside shared experts of the neurons that add most. Writes
SAVE_PATH/NAME-8Expert-Split-Clustering, one file per layer with the expert of each neuron.
"""

import argparse
import sys
from typing import Any

from run_moefication import command_line
from run_moefication.settings import SplitSettings


def build_parser() -> argparse.ArgumentParser:
    """The options of this stage."""
    parser = command_line.new_parser(__doc__)
    command_line.add_model_path(parser)
    command_line.add_save_path(parser, "NAME-nExpert-Split-Clustering")
    command_line.add_templates(parser)
    command_line.add_settings(parser, SplitSettings)
    parser.add_argument(
        "--hidden_features_path",
        type=command_line.path,
        help="activations from what llama_get_hidden_features.py recorded, instead of --train_data_path",
    )
    command_line.add_corpus(parser, required=False)
    command_line.add_common(parser)
    return parser


def split(arguments: argparse.Namespace) -> None:
    """Run the stage and print the balance of what came out."""
    device = command_line.pick_device(arguments)
    from run_moefication.moefication.artifacts.split import parse_templates
    from run_moefication.moefication.checkpoints.dense import DenseCheckpoint

    settings = command_line.settings_of(arguments, SplitSettings)
    templates = parse_templates(arguments.templates)
    checkpoint = DenseCheckpoint(arguments.model_path)
    by = _by_activations if settings.cluster_on == "activations" else _by_weights
    writer = by(arguments, checkpoint, templates, settings, device)
    num_layers, width = checkpoint.config.num_hidden_layers, checkpoint.config.intermediate_size
    shared = f", {arguments.num_shared_experts} of them shared" if arguments.num_shared_experts else ""
    experts = f"{arguments.num_experts} experts of {width // arguments.num_experts} neurons{shared}"
    print(f"{checkpoint.name}: {num_layers} layers, {experts}")
    metrics = writer.metrics()
    routed = width - arguments.num_shared_experts * (width // arguments.num_experts)
    for template in templates:
        costs = [metrics[template.format(layer)]["cost"] / routed for layer in range(num_layers)]
        print(f"{template}: mean {arguments.distance} distance to the centre {min(costs):.3f} to {max(costs):.3f}")
    command_line.report(writer, "llama_get_hidden_features.py (2_get_hidden_features.sh)")


def _by_weights(
    arguments: argparse.Namespace, checkpoint: Any, templates: list[str], settings: SplitSettings, device: str
) -> Any:
    from run_moefication.moefication.errors import SettingError
    from run_moefication.moefication.stages.split import split_by_weights

    for name in ("train_data_path", "hidden_features_path"):
        if getattr(arguments, name):
            raise SettingError(f"{name} is for cluster_on activations")
    return split_by_weights(
        checkpoint,
        arguments.save_path,
        templates,
        settings,
        device=device,
        overwrite=arguments.overwrite,
        progress=command_line.progress_bar,
    )


def _by_activations(
    arguments: argparse.Namespace, checkpoint: Any, templates: list[str], settings: SplitSettings, device: str
) -> Any:
    from run_moefication.moefication.artifacts.features import Features
    from run_moefication.moefication.errors import SettingError
    from run_moefication.moefication.stages.split_on_activations import split_by_activations

    if bool(arguments.train_data_path) == bool(arguments.hidden_features_path):
        raise SettingError("cluster_on activations needs either train_data_path or hidden_features_path")
    if len(templates) > 1:
        raise SettingError("cluster_on activations takes one of templates: the split is the same for both")
    if arguments.hidden_features_path:
        text = Features(arguments.hidden_features_path, checkpoint, templates[0])
    else:
        text = command_line.read_corpus(arguments, checkpoint, command_line.progress_bar)
    writer = split_by_activations(
        checkpoint,
        text,
        arguments.save_path,
        templates[0],
        settings,
        device=device,
        overwrite=arguments.overwrite,
        progress=command_line.progress_bar,
    )
    if arguments.train_data_path:
        command_line.print_mix(checkpoint, text)
    return writer


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), split, argv)


if __name__ == "__main__":
    sys.exit(main())
