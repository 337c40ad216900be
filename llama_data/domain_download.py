"""Reads a dataset record by record and writes its texts to one file per domain, for download_redpajama.py."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from run_moefication.moefication.errors import MoEficationError, NetworkError
from run_moefication.moefication.progress import Progress
from run_moefication.moefication.storage.files import file_sha256, write_json

# A sample of SlimPajama, which is RedPajama deduplicated: 14 GB of parquet, 6 billion tokens, domains shuffled.
DEFAULT_DATASET = "DKYoon/SlimPajama-6B"
# Each domain's name there, and what the cards of RedPajama and SlimPajama say of the licence of its texts.
DOMAINS = {
    "commoncrawl": ("RedPajamaCommonCrawl", "Common Crawl terms of use"),
    "c4": ("RedPajamaC4", "ODC-BY, Common Crawl terms of use"),
    "github": ("RedPajamaGithub", "MIT, BSD or Apache, by repository"),
    "wikipedia": ("RedPajamaWikipedia", "CC BY-SA"),
    "books": ("RedPajamaBook", "as the_pile_books3 (none stated, books in copyright) and pg19"),
    "arxiv": ("RedPajamaArXiv", "arXiv terms of use, by paper"),
    "stackexchange": ("RedPajamaStackExchange", "CC BY-SA"),
}
PART = ".redpajama.part"  # folder of what is not complete
STATE = f"{PART}/state.json"  # what an interrupted run goes on from
HELD_OUT_ONE_IN = 20
COMMIT_EVERY = 1000  # records between two points from which a later run can go on
LOOK_AHEAD = 10_000  # records after which a dataset that gave no document is given up
NETWORK_RETRIES = 5  # per read, half a minute each


@contextlib.contextmanager
def reading(dataset: str) -> Iterator[None]:
    """Turn whatever reading a dataset raises into one line: MoEficationError for the data, else NetworkError."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    of_data = (ValueError, TypeError, LookupError, ImportError, FileNotFoundError, DatasetsError)
    of_network = (OSError, HfHubHTTPError.__bases__[0])  # the HTTP client's own errors among them
    try:
        yield
    except RepositoryNotFoundError as error:
        raise MoEficationError(
            f"--dataset {dataset}: not on the hub, or only for those who log in (hf auth login)"
        ) from error
    except (*of_data, *of_network) as error:
        sentence = f"--dataset {dataset}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        if Path(dataset).is_dir() or isinstance(error, of_data):
            raise MoEficationError(sentence) from error
        raise NetworkError(f"{sentence}; run the same command again to go on") from error


def open_streams(options: dict[str, Any], revision: str | None) -> list[tuple[Any, str | None]]:
    """What to read one after the other: a stream of records and its domain, None where each record names its own.
    Code that a dataset brings is never run."""
    import datasets

    datasets.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = NETWORK_RETRIES
    for name in ("datasets.packaged_modules", "huggingface_hub"):  # the first logs what it raises, the other each try
        logging.getLogger(name).setLevel(logging.CRITICAL)
    places, streams = (options["config"], options["data_dir"]), []
    choice = {"split": options["split"], "revision": revision, "streaming": True}
    for domain, name in options["domain_names"].items() if "{}" in str(places) else [(None, "")]:
        config, data_dir = (place and place.replace("{}", name) for place in places)
        with reading(options["dataset"]):
            streams.append((datasets.load_dataset(options["dataset"], config, data_dir=data_dir, **choice), domain))
    return streams


def value_at(record: Any, field: str) -> Any:
    """The value of a field such as `meta.redpajama_set_name`; None where there is none."""
    for key in field.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def new_state(options: dict[str, Any]) -> dict[str, Any]:
    """The state of a download that has read nothing; a dataset of the hub is held at its present commit."""
    revision, domains = None, options["domain_names"]
    if not Path(options["dataset"]).is_dir():
        from huggingface_hub import HfApi

        with reading(options["dataset"]):
            revision = HfApi().dataset_info(options["dataset"]).sha
    names = [f"{folder}{domain}.jsonl" for domain in domains for folder in ("", "heldout/")]
    return {
        "options": options,
        "revision": revision,
        "stream": 0,  # which one is being read
        "position": None,  # where in it, as `datasets` says it
        "records": 0,  # read so far, in all streams
        "skipped": dict.fromkeys(domains, 0),
        "files": {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in names},
        "finished": False,
    }


class Download:
    """Partial files, and the state beside them. What is written depends on the records alone: after an interruption a
    later run cuts the files back to their lengths at the last commit and reads on from the record after it."""

    def __init__(self, folder: Path, state: dict[str, Any], count_tokens: Callable[[str], int]):
        self.folder, self.state, self.count_tokens = folder, state, count_tokens
        self.options, self.tallies = state["options"], state["files"]
        self.domain_of = {name: domain for domain, name in self.options["domain_names"].items()}
        self.record: Any = None  # the last one read

    def run(self) -> None:
        """Read until every domain has its tokens or the dataset ends; then the state says that it is finished."""
        streams = open_streams(self.options, self.state["revision"])
        total = self.options["tokens_per_domain"] * len(self.domain_of)
        done = sum(tally["tokens"] for name, tally in self.tallies.items() if "/" not in name)
        with contextlib.ExitStack() as stack:
            bar = Progress(desc="download text", total=total, initial=done, unit=" tokens", unit_scale=True)
            self.bar = stack.enter_context(bar)
            self.files = {name: stack.enter_context(self.open_part(name)) for name in self.tallies}
            self.commit()
            while self.state["stream"] < len(streams):
                self.read(*streams[self.state["stream"]])
                self.state |= {"stream": self.state["stream"] + 1, "position": None}
                self.commit()
            self.refuse_no_documents()
        for name, tally in self.tallies.items():
            tally["sha256"] = file_sha256(self.folder / PART / name)
        self.state["finished"] = True
        write_json(self.folder / STATE, self.state)

    def open_part(self, name: str) -> BinaryIO:
        """A partial file, cut back to its length at the last commit."""
        path, length = self.folder / PART / name, self.tallies[name]["bytes"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if length > (path.stat().st_size if path.exists() else 0):
            raise MoEficationError(f"{path} is shorter than it was left: start anew with --overwrite")
        file = path.open("ab")
        file.truncate(length)
        return file

    def commit(self) -> None:
        """Put everything so far on the disk, and after it the state that says how much it is."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self.folder / STATE, self.state)

    def read(self, stream: Any, domain: str | None) -> None:
        """Take records of a stream, from its position on, until the domains in it have their tokens."""
        if self.state["position"] is not None:
            stream.load_state_dict(self.state["position"])
        iterator, label_field = iter(stream), self.options["label_field"]
        while any(map(self.wants, [domain] if domain else self.domain_of.values())):
            with reading(self.options["dataset"]):
                record = next(iterator, None)
            if record is None:
                return
            self.record = record
            home = domain or self.domain_of.get(str(value_at(record, label_field)))
            if home and self.wants(home):
                self.take(home, value_at(record, self.options["text_field"]))
            self.state["records"] += 1
            if self.state["records"] % COMMIT_EVERY == 0:
                self.state["position"] = stream.state_dict()
                self.commit()
            if self.state["records"] == LOOK_AHEAD:
                self.refuse_no_documents()

    def wants(self, domain: str) -> bool:
        """Whether the domain lacks training tokens."""
        return self.tallies[f"{domain}.jsonl"]["tokens"] < self.options["tokens_per_domain"]

    def take(self, domain: str, text: Any) -> None:
        """Write as much of a text as there is room for; its hash says whether it is held out."""
        try:
            content = text.strip() and text.encode()
        except (AttributeError, UnicodeEncodeError):  # no text, or with a lone surrogate, which no file can hold
            content = b""
        if not content:
            self.state["skipped"][domain] += 1
            return
        # By the whole text, so that the same text is never on both sides.
        held_out = int.from_bytes(hashlib.sha256(content).digest()[:8]) % HELD_OUT_ONE_IN == 0
        name, room = f"{domain}.jsonl", self.options["tokens_per_domain"]
        if held_out:
            name, room = f"heldout/{name}", max(1, room // HELD_OUT_ONE_IN)
        tally = self.tallies[name]
        if tally["tokens"] >= room:
            return
        text, tokens = self.cut(text, room - tally["tokens"])
        dataset, revision = self.options["dataset"], self.state["revision"]
        document = {
            "text": text,
            "domain": domain,
            "source": f"{dataset}{'@' + revision if revision else ''} {self.options['domain_names'][domain]}",
            "licence": DOMAINS[domain][1] if dataset == DEFAULT_DATASET else "see the dataset",
        }
        line = json.dumps(document, ensure_ascii=False).encode() + b"\n"
        self.files[name].write(line)
        tally["documents"] += 1
        tally["tokens"] += tokens
        tally["bytes"] += len(line)
        self.bar.update(0 if held_out else tokens)

    def cut(self, text: str, room: int) -> tuple[str, int]:
        """The text and its tokens. A text of more than `room` tokens is cut to that many, or very few more."""
        tokens = self.count_tokens(text)
        if tokens <= room:
            return text, tokens
        end = len(text) * room // tokens
        while (tokens := self.count_tokens(text[:end])) < room:
            end += 1 + end // 100
        return text[:end], tokens

    def refuse_no_documents(self) -> None:
        """Raise MoEficationError, and leave nothing, where no record so far gave a document."""
        if any(tally["documents"] for tally in self.tallies.values()):
            return
        shutil.rmtree(self.folder / PART)
        fields = f"a text in {self.options['text_field']!r} and a domain ({', '.join(self.domain_of)})"
        raise MoEficationError(
            f"--dataset {self.options['dataset']}: none of {self.state['records']} records has {fields} in "
            f"{self.options['label_field']!r}; the last one: {str(self.record)[:200]}"
        )
