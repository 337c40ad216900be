"""Which domain a file is of: by the words of its name, or else of the folders around it, and never by a part of one."""

import json
import logging
import zipfile
from pathlib import Path

import pytest
from conftest import SENTENCES, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from run_moefication import llama_split_clustering
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.text.domains import LLAMA_MIX, domains_in, find_domains, known_domain

MD5 = "0c4f0c41d5d5b21bc4e1c4b1d7c4a9e2"  # with c4 in it
UUID = "c4c4c4c4-00c4-4bc4-9c4a-0123456789ab"


def make_text(folder: Path, *names: str) -> None:
    for name in names:
        write_jsonl(folder / f"{name}.jsonl", [f"{name}: {sentence}" for sentence in SENTENCES])


def found_in(folder: Path, weights: dict[str, float] | None = None) -> dict[str, list[str]]:
    """The files of each domain, by their place in the folder."""
    return {
        domain: sorted(str(file).removeprefix(f"{folder}/") for file in files)
        for domain, files in find_domains(folder, weights).items()
    }


NAMES = {
    "c4": ["c4.jsonl", "c4-train.00000-of-01024.json.gz", "c4-de.jsonl"],
    # The third is RedPajama's sample.
    "commoncrawl": ["common_crawl", "CommonCrawl.zip", "cc_2019-30_sample.jsonl", "CC-MAIN-2023-14"],
    "stackexchange": ["stack-exchange.txt", "stackexchange_sample.jsonl", "RedPajamaStackExchange"],
    "book": ["Books3.jsonl"],
    "github": ["my_GitHub-part1.jsonl", "github2.jsonl"],
    "wikipedia": ["wiki.jsonl", "enwiki-20220301-pages.jsonl.zst"],
    "arxiv": [f"arxiv_{UUID}.jsonl"],
    None: [
        *(f"filtered_{MD5}.sampled.jsonl", f"{UUID}.jsonl", "c4b1d7c4.jsonl"),
        *("part-00000-c4-aa-bb.jsonl", "f3-c4-aa.jsonl"),  # checksums in pieces
        *("facebook_comments.jsonl", "wikibooks.jsonl", "rustc4all.jsonl", "part-c-4.jsonl", "c42.jsonl"),
        *("cc_by_sa.jsonl", "2019-30"),
    ],
}


@pytest.mark.parametrize("domain", NAMES)
def test_a_domain_is_a_word_of_a_name(domain):
    for name in NAMES[domain]:
        assert domains_in(name) == ([domain] if domain else []), name


@given(st.binary(min_size=16, max_size=32))
def test_no_checksum_speaks_of_a_domain(checksum):
    assert domains_in(f"filtered_{checksum.hex()}.sampled.jsonl") == []


def test_every_domain_is_known_by_its_own_name(tmp_path):
    assert [known_domain(name) for name in LLAMA_MIX] == list(LLAMA_MIX)
    assert known_domain("Stack Exchange") == "stackexchange"
    make_text(tmp_path, "c4", "my notes")
    assert found_in(tmp_path, {"mynotes": 1.0}) == {"mynotes": ["my notes.jsonl"]}  # weights choose what is read


@pytest.mark.parametrize(
    ("names", "weights", "words"),
    [
        (["c4", "other"], None, "other.jsonl names none of the domains"),
        (["c4_github"], None, "c4_github.jsonl names several domains (c4, github)"),
        (["c4"], {"c4": 1.0, "github": 1.0}, "domain_weights names github"),
        ([], None, "holds no .jsonl, .txt"),
    ],
)
def test_unclear_domains_are_refused(names, weights, words, tmp_path):
    make_text(tmp_path, *names)
    with pytest.raises(MoEficationError) as error:
        find_domains(tmp_path, weights)
    assert words in str(error.value)


# Each file and its domain; None is not read.
LAYOUTS = {
    "RedPajama's own": {
        f"github/filtered_{MD5}.sampled.jsonl": "github",
        "github/filtered_d41d8cd98f00b204e9800998ecf8427e.sampled.jsonl": "github",
        "common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl": "commoncrawl",
        "common_crawl/2020-05/en_middle_0001.json.gz.dedup.classifier.jsonl": "commoncrawl",
        f"arxiv/arxiv_{UUID}.jsonl": "arxiv",
        "c4/c4-train.00000-of-01024.jsonl": "c4",
        "c4/heldout/c4-train.00001-of-01024.jsonl": None,
        "heldout/c4.jsonl": None,
    },
    "a file's own name before its folder's": {
        "github/wiki_of_a_project.jsonl": "wikipedia",
        f"github/3f/3f{MD5}.jsonl": "github",
        f"github/c4/c4{MD5}.jsonl": "github",
    },
    "a name of two domains, decided by its folder": {
        "stackexchange/books.stackexchange.com.jsonl": "stackexchange",
        "c4.jsonl": "c4",
        "github-wiki-notes/README.md": None,  # a folder without text, whose name does not matter
    },
    "no domain at all": {"a.jsonl": "text", "b.jsonl": "text"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_is_read_by_domains(name, tmp_path):
    for file in LAYOUTS[name]:
        write_jsonl(tmp_path / file, SENTENCES)
    domains = {domain: [] for domain in LAYOUTS[name].values() if domain}
    for file, domain in sorted(LAYOUTS[name].items()):
        domains.get(domain, []).append(file)
    assert found_in(tmp_path) == domains


def test_a_members_own_name_goes_before_its_zips(tmp_path):
    with zipfile.ZipFile(tmp_path / "c4.zip", "w") as archive:
        archive.writestr("arxiv/a.jsonl", json.dumps({"text": "x"}))
        archive.writestr("b.jsonl", json.dumps({"text": "y"}))
    assert found_in(tmp_path) == {"arxiv": ["c4.zip/arxiv/a.jsonl"], "c4": ["c4.zip/b.jsonl"]}


def test_a_store_of_folders_named_after_checksums_is_no_data(tmp_path):
    for name in ("3f", "c4", "c5"):
        make_text(tmp_path / name, f"{name}{MD5}")
    with pytest.raises(MoEficationError, match=r"holds no .jsonl.* not read: 3f/, c4/, c5/ \(name it after a domain"):
        find_domains(tmp_path)


def test_links_that_lead_in_a_circle_are_followed_once(tmp_path):
    make_text(tmp_path / "book" / "one", "a")
    (tmp_path / "book" / "one" / "again").symlink_to(tmp_path / "book")
    assert found_in(tmp_path) == {"book": ["book/one/a.jsonl"]}


def test_the_table_names_the_files_counted_for_each_domain(tiny_llama, tmp_path, run_script):
    make_text(tmp_path / "text", "c4")
    make_text(tmp_path / "text" / "github", f"filtered_{MD5}", "b", "c", "d")
    arguments = ["--model_path", tiny_llama, "--save_path", tmp_path / "out", "--num_experts", 4, "--block_size", 16]
    activations = ["--cluster_on", "activations", "--train_data_path", tmp_path / "text"]
    status, out, _ = run_script(llama_split_clustering.main, *arguments, *activations)
    assert status == 0
    assert "  c4.jsonl\n" in out
    assert "  github/b.jsonl, github/c.jsonl, github/d.jsonl and 1 more\n" in out


def test_a_zip_that_lies_unpacked_beside_is_read_once(tmp_path, caplog):
    for name in ("wikipedia", "notes"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for part in "ab":
                archive.writestr(f"wikipedia_{part}.jsonl", json.dumps({"text": f"zipped {part}"}))
    make_text(tmp_path / "wikipedia", "wikipedia_a")
    make_text(tmp_path / "notes", "wikipedia_a")  # is not read, since it names no domain
    files = ["notes.zip/wikipedia_a.jsonl", "notes.zip/wikipedia_b.jsonl", "wikipedia.zip/wikipedia_b.jsonl"]
    with caplog.at_level(logging.WARNING):
        assert sorted(found_in(tmp_path)["wikipedia"]) == [*files, "wikipedia/wikipedia_a.jsonl"]
    assert "wikipedia.zip/wikipedia_a.jsonl (the folder beside the zip is read for it)" in caplog.text


def test_data_that_is_not_read_is_said_in_one_line(tmp_path, caplog, monkeypatch):
    make_text(tmp_path, "c4", "github")
    make_text(tmp_path / "extra" / "chunk1", "book")
    make_text(tmp_path / "heldout", "c4")
    (tmp_path / "arxiv.jsonl").symlink_to("nowhere")
    with zipfile.ZipFile(tmp_path / "github.zip", "w") as archive:
        archive.writestr("a.jsonl", json.dumps({"text": "x"}))
        archive.writestr("b.jsonl.xz", "x")
    for name in ("wiki.jsonl.xz", "book.jsonl.bz2", "notes.csv", "wiki.doc", "arxiv.parquet", "README.md", ".a.xz"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr("run_moefication.moefication.text.text_files.reads_parquet", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert sorted(find_domains(tmp_path)) == ["c4", "github"]
    (line,) = caplog.messages
    assert line == (
        f"{tmp_path}: not read: arxiv.jsonl (its link leads nowhere); "
        "arxiv.parquet (pip install datasets, with which it is read); "
        "book.jsonl.bz2, wiki.jsonl.xz (unpack it); github.zip/b.jsonl.xz (unpack the zip); "
        'notes.csv (write it as .jsonl, with a "text" in each line); '
        "wiki.doc (if it is text, let its name end in .txt or .jsonl); "
        "github.zip (github.jsonl is read for it); "
        "extra/ (name it after a domain to have it read)"
    )


def test_a_folder_or_file_of_nothing_else_names_the_cure(tmp_path):
    (tmp_path / "c4.jsonl.xz").write_bytes(b"x")
    with pytest.raises(MoEficationError, match=r"makes some; not read: c4.jsonl.xz \(unpack it\)"):
        find_domains(tmp_path)
    with pytest.raises(MoEficationError, match=r"c4.jsonl.xz is not read: unpack it"):
        find_domains(tmp_path / "c4.jsonl.xz")
