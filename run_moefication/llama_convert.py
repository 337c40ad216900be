r"""Stage 4, convert: dense weights, split and gates become a LlamaMoE checkpoint for `from_pretrained`.

  python llama_convert.py --model_path MODEL --save_path NAME-MoE --num_experts 8 --num_selects 2 \
    --split_file_path ../llama_moe_temp_files/NAME-8Expert-Split-Clustering \
    --select_file_path ../llama_moe_temp_files/NAME-8Expert-Select-MLP

No weight changes; neurons move to their experts. Memory: twice one shard of at most 2 GiB.
"""

import argparse
import sys

from run_moefication import command_line
from run_moefication.settings import ConvertSettings


def build_parser() -> argparse.ArgumentParser:
    """The options of this stage."""
    parser = command_line.new_parser(__doc__)
    command_line.add_model_path(parser)
    command_line.add_split(parser)
    parser.add_argument(
        "--select_file_path", type=command_line.path, required=True, help="folder that llama_select_mlp.py wrote"
    )
    parser.add_argument(
        "--save_path",
        type=command_line.path,
        required=True,
        help="folder of the new checkpoint itself, absent or empty",
    )
    command_line.add_settings(parser, ConvertSettings)
    command_line.add_common(parser, device=False)
    return parser


def convert(arguments: argparse.Namespace) -> None:
    """Run the stage and print what kind of checkpoint came out."""
    from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
    from run_moefication.moefication.stages.convert import convert as convert_checkpoint

    settings = command_line.settings_of(arguments, ConvertSettings)
    checkpoint = DenseCheckpoint(arguments.model_path)
    writer = convert_checkpoint(
        checkpoint,
        arguments.split_file_path,
        arguments.select_file_path,
        arguments.save_path,
        settings,
        overwrite=arguments.overwrite,
        progress=command_line.progress_bar,
    )
    average = " on average" if arguments.routing == "threshold" else ""
    budget = f"{arguments.num_selects} of {arguments.num_experts} experts a token{average}"
    print(f"{checkpoint.name} as {arguments.convert_type}: {budget}")
    if arguments.convert_type == "LlamaMoEForSequenceClassification" and "score.weight" not in checkpoint.tensors:
        labels = writer.spec["options"]["num_labels"]
        print(f"the source has no score.weight: the classification head of {labels} labels is new and must be trained")
    if not (checkpoint.path / "tokenizer_config.json").exists():
        print(f"{checkpoint.path} has no tokenizer files: none were copied")
    command_line.report(writer, "llama_calibrate.py (5_calibrate.sh), or llama_evaluate.py (evaluate.sh)")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), convert, argv)


if __name__ == "__main__":
    sys.exit(main())
