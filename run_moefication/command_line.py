"""What the scripts share: settings become options, and errors become one line and exit status 2.

Nothing heavy is imported at the top: `--help` and a typo must answer at once.
"""

import argparse
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin

from .settings import TEMPLATES, CorpusSettings

if TYPE_CHECKING:
    from .moefication.processes import Process

TRACEBACK = "MOEFICATION_TRACEBACK"  # if it is set in the environment, the traceback stands before the line of an error
# Help of paths that several scripts take.
MODEL = "folder of the dense LLaMA checkpoint in transformers format, or a hub id"
SPLIT = "folder that llama_split_clustering.py wrote"
NEW_CHECKPOINT = "folder of the new checkpoint itself, absent or empty"
# What helps when memory runs out, by the option that it needs.
CURES = {"batch_size": "a smaller --batch_size", "device": "another --device", "max_tokens": "fewer --max_tokens"}


# ---------------------------------------------------------------------------------------------------- the parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, and lets the epilogue keep its line breaks."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.strip().splitlines())

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Answers a wrong option in one line, without the usage of forty."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help explains the options)\n")


def new_parser(doc: str) -> Parser:
    """A parser described by its script's docstring."""
    return Parser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)


def stage_parser(
    doc: str, settings: type, *, has_device: bool = True, leave_out: Collection[str] = (), **paths: str
) -> Parser:
    """The options of a stage: its paths (`--model_path`, and those given by name with their help), its settings but
    for those left out, `--device` and `--overwrite`."""
    parser = new_parser(doc)
    add_model_path(parser)
    for name, help in paths.items():
        parser.add_argument(f"--{name}", type=path, required=True, help=help)
    add_settings(parser, settings, leave_out)
    if has_device:
        add_device(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="redo a finished stage, or one made with other options"
    )
    return parser


def path(text: str) -> str:
    """The type of options that name a file or folder: an empty one (a shell variable not set) is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def seed_number(text: str) -> int:
    """The type of `--seed`: what every generator used here takes."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 2^32 - 1")
    return int(text)


def add_settings(parser: Any, settings: type, leave_out: Collection[str] = ()) -> None:
    """An option for each field of a stage's settings (see `run_moefication.settings`) that has none yet."""
    taken = {action.dest for action in parser._actions}  # argparse has no public list of them
    for one in fields(settings):
        if one.name in taken or one.name in leave_out:
            continue
        alternatives = get_args(one.type) or (one.type,)
        items = [item for kind in alternatives if get_origin(kind) is Sequence for item in get_args(kind)]
        kind = next(kind for kind in (bool, int, float, str) if kind in (*alternatives, *items))
        options = {"help": one.metadata["help"]}
        options |= {"required": True} if one.default is MISSING else {"default": one.default}
        if kind is bool:
            options |= {"action": "store_true"}
        else:
            options |= {"type": seed_number if one.name == "seed" else kind, "choices": one.metadata["choices"]}
            options |= {"nargs": "+"} if items else {}
        parser.add_argument(f"--{one.name}", **options)


def settings_of(arguments: argparse.Namespace, settings: type) -> Any:
    """The settings that the options give, checked."""
    given = vars(arguments)
    return settings(**{one.name: given[one.name] for one in fields(settings) if one.name in given})


def add_model_path(parser: argparse.ArgumentParser) -> None:
    """`--model_path`."""
    parser.add_argument("--model_path", type=path, required=True, help=MODEL)


def add_templates(parser: argparse.ArgumentParser) -> None:
    """`--templates` of a split, which can be made on several."""
    parser.add_argument(
        "--templates",
        default=TEMPLATES[0],
        help="weights whose rows are the neurons, comma-separated, {} standing for the layer (gate_proj or up_proj)",
    )


def add_corpus(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options that choose text and cut it into blocks; `read_corpus` follows them."""
    group = parser.add_argument_group("text")
    group.add_argument(
        "--train_data_path",
        type=path,
        required=required,
        help="folder of .jsonl, .txt or .parquet files, or .gz, .zst or .zip of the first two, named after their "
        "domains or in folders that are (other folders below it are not read); or one such file",
    )
    group.add_argument(
        "--train_data_cache_path",
        type=path,
        help="folder that keeps tokenised text, so that it is tokenised once; without it nothing is kept",
    )
    add_settings(group, CorpusSettings)


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`, for `pick_device`."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """The hidden option that the old launcher of PyTorch passes; torchrun sets LOCAL_RANK instead."""
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)


# ---------------------------------------------------------------------------------------------------- the work


def run_options(arguments: argparse.Namespace, process: "Process | None" = None) -> dict[str, Any]:
    """What every stage's function takes: `device` (where it is an option), on this `process`, and `overwrite`."""
    options = {"device": pick_device(arguments, process.local_rank if process else 0)} if "device" in arguments else {}
    return options | {"overwrite": arguments.overwrite}


def this_process(arguments: argparse.Namespace, what_alone: str) -> "Process":
    """Which of several processes this one is, as torchrun says in the environment.

    If something else set these variables, they may be left over from another run: a line on stderr says what this
    process will do.

    Args:
        what_alone: what a process does if it is one of several.
    """
    from .moefication import processes

    process = processes.this_process(arguments.local_rank)
    if process.world_size > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        print(
            f"the environment says RANK {process.rank} of WORLD_SIZE {process.world_size}: {what_alone}; "
            f"`unset RANK WORLD_SIZE` if this process is to do all",
            file=sys.stderr,
        )
    return process


def pick_device(arguments: argparse.Namespace, local_rank: int = 0) -> str:
    """The device that `--device` names, checked; by default the GPU of this process where there is one."""
    from .moefication import processes

    return processes.pick_device(arguments.device, local_rank)


def read_corpus(arguments: argparse.Namespace, checkpoint: Any) -> Any:
    """The corpus that the options of `add_corpus` and `--seed` choose, as this dense model's tokenizer cuts it."""
    from .moefication.text.corpus import training_corpus

    settings = settings_of(arguments, CorpusSettings)
    paths = arguments.train_data_path, arguments.train_data_cache_path
    return training_corpus(checkpoint, *paths, settings)


# ---------------------------------------------------------------------------------------------------- the summary


def print_mix(checkpoint: Any, corpus: Any) -> None:
    """The domains of a corpus: their shares, the tokens there, asked for and got, and the files counted for each."""
    from .moefication.text.unread import some

    print(f"{'domain':<14} {'share':>6} {'there':>10} {'asked':>10} {'got':>10}  tokens, of files")
    for row in corpus.mix:
        counts = f"{row.available:>10,} {row.asked:>10,} {row.got:>10,}"
        print(f"{row.domain:<14} {row.weight:>6.1%} {counts}  {some(row.files)}")
    for row in corpus.mix:
        if row.skipped_lines:
            print(f"{row.domain}: {row.skipped_lines:,} bad lines skipped")
    print(f"{checkpoint.name}: {corpus.num_tokens:,} tokens in {len(corpus.blocks):,} blocks")


def report(arguments: argparse.Namespace, writer: Any, next_step: str, missing: str = "still missing") -> None:
    """The last lines of a stage: what was written, where, how long it took, and what comes next. `missing` says of
    parts that are not there who makes them."""
    took = f"{time.perf_counter() - arguments.start_time:.1f} s"
    if writer.was_finished:
        print(f"already finished: {writer.folder} (--overwrite redoes it)")
    elif writer.finished:
        print(f"written: {writer.folder} ({took})")
    else:
        parts = f"{len(writer.missing())} of {len(writer.parts)} parts {missing}"
        print(f"written so far: {writer.folder} ({parts}) after {took}")
    if writer.finished:
        print(f"next: {next_step}")


# ---------------------------------------------------------------------------------------------------- the exit status


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], argv: list[str] | None) -> int:
    """Parse, work, and turn wrong input into one line on stderr and exit status 2 (3 where a server is at fault).

    Returns: the exit status. Other exceptions are defects of ours and keep their traceback.
    """
    if {"-h", "--help"} & {*(sys.argv[1:] if argv is None else argv)}:
        parser.print_help()  # before any other option is looked at: the shell scripts pass some that may be empty
        return 0
    arguments = parser.parse_args(argv, argparse.Namespace(start_time=time.perf_counter()))
    from .moefication.errors import MoEficationError, SettingError

    try:
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning)  # libraries announce their own plans with these
        work(arguments)
    except SettingError as error:
        return fail(parser.prog, with_dashes(str(error), vars(arguments)))
    except MoEficationError as error:
        return fail(parser.prog, str(error), error.exit_status)
    except OSError as error:
        return fail(parser.prog, f"{error.filename or 'file'}: {error.strerror or error}")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        cures = [cure for name, cure in CURES.items() if name in arguments]
        return fail(parser.prog, f"out of memory: {' or '.join(['more memory', *cures])} may help; run again")
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; run again to go on from here", file=sys.stderr)
        return 130
    return 0


def with_dashes(message: str, options: Collection[str]) -> str:
    """A message that speaks of fields as the command line does: `num_experts 5` becomes `--num_experts 5`."""
    names = "|".join(sorted(options, key=len, reverse=True))
    return re.sub(rf"(?<![\w/.-])({names})(?![\w/.-])", r"--\1", message)


def fail(program: str, message: str, status: int = 2) -> int:
    """Say in one line what went wrong (after the traceback of the error at hand, if `TRACEBACK` is set).

    Returns: the exit status.
    """
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return status
