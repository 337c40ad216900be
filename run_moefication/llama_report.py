r"""One page about a conversion: how much runs, what it costs in perplexity and buys in time, and what its experts do.

  python llama_report.py --model_path NAME-MoE-Calibrated --dense_path NAME --save_path report.html \
    --text_path ../llama_data/heldout/wikipedia.jsonl ../llama_data/heldout/github.jsonl

The page opens in any browser, from the disk and without a network. The same numbers lie beside it as JSON. What needs
the dense model, a manifest or two splits is left out without them, and the page says so.
"""

import sys

from run_moefication.command_line import DEVICE, Run, path_option, stage_script, took
from run_moefication.settings import ReportSettings


@stage_script(
    __doc__,
    ReportSettings,
    model_path=path_option("LlamaMoE checkpoint, or a hub id"),
    dense_path=path_option("the dense model that it was made of", required=False),
    text_path=path_option('text files, or .jsonl with a "text" a line, that nothing was fitted to', nargs="+"),
    split_file_path=path_option("two splits of the dense model, to compare", required=False, nargs=2, default=()),
    evaluation_path=path_option(
        "what llama_evaluate.py --json wrote of both models: its text is not evaluated again", required=False
    ),
    save_path=path_option("the page, NAME.html; its numbers go to NAME.json beside it"),
    device=DEVICE,
)
def main(run: Run) -> None:
    """Measure, write the page, and say where it is."""
    from run_moefication.moefication.stages.report import report

    given = run.arguments
    made = report(
        given.model_path,
        given.text_path,
        given.save_path,
        run.settings,
        dense_path=given.dense_path,
        split_paths=given.split_file_path,
        evaluation_path=given.evaluation_path,
        **run.options,
    )
    for section, why in made.numbers["left_out"].items():
        print(f"left out: {section}: {why}")
    if made.was_finished:
        print(f"already finished: {made.page} (--overwrite redoes it)")
        return
    size = made.page.stat().st_size / 1e6
    print(f"written: {made.page} ({size:.2f} MB) and {made.json} ({took(given)})")


if __name__ == "__main__":
    sys.exit(main())
