r"""Write a LlamaMoE checkpoint for other programs: a GGUF file for llama.cpp, or a class that transformers has.

  python llama_export.py --model_path NAME-MoE-Calibrated --save_path NAME-GGUF --format gguf --outtype f16 q8_0 \
    --text_path ../llama_data/heldout/wikipedia.jsonl

The result is compared with the LlamaMoE on the first tokens of a text: a checkpoint in transformers, a GGUF file in
llama.cpp where the package xllamacpp is installed. What engines cannot hold is refused: RECIPE=engine makes models
without it. Memory: the model in float32, for a class of transformers twice.
"""

import sys

from run_moefication.command_line import DEVICE, NEW_CHECKPOINT, Run, path_option, stage_script
from run_moefication.settings import ExportSettings


@stage_script(
    __doc__,
    ExportSettings,
    model_path=path_option("LlamaMoE checkpoint, or a hub id"),
    text_path=path_option('text file, or .jsonl with a "text" a line, to check on'),
    save_path=NEW_CHECKPOINT,
    device=DEVICE,
)
def main(run: Run) -> None:
    """Export, and print how near each result is."""
    from run_moefication.moefication.stages import export as stage

    given = run.arguments
    writer = stage.export(given.model_path, given.text_path, given.save_path, run.settings, **run.options)
    for part, check in writer.metrics().items():
        what = part if part != stage.CHECK else run.settings.format
        if not check.get("run", True):
            cure = "pip install -e '.[engine]' -c constraints.txt, and --overwrite"
            print(f"{what}: read back; not run, since llama.cpp was not there when it was made ({cure})")
            continue
        ratio = check["perplexity"] / check["reference_perplexity"]
        name, largest = next(item for item in check.items() if item[0].startswith("max_"))
        of = "a logit" if name == "max_logit_difference" else "a log-probability"
        print(
            f"{what}: perplexity {check['perplexity']:.3f} ({ratio:.4f} of the LlamaMoE's), same most likely token "
            f"{check['argmax_agreement']:.2%}, largest difference of {of} {largest:.1e}; {check['tokens']} tokens"
        )
        if "perplexity_without_bound" in check:
            lost = check["reference_perplexity"] / check["perplexity_without_bound"]
            print(f"  bounding the experts of a token raises perplexity by a factor of {lost:.3f}")
        if cut := check.get("cut_otherwise"):
            print(f"  {len(cut)} of {check['texts']} provoking texts are cut into other tokens, such as {cut[0]!r}")
    run.report(writer, "llama.cpp" if run.settings.format == "gguf" else "llama_evaluate.py, or the program it is for")


if __name__ == "__main__":
    sys.exit(main())
