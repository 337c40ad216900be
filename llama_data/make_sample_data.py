"""Make a small set of pretraining-like text, one jsonl file per domain, from pinned packages of the registry.

    python llama_data/make_sample_data.py

Writes DOMAIN.jsonl, and heldout/DOMAIN.jsonl with about a fifth of the documents, which are never training text. Every
run gives the same bytes. Exit status: 2 for a wrong argument or a full disk, 3 where the registry cannot be reached.
"""

import argparse
import contextlib
import hashlib
import html
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_download.registry import Wheel, exit_status, fetch_wheel, file_sha256

VERSION = 1  # raise it when the same packages give other text, so that folders made before are made anew
REPOSITORY = Path(__file__).resolve().parents[1]
MANIFEST = "manifest.json"
HELD_OUT_ONE_IN = 5
SHORTEST_ARTICLE = 200  # characters; below lie stubs that hold a title and nothing else
# Also in the test set of WikiText-2, on which models are evaluated.
WIKITEXT2_TEST_TITLES = {"Du Fu", "Olmec colossal heads", "Nero", "Manila"}


def split_lines(text: str) -> Iterator[str]:
    """One document per line."""
    yield from text.split("\n")


def split_marked_files(text: str) -> Iterator[str]:
    """The files between `// ===== BEGIN language` and `// ===== END`; text outside has no known borders."""
    for match in re.finditer(r"^// ===== BEGIN [^\n]*\n(.*?)^// ===== END ", text, re.DOTALL | re.MULTILINE):
        yield match[1].strip("\n")


def split_wikipedia(text: str) -> Iterator[str]:
    """The articles of a WikiExtractor dump, each beginning with its title."""
    for match in re.finditer(r'^<doc [^\n]*title="([^\n]*)">\n(.*?)\n</doc>$', text, re.DOTALL | re.MULTILINE):
        title, article = html.unescape(match[1]), html.unescape(match[2]).strip()
        if len(article) > SHORTEST_ARTICLE and title not in WIKITEXT2_TEST_TITLES:
            yield article


@dataclass(frozen=True)
class Source:
    """One file of a package, the domain that its text belongs to, and how it falls into documents."""

    domain: str
    wheel: Wheel
    member: str
    split: Callable[[str], Iterator[str]]
    licence: str

    @property
    def name(self) -> str:
        return f"PyPI {self.wheel.requirement} {self.member}"


EXLLAMAV3 = Wheel("exllamav3", "1.6.5", "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded")
CALIBRATION = "exllamav3/conversion/standard_cal_data"
SOURCES = (
    Source("c4", EXLLAMAV3, f"{CALIBRATION}/c4.utf8", split_lines, "ODC-BY"),
    Source("github", EXLLAMAV3, f"{CALIBRATION}/code.utf8", split_marked_files, "mixed, unstated"),
    Source("wikipedia", EXLLAMAV3, f"{CALIBRATION}/wiki.utf8", split_wikipedia, "CC BY-SA"),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=REPOSITORY / "llama_data",
        help="folder of the jsonl files (default: llama_data in this project)",
    )
    parser.add_argument(
        "--cache_dir",
        type=Path,
        default=REPOSITORY / ".cache" / "wheels",
        help="folder that keeps the downloaded wheels (default: .cache/wheels in this project)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and write the sample data; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(lambda: make(args.output_dir, args.cache_dir), parser.prog)


def make(output_dir: Path, cache_dir: Path) -> None:
    """Write the sample data to `output_dir` unless it is there already."""
    manifest = read_manifest(output_dir)
    if is_complete(output_dir, manifest):
        print(f"{output_dir} holds the sample data already, unchanged: nothing to do")
        return
    files = {name: encode(documents) for name, documents in collect_documents(SOURCES, cache_dir).items()}
    refuse_foreign_files(output_dir, files, manifest)
    manifest = describe(files)
    # The manifest goes last: it says that all the others are there.
    files[MANIFEST] = (json.dumps(manifest, indent=2) + "\n").encode()
    write_files(output_dir, files)
    print(table(manifest))
    print(f"Wrote the sample data to {output_dir}")
    print(f"Next: python run_moefication/llama_get_hidden_features.py --train_data_path '{output_dir}' ...")


def collect_documents(sources: Iterable[Source], cache_dir: Path) -> dict[str, list[dict[str, str]]]:
    """The documents of every file to write, keyed by its path in the output folder; exact duplicates dropped."""
    files: dict[str, list[dict[str, str]]] = {}
    seen = set()
    for source in sources:
        with zipfile.ZipFile(fetch_wheel(source.wheel, cache_dir)) as archive:
            text = archive.read(source.member).decode("utf-8")
        for document in source.split(text):
            digest = hashlib.sha256(document.encode()).digest()
            if not document.strip() or digest in seen:
                continue
            seen.add(digest)
            # By the text itself, so that a document stays on its side whatever is added around it.
            held_out = int.from_bytes(digest[:8]) % HELD_OUT_ONE_IN == 0
            path = f"heldout/{source.domain}.jsonl" if held_out else f"{source.domain}.jsonl"
            files.setdefault(path, []).append(
                {"text": document, "domain": source.domain, "source": source.name, "licence": source.licence}
            )
    return files


def encode(documents: list[dict[str, str]]) -> bytes:
    """The jsonl file of the documents."""
    return "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents).encode()


def describe(files: dict[str, bytes]) -> dict:
    """The manifest of the files: what they hold, from where, under which licence."""
    entries = {}
    for path, content in sorted(files.items()):
        documents = [json.loads(line) for line in content.decode().split("\n") if line]
        entries[path] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "documents": len(documents),
            "characters": sum(len(document["text"]) for document in documents),
            "bytes": len(content),
            "licences": sorted({document["licence"] for document in documents}),
        }
    return {"version": VERSION, "sources": [source.name for source in SOURCES], "files": entries}


def read_manifest(output_dir: Path) -> dict:
    """The folder's manifest; an empty one where there is none. Raises ValueError where it is not ours."""
    path = output_dir / MANIFEST
    if not path.exists():
        return {"files": {}}
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(entry["sha256"], str) for entry in manifest["files"].values()):
            return manifest
    raise ValueError(f"{path} is not a manifest of this script: move it away")


def is_complete(output_dir: Path, manifest: dict) -> bool:
    """Whether the folder holds what this version of the script writes, unchanged."""
    return (
        manifest.get("version") == VERSION
        and manifest.get("sources") == [source.name for source in SOURCES]
        and all(
            (output_dir / path).is_file() and file_sha256(output_dir / path) == entry["sha256"]
            for path, entry in manifest["files"].items()
        )
    )


def refuse_foreign_files(output_dir: Path, files: dict[str, bytes], manifest: dict) -> None:
    """Raise ValueError where a file to write exists and holds neither the new content nor what an older run wrote."""
    for name, content in files.items():
        path = output_dir / name
        ours = {hashlib.sha256(content).hexdigest(), manifest["files"].get(name, {}).get("sha256")}
        if path.exists() and not (path.is_file() and file_sha256(path) in ours):
            raise ValueError(f"{path} was not made by this script, or was changed since: move it away")


def write_files(output_dir: Path, files: dict[str, bytes]) -> None:
    """Write the files in their order, each complete under its name or absent."""
    from run_moefication.moefication.files import write_atomically  # brings torch in, which takes its time

    for name, content in files.items():
        write_atomically(output_dir / name, lambda file, content=content: file.write(content))


def table(manifest: dict) -> str:
    """Documents, characters and bytes of each file, and of all together."""
    columns = ("documents", "characters", "bytes")
    rows = [(path, *(entry[column] for column in columns)) for path, entry in manifest["files"].items()]
    rows.append(("total", *(sum(row[i] for row in rows) for i in range(1, 4))))
    lines = [f"{'file':<26}" + "".join(f"{column:>12}" for column in columns)]
    lines += [f"{row[0]:<26}" + "".join(f"{number:>12,}" for number in row[1:]) for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
