"""download_hf.sh: the hub's real client against a server that answers as the hub does, and misbehaves on demand."""

import hashlib
import json
import os
import random
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import pipeline
import pytest
from local_server import LocalServer, Reply, assert_one_line

SCRIPT = Path(__file__).parents[2] / "llama_download" / "download_hf.sh"
MODEL = "some-lab/tiny-llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECORD = ".download_hf"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NEEDED = ["LICENSE.txt", "README.md", "config.json", "tokenizer.json", "tokenizer.model", *SHARDS]
NEEDED += ["model.safetensors.index.json"]
NOT_NEEDED = ["original/params.json", "original/consolidated.00.pth", "onnx/model.onnx", "flax_model.msgpack"]
NOT_NEEDED += ["consolidated.safetensors", "model.fp16.safetensors", "consolidated.00.pth", "tiny.Q4_0.gguf"]
NOT_NEEDED += ["pytorch_model.bin", "pytorch_model.bin.index.json", ".gitattributes"]


class Hub(LocalServer):
    """The part of the hub's interface that a download of one model uses."""

    def publish(self, names: list[str], size: int = 30_000) -> dict[str, bytes]:
        """Put files of random content into the model's repository; returns them."""
        source = random.Random(0)
        self.contents = {name: source.randbytes(size) for name in names}
        tree = []
        for name, content in self.contents.items():
            sha256 = hashlib.sha256(content).hexdigest()
            git_hash = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_hash}
            large = name.endswith(("safetensors", "bin", "model"))
            tree.append(entry | ({"lfs": {"oid": sha256, "size": len(content), "pointerSize": 130}} if large else {}))
            self.files[self.place(name)] = content
            self.headers[self.place(name)] = {"ETag": f'"{sha256 if large else git_hash}"', "X-Repo-Commit": COMMIT}
        info = {"id": MODEL, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        self.files[f"api/models/{MODEL}/revision/main"] = json.dumps(info).encode()
        self.files[f"api/models/{MODEL}/tree/{COMMIT}"] = json.dumps(tree).encode()
        return self.contents

    @staticmethod
    def place(name: str) -> str:
        return f"{MODEL}/resolve/{COMMIT}/{name}"

    def downloads(self) -> set[str]:
        """Names of the repository's files that were asked for."""
        begin = self.place("")
        found = {r.path for r in self.requests if r.method == "GET" and r.path.startswith(begin)}
        return {path.removeprefix(begin) for path in found}


@pytest.fixture
def hub():
    with Hub() as hub:
        hub.publish(NEEDED + NOT_NEEDED)
        yield hub


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "the models" / "tiny"


@pytest.fixture
def environment(hub, tmp_path) -> dict[str, str]:
    """In which that hub answers, and its cache is empty."""
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    return os.environ | online | {"PYTHON": sys.executable, "HF_HOME": str(tmp_path / "home")}


@pytest.fixture
def run(environment, target, tmp_path):
    """`run(NAME="value")` downloads the model into the target; `run("other", "arguments")`."""

    def run(*arguments: str | Path, **settings: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", SCRIPT, *(arguments or (MODEL, target))],
            env=environment | settings,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """The checkpoint's files: without this script's record and what the client notes down for itself."""
    return {n: c for n, c in pipeline.contents(folder).items() if n != RECORD and not n.startswith(".cache/")}


def assert_complete(result: subprocess.CompletedProcess, hub: Hub, target: Path, names: list[str] = NEEDED) -> None:
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert contents(target) == {name: hub.contents[name] for name in names}


@pytest.mark.parametrize("weights", [[*SHARDS, "model.safetensors.index.json"], ["pytorch_model.bin"]])
def test_a_stage_that_is_given_a_hub_id_fetches_the_weights_once(weights, hub, environment):
    """And where the hub cannot be reached, it takes what it has fetched."""
    hub.publish(["config.json", "tokenizer.model", "pytorch_model.bin", "consolidated.safetensors", *weights])
    code = "from run_moefication.moefication.checkpoints.dense import resolve_model_path\n"
    code += f"print(resolve_model_path({MODEL!r}))"
    for offline in "01":
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment | {"HF_HUB_OFFLINE": offline}, capture_output=True, text=True
        )
        folder = Path(result.stdout.strip() or "nowhere")
        found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
        assert found == {"config.json", "tokenizer.model", *weights}, result.stderr


def test_what_a_checkpoint_needs_is_fetched_once(run, hub, target):
    result = run()
    assert_complete(result, hub, target)
    assert hub.downloads() == set(NEEDED)
    *_, verified, after = result.stdout.splitlines()
    assert verified == f"verified: {len(NEEDED)} files of {MODEL} ({COMMIT[:12]}) in {target}"
    assert after == f"next: MODEL_PATH='{target}' bash run_moefication/1_split.sh"

    hub.requests.clear()
    assert_complete(run(), hub, target)
    assert hub.downloads() == set()


@pytest.mark.parametrize(
    ("published", "taken"),
    [
        (["config.json", "model.safetensors", *SHARDS, "model.safetensors.index.json"], [0, 1]),
        (["config.json", "pytorch_model.bin", "consolidated.safetensors"], [0, 1]),
        (["config.json", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "a.gguf"], [0, 1, 2]),
    ],
    ids=["whole before shards", "bin", "bin in shards"],
)
def test_which_weights_are_taken(published, taken, run, hub, target):
    hub.publish(published)
    assert_complete(run(), hub, target, [published[index] for index in taken])


@pytest.mark.parametrize("published", [["tiny.gguf", "config.json"], ["model.safetensors"]])
def test_no_checkpoint_in_transformers_format_is_one_line(published, run, hub, target):
    hub.publish(published)
    assert_one_line(run(), MODEL, "no checkpoint in transformers format")
    assert not target.exists()


def test_a_cut_connection_is_resumed(run, hub, target):
    """The client keeps whole chunks of 10 MiB."""
    names = ["config.json", "model.safetensors"]
    hub.publish(names, size=11 * 2**20)
    hub.misbehave(hub.place(names[1]), [Reply(cut=11 * 2**20 - 1)])
    assert_complete(run(), hub, target, names)
    assert hub.requested(hub.place(names[1])) == [0, 10 * 2**20]


def test_an_interrupted_run_goes_on(run, hub, target):
    """What had come whole is not fetched again."""
    hub.misbehave(hub.place(SHARDS[1]), repeat(Reply(status=404)))
    assert run().returncode == 2
    assert SHARDS[1] not in contents(target)
    hub.misbehave(hub.place(SHARDS[1]), [])
    there = set(contents(target))
    assert there
    hub.requests.clear()
    assert_complete(run(), hub, target)
    assert hub.downloads() == set(NEEDED) - there


def test_files_altered_on_the_way_are_fetched_again(run, hub, target):
    """Of the right length: the client alone would keep them."""
    for name in (SHARDS[0], "config.json"):
        hub.misbehave(hub.place(name), [Reply(body=bytes(30_000))])
    assert_complete(run(), hub, target)
    assert hub.requested(hub.place(SHARDS[0])) == hub.requested(hub.place("config.json")) == [0, 0]


def test_a_file_that_is_always_altered_is_refused(run, hub):
    hub.misbehave(hub.place(SHARDS[0]), repeat(Reply(body=bytes(30_000))))
    result = run()
    assert_one_line(result, SHARDS[0], "not what its checksum says")
    assert "next:" not in result.stdout


def test_a_file_that_always_comes_short_is_refused(run, hub, target):
    hub.misbehave(hub.place(SHARDS[0]), repeat(Reply(body=hub.contents[SHARDS[0]][:10_000])))
    assert_one_line(run(), "check the network", status=3)
    assert SHARDS[0] not in contents(target)


def test_a_damaged_file_is_mended(run, hub, target):
    run()
    (target / SHARDS[1]).write_bytes(bytes(30_000))
    hub.requests.clear()
    assert_complete(run(), hub, target)
    assert hub.downloads() == {SHARDS[1]}


def test_weights_of_an_earlier_commit_are_named(run, hub, target):
    """transformers would load the whole file, not the shards that took its place."""
    hub.publish(["config.json", "model.safetensors"])
    assert run().returncode == 0
    hub.publish(NEEDED)
    assert_one_line(run(), "model.safetensors", "remove that file")
    (target / "model.safetensors").unlink()
    assert_complete(run(), hub, target)


INFO = f"api/models/{MODEL}/revision/main"


@pytest.mark.parametrize(
    ("path", "reply", "words", "status"),
    [
        (INFO, Reply(500), "500 Internal Server Error", 3),
        (INFO, Reply(401, headers={"X-Error-Code": "RepoNotFound"}), "Repository Not Found", 2),
        (INFO, Reply(404, headers={"X-Error-Code": "RevisionNotFound"}), "Revision Not Found", 2),
        (INFO, Reply(403, headers={"X-Error-Code": "GatedRepo"}), "Cannot access gated repo", 2),
        (Hub.place(SHARDS[0]), Reply(403, headers={"X-Error-Code": "GatedRepo"}), "Cannot access gated repo", 2),
    ],
)
def test_what_the_hub_refuses_is_one_line(path, reply, words, status, run, hub, target):
    hub.misbehave(path, repeat(reply))
    assert_one_line(run(), MODEL, words, status=status)
    assert path.rpartition("/")[2] not in contents(target)


def test_an_address_that_is_no_hub_is_one_line(run, hub, target):
    hub.misbehave(INFO, repeat(Reply(200, body=b"<html>Please log in</html>")))
    assert_one_line(run(), MODEL, "check HF_ENDPOINT")
    assert_one_line(run(HF_ENDPOINT="notaurl"), MODEL, "check HF_ENDPOINT")
    assert not target.exists()


def test_no_network_is_one_line(run, target):
    with LocalServer() as gone:
        url = gone.url
    assert_one_line(run(HF_ENDPOINT=url), MODEL, "check the network", status=3)
    assert not target.exists()


def test_offline_mode_is_named(run, target):
    assert_one_line(run(HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([MODEL], "required: TARGET_FOLDER"),
        ([MODEL, ""], "TARGET_FOLDER: the path is empty"),
        ([MODEL, "x", "y"], "unrecognized arguments: y"),
        (["https://huggingface.co/some/model", "x"], "Repo id must"),
        (["../models", "x"], "Repo id must"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, words, run, hub, tmp_path):
    assert_one_line(run(*arguments), words)
    assert not (tmp_path / "x").exists()
    assert hub.requests == []


def test_a_python_without_the_client_is_one_line(run):
    assert_one_line(run(PYTHON="/bin/false"), "'/bin/false' has no huggingface_hub", "PYTHON")


@pytest.mark.parametrize("there", ["a file", "a folder", "another model"])
def test_something_else_in_the_target_stays_as_it_is(there, run, hub, target):
    place = {"a file": target, "a folder": target / "config.json", "another model": target / RECORD}[there]
    place.parent.mkdir(parents=True)
    place.write_text("other/model@main\n")
    assert_one_line(run(), str(target), "choose another folder")
    assert [path for path in target.parent.rglob("*") if path.is_file()] == [place]
    assert place.read_text() == "other/model@main\n"


def test_a_target_that_cannot_be_made_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_one_line(run(MODEL, tmp_path / "file" / "x"), "file/x: Not a directory")


def test_help_needs_no_arguments(run):
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "MODEL_ID TARGET_FOLDER" in result.stdout
