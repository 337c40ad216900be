"""Streaming a dataset into one file per domain: real `datasets`, on small datasets of every shape it can have."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SENTENCES, make_tokenizer, write_jsonl
from local_server import LocalServer, Reply
from pipeline import contents, renames

pytest.importorskip("datasets")
zstandard = pytest.importorskip("zstandard")

from llama_data import domain_download, download_redpajama  # noqa: E402
from llama_data.domain_download import DOMAINS  # noqa: E402
from llama_data.download_redpajama import main  # noqa: E402

SCRIPT = Path(download_redpajama.__file__)
NAMES = {domain: name for domain, (name, _) in DOMAINS.items()}
PER_DOMAIN = 45
EVERYTHING = 10**9
COMMIT = "c0ffee" + "0" * 34


def make_texts(per_domain: int = PER_DOMAIN) -> dict[str, list[str]]:
    """Distinct texts of each domain."""
    return {
        domain: [f"{domain} {i}. " + SENTENCES[i % 6] * (1 + i % 3) for i in range(per_domain)] for domain in DOMAINS
    }


def labelled(texts: dict[str, list[str]]) -> list[dict]:
    """The records of one dataset with all domains in turn, and one of a domain that nobody asks for."""
    turns = [zip(NAMES.values(), turn, strict=True) for turn in itertools.zip_longest(*texts.values())]
    records = [("RedPajamaOther", "tiny"), *((name, text) for turn in turns for name, text in turn if text)]
    return [{"text": text, "meta": {"redpajama_set_name": name}} for name, text in records]


def make_labelled(folder: Path, texts: dict[str, list[str]]) -> Path:
    """A dataset as SlimPajama-6B is: parquet files of several row groups, the domain in a field."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = labelled(texts)
    (folder / "data").mkdir(parents=True)
    for shard, part in enumerate((records[:150], records[150:])):
        path = folder / "data" / f"train-0000{shard}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part), path, row_group_size=40)
    return folder


def make_folders(folder: Path, texts: dict[str, list[str]]) -> Path:
    """A dataset as SlimPajama-627B-DC is: a folder of jsonl.zst for each domain."""
    for domain, documents in texts.items():
        for shard, part in enumerate((documents[:20], documents[20:])):
            path = folder / "train" / NAMES[domain] / f"chunk_{shard}.jsonl.zst"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"text": text}) + "\n" for text in part]
            path.write_bytes(zstandard.compress("".join(lines).encode()))
    return folder


def make_configs(folder: Path, texts: dict[str, list[str]]) -> Path:
    """A dataset with a configuration for each domain, of plain jsonl."""
    card = "---\nconfigs:\n"
    for domain, documents in texts.items():
        write_jsonl(folder / domain / "part.jsonl", documents)
        card += f"- config_name: {NAMES[domain]}\n  data_files:\n  - split: train\n    path: {domain}/*.jsonl\n"
    (folder / "README.md").write_text(card + "---\n")
    return folder


SHAPES = {
    "label": (make_labelled, []),
    "folders": (make_folders, ["--data_dir", "train/{}"]),
    "configs": (make_configs, ["--config", "{}"]),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """The dataset of make_texts() with labels, shared and read-only."""
    return make_labelled(tmp_path_factory.mktemp("dataset"), make_texts())


@pytest.fixture
def often(monkeypatch) -> None:
    """Commits every 40 records, so that the small dataset has several."""
    monkeypatch.setattr(domain_download, "COMMIT_EVERY", 40)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().decode().split("\n") if line]


def texts_of(path: Path) -> list[str]:
    return [document["text"] for document in read(path)]


def is_held_out(text: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) % 20 == 0


def one_line(result: tuple[int, str, str], status: int = 2) -> str:
    """The message of a run that ended with this status and one line on stderr."""
    assert (result[0], result[1], result[2].count("\n")) == (status, "", 1), result
    return result[2]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_document_of_every_domain(shape, tmp_path, run_script, often):
    make, options = SHAPES[shape]
    texts = make_texts()
    folder = make(tmp_path / "set", texts)
    out = tmp_path / "out"
    options = ["--dataset", folder, "--output_dir", out, "--tokens_per_domain", EVERYTHING, *options]
    status, _, err = run_script(main, *options)
    assert (status, err) == (0, "")
    for domain in DOMAINS:
        assert texts_of(out / f"{domain}.jsonl") == [text for text in texts[domain] if not is_held_out(text)]
        held_out = out / "heldout" / f"{domain}.jsonl"
        assert (texts_of(held_out) if held_out.exists() else []) == [t for t in texts[domain] if is_held_out(t)]
    assert sum(map(len, map(read, (out / "heldout").iterdir()))) > 3
    expected = {"domain": "c4", "source": f"{folder} RedPajamaC4", "licence": "see the dataset"}
    assert all(document == {"text": document["text"]} | expected for document in read(out / "c4.jsonl"))
    manifest = json.loads((out / "redpajama.json").read_text())
    assert set(contents(out)) == {"redpajama.json", *manifest["files"]}
    for name, entry in manifest["files"].items():
        content = (out / name).read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
        assert entry["documents"] == len(texts_of(out / name))


def test_tokens_are_those_of_the_tokenizer(tmp_path, run_script):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    texts = make_texts()
    texts["books"] = [f"A book. {' '.join(SENTENCES)} " * 60 + str(i) for i in range(PER_DOMAIN)]
    folder = make_labelled(tmp_path / "set", texts)
    asked, out = 500, tmp_path / "out"
    options = ["--output_dir", out, "--tokens_per_domain", asked, "--model_path", tmp_path / "model"]
    status, printed, _ = run_script(main, "--dataset", folder, *options)
    assert status == 0
    assert "about" not in printed
    manifest = json.loads((out / "redpajama.json").read_text())
    for domain in DOMAINS:
        documents = texts_of(out / f"{domain}.jsonl")
        got = sum(len(tokenizer(document)["input_ids"]) for document in documents)
        assert got == manifest["files"][f"{domain}.jsonl"]["tokens"]
        assert asked <= got <= 1.02 * asked
        assert all(document in texts[domain] for document in documents[:-1])
        assert any(text.startswith(documents[-1]) for text in texts[domain])
    assert len(texts_of(out / "books.jsonl")) == 1
    assert manifest["records"] < sum(map(len, texts.values()))  # it stopped reading


def test_four_characters_are_a_token_and_a_domain_that_ends_early_or_is_absent_is_said(tmp_path, run_script):
    texts = make_texts() | {"arxiv": [], "github": ["only this one is here"]}
    folder, out = make_labelled(tmp_path / "set", texts), tmp_path / "out"
    names = "arxiv=RedPajamaArXiv,github=RedPajamaGithub,c4=RedPajamaC4"
    options = ["--output_dir", out, "--tokens_per_domain", 90, "--domain_names", names]
    status, printed, _ = run_script(main, "--dataset", folder, *options)
    lines = {line.split()[0]: line for line in printed.splitlines()}
    assert (status, "about got" in printed) == (0, True)
    assert lines["arxiv"].split()[1:3] == ["90", "0"]
    assert lines["arxiv"].endswith("the dataset has none")
    assert lines["github"].split()[1:3] == ["90", "6"]
    assert lines["github"].endswith("the dataset has no more")
    assert "the dataset" not in lines["c4"]
    assert {path.name for path in out.glob("*.jsonl")} == {"c4.jsonl", "github.jsonl"}
    assert 90 <= sum(-(-len(text) // 4) for text in texts_of(out / "c4.jsonl")) <= 91


def test_bad_records_are_skipped_and_counted(tmp_path, run_script):
    label = {"meta": {"redpajama_set_name": "RedPajamaC4"}}
    bad = [{"text": None}, {}, {"text": 5}, {"text": ""}, {"text": " \n"}, {"text": ["a"]}]
    records = [{"text": "good"} | label, *(record | label for record in bad), {"text": "bad", "meta": None}]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    status, printed, _ = run_script(main, "--dataset", tmp_path / "set", "--output_dir", tmp_path / "out")
    assert status == 0
    assert texts_of(tmp_path / "out" / "c4.jsonl") == ["good"]
    assert json.loads((tmp_path / "out" / "redpajama.json").read_text())["skipped"]["c4"] == len(bad)
    assert next(line for line in printed.splitlines() if line.startswith("c4")).split()[5] == str(len(bad))


@pytest.mark.parametrize("shape", ["label", "folders"])
def test_interrupted_before_any_renaming_it_ends_in_the_same_bytes(shape, tmp_path, run_script, often):
    """By Ctrl-C. The renamings of a run: commits of the state, then the files' final names, then the manifest."""
    make, options = SHAPES[shape]
    domains = ["--domain_names", "c4=RedPajamaC4,books=RedPajamaBook"]
    dataset = make(tmp_path / "set", make_texts())
    options = ["--dataset", dataset, *options, *domains, "--tokens_per_domain", 800, "--output_dir"]
    with renames() as names:
        assert run_script(main, *options, tmp_path / "whole")[0] == 0
    assert len(names) > 8
    for at in range(1, len(names) + 1):
        out = tmp_path / str(at)
        with renames(at, KeyboardInterrupt):
            assert run_script(main, *options, out)[0] == 130
        assert run_script(main, *options, out)[0] == 0
        assert contents(out) == contents(tmp_path / "whole"), at


def test_unreadable_data_is_one_line_and_repaired_it_goes_on(tmp_path, run_script, often):
    folder = make_labelled(tmp_path / "set", make_texts())
    options = ["--dataset", folder, "--tokens_per_domain", EVERYTHING, "--output_dir"]
    assert run_script(main, *options, tmp_path / "whole")[0] == 0
    shard = folder / "data" / "train-00001-of-00002.parquet"
    good = shard.read_bytes()
    shard.write_bytes(good[:1000])
    assert "Parquet" in one_line(run_script(main, *options, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / domain_download.STATE).read_text())["records"] == 120
    shard.write_bytes(good)
    assert run_script(main, *options, tmp_path / "out")[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture
def hub(dataset):
    """A server on this machine with `dataset` as owner/set."""
    shards = {path.name: path.read_bytes() for path in sorted((dataset / "data").iterdir())}
    folder = {"type": "directory", "oid": "0" * 40, "path": "data"}
    files = [folder | {"type": "file", "path": f"data/{n}", "size": len(content)} for n, content in shards.items()]
    info = {"id": "owner/set", "sha": COMMIT, "siblings": [], "tags": []}
    answers = {"": info, f"/revision/{COMMIT}": info, f"/paths-info/{COMMIT}": [folder, *files]}
    answers |= {f"/tree/{COMMIT}": [folder], f"/tree/{COMMIT}/data": files}
    with LocalServer() as server:
        server.files = {
            f"api/datasets/owner/set{path}": json.dumps(answer).encode() for path, answer in answers.items()
        }
        for name, content in shards.items():
            server.files[path := f"datasets/owner/set/resolve/{COMMIT}/data/{name}"] = content
            server.headers[path] = {"ETag": '"0"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        yield server


def test_from_a_hub_that_fails_and_comes_back(hub, tmp_path):
    """A dataset by its id, from a server that refuses everything at first, then the second of two shards."""
    program = (
        "import sys\n"
        "from llama_data import domain_download, download_redpajama\n"
        "domain_download.COMMIT_EVERY = 40\n"
        "for attempt in sys.stdin:\n"
        "    print('status', download_redpajama.main(sys.argv[1:]), flush=True)\n"
    )
    out = tmp_path / "out"
    options = ["--dataset", "owner/set", "--tokens_per_domain", str(EVERYTHING), "--output_dir", str(out)]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", program, *options]
    process = subprocess.Popen(command, text=True, env=environment, cwd=SCRIPT.parents[1], **pipes)
    for refused, status in (("", 3), ("train-00001-of-00002", 3), ("nothing", 0)):
        for path in hub.files:
            hub.misbehave(path, itertools.repeat(Reply(status=403)) if refused in path else [])
        print("run", file=process.stdin, flush=True)
        printed = next(line for line in process.stdout if line.startswith("status"))
        assert printed == f"status {status}\n"
    lines = process.communicate()[1].splitlines()
    assert len(lines) == 2, lines
    assert all("run the same command again to go on" in line for line in lines)
    documents = [document for path in out.rglob("*.jsonl") for document in read(path)]
    assert sorted(document["text"] for document in documents) == sorted(itertools.chain(*make_texts().values()))
    assert all(document["source"].startswith(f"owner/set@{COMMIT} RedPajama") for document in documents)


@pytest.fixture
def finished(dataset, tmp_path, run_script) -> list:
    """The options of a finished download in `tmp_path / "out"`, where the sample data's manifest is no hindrance."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("{}")
    options = ["--dataset", dataset, "--output_dir", tmp_path / "out", "--tokens_per_domain", 50]
    assert run_script(main, *options)[0] == 0
    return options


def test_finished_there_is_nothing_to_do(finished, tmp_path, run_script):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, printed, _ = run_script(main, *finished)
    assert (status, "nothing to do" in printed) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_other_options_are_refused_and_overwrite_replaces_when_all_is_complete(finished, tmp_path, run_script):
    out = tmp_path / "out"
    (out / "mine.jsonl").write_text("mine")
    before = contents(out)
    other = [*finished, "--tokens_per_domain", 80, "--domain_names", "c4=RedPajamaC4"]
    assert "another --tokens_per_domain, --domain_names: --overwrite" in one_line(run_script(main, *other))
    assert contents(out) == before
    with renames(2, KeyboardInterrupt):
        assert run_script(main, *other, "--overwrite")[0] == 130
    assert contents(out).items() >= before.items()
    assert "another --tokens_per_domain" in one_line(run_script(main, *finished))  # than the unfinished one
    assert run_script(main, *other)[0] == 0
    assert {path.name for path in out.glob("*.jsonl")} == {"c4.jsonl", "mine.jsonl"}
    assert len(texts_of(out / "c4.jsonl")) > before["c4.jsonl"].count(b"\n")
    assert (out / "manifest.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["c4.jsonl", "c4.zip", "heldout/books.jsonl", "redpajama.json", "c4.jsonl.gz"])
def test_foreign_files_are_refused_and_kept(name, dataset, tmp_path, run_script):
    (tmp_path / "heldout").mkdir()
    (tmp_path / name).write_text('{"files": {}}')
    for overwrite in ([], ["--overwrite"]):
        assert name in one_line(run_script(main, "--dataset", dataset, "--output_dir", tmp_path, *overwrite))
        assert contents(tmp_path) == {name: b'{"files": {}}'}


def test_changed_files_are_refused_and_lost_ones_are_said(finished, tmp_path, run_script):
    path = tmp_path / "out" / "c4.jsonl"
    path.write_text("mine")
    for overwrite in ([], ["--overwrite"]):
        assert "changed since" in one_line(run_script(main, *finished, *overwrite))
    path.unlink()
    assert "c4.jsonl is missing" in one_line(run_script(main, *finished))
    assert run_script(main, *finished, "--overwrite")[0] == 0
    assert path.exists()


WRONG = {
    "unknown domain": (["--domain_names", "news=News"], "'news=News' is not domain=name"),
    "domain twice": (["--domain_names", "c4=a,c4=b"], "'c4=b'"),
    "name twice": (["--domain_names", "c4=a,books=a"], "'books=a'"),
    "no tokens": (["--tokens_per_domain", 0], "--tokens_per_domain 0 must be at least 1"),
    "no such folder": (["--dataset", "./nowhere"], "./nowhere is not a folder"),
    "no such split": (["--split", "dev"], "Available splits: ['train']"),
    "no such configuration": (["--config", "en-{}"], "'en-RedPajamaCommonCrawl' not found"),
    "no such data_dir": (["--data_dir", "{}"], "RedPajamaCommonCrawl"),
    "no such text": (["--text_field", "content"], "none of 316 records has a text in 'content'"),
    "no such label": (["--label_field", "meta.source"], "in 'meta.source'; the last one: {'text': "),
    "no such tokenizer": (["--model_path", "nowhere"], "nowhere has no usable tokenizer"),
    "hub switched off": (["--dataset", "owner/set"], "offline"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(case, dataset, tmp_path, run_script):
    options, words = WRONG[case]
    status = 3 if case == "hub switched off" else 2
    assert words in one_line(run_script(main, "--dataset", dataset, "--output_dir", tmp_path, *options), status)
    assert contents(tmp_path) == {}


def test_a_dataset_without_any_of_the_domains_is_given_up_early(dataset, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr(domain_download, "LOOK_AHEAD", 25)
    names = ["--domain_names", "c4=C4"]
    assert "none of 25 records" in one_line(run_script(main, "--dataset", dataset, "--output_dir", tmp_path, *names))
    assert contents(tmp_path) == {}


def test_without_datasets_it_says_what_to_install(tmp_path, run_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in one_line(run_script(main, "--output_dir", tmp_path))


def test_help_imports_nothing_heavy():
    result = subprocess.run([sys.executable, "-X", "importtime", SCRIPT, "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "--tokens_per_domain" in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert not {"torch", "datasets", "transformers"} & imported
