"""What the scripts share: settings become options, and errors become one line and exit status 2.

Nothing heavy is imported at the top: `--help` and a typo must answer at once.
"""

import argparse
import logging
import os
import re
import select
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, fields
from functools import cached_property, partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin

from .moefication.errors import MoEficationError, SettingError
from .settings import SEED, TEMPLATES, CorpusSettings

if TYPE_CHECKING:
    from .moefication.artifacts.features import Features
    from .moefication.checkpoints.dense import DenseCheckpoint
    from .moefication.storage.folder import ArtifactWriter
    from .moefication.text.corpus import Corpus

TRACEBACK = "MOEFICATION_TRACEBACK"  # if it is set in the environment, the traceback stands before the line of an error
# What helps when memory runs out, by the option that it needs.
CURES = {"batch_size": "a smaller --batch_size", "device": "another --device", "max_tokens": "fewer --max_tokens"}


# ---------------------------------------------------------------------------------------------------- options


def path(text: str) -> str:
    """The type of options that name a file or folder: an empty one (a shell variable not set) is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def path_option(help: str, **more: Any) -> dict[str, Any]:
    """An option that names a file or folder, and must be given if `more` does not say otherwise."""
    return {"type": path, "required": True, "help": help} | more


# Options that several scripts have, as argparse takes them.
MODEL = path_option("folder of the dense LLaMA checkpoint in transformers format, or a hub id")
SPLIT = path_option("folder that llama_split_clustering.py wrote")
MOE = path_option("LlamaMoE checkpoint that llama_convert.py, llama_calibrate.py or llama_distill.py wrote")
NEW_CHECKPOINT = path_option("folder of the new checkpoint itself, absent or empty")
OVERWRITE = {"action": "store_true", "help": "redo a finished stage, or one made with other options"}
DEVICE = {"help": "cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)"}
FEATURES = path_option("what stage 2 recorded, instead of --train_data_path", required=False)
SEVERAL_TEMPLATES = {
    "default": TEMPLATES[0],
    "help": "weights whose rows are the neurons, comma-separated, {} standing for the layer (gate_proj or up_proj)",
}


# ---------------------------------------------------------------------------------------------------- a stage's script


def stage_script(doc: str, settings: type, *more: Callable, **options: dict[str, Any]) -> Callable[..., Callable]:
    """Turns a function of a `Run`, which calls a stage and prints a summary, into the `main` of a script.

    Its options are the fields of `settings`, those that the functions `more` add, and `options`, by name, as argparse
    takes them. `--model_path` is there without being named, and `--overwrite` beside `--save_path`.
    """

    def build_parser() -> Parser:
        parser = new_parser(doc)
        overwrite = {"overwrite": OVERWRITE} if "save_path" in options else {}
        for name, option in ({"model_path": MODEL} | options | overwrite).items():
            parser.add_argument(f"--{name}", **option)
        for add in (partial(add_settings, settings=settings), *more):
            add(parser)
        return parser

    def script(work: Callable[[Run], None]) -> Callable[..., int]:
        def main(argv: list[str] | None = None) -> int:
            return run(build_parser(), lambda arguments: work(Run(arguments, settings)), argv)

        main.build_parser, main.settings = build_parser, settings
        return main

    return script


class Run:
    """One run of a stage's script: what its options name, checked before any model or text is opened.

    `process` is one of several only where the script has the option of `add_local_rank`; `options` holds `device` and
    `overwrite`, for the stage's function, where they are options.
    """

    def __init__(self, arguments: argparse.Namespace, settings: type):
        from .moefication.processes import Process, pick_device, this_process

        self.arguments = arguments
        self.process = this_process(arguments.local_rank) if "local_rank" in arguments else Process()
        self.options = {"overwrite": arguments.overwrite} if "overwrite" in arguments else {}
        if "device" in arguments:
            self.options["device"] = pick_device(arguments.device, self.process.local_rank)
        self.settings = settings_of(arguments, settings)

    @cached_property
    def checkpoint(self) -> "DenseCheckpoint":
        """The dense model of `--model_path`."""
        from .moefication.checkpoints.dense import DenseCheckpoint

        return DenseCheckpoint(self.arguments.model_path)

    @cached_property
    def corpus(self) -> "Corpus":
        """The text that the options of `add_corpus` and `--seed` choose, as the dense model's tokenizer cuts it."""
        from .moefication.text.corpus import training_corpus

        paths = self.arguments.train_data_path, self.arguments.train_data_cache_path
        return training_corpus(self.checkpoint, *paths, settings_of(self.arguments, CorpusSettings))

    def refuse_unread_text_options(self) -> None:
        """Refuse options that say how text is read where none is."""
        given, default = self.arguments, CorpusSettings(seed=self.arguments.seed)
        for name in (*vars(default), "batch_size", "train_data_cache_path"):
            usual = getattr(default, name, getattr(type(self.settings), name, None))
            if not given.train_data_path and getattr(given, name) != usual:
                raise SettingError(f"{name} is for train_data_path")

    def text_or_features(self, template: str) -> "Corpus | Features":
        """What a split on activations reads: a text, or what stage 2 recorded."""
        from .moefication.artifacts.features import Features

        text, features = self.arguments.train_data_path, self.arguments.hidden_features_path
        if bool(text) == bool(features):
            raise SettingError("a split on activations needs either train_data_path or hidden_features_path")
        self.refuse_unread_text_options()
        return self.corpus if text else Features(features, self.checkpoint, template)

    def print_experts(self) -> None:
        """What a split cut each MLP into."""
        settings, config = self.settings, self.checkpoint.config
        experts = f"{settings.num_experts} experts of {config.intermediate_size // settings.num_experts} neurons"
        shared = f", {settings.num_shared_experts} of them shared" if settings.num_shared_experts else ""
        print(f"{self.checkpoint.name}: {config.num_hidden_layers} layers, {experts}{shared}")

    def warn_if_not_started_together(self, what_alone: str) -> None:
        """Warn where RANK and WORLD_SIZE may be left over from another run, since torchrun did not set them."""
        if self.process.world_size > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            said = f"the environment says RANK {self.process.rank} of WORLD_SIZE {self.process.world_size}"
            cure = "`unset RANK WORLD_SIZE` if this process is to do all"
            print(f"{said}: {what_alone}; {cure}", file=sys.stderr)

    def print_mix(self) -> None:
        """The domains of the corpus: their shares, the tokens there, asked for and got, and the files counted."""
        from .moefication.text.text_files import some

        print(f"{'domain':<14} {'share':>6} {'there':>10} {'asked':>10} {'got':>10}  tokens, of files")
        for row in self.corpus.mix:
            counts = f"{row.available:>10,} {row.asked:>10,} {row.got:>10,}"
            print(f"{row.domain:<14} {row.weight:>6.1%} {counts}  {some(row.files)}")
        for row in filter(attrgetter("skipped_lines"), self.corpus.mix):
            print(f"{row.domain}: {row.skipped_lines:,} bad lines skipped")
        print(f"{self.checkpoint.name}: {self.corpus.num_tokens:,} tokens in {len(self.corpus.blocks):,} blocks")
        if any(row.got < row.asked for row in self.corpus.mix):
            least = min(self.corpus.mix, key=lambda row: row.available / row.weight)
            why = f"the text of {least.domain} ends, whose share is {least.weight:.1%}"
            print(f"fewer than --max_tokens: {why}; give it more, or other --domain_weights")

    def report(self, writer: "ArtifactWriter", next_step: str, missing: str = "still missing") -> None:
        """The last lines of a stage; `missing` says of parts that are not there who makes them."""
        if writer.was_finished:
            print(f"already finished: {writer.folder} (--overwrite redoes it)")
        elif writer.finished:
            print(f"written: {writer.folder} ({took(self.arguments)})")
        else:
            parts = f"{len(writer.missing())} of {len(writer.parts)} parts {missing}"
            print(f"written so far: {writer.folder} ({parts}) after {took(self.arguments)}")
        if writer.finished:
            print(f"next: {next_step}")


# ---------------------------------------------------------------------------------------------------- the parser


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something, and keeps the line breaks of the description."""

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
    return Parser(description=doc.strip(), formatter_class=HelpFormatter, allow_abbrev=False)


def seed_number(text: str) -> int:
    """The type of a `--seed` that belongs to no stage's settings."""
    if not text.isascii() or not text.isdigit() or not SEED.is_right(int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} {SEED.otherwise}")
    return int(text)


def add_settings(parser: Any, settings: type) -> None:
    """An option for each field of a stage's settings (see `run_moefication.settings`) that has none yet."""
    taken = {action.dest for action in parser._actions}  # argparse has no public list of them
    for one in fields(settings):
        if one.name in taken or not one.metadata["is_option"]:
            continue
        alternatives = get_args(one.type) or (one.type,)
        items = [item for kind in alternatives if get_origin(kind) is Sequence for item in get_args(kind)]
        kind = next(kind for kind in (bool, int, float, str) if kind in (*alternatives, *items))
        options = {"help": one.metadata["help"]}
        options |= {"required": True} if one.default is MISSING else {"default": one.default}
        if kind is bool:
            options |= {"action": "store_true"}
        else:
            options |= {"type": kind, "choices": one.metadata["choices"]}
            options |= {"nargs": "+"} if items else {}
        parser.add_argument(f"--{one.name}", **options)


def settings_of(arguments: argparse.Namespace, settings: type) -> Any:
    """The settings that the options give, checked."""
    given = vars(arguments)
    return settings(**{one.name: given[one.name] for one in fields(settings) if one.name in given})


def add_corpus(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options that choose text and cut it into blocks: `Run.corpus`."""
    group = parser.add_argument_group("text")
    text = (
        "folder of .jsonl, .txt or .parquet files, or .gz, .zst or .zip of the first two, named after their domains or "
        "in folders that are (other folders below it are not read); or one such file"
    )
    cache = "folder that keeps tokenised text for other runs (default: it is not kept)"
    group.add_argument("--train_data_path", **path_option(text, required=required))
    group.add_argument("--train_data_cache_path", **path_option(cache, required=False))
    add_settings(group, CorpusSettings)


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """The hidden option that the old launcher of PyTorch passes; torchrun sets LOCAL_RANK instead."""
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)


# ---------------------------------------------------------------------------------------------------- the exit status


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], argv: list[str] | None) -> int:
    """Parse, work, and turn wrong input into one line on stderr and exit status 2 (3 where a server is at fault), which
    is returned. Other exceptions are defects of ours and keep their traceback."""
    if {"-h", "--help"} & {*(sys.argv[1:] if argv is None else argv)}:
        parser.print_help()  # before any other option is looked at: the shell scripts pass some that may be empty
        return 0
    arguments = parser.parse_args(argv, argparse.Namespace(start_time=time.perf_counter()))
    try:
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning)  # libraries announce their own plans with these
        work(arguments)
    except SettingError as error:
        return fail(parser.prog, with_dashes(str(error), vars(arguments)))
    except MoEficationError as error:
        return fail(parser.prog, str(error), error.exit_status)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            return 141  # as the shell counts a process that a closed pipe ended
        what = f"{error.filename}: " if error.filename else ""
        return fail(parser.prog, f"{what}{error.strerror or error}")
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        cures = [cure for name, cure in CURES.items() if name in arguments]
        return fail(parser.prog, f"out of memory: {' or '.join(['more memory', *cures])} may help; run again")
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; run again to go on from here", file=sys.stderr)
        return 130
    return 0


def output_is_closed() -> bool:
    """Whether nobody reads the standard output any more, as after `| head`. What is left of it then goes nowhere."""
    poll = select.poll()
    poll.register(1, 0)  # errors are told in any case, and this is one
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains when it ends
    return is_closed


def took(arguments: argparse.Namespace) -> str:
    """How long it is since `run` parsed the arguments, for people."""
    from .moefication.progress import duration

    return duration(time.perf_counter() - arguments.start_time)


def with_dashes(message: str, options: Collection[str]) -> str:
    """A message that speaks of fields as the command line does: `num_experts 5` becomes `--num_experts 5`."""
    names = "|".join(sorted(options, key=len, reverse=True))
    return re.sub(rf"(?<![\w/.-])({names})(?![\w/.-])", r"--\1", message)


def fail(program: str, message: str, status: int = 2) -> int:
    """Say in one line what went wrong (after the error's traceback, if `TRACEBACK` is set); returns the exit status."""
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    return status
