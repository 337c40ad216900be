"""What the stage scripts share: option helpers, the progress bar, and the one place where errors become exit status 2.

Nothing heavy is imported at the top: `--help` and a typo must answer at once.
"""

import argparse
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import MISSING, dataclass, fields
from typing import Any, NoReturn, get_args

from run_moefication.settings import TEMPLATES, CorpusSettings

TRACEBACK = "MOEFICATION_TRACEBACK"  # set in the environment, errors of one line come after their traceback


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
        kind = next(kind for kind in (bool, int, float, str) if kind is one.type or kind in get_args(one.type))
        options = {"help": one.metadata["help"]}
        if kind is bool:
            options |= {"action": "store_true"}
        else:
            is_required = one.default is MISSING
            options |= {"type": seed_number if one.name == "seed" else kind, "choices": one.metadata["choices"]}
            options |= {"required": True} if is_required else {"default": one.default}
        parser.add_argument(f"--{one.name}", **options)


def settings_of(arguments: argparse.Namespace, settings: type) -> Any:
    """The settings that the options give, checked."""
    given = vars(arguments)
    return settings(**{one.name: given[one.name] for one in fields(settings) if one.name in given})


def add_model_path(parser: argparse.ArgumentParser) -> None:
    """`--model_path`."""
    parser.add_argument(
        "--model_path",
        type=path,
        required=True,
        help="folder of the dense LLaMA checkpoint in transformers format, or a hub id",
    )


def add_save_path(parser: argparse.ArgumentParser, result: str) -> None:
    """`--save_path`, the folder in which the result gets a folder of its own."""
    parser.add_argument("--save_path", type=path, required=True, help=f"folder in which {result} is made")


def add_templates(parser: argparse.ArgumentParser) -> None:
    """`--templates` of a split, which can be made on several."""
    parser.add_argument(
        "--templates",
        default=TEMPLATES[0],
        help="weights whose rows are the neurons, comma-separated, {} standing for the layer (gate_proj or up_proj)",
    )


def add_split(parser: argparse.ArgumentParser) -> None:
    """`--split_file_path`."""
    parser.add_argument(
        "--split_file_path", type=path, required=True, help="folder that llama_split_clustering.py wrote"
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


def read_corpus(arguments: argparse.Namespace, checkpoint: Any, progress: Callable) -> Any:
    """The corpus that the options of `add_corpus` and `--seed` choose, as this dense model's tokenizer cuts it."""
    from run_moefication.moefication.text.corpus import training_corpus

    settings = settings_of(arguments, CorpusSettings)
    return training_corpus(
        checkpoint, arguments.train_data_path, arguments.train_data_cache_path, settings, progress=progress
    )


def print_mix(checkpoint: Any, corpus: Any) -> None:
    """The domains of a corpus: their shares, the tokens there, asked for and got, and the files counted for each."""
    from run_moefication.moefication.text.unread import some

    print(f"{'domain':<14} {'share':>6} {'there':>10} {'asked':>10} {'got':>10}  tokens, of files")
    for row in corpus.mix:
        counts = f"{row.available:>10,} {row.asked:>10,} {row.got:>10,}"
        print(f"{row.domain:<14} {row.weight:>6.1%} {counts}  {some(row.files)}")
    for row in corpus.mix:
        if row.skipped_lines:
            print(f"{row.domain}: {row.skipped_lines:,} bad lines skipped")
    print(f"{checkpoint.name}: {corpus.num_tokens:,} tokens in {len(corpus.blocks):,} blocks")


def add_common(parser: argparse.ArgumentParser, device: bool = True) -> None:
    """`--device` and `--overwrite`."""
    if device:
        add_device(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="redo a finished stage, or one made with other options"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`, for `pick_device`."""
    parser.add_argument(
        "--device",
        default=argparse.SUPPRESS,
        help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)",
    )


def pick_device(arguments: argparse.Namespace, local_rank: int = 0) -> str:
    """The device asked for, checked; by default the GPU of this process where there is one."""
    import torch

    from run_moefication.moefication.errors import MoEficationError

    wanted = getattr(arguments, "device", None)
    if wanted is None:
        return f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
        if torch.device(wanted).type == "meta":
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MoEficationError(f"--device {wanted!r} cannot be used here ({reason})") from error
    return wanted


@dataclass(frozen=True)
class Process:
    """This process among those that share the work, as the environment says."""

    rank: int
    world_size: int
    local_rank: int


def this_process(arguments: argparse.Namespace, what_alone: str) -> Process:
    """Who this process is by RANK, WORLD_SIZE and LOCAL_RANK, which torchrun sets.

    If they are set, but not by torchrun, they may be left over from another run: a line on stderr says what this
    process will do.

    Args:
        what_alone: what a process does if it is one of several.
    """
    from run_moefication.moefication.errors import MoEficationError

    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": getattr(arguments, "local_rank", None) or 0}
    try:
        process = Process(*(int(os.environ.get(name) or default) for name, default in names.items()))
    except ValueError as error:
        raise MoEficationError(
            f"{', '.join(names)} in the environment must be integers; torchrun sets them, else unset them"
        ) from error
    if not 0 <= process.rank < process.world_size:
        raise MoEficationError(
            f"the environment says RANK {process.rank}, which is outside of WORLD_SIZE {process.world_size}: "
            f"start the processes with torchrun, or unset RANK and WORLD_SIZE"
        )
    if process.world_size > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        print(
            f"the environment says RANK {process.rank} of WORLD_SIZE {process.world_size}: {what_alone}; "
            f"`unset RANK WORLD_SIZE` if this process is to do all",
            file=sys.stderr,
        )
    return process


def progress_bar(items: Iterable, what: str, unit: str) -> Iterable:
    """tqdm, silent where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=what, unit=unit, disable=None, dynamic_ncols=True)


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], argv: list[str] | None) -> int:
    """Parse, work, and turn wrong input into one line on stderr and exit status 2 (3 where a server is at fault).

    Returns: the exit status. Other exceptions are defects of ours and keep their traceback.
    """
    if {"-h", "--help"} & {*(sys.argv[1:] if argv is None else argv)}:
        parser.print_help()  # before any other option is looked at: the shell scripts pass some that may be empty
        return 0
    arguments = parser.parse_args(argv)
    from run_moefication.moefication.errors import MoEficationError, SettingError

    try:
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, about their own plans
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
        cure = "use a smaller --batch_size, another --device or fewer tokens; run again"
        return fail(parser.prog, f"out of memory: {cure}")
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


def report(writer: Any, next_step: str, missing: str = "still missing") -> None:
    """The last lines of a stage: what was written, where, and what comes next. `missing` says of parts that are not
    there who makes them."""
    if writer.was_finished:
        print(f"already finished: {writer.folder} (--overwrite redoes it)")
    elif writer.finished:
        print(f"written: {writer.folder}")
    else:
        print(f"written so far: {writer.folder} ({len(writer.missing())} of {len(writer.parts)} parts {missing})")
    if writer.finished:
        print(f"next: {next_step}")
