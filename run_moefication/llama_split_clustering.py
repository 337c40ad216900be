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
from run_moefication.settings import CorpusSettings, SplitSettings


def build_parser() -> argparse.ArgumentParser:
    """The options of this stage."""
    parser = command_line.stage_parser(
        __doc__, SplitSettings, save_path="folder in which NAME-nExpert-Split-Clustering is made"
    )
    command_line.add_templates(parser)
    parser.add_argument(
        "--hidden_features_path",
        type=command_line.path,
        help="activations from what llama_get_hidden_features.py recorded, instead of --train_data_path",
    )
    command_line.add_corpus(parser, required=False)
    return parser


def split(arguments: argparse.Namespace) -> None:
    """Run the stage and print the balance of what came out."""
    run = command_line.run_options(arguments)
    from run_moefication.moefication.artifacts.split import parse_templates
    from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
    from run_moefication.moefication.stages.split import split_by_weights
    from run_moefication.moefication.stages.split_on_activations import split_by_activations

    settings = command_line.settings_of(arguments, SplitSettings)
    templates = parse_templates(arguments.templates)
    _check(arguments, templates)
    checkpoint = DenseCheckpoint(arguments.model_path)
    if settings.cluster_on == "weights":
        writer = split_by_weights(checkpoint, arguments.save_path, templates, settings, **run)
    else:
        text = _text(arguments, checkpoint, templates[0])
        writer = split_by_activations(checkpoint, text, arguments.save_path, templates[0], settings, **run)
        if arguments.train_data_path:
            command_line.print_mix(checkpoint, text)
    num_layers, width = checkpoint.config.num_hidden_layers, checkpoint.config.intermediate_size
    shared = f", {settings.num_shared_experts} of them shared" if settings.num_shared_experts else ""
    experts = f"{settings.num_experts} experts of {width // settings.num_experts} neurons{shared}"
    print(f"{checkpoint.name}: {num_layers} layers, {experts}")
    metrics = writer.metrics()
    routed = width - settings.num_shared_experts * (width // settings.num_experts)
    for template in templates:
        costs = [metrics[template.format(layer)]["cost"] / routed for layer in range(num_layers)]
        print(f"{template}: mean {settings.distance} distance to the centre {min(costs):.3f} to {max(costs):.3f}")
    command_line.report(arguments, writer, "llama_get_hidden_features.py (2_get_hidden_features.sh)")


def _check(arguments: argparse.Namespace, templates: list[str]) -> None:
    """Refuse a source of activations that is missing or not used, and options of one that is not used."""
    from run_moefication.moefication.errors import SettingError

    sources = [name for name in ("train_data_path", "hidden_features_path") if getattr(arguments, name)]
    if arguments.cluster_on == "weights" and sources:
        raise SettingError(f"{sources[0]} is for cluster_on activations")
    if arguments.cluster_on == "activations" and len(sources) != 1:
        raise SettingError("cluster_on activations needs either train_data_path or hidden_features_path")
    if arguments.cluster_on == "activations" and len(templates) > 1:
        raise SettingError("cluster_on activations takes one of templates: the split is the same for both")
    if not arguments.train_data_path:
        default = CorpusSettings(seed=arguments.seed)
        for name in (*vars(default), "batch_size", "train_data_cache_path"):
            if getattr(arguments, name) != getattr(default, name, None):
                raise SettingError(f"{name} is for train_data_path")


def _text(arguments: argparse.Namespace, checkpoint: Any, template: str) -> Any:
    """What the activations come from."""
    if arguments.train_data_path:
        return command_line.read_corpus(arguments, checkpoint)
    from run_moefication.moefication.artifacts.features import Features

    return Features(arguments.hidden_features_path, checkpoint, template)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), split, argv)


if __name__ == "__main__":
    sys.exit(main())
