"""download_llama.sh against a server that cuts connections, alters files, refuses: right files, or one clear line."""

import hashlib
import os
import pty
import random
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import pytest
from local_server import LocalServer, Reply, assert_one_line
from pipeline import contents

SCRIPT = Path(__file__).parents[2] / "llama_download" / "download_llama.sh"
BASH, ENV = shutil.which("bash"), shutil.which("env")
TOOLS = ["awk", "find", "flock", "md5sum", "mkdir", "mktemp", "mv", "rm", "sed", "sleep", "sort", "sync", "tr"]
TOOLS += ["wc"]
SHARD = "7B/consolidated.00.pth"
PART = ".consolidated.00.pth.part"
PAGE = b"<!doctype html><html><title>Log in</title></html>\n"
QUERY = "Policy=eyJ*~_-&Signature=SeCrEt%7E~&Key-Pair-Id=K1"

pytestmark = pytest.mark.skipif(BASH is None, reason="bash is not installed")


def meta_files(size: str, shards: int, tokenizer: str = "root", seed: int = 0) -> dict[str, bytes]:
    """A release as Meta lays it out, its tokenizer at the `root` or in the size's `folder`; contents are random."""
    source = random.Random(seed)
    names = ["params.json", *(f"consolidated.{shard:02d}.pth" for shard in range(shards))]
    names += ["tokenizer.model"] if tokenizer == "folder" else []
    files = {f"{size}/{name}": source.randbytes(20_000) for name in names}
    files[f"{size}/checklist.chk"] = checklist({name: files[f"{size}/{name}"] for name in names})
    if tokenizer == "root":
        files["tokenizer.model"] = source.randbytes(3_000)
        files["tokenizer_checklist.chk"] = checklist({"tokenizer.model": files["tokenizer.model"]})
    return files


def checklist(files: dict[str, bytes], form: str = "{md5}  {name}\n") -> bytes:
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    return "".join(form.format(md5=md5, MD5=md5.upper(), name=name) for name, md5 in sums.items()).encode()


@pytest.fixture
def server():
    with LocalServer() as server:
        server.files = meta_files("7B", shards=1)
        yield server


@pytest.fixture(scope="module")
def path_with(tmp_path_factory) -> Callable[..., str]:
    """`path_with("curl")`: a PATH on which lie what the script needs and these programs, and nothing else."""

    def path_with(*programs: str) -> str:
        folder = tmp_path_factory.mktemp("bin")
        for name in [*TOOLS, *programs]:
            if found := shutil.which(name):
                (folder / name).symlink_to(found)
            elif name != "flock":
                pytest.skip(f"{name} is not installed")
        return str(folder)

    return path_with


@pytest.fixture(scope="module", params=["curl", "wget"])
def client(request, path_with) -> str:
    return path_with(request.param)


@pytest.fixture(scope="module")
def any_client(path_with) -> str:
    return path_with("curl" if shutil.which("curl") else "wget")


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "the models" / "meta"


@pytest.fixture
def settings(server, target) -> dict[str, str]:
    return {
        "PRESIGNED_URL": f"{server.url}/*",
        "MODEL_SIZE": "7B",
        "TARGET_FOLDER": str(target),
        "DOWNLOAD_TRIES": "3",
        "DOWNLOAD_DELAY": "0",
        "HOME": str(target.parents[1]),
    }


def start(path: str, settings: dict[str, str], *arguments: str, cwd: Path | None = None) -> subprocess.Popen:
    environment = {"PATH": path, "LC_ALL": "C"} | settings
    # Tests that run in the background ignore SIGINT, and so would the script.
    command = [ENV, "--default-signal=INT", BASH, SCRIPT, *arguments]
    return subprocess.Popen(
        command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(path: str, settings: dict[str, str], *arguments: str, **options) -> subprocess.CompletedProcess:
    process = start(path, settings, *arguments, **options)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def assert_complete(result: subprocess.CompletedProcess, server: LocalServer, target: Path) -> None:
    """The script succeeded, silently, and the folder holds the server's files, nothing else."""
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert contents(target) == server.files


def test_a_release_is_fetched_and_verified(client, server, settings, target):
    result = run(client, settings)
    assert_complete(result, server, target)
    *_, verified, after = result.stdout.splitlines()
    assert verified == f"verified: 7B in {target}"
    assert after.startswith("next: python llama_download/convert_llama_weights_to_hf.py --input_dir ")
    assert "--model_size 7B" in after
    assert all(request.user_agent.startswith("Wget/") for request in server.requests)


def test_a_second_run_asks_for_nothing(any_client, server, settings, target):
    run(any_client, settings)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    server.requests.clear()
    result = run(any_client, settings)
    assert_complete(result, server, target)
    assert server.requests == []
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before


def test_several_sizes_and_shards(any_client, server, settings, target):
    server.files = (
        meta_files("7B", 1, seed=1)
        | meta_files("13B", 2, seed=2)
        | meta_files("llama-2-70b-chat", 8, seed=3)
        | meta_files("Llama-3.2-1B", 1, tokenizer="folder", seed=4)
        | meta_files("Meta-Llama-3-70B", 8, tokenizer="folder", seed=5)
    )
    sizes = "7B, 13B,llama-2-70b-chat ,Llama-3.2-1B,\nMeta-Llama-3-70B"
    result = run(any_client, settings | {"MODEL_SIZE": sizes})
    assert_complete(result, server, target)
    assert len(server.requests) == len(server.files)
    after = [shlex.split(line) for line in result.stdout.splitlines() if line.startswith("next: ")]
    folders = [Path(words[4]).relative_to(target).as_posix() for words in after]
    assert folders == [".", ".", "llama-2-70b-chat", "Llama-3.2-1B", "Meta-Llama-3-70B"]
    assert [words[6] for words in after] == ["7B", "13B", "70B", "1B", "70B"]


def test_llama_3_alone_needs_no_tokenizer_at_the_root(any_client, server, settings, target):
    server.files = meta_files("Llama-3.1-8B-Instruct", 1, tokenizer="folder")
    assert_complete(run(any_client, settings | {"MODEL_SIZE": "Llama-3.1-8B-Instruct"}), server, target)


def test_relative_folder_settings_in_the_file_and_no_foreign_ones(client, server, settings, tmp_path):
    """As the description has it: the variables are edited, the script is run where it lies. The folder's name looks
    like an option."""
    copy = tmp_path / "download_llama.sh"
    text = SCRIPT.read_text().split("\n", 3)
    assert [line.partition("=")[0] for line in text[:3]] == ["PRESIGNED_URL", "MODEL_SIZE", "TARGET_FOLDER"]
    copy.write_text(
        f'PRESIGNED_URL="{settings["PRESIGNED_URL"]}"\nMODEL_SIZE="7B"\nTARGET_FOLDER="-some models"\n{text[3]}'
    )
    (tmp_path / ".wgetrc").write_text("user_agent = Mozilla\n")
    (tmp_path / ".curlrc").write_text("max-filesize = 1\n")
    result = subprocess.run(
        [BASH, copy.name], env={"PATH": client, "HOME": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert_complete(result, server, tmp_path / "-some models")
    assert {request.user_agent.partition("/")[0] for request in server.requests} == {"Wget"}


def test_the_query_of_a_presigned_link_goes_along(client, server, settings, target):
    """Only the * of the path stands for a file's name. Links copied as HTML or broken by a mail program are mended."""
    link = f"{server.url}/some/path/*?{QUERY}".replace("&", "&amp;")
    server.files = {f"some/path/{name}": content for name, content in server.files.items()}
    result = run(client, settings | {"PRESIGNED_URL": f" {link[:40]}\n{link[40:]}\n"})
    assert (result.returncode, result.stderr) == (0, "")
    assert {f"some/path/{name}": content for name, content in contents(target).items()} == server.files
    assert {request.query for request in server.requests} == {QUERY}


@pytest.mark.skipif(not shutil.which("ps"), reason="ps is not installed")
def test_the_link_is_not_on_the_process_list(client, server, settings, target):
    gate = threading.Event()
    server.misbehave(SHARD, [Reply(cut=5_000, gate=gate)])
    process = start(client, settings | {"PRESIGNED_URL": f"{server.url}/*?{QUERY}"})
    wait_for(lambda: server.requested(SHARD))
    listed = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True, check=True).stdout
    gate.set()
    process.communicate(timeout=60)
    assert PART in listed
    assert "SeCrEt" not in listed
    assert contents(target) == server.files


def test_cut_connections_are_resumed(client, server, settings, target):
    """More cuts than tries in a row: a try that brought bytes does not count as failed."""
    server.misbehave(SHARD, [Reply(cut=3_000)] * 5)
    assert_complete(run(client, settings), server, target)
    assert server.requested(SHARD) == [0, 3_000, 6_000, 9_000, 12_000, 15_000]


def test_cuts_before_the_first_byte_and_busy_answers_are_tried_again(client, server, settings, target):
    server.misbehave(SHARD, [Reply(cut=0), Reply(status=503)])
    server.misbehave("7B/params.json", [Reply(status=429), Reply(status=500)])
    assert_complete(run(client, settings), server, target)


def test_a_network_that_stays_away_is_one_line(client, server, settings, target):
    server.misbehave(SHARD, [Reply(cut=0), Reply(status=503), Reply(cut=0)])
    result = run(client, settings)
    assert_one_line(result, SHARD, "3 times in a row", "check the network", status=3)
    assert SHARD not in contents(target)
    server.shutdown()
    server.server_close()
    assert_one_line(run(client, settings | {"PRESIGNED_URL": f"{server.url}/*?{QUERY}"}), "check the network", status=3)


def test_tries_are_spaced_by_a_growing_delay(path_with, server, settings, tmp_path):
    """With a sleep that writes down how long it was meant to be."""
    path = Path(path_with("curl" if shutil.which("curl") else "wget"))
    (path / "sleep").unlink()
    (path / "sleep").write_text(f"#!{BASH}\necho $1 >>'{tmp_path}/slept'\n")
    (path / "sleep").chmod(0o755)
    server.misbehave(SHARD, repeat(Reply(status=503)))
    result = run(str(path), settings | {"DOWNLOAD_DELAY": "3", "DOWNLOAD_TRIES": "9"})
    assert_one_line(result, "9 times in a row", status=3)
    assert (tmp_path / "slept").read_text().split() == ["3", "6", "12", "24", "48", "60", "60", "60"]


@pytest.mark.parametrize("program", [pytest.param("curl", marks=pytest.mark.slow), "wget"])
def test_a_silent_connection_is_given_up(program, path_with, server, settings, target):
    """curl looks at the mean of some seconds, hence slow."""
    server.misbehave(SHARD, [Reply(cut=4_000, gate=threading.Event())])
    assert_complete(run(path_with(program), settings | {"DOWNLOAD_TIMEOUT": "1"}), server, target)
    assert server.requested(SHARD) == [0, 4_000]


def test_a_server_without_ranges_is_asked_from_the_start(client, server, settings, target):
    """Appending the whole to the half would give a file of the wrong length."""
    server.misbehave(SHARD, [Reply(cut=7_000), *[Reply(ignore_range=True)] * 3])
    assert_complete(run(client, settings), server, target)
    assert server.requested(SHARD)[:2] == [0, 7_000]


def test_a_server_without_ranges_that_always_breaks_off_ends_the_run(any_client, server, settings, target):
    server.misbehave(SHARD, repeat(Reply(cut=7_000, ignore_range=True)))
    assert_one_line(run(any_client, settings), SHARD, "check the network", status=3)
    assert SHARD not in contents(target)


WRONG = {
    "altered": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "truncated": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "page": lambda content: PAGE,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_fetched_again_once(any_client, wrong, server, settings, target):
    """The body is wrong, the transfer complete: only the checksum tells."""
    body = WRONG[wrong](server.files[SHARD])
    server.misbehave(SHARD, [Reply(body=body)] * 2)
    assert_one_line(run(any_client, settings), SHARD, "what the server sends is", "ask Meta for a new link")
    assert contents(target) == {name: content for name, content in server.files.items() if name != SHARD}
    server.misbehave(SHARD, [Reply(body=body)])
    assert_complete(run(any_client, settings), server, target)
    assert server.requested(SHARD) == [0, 0, 0, 0]


def test_a_file_that_changes_between_tries_is_not_glued_together(any_client, server, settings, target):
    other = meta_files("7B", 1, seed=9)[SHARD]
    server.misbehave(SHARD, [Reply(body=other, cut=6_000)])
    assert_complete(run(any_client, settings), server, target)
    assert server.requested(SHARD) == [0, 6_000, 0]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "link has expired"),
        (403, "the link has expired or does not cover this model: ask Meta for a new one"),
        (404, "check PRESIGNED_URL and MODEL_SIZE"),
        (410, "check PRESIGNED_URL and MODEL_SIZE"),
    ],
)
def test_a_refusal_is_final(any_client, status, words, server, settings, target):
    server.misbehave("7B/params.json", [Reply(status=status)])
    result = run(any_client, settings | {"PRESIGNED_URL": f"{server.url}/*?{QUERY}"})
    assert_one_line(result, "7B/params.json", str(status), words)
    assert len(server.requested("7B/params.json")) == 1
    assert "7B/params.json" not in contents(target)
    shutil.rmtree(target)
    server.misbehave("tokenizer_checklist.chk", [Reply(status=status)])
    assert_one_line(run(any_client, settings), "tokenizer_checklist.chk")
    assert not target.exists()


def test_a_link_that_expires_half_way_keeps_what_came(any_client, server, settings, target):
    server.misbehave(SHARD, [Reply(cut=9_000), Reply(status=403)])
    assert_one_line(run(any_client, settings), SHARD, "expired")
    assert contents(target)[f"7B/{PART}"] == server.files[SHARD][:9_000]
    server.requests.clear()
    assert_complete(run(any_client, settings), server, target)
    assert server.requested(SHARD) == [9_000]


@pytest.mark.parametrize(
    "wrong",
    [
        PAGE,
        checklist({"params.json": b""}),
        checklist({"params.json": b"", "consolidated.00.pth": b""}, "sha {md5}  {name}\n"),
        checklist({"params.json": b"", "consolidated.00.pth": b""}, "{md5}0  {name}\n"),
    ],
    ids=["page", "shard unlisted", "no md5", "longer sum"],
)
def test_a_checklist_that_is_none_is_refused(any_client, wrong, server, settings, target):
    server.files["7B/checklist.chk"] = wrong
    assert_one_line(run(any_client, settings), "7B/checklist.chk", "ask Meta for a new link")
    assert not [name for name in contents(target) if name.startswith("7B/")]
    assert server.requested(SHARD) == []


@pytest.mark.parametrize("form", ["{MD5}  {name}\r\n", "{md5} *{name}\n", "{md5}  ./{name}\n"])
def test_forms_of_checklists(any_client, form, server, settings, target):
    names = ["consolidated.00.pth", "params.json"]
    server.files["7B/checklist.chk"] = checklist({name: server.files[f"7B/{name}"] for name in names}, form)
    assert_complete(run(any_client, settings), server, target)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_and_run_again(any_client, sent, server, settings, target):
    gate = threading.Event()
    server.misbehave(SHARD, [Reply(cut=12_000, gate=gate)])
    process = start(any_client, settings)
    wait_for(lambda: target.joinpath("7B", PART).exists() and target.joinpath("7B", PART).stat().st_size)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60) if sent != signal.SIGKILL else ("", "")
    if sent == signal.SIGKILL:  # what it started lives on, until the server lets go
        gate.set()
        process.communicate(timeout=60)
    else:
        assert process.returncode == 128 + sent
        assert err == ""
        assert "verified: 7B" not in out
    assert SHARD not in contents(target)
    here = len(contents(target)[f"7B/{PART}"])
    assert 0 < here <= 12_000
    server.requests.clear()
    assert_complete(run(any_client, settings), server, target)
    assert server.requested(SHARD) == [here]


def test_leftovers_of_another_version_do_no_harm(client, server, settings, target):
    """Parts that are longer than the file, as long, or shorter, and part of a list."""
    names = [SHARD, "7B/params.json", "tokenizer.model", "7B/checklist.chk"]
    for name, length in zip(names, [25_000, 20_000, 10, 20], strict=True):
        part = target / Path(name).with_name(f".{Path(name).name}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"\1" * length)
    assert_complete(run(client, settings), server, target)
    assert server.requested("7B/checklist.chk") == [0]


@pytest.mark.parametrize("damaged", ["7B/consolidated.00.pth", "tokenizer.model", "7B/checklist.chk"])
def test_a_damaged_file_is_fetched_anew_and_stays_until_the_new_one_is_verified(
    any_client, damaged, server, settings, target
):
    run(any_client, settings)
    (target / damaged).write_bytes(b"damaged")
    server.misbehave(damaged, [Reply(status=403)])
    assert_one_line(run(any_client, settings), damaged)
    assert (target / damaged).read_bytes() == b"damaged"
    server.requests.clear()
    assert_complete(run(any_client, settings), server, target)
    checklists = {"7B/checklist.chk", "tokenizer_checklist.chk"}
    assert {request.path for request in server.requests} - checklists == {damaged} - checklists


def test_two_runs_at_once(any_client, server, settings, target):
    if not shutil.which("flock"):
        pytest.skip("flock is not installed")
    gate = threading.Event()
    server.misbehave(SHARD, [Reply(cut=5_000, gate=gate)])
    first = start(any_client, settings)
    wait_for(lambda: server.requested(SHARD))
    assert_one_line(run(any_client, settings), "another run fills", str(target))
    gate.set()
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert contents(target) == server.files


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"PRESIGNED_URL": ""}, ["PRESIGNED_URL is empty"]),
        ({"PRESIGNED_URL": "https://host/llama"}, ["PRESIGNED_URL lacks the *"]),
        ({"PRESIGNED_URL": f"https://host/llama?{QUERY}"}, ["PRESIGNED_URL lacks the *"]),
        ({"PRESIGNED_URL": "file:///etc/*"}, ["must begin with https://"]),
        ({"PRESIGNED_URL": 'https://host/*"\noutput = "x'}, ['has a "']),
        ({"TARGET_FOLDER": ""}, ["TARGET_FOLDER is empty"]),
        ({"MODEL_SIZE": ""}, ["MODEL_SIZE is empty", "7B", "Llama-3.2-1B-Instruct"]),
        ({"MODEL_SIZE": "7B,8Q"}, ["no '8Q'", "13B", "65B", "llama-2-70b-chat"]),
        ({"MODEL_SIZE": "*"}, ["no '*'"]),
        ({"MODEL_SIZE": "$(touch x)"}, ["no '$(touch'"]),
        ({"DOWNLOAD_TRIES": "many"}, ["DOWNLOAD_TRIES='many' is no whole number"]),
        ({"DOWNLOAD_DELAY": "-1"}, ["DOWNLOAD_DELAY='-1'"]),
        ({"DOWNLOAD_TIMEOUT": "1m"}, ["DOWNLOAD_TIMEOUT='1m'"]),
    ],
)
def test_wrong_settings_are_one_line_and_write_nothing(any_client, changes, words, server, settings, tmp_path):
    before = contents(tmp_path)
    assert_one_line(run(any_client, settings | changes, cwd=tmp_path), *words)
    assert contents(tmp_path) == before
    assert not Path(settings["TARGET_FOLDER"]).exists()
    assert server.requests == []


def test_an_argument_is_refused_and_help_needs_no_settings(any_client):
    assert_one_line(run(any_client, {}, "7B"), "'7B'", "--help")
    result = run(any_client, {}, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Downloads LLaMA's original weights")
    assert "DOWNLOAD_TRIES" in result.stdout
    assert "N_SHARD_DICT" not in result.stdout


def test_no_client_is_one_line(path_with, settings, target):
    assert_one_line(run(path_with(), settings), "neither curl nor GNU wget")
    assert not target.exists()


def test_a_target_that_cannot_be_made_is_one_line(any_client, settings, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_one_line(run(any_client, settings | {"TARGET_FOLDER": str(tmp_path / "file" / "x")}), "cannot be made")
    assert_one_line(run(any_client, settings | {"TARGET_FOLDER": str(tmp_path / "file")}), "cannot be made")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "in the way" / SHARD).mkdir(parents=True)
    result = run(any_client, settings | {"TARGET_FOLDER": str(tmp_path / "in the way")})
    assert_one_line(result, SHARD, "is a folder: move it away")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(client, settings, target):
    """Every write to /dev/full fails as on a full disk."""
    (target / "7B").mkdir(parents=True)
    (target / "7B" / PART).symlink_to("/dev/full")
    assert_one_line(run(client, settings), PART, "no space left")
    assert not (target / SHARD).exists()


def test_progress_is_shown_on_a_terminal(client, server, settings, target):
    terminal, end = pty.openpty()
    process = subprocess.run([BASH, SCRIPT], env={"PATH": client} | settings, stdout=subprocess.DEVNULL, stderr=end)
    os.close(end)  # now an empty terminal is the end of the input instead of a wait
    assert b"100" in os.read(terminal, 100_000)
    os.close(terminal)
    assert process.returncode == 0
    assert contents(target) == server.files


def test_shellcheck_finds_nothing():
    """The settings come first, so the shell is named here instead of in the file's first line."""
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    result = subprocess.run(["shellcheck", "--shell=bash", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
