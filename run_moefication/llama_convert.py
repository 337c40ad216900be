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
    return command_line.stage_parser(
        __doc__,
        ConvertSettings,
        has_device=False,
        split_file_path=command_line.SPLIT,
        select_file_path="folder that llama_select_mlp.py wrote",
        save_path=command_line.NEW_CHECKPOINT,
    )


def convert(arguments: argparse.Namespace) -> None:
    """Run the stage and print what kind of checkpoint came out."""
    from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
    from run_moefication.moefication.stages import convert as stage

    settings = command_line.settings_of(arguments, ConvertSettings)
    checkpoint = DenseCheckpoint(arguments.model_path)
    paths = arguments.split_file_path, arguments.select_file_path, arguments.save_path
    writer = stage.convert(checkpoint, *paths, settings, **command_line.run_options(arguments))
    average = " on average" if settings.routing == "threshold" else ""
    budget = f"{settings.num_selects} of {settings.num_experts} experts a token{average}"
    print(f"{checkpoint.name} as {settings.convert_type}: {budget}")
    if settings.convert_type == "LlamaMoEForSequenceClassification" and "score.weight" not in checkpoint.tensors:
        labels = writer.claim["options"]["num_labels"]
        print(f"the source has no score.weight: the classification head of {labels} labels is new and must be trained")
    if not (checkpoint.path / "tokenizer_config.json").exists():
        print(f"{checkpoint.path} has no tokenizer files: none were copied")
    command_line.report(arguments, writer, "llama_calibrate.py (5_calibrate.sh), or llama_evaluate.py (evaluate.sh)")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return command_line.run(build_parser(), convert, argv)


if __name__ == "__main__":
    sys.exit(main())
