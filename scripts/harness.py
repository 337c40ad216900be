"""EleutherAI's lm-evaluation-harness on checkpoints that transformers loads, and one table of what it found.

python scripts/harness.py --model_path DENSE MOE EXPORTED --tasks heldout_continuation,heldout_cloze \\
  --include_path .cache/lm_eval_tasks

LlamaMoE checkpoints run on the installed package, no code of theirs. `lm_eval.sh` makes the tasks and calls this.
"""

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timing
import tqdm

import llama_moe  # noqa: F401 (registers LlamaMoE with the Auto classes)
from run_moefication import command_line
from run_moefication.moefication.checkpoints.dense import resolve_model_path
from run_moefication.moefication.checkpoints.transformers_library import quiet_transformers
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.processes import pick_device
from run_moefication.moefication.progress import Progress

SHOWN = ("word_perplexity", "acc", "acc_norm")  # of a task's metrics, where it has them


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    models = "checkpoint folders or hub ids; the first is what the others are compared with"
    parser.add_argument("--model_path", **command_line.path_option(models, nargs="+"))
    parser.add_argument("--tasks", required=True, help="names of tasks, comma-separated")
    parser.add_argument("--include_path", type=Path, help="folder with descriptions of more tasks than the harness has")
    parser.add_argument("--limit", type=timing.positive, help="examples of each task (default: all)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="to run in")
    parser.add_argument("--batch_size", type=timing.positive, default=8, help="examples at a time")
    parser.add_argument("--device", **command_line.DEVICE)
    parser.add_argument("--json", type=Path, help="also write the harness's results to this file")
    return command_line.run(parser, evaluate, argv)


def evaluate(arguments: argparse.Namespace) -> None:
    """Run the tasks on each model, printing a row as it is there."""
    if find_spec("lm_eval") is None:
        raise MoEficationError("this wants the lm-evaluation-harness: pip install -e '.[eval]' -c constraints.txt")
    # What is wrong is found before any work.
    paths = [resolve_model_path(path) for path in arguments.model_path]
    for path in paths:
        if not (path / "config.json").is_file():
            raise MoEficationError(f"{path} has no config.json: name a checkpoint that transformers loads")
    if arguments.json and not (arguments.json.absolute().parent.is_dir() and os.access(arguments.json.parent, os.W_OK)):
        raise MoEficationError(f"--json {arguments.json} cannot be written")
    tqdm.tqdm = Progress  # the harness's bars would fill log files, and so would those of `datasets`
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    manager = TaskManager(include_path=arguments.include_path and str(arguments.include_path))
    names = arguments.tasks.split(",")
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise MoEficationError(f"--tasks {','.join(unknown)}: the harness has none of that name")
    results: dict[str, Any] = {}
    for path, given in zip(paths, arguments.model_path, strict=True):
        how = dict(dtype=arguments.dtype, device=pick_device(arguments.device), batch_size=arguments.batch_size)
        with quiet_transformers():
            model = HFLM(pretrained=str(path), trust_remote_code=False, **how)
        found = simple_evaluate(model, tasks=names, task_manager=manager, limit=arguments.limit, bootstrap_iters=0)
        results[given] = found["results"]
        if len(results) == 1:
            columns = [
                (task, metric) for task, row in found["results"].items() for metric in SHOWN if f"{metric},none" in row
            ]
            print("| model | " + " | ".join(f"{task} {metric}" for task, metric in columns) + " |")
            print("|---" * (len(columns) + 1) + "|")
        cells = [f"{found['results'][task][f'{metric},none']:.4g}" for task, metric in columns]
        print(f"| {Path(given).name} | " + " | ".join(cells) + " |", flush=True)
        del model
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, default=str) + "\n")


if __name__ == "__main__":
    sys.exit(main())
