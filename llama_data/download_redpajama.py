"""Get text of LLaMA's seven pretraining domains, one jsonl file per domain, streamed from a dataset of the hub.

    pip install datasets zstandard
    python llama_data/download_redpajama.py --tokens_per_domain 100000
    python llama_data/download_redpajama.py --tokens_per_domain 1000000 --model_path .cache/SmolLM2-135M-Instruct

Writes DOMAIN.jsonl, and heldout/DOMAIN.jsonl with about a twentieth of the documents, which are never training text.
An interrupted download goes on where it was when the same command is given again, and ends in the same bytes. Exit
status: 2 for a wrong argument, unreadable data or a full disk, 3 where the network fails.

Other datasets, in either of two shapes: a field that names each record's domain (the default), or a folder or
configuration for each domain, `{}` standing for what --domain_names calls it:

    --dataset MBZUAI-LLM/SlimPajama-627B-DC --data_dir 'train/{}'
    --dataset my_folder --config '{}' --domain_names c4=web,github=code
"""

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_data.domain_download import DEFAULT_DATASET, DOMAINS, PART, STATE, Download, new_state
from llama_data.own_files import old_names, read_record, refuse_foreign_files
from run_moefication.command_line import new_parser, run
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.storage.files import write_json

MANIFEST = "redpajama.json"
CHARACTERS_PER_TOKEN = 4  # where no tokenizer counts


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path(__file__).resolve().parent, help="folder of the files")
    cut = "training tokens of each domain, whose last document is cut there"
    add("--tokens_per_domain", type=int, default=1_000_000, help=cut)
    counts = "folder of a checkpoint whose tokenizer counts the tokens (default: none; 4 characters count as a token)"
    add("--model_path", type=Path, help=counts)
    add("--overwrite", action="store_true", help="start anew; the old files go when the new ones are complete")
    add = parser.add_argument_group("the dataset").add_argument
    add("--dataset", default=DEFAULT_DATASET, help="hub id or local folder")
    add("--config", help="its configuration, with {} one for each domain (default: its only one)")
    add("--data_dir", help="folder in it, with {} one for each domain (default: all of it)")
    add("--split", default="train", help="its split")
    add("--text_field", default="text", help="field of a record that holds the text")
    label = "field of a record that names its domain, unused with {}"
    add("--label_field", default="meta.redpajama_set_name", help=label)
    names = ",".join(f"{domain}={name}" for domain, (name, _) in DOMAINS.items())
    add("--domain_names", default=names, help="the domains to get, and their names there")
    return run(parser, download, argv)


def download(args: argparse.Namespace) -> None:
    """Bring the folder to what the options ask for, from whatever an earlier run left there."""
    if importlib.util.find_spec("datasets") is None:
        raise MoEficationError("datasets is not installed: pip install datasets zstandard")
    options, folder = collect_options(args), args.output_dir
    state, manifest = (read_record(folder / name, "options") for name in (STATE, MANIFEST))
    names = {name for record in (state, manifest) if record for name in record["files"]}
    for pattern in (f"{side}{domain}.*" for domain in options["domain_names"] for side in ("", "heldout/")):
        names |= {path.relative_to(folder).as_posix() for path in folder.glob(pattern)}
    refuse_foreign_files(folder, names, (state, manifest))
    if state and state["finished"]:  # interrupted while the files got their names
        state, manifest = None, publish(folder, state, manifest)
    if args.overwrite:
        if state:
            shutil.rmtree(folder / PART)
        state = None
    elif state or manifest:
        refuse_other_options(folder, state or manifest, options)
        if not state:
            print(f"{folder} holds this download already, unchanged: nothing to do")
            return
    count_tokens = token_counter(args.model_path)
    state = state or new_state(options)
    Download(folder, state, count_tokens).run()
    print(table(publish(folder, state, manifest)))
    print(f"Wrote the text to {folder}")
    print(f"Next: python run_moefication/llama_get_hidden_features.py --train_data_path '{folder}' ...")


def collect_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what is written, checked, by their names on the command line."""
    if args.tokens_per_domain < 1:
        raise MoEficationError(f"--tokens_per_domain {args.tokens_per_domain} must be at least 1")
    not_content = ("output_dir", "overwrite", "start_time")
    options = {name: value for name, value in vars(args).items() if name not in not_content}
    if Path(args.dataset).is_dir():
        options["dataset"] = str(Path(args.dataset).resolve())
    elif args.dataset.startswith((".", "/", "~")) or args.dataset.count("/") > 1:
        raise MoEficationError(f"--dataset {args.dataset} is not a folder")
    options["model_path"] = args.model_path and str(args.model_path.resolve())
    options["domain_names"] = names = {}
    for item in args.domain_names.split(","):
        domain, _, name = (part.strip() for part in item.partition("="))
        if domain not in DOMAINS or not name or domain in names or name in names.values():
            raise MoEficationError(f"--domain_names: {item!r} is not domain=name, each once, of {', '.join(DOMAINS)}")
        names[domain] = name
    return options


def refuse_other_options(folder: Path, record: dict[str, Any], options: dict[str, Any]) -> None:
    """Raise MoEficationError where the folder holds a download with other options, or one that has lost a file."""
    others = [f"--{name}" for name, value in options.items() if record["options"].get(name) != value]
    if others:
        raise MoEficationError(f"{folder} holds a download with another {', '.join(others)}: --overwrite replaces it")
    missing = [name for name in record["files"] if "position" not in record and not (folder / name).exists()]
    if missing:
        raise MoEficationError(f"{folder / missing[0]} is missing: --overwrite downloads everything again")


def publish(folder: Path, state: dict[str, Any], manifest: dict[str, Any] | None) -> dict[str, Any]:
    """Give the complete files their names, in place of those of the manifest before; returns the new manifest.
    Interrupted, it can be called again. Files without a document are left out: no stage could read them."""
    files = {name: tally for name, tally in state["files"].items() if tally["documents"]}
    for name in files:
        if (folder / PART / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(folder / PART / name, folder / name)
    for name in old_names(folder, manifest, files):
        (folder / name).unlink(missing_ok=True)
    manifest = {key: state[key] for key in ("options", "revision", "records", "skipped")} | {"files": files}
    write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / PART)
    return manifest


def token_counter(model_path: Path | None) -> Callable[[str], int]:
    """The function that counts the tokens of a text."""
    if model_path is None:
        return lambda text: -(-len(text) // CHARACTERS_PER_TOKEN)
    from run_moefication.moefication.text.tokens import encode, load_tokenizer

    tokenizer = load_tokenizer(model_path)
    return lambda text: len(encode([text], tokenizer)[0])


def table(manifest: dict[str, Any]) -> str:
    """Tokens asked for and got of each domain, and what else was found."""
    options, files = manifest["options"], manifest["files"]
    asked, about = options["tokens_per_domain"], "" if options["model_path"] else "about "
    lines = [f"{'domain':<14}{'asked':>14}{about + 'got':>14}{'documents':>12}{'held out':>12}{'bad records':>13}"]
    nothing = {"documents": 0, "tokens": 0}
    for domain in options["domain_names"]:
        train, held_out = (files.get(f"{folder}{domain}.jsonl", nothing) for folder in ("", "heldout/"))
        numbers = f"{asked:>14,}{train['tokens']:>14,}{train['documents']:>12,}{held_out['documents']:>12,}"
        short = "" if train["tokens"] >= asked else "  the dataset has " + ("no more" if train["tokens"] else "none")
        lines.append(f"{domain:<14}{numbers}{manifest['skipped'][domain]:>13,}{short}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
