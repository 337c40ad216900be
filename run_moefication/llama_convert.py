r"""Stage 4, convert: dense weights, split and gates become a LlamaMoE checkpoint for `from_pretrained`.

  python llama_convert.py --model_path MODEL --save_path NAME-MoE --num_experts 8 --num_selects 2 \
    --split_file_path ../llama_moe_temp_files/NAME-8Expert-Split-Clustering \
    --select_file_path ../llama_moe_temp_files/NAME-8Expert-Select-MLP

No weight changes; neurons move to their experts. Memory: twice one shard of at most 2 GiB.
"""

import sys

from run_moefication.command_line import NEW_CHECKPOINT, SPLIT, Run, path_option, stage_script
from run_moefication.settings import ConvertSettings


@stage_script(
    __doc__,
    ConvertSettings,
    split_file_path=SPLIT,
    select_file_path=path_option("folder that llama_select_mlp.py wrote"),
    save_path=NEW_CHECKPOINT,
)
def main(run: Run) -> None:
    """Run the stage and print what kind of checkpoint came out."""
    from run_moefication.moefication.checkpoints.tokenizers import tokenizer_files
    from run_moefication.moefication.stages import convert as stage

    checkpoint, settings = run.checkpoint, run.settings
    paths = run.arguments.split_file_path, run.arguments.select_file_path, run.arguments.save_path
    writer = stage.convert(checkpoint, *paths, settings, **run.options)
    average = " on average" if settings.routing == "threshold" else ""
    budget = f"{settings.num_selects} of {settings.num_experts} experts a token{average}"
    print(f"{checkpoint.name} as {settings.convert_type}: {budget}")
    if settings.convert_type == "LlamaMoEForSequenceClassification" and "score.weight" not in checkpoint.tensors:
        labels = writer.spec["options"]["num_labels"]
        print(f"the source has no score.weight: the classification head of {labels} labels is new and must be trained")
    if not tokenizer_files(checkpoint.path):
        print(f"{checkpoint.path} has no tokenizer files: none were copied")
    run.report(writer, "llama_calibrate.py (5_calibrate.sh), or llama_evaluate.py (evaluate.sh)")


if __name__ == "__main__":
    sys.exit(main())
