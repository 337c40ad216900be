r"""Stage 2, get_hidden_features: record what the MLPs see while the dense model reads pretraining-like text.

  python llama_get_hidden_features.py --model_path MODEL --train_data_path ../llama_data \
    --train_data_cache_path ../llama_data_cache --save_path ../llama_moe_temp_files --feature_format inputs
  torchrun --nproc_per_node=8 llama_get_hidden_features.py (the same options)

Writes SAVE_PATH/NAME-Hidden-Features. Disk, LLaMA-7B in 2-byte dtypes: 0.97 MB a token in full, 0.26 MB with inputs.
"""

import argparse
import sys

from run_moefication import command_line
from run_moefication.settings import FeatureSettings


def build_parser() -> argparse.ArgumentParser:
    """The options of this stage."""
    parser = command_line.stage_parser(
        __doc__, FeatureSettings, save_path="folder in which NAME-Hidden-Features is made"
    )
    command_line.add_corpus(parser)
    command_line.add_local_rank(parser)
    return parser


def get_hidden_features(arguments: argparse.Namespace) -> None:
    """Run the stage in this process of one or several, and print the mix of domains."""
    process = command_line.this_process(arguments, "it records its share, and the others must be started, too")
    run = command_line.run_options(arguments, process)
    from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
    from run_moefication.moefication.stages.features import extract_features

    settings = command_line.settings_of(arguments, FeatureSettings)
    checkpoint = DenseCheckpoint(arguments.model_path)
    corpus = command_line.read_corpus(arguments, checkpoint)
    share = {"rank": process.rank, "world_size": process.world_size}
    writer = extract_features(checkpoint, corpus, arguments.save_path, settings, **share, **run)
    if process.rank == 0:
        command_line.print_mix(checkpoint, corpus)
    if process.rank == 0 or (writer.finished and not writer.was_finished):
        others = f"still missing, which the other processes of WORLD_SIZE {process.world_size} make"
        command_line.report(arguments, writer, "llama_select_mlp.py (3_select.sh)", others)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), get_hidden_features, argv)


if __name__ == "__main__":
    sys.exit(main())
