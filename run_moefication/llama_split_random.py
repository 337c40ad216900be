r"""Stage 1, split, as a control: deal the neurons of every MLP out to experts at random.

  python llama_split_random.py --model_path MODEL --save_path ../llama_moe_temp_files --num_experts 8

Writes SAVE_PATH/NAME-8Expert-Split-Random, which the later stages take as they take a clustering.
"""

import sys

from run_moefication.command_line import SEVERAL_TEMPLATES, Run, path_option, stage_script
from run_moefication.settings import RandomSplitSettings


@stage_script(
    __doc__,
    RandomSplitSettings,
    save_path=path_option("folder in which NAME-nExpert-Split-Random is made"),
    templates=SEVERAL_TEMPLATES,
)
def main(run: Run) -> None:
    """Run the stage and print what came out."""
    from run_moefication.moefication.artifacts.split import parse_templates
    from run_moefication.moefication.stages.split import split_at_random

    templates = parse_templates(run.arguments.templates)
    writer = split_at_random(run.checkpoint, run.arguments.save_path, templates, run.settings, **run.options)
    run.print_experts()
    run.report(writer, "llama_get_hidden_features.py (2_get_hidden_features.sh)")


if __name__ == "__main__":
    sys.exit(main())
