"""Folders that hand work from stage to stage: whole or absent, never mixed, never foreign, never executed."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import contents

from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.storage import clearing, files
from run_moefication.moefication.storage.files import load_tensors, write_atomically
from run_moefication.moefication.storage.folder import ArtifactWriter, open_finished
from run_moefication.moefication.storage.manifest import Claim

CLAIM = Claim(
    stage="split",
    options={"num_experts": 8, "seed": 0},
    source={"name": "llama_7B", "fingerprint": "abc"},
    environment={"torch": "2"},
    inputs={"text": "digest"},
)
OTHER = dataclasses.replace(CLAIM, options={"num_experts": 8, "seed": 1})
PIECES = ["layer.0", "layer.1", "layer.2"]


def fill(writer: ArtifactWriter, pieces: list[str]) -> None:
    for piece in pieces:
        entry = writer.write_tensors(f"files/{piece}", torch.arange(3) + int(piece[-1]))
        writer.write_piece(piece, {f"files/{piece}": entry}, {"cost": int(piece[-1])})


@pytest.fixture
def finished(tmp_path) -> Path:
    writer = ArtifactWriter(tmp_path / "folder", CLAIM, PIECES)
    fill(writer, PIECES)
    assert writer.finish()
    return writer.folder


# ---------------------------------------------------------------------------------------------------- one file


def test_file_appears_whole_with_true_size_sum_and_rights(tmp_path):
    previous = os.umask(0o027)
    try:
        entry = write_atomically(tmp_path / "a" / "file", lambda file: [file.write(b"ab"), file.write(b"c")])
    finally:
        os.umask(previous)
    path = tmp_path / "a" / "file"
    assert path.read_bytes() == b"abc"
    assert entry == {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("existing", [None, b"old"])
def test_failed_write_leaves_what_was_there(existing, tmp_path):
    path = tmp_path / "file"
    if existing:
        path.write_bytes(existing)

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    assert contents(tmp_path) == ({"file": existing} if existing else {})


def at_call(monkeypatch, owner, name: str, number: int, act) -> list[int]:
    """Make the `number`-th call of a function `act()` first. Returns a list that grows by one with each call."""
    calls, real = [], getattr(owner, name)

    def replacement(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            act()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, replacement)
    return calls


def fail_with_full_disk():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("existing", [None, b"old"])
def test_full_disk_at_any_write_of_torch_save_leaves_what_was_there(existing, tmp_path):
    if existing:
        (tmp_path / "file").write_bytes(existing)
    for number in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch:
            calls = at_call(patch, files._HashingFile, "write", number, fail_with_full_disk)
            try:
                write_atomically(tmp_path / "file", lambda file: torch.save({0: torch.zeros(1000)}, file))
            except OSError:
                failed = True
            else:
                failed = False
        assert failed == (len(calls) >= number)  # never silently, never as another error
        if not failed:
            break
        assert contents(tmp_path) == ({"file": existing} if existing else {})
    assert number > 5
    assert load_tensors(tmp_path / "file")[0].tolist() == [0] * 1000


@pytest.mark.parametrize("name", ["fsync", "chmod", "replace"])
def test_failure_after_the_last_write_leaves_nothing(name, tmp_path, monkeypatch):
    at_call(monkeypatch, os, name, 1, fail_with_full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RuntimeError])
def test_other_errors_of_the_writer_pass_and_leave_nothing(error, tmp_path):
    def fail(file):
        file.write(b"half")
        raise error("mine")

    with pytest.raises(error, match="mine"):
        write_atomically(tmp_path / "file", fail)
    assert not list(tmp_path.iterdir())


def test_bytes_do_not_depend_on_the_name(tmp_path):
    for name in ("a", "a-much-longer-name"):
        write_atomically(tmp_path / name, lambda file: torch.save({0: torch.ones(3)}, file))
    first, second = contents(tmp_path).values()
    assert first == second


# ---------------------------------------------------------------------------------------------------- a folder's life


def test_nothing_is_touched_before_the_first_write(tmp_path):
    writer = ArtifactWriter(tmp_path / "folder", CLAIM, PIECES)
    assert writer.missing() == PIECES
    assert not writer.finish()
    assert not (tmp_path / "folder").exists()


def test_manifest_appears_with_the_last_piece(tmp_path):
    writer = ArtifactWriter(tmp_path / "folder", CLAIM, PIECES)
    fill(writer, PIECES[:2])
    assert writer.missing() == PIECES[2:]
    assert not writer.finish()
    assert not (writer.folder / "manifest.json").exists()
    assert writer.metrics() == {"layer.0": {"cost": 0}, "layer.1": {"cost": 1}}
    with pytest.raises(MoEficationError, match=r"unfinished \(2 parts done\); run llama_split_clustering.py again"):
        open_finished(writer.folder, "split")

    resumed = ArtifactWriter(writer.folder, CLAIM, PIECES)
    assert resumed.missing() == PIECES[2:]
    fill(resumed, PIECES[2:])
    assert resumed.finish()
    assert resumed.finished
    assert not (writer.folder / "manifest.parts").exists()
    manifest = json.loads((writer.folder / "manifest.json").read_text())
    assert manifest["options"] == CLAIM.options
    assert manifest["metrics"] == {piece: {"cost": i} for i, piece in enumerate(PIECES)}
    for name, entry in manifest["files"].items():
        data = (writer.folder / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("redone", [False, True])
def test_a_piece_without_files_may_be_the_first_write(redone, finished, tmp_path):
    folder = finished if redone else tmp_path / "other"
    writer = ArtifactWriter(folder, CLAIM, PIECES, overwrite=redone)
    writer.write_piece(PIECES[0], {}, {"cost": 7})
    assert writer.missing() == PIECES[1:]
    assert writer.metrics() == {"layer.0": {"cost": 7}}
    assert ArtifactWriter(folder, CLAIM, PIECES).missing() == PIECES[1:]  # claimed, and so resumed
    fill(writer, PIECES[1:])
    assert writer.finish()
    assert writer.metrics()["layer.0"] == {"cost": 7}


def test_finished_folder_is_left_alone(finished):
    before = contents(finished)
    writer = ArtifactWriter(finished, CLAIM, PIECES)
    assert writer.was_finished
    assert writer.missing() == []
    assert writer.finish()
    assert contents(finished) == before


@pytest.mark.parametrize("last", [0, 1])
def test_two_writers_fill_one_folder_like_one(last, finished, tmp_path):
    writers = [ArtifactWriter(tmp_path / "two", CLAIM, PIECES) for _ in range(2)]
    fill(writers[0], PIECES[:1])
    fill(writers[1], PIECES[1:2])
    fill(writers[0], PIECES[2:])
    writers[last].finish()
    assert all(writer.finish() and writer.finished for writer in writers)
    assert contents(tmp_path / "two") == contents(finished)


@settings(max_examples=25, deadline=None)
@given(st.permutations(PIECES), st.lists(st.integers(0, 2), min_size=3, max_size=3), st.permutations(range(3)))
def test_any_three_writers_in_any_order_fill_one_folder_like_one(order, writer_of, finishing):
    with tempfile.TemporaryDirectory() as root:
        alone = ArtifactWriter(Path(root, "one"), CLAIM, PIECES)
        fill(alone, PIECES)
        assert alone.finish()
        writers = [ArtifactWriter(Path(root, "three"), CLAIM, PIECES, shared=True) for _ in range(3)]
        for done, (piece, number) in enumerate(zip(order, writer_of, strict=True), start=1):
            fill(writers[number], [piece])
            assert writers[number].finish() == (done == 3)
            assert (Path(root, "three") / "manifest.json").exists() == (done == 3)
        assert all(writers[number].finish() for number in finishing if number in writer_of)
        assert contents(Path(root, "three")) == contents(Path(root, "one"))


@pytest.mark.parametrize(("owner", "name"), [(os, "replace"), (Path, "unlink"), (Path, "rmdir")])
def test_a_writer_may_finish_while_another_does(owner, name, finished, tmp_path):
    for number in itertools.count(1):
        folder = tmp_path / f"two-{number}"
        writers = [ArtifactWriter(folder, CLAIM, PIECES) for _ in range(2)]
        fill(writers[0], PIECES[:1])
        fill(writers[1], PIECES[1:])
        with pytest.MonkeyPatch.context() as patch:
            calls = at_call(patch, owner, name, number, lambda: writers[1].finish())  # noqa: B023 (called at once)
            assert writers[0].finish()
        assert contents(folder) == contents(finished)
        if len(calls) < number:
            break
    assert number > 1


def hold(folder, begun):
    """Begin to fill an exclusive folder, and never finish."""
    writer = ArtifactWriter(folder, CLAIM, PIECES, exclusive=True)
    fill(writer, PIECES[:1])
    begun.set()
    time.sleep(600)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exclusive_folder_has_one_writer_at_a_time(overwrite, tmp_path):
    """A process of its own holds it, until it is killed."""
    folder = tmp_path / "folder"
    processes = multiprocessing.get_context("spawn")
    begun = processes.Event()
    first = processes.Process(target=hold, args=(folder, begun))
    first.start()
    try:
        assert begun.wait(60)
        before = contents(folder)
        second = ArtifactWriter(folder, CLAIM, PIECES, exclusive=True, overwrite=overwrite)
        with pytest.raises(MoEficationError, match=r"another run is writing .*: let it finish"):
            second.begin()
        assert contents(folder) == before
    finally:
        first.kill()
        first.join()
    fill(second, second.missing())
    assert second.finish()
    assert {path.name for path in folder.iterdir()} == {"files", "manifest.json"}


def test_stale_temporary_files_are_swept(finished, tmp_path):
    folder = tmp_path / "folder2"
    writer = ArtifactWriter(folder, CLAIM, PIECES)
    fill(writer, PIECES[:1])
    for stale in ("files/.layer.1.abc.tmp", "manifest.parts/.layer.1.json.abc.tmp", ".manifest.json.abc.tmp"):
        (folder / stale).write_text("of a killed run")
    writer = ArtifactWriter(folder, CLAIM, PIECES)
    fill(writer, PIECES[1:])
    writer.finish()
    assert contents(folder) == contents(finished)


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("state", ["finished", "begun"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": {"num_experts": 16, "seed": 0}}, "was made with num_experts 8, this run asks for 16"),
        ({"options": {"num_experts": 8, "seed": 0, "new": 1}}, "was made with new None, this run asks for 1"),
        ({"source": {"name": "x", "fingerprint": "other"}}, "was made from another model (llama_7B"),
        ({"inputs": {"text": "other"}}, "was made from another text"),
        ({"stage": "select"}, "was written by llama_split_clustering.py"),
    ],
)
def test_other_claims_are_refused(state, change, words, tmp_path):
    writer = ArtifactWriter(tmp_path / "folder", CLAIM, PIECES)
    fill(writer, PIECES if state == "finished" else PIECES[:1])
    writer.finish()
    before = contents(tmp_path)
    with pytest.raises(MoEficationError) as error:
        ArtifactWriter(writer.folder, dataclasses.replace(CLAIM, **change), PIECES)
    assert words in str(error.value)
    assert str(writer.folder) in str(error.value)
    assert contents(tmp_path) == before


def test_environment_counts_only_while_unfinished(tmp_path):
    other = dataclasses.replace(CLAIM, environment={"torch": "3"})
    writer = ArtifactWriter(tmp_path / "folder", CLAIM, PIECES)
    fill(writer, PIECES[:1])
    with pytest.raises(MoEficationError, match="was begun with torch 2, this run has 3"):
        ArtifactWriter(writer.folder, other, PIECES)
    fill(writer, PIECES[1:])
    writer.finish()
    assert ArtifactWriter(writer.folder, other, PIECES).was_finished


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(MoEficationError, match=r"holds files but no manifest.json: not ours to fill"):
            ArtifactWriter(tmp_path, CLAIM, PIECES, overwrite=overwrite)
    with pytest.raises(MoEficationError, match="is a file"):
        ArtifactWriter(tmp_path / "notes.txt", CLAIM, PIECES)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("options", [CLAIM.options, {"num_experts": 4, "seed": 0}])
@pytest.mark.parametrize("state", ["finished", "begun"])
def test_overwrite_removes_only_what_was_written_here(state, options, tmp_path):
    writer = ArtifactWriter(tmp_path / "folder", CLAIM, PIECES)
    fill(writer, PIECES if state == "finished" else PIECES[:2])
    writer.finish()
    (writer.folder / "files" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    claim = dataclasses.replace(CLAIM, options=options)
    writer = ArtifactWriter(writer.folder, claim, PIECES[2:], overwrite=True)
    assert writer.missing() == PIECES[2:]
    assert contents(tmp_path) == before  # until the first write
    fill(writer, PIECES[2:])
    assert writer.finish()
    after = contents(writer.folder)
    assert set(after) == {"files/layer.2", "files/notes.txt", "manifest.json"}
    assert after["files/notes.txt"] == b"mine"


def test_overwrite_of_another_stage_is_refused(finished):
    before = contents(finished)
    with pytest.raises(MoEficationError, match=r"was written by llama_split_clustering.py"):
        ArtifactWriter(finished, dataclasses.replace(CLAIM, stage="select"), PIECES, overwrite=True)
    assert contents(finished) == before


def test_processes_of_one_run_overwrite_once(finished):
    writers = [ArtifactWriter(finished, CLAIM, PIECES, overwrite=True, shared=True) for _ in range(2)]
    assert [writer.missing() for writer in writers] == [PIECES, PIECES]
    fill(writers[0], PIECES[:2])
    fill(writers[1], PIECES[2:])  # joins: what the first has written stays
    assert writers[1].finish()
    assert len(contents(finished)) == 4


def overwrite_in_step(folders, rank, step):
    """One of two processes that overwrite finished folders, each filling its part of them."""
    for folder in folders:
        step.wait()
        writer = ArtifactWriter(folder, OTHER, PIECES, overwrite=True, shared=True)
        fill(writer, PIECES[rank::2])
        writer.finish()


def test_processes_that_overwrite_at_the_same_time(tmp_path):
    folders = [tmp_path / str(number) for number in range(25)]
    for folder in folders:
        made(folder, CLAIM, PIECES)
    processes = multiprocessing.get_context("spawn")
    step = processes.Barrier(2, timeout=30)  # one that fails is not waited for
    both = [processes.Process(target=overwrite_in_step, args=(folders, rank, step)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    expected = made(tmp_path / "expected", OTHER, PIECES)
    assert all(contents(folder) == expected for folder in folders)


def made(folder: Path, claim: Claim, pieces: list[str], *, finish: bool = True) -> dict[str, bytes]:
    """Fill a folder, and read it."""
    writer = ArtifactWriter(folder, claim, pieces)
    fill(writer, pieces)
    if finish:
        assert writer.finish()
    return contents(folder)


class Killed(BaseException):
    """Nothing runs after it."""


def die():
    raise Killed


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_killed_while_it_clears(is_finished, tmp_path):
    """At every removal: with the old options it makes the old folder, with the new ones the new."""
    old, new = made(tmp_path / "old", CLAIM, PIECES), made(tmp_path / "new", OTHER, PIECES[:1])
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        made(folder, CLAIM, PIECES, finish=is_finished)
        with pytest.MonkeyPatch.context() as patch:
            calls = at_call(patch, clearing, "remove", number, die)
            with contextlib.suppress(Killed):
                ArtifactWriter(folder, OTHER, PIECES[:1], overwrite=True).begin()
        if len(calls) < number:
            break
        again = shutil.copytree(folder, tmp_path / f"{number} again")
        for writer, expected in (
            (ArtifactWriter(again, CLAIM, PIECES), old),
            (ArtifactWriter(folder, OTHER, PIECES[:1], overwrite=True), new),
        ):
            fill(writer, writer.missing())
            assert writer.finish()
            assert contents(writer.folder) == expected
    assert number > 5


def test_files_that_no_piece_records_are_cleared_too(tmp_path):
    """Of a run killed between a file, or half of it, and the record of its unit."""
    expected = made(tmp_path / "expected", OTHER, PIECES)
    folder = tmp_path / "folder"
    writer = ArtifactWriter(folder, CLAIM, PIECES)
    fill(writer, PIECES[:1])
    writer.write_tensors("deep/alone", torch.zeros(3))
    writer.write_tensors("deep/half", torch.zeros(3))
    (folder / "deep" / "half").rename(folder / "deep" / ".half.abc.tmp")
    (folder / "mine").write_text("mine")
    writer = ArtifactWriter(folder, OTHER, PIECES, overwrite=True)
    fill(writer, PIECES)
    assert writer.finish()
    assert contents(folder) == expected | {"mine": b"mine"}
    assert not (folder / "deep").exists()


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_damaged_files_of_a_half_finished_folder_are_made_again(harm, tmp_path, caplog):
    expected = made(tmp_path / "expected", CLAIM, PIECES)
    folder = tmp_path / "folder"
    fill(ArtifactWriter(folder, CLAIM, PIECES), PIECES[:2])
    file = folder / "files" / PIECES[1]
    file.write_bytes(file.read_bytes()[:-1])
    if harm == "gone":
        file.unlink()
    writer = ArtifactWriter(folder, CLAIM, PIECES)
    assert writer.missing() == PIECES[1:]
    fill(writer, writer.missing())
    assert "files of layer.1 are missing or cut short; it is made again" in caplog.text
    assert writer.finish()
    assert contents(folder) == expected


def test_manifest_that_names_files_outside_removes_nothing_there(finished, tmp_path):
    (tmp_path / "precious").write_text("mine")
    manifest = json.loads((finished / "manifest.json").read_text())
    manifest["files"]["../precious"] = {"size": 4, "sha256": "x"}
    (finished / "manifest.json").write_text(json.dumps(manifest))
    writer = ArtifactWriter(finished, CLAIM, PIECES, overwrite=True)
    with pytest.raises(MoEficationError, match=r"names ../precious, outside of it"):
        fill(writer, PIECES)
    with pytest.raises(MoEficationError, match="outside of it"):
        open_finished(finished, "split").load("../precious")
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is damaged"),
        (b"[1]", "is damaged (not a JSON object)"),
        (b"\x00\xff", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b'{"stage": "split"}', "has format None, this version reads 1"),
        (b'{"stage": "split", "format": 2}', "has format 2, this version reads 1"),
        (b'{"stage": "brew", "format": 1}', "is not a manifest of this toolkit"),
        (b'{"stage": "split", "format": 1}', "is damaged (no options)"),
        (b'{"model_type": "llama"}', "is not a manifest of this toolkit"),
    ],
)
def test_bad_manifests_are_refused(content, words, finished):
    (finished / "manifest.json").write_bytes(content)
    for use in (lambda: open_finished(finished, "split"), lambda: ArtifactWriter(finished, CLAIM, PIECES)):
        with pytest.raises(MoEficationError) as error:
            use()
        assert words in str(error.value)
        assert "manifest.json" in str(error.value)


# ---------------------------------------------------------------------------------------------------- reading


def test_load_checks_size_and_sum(finished):
    artifact = open_finished(finished, "split")
    path = finished / "files" / "layer.1"
    assert artifact.load("files/layer.1").tolist() == [1, 2, 3]
    good = path.read_bytes()
    for position in {*range(0, len(good), 19), len(good) - 1}:
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(MoEficationError, match=r"layer.1 is damaged: its checksum"):
            artifact.load("files/layer.1")
    path.write_bytes(good[:-1])
    with pytest.raises(MoEficationError, match=r"layer.1 has \d+ bytes, the manifest says"):
        artifact.load("files/layer.1")
    with pytest.raises(MoEficationError, match="the manifest says"):
        artifact.check_sizes()
    path.unlink()
    with pytest.raises(MoEficationError, match="is missing although the manifest lists it"):
        artifact.load("files/layer.1")
    with pytest.raises(MoEficationError, match="has no files/other"):
        artifact.load("files/other")


def test_folders_of_other_kinds_do_not_open(finished, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, stage, words in [
        (tmp_path / "absent", "split", "is not a folder; run llama_split_clustering.py first"),
        (finished / "manifest.json", "split", "is not a folder"),
        (tmp_path / "empty", "select", "has no manifest.json: not a folder written by llama_select_mlp.py"),
        (finished, "select", "was written by llama_split_clustering.py, not by llama_select_mlp.py"),
    ]:
        with pytest.raises(MoEficationError) as error:
            open_finished(folder, stage)
        assert f"{folder} {words}" in str(error.value)
    manifest = json.loads((finished / "manifest.json").read_text())
    (finished / "manifest.json").write_text(json.dumps(manifest | {"files": None}))
    with pytest.raises(MoEficationError, match=r"is damaged \(no list of files"):
        open_finished(finished, "split")


def test_mismatch_with_the_reader_is_named(finished):
    artifact = open_finished(finished, "split")
    artifact.require_source("abc", "llama_7B")
    artifact.require_option("num_experts", 8)
    with pytest.raises(MoEficationError, match=r"was made from another model \(llama_7B\) than alpaca"):
        artifact.require_source("abcd", "alpaca")
    with pytest.raises(MoEficationError, match="was made for num_experts 8 of llama_7B, this run asks for 16"):
        artifact.require_option("num_experts", 16)


def test_digest_stands_for_the_files_alone(finished, tmp_path):
    def digest_of(name: str, pieces: list[str]) -> str:
        claim = dataclasses.replace(CLAIM, options={name: 1})
        writer = ArtifactWriter(tmp_path / name, claim, pieces)
        fill(writer, pieces)
        assert writer.finish()
        return open_finished(writer.folder, "split").digest

    original = open_finished(finished, "split").digest
    assert digest_of("same", PIECES) == original
    assert digest_of("fewer", PIECES[:2]) != original


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_not_run(zipped, tmp_path):
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "file", _use_new_zipfile_serialization=zipped)
    with pytest.raises(MoEficationError, match="is not a whole file of plain tensors, refused"):
        load_tensors(tmp_path / "file")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("read", ["load", "map"])
def test_code_in_a_folder_is_refused_not_run_even_with_a_true_checksum(read, tmp_path):
    writer = ArtifactWriter(tmp_path / "folder", CLAIM, PIECES[:1])
    entry = writer.write("bomb", lambda file: torch.save({0: Bomb(tmp_path / "exploded")}, file))
    writer.write_piece(PIECES[0], {"bomb": entry})
    assert writer.finish()
    with pytest.raises(MoEficationError, match="is not a whole file of plain tensors, refused"):
        getattr(open_finished(writer.folder, "split"), read)("bomb")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("read", ["load", "map"])
def test_what_is_no_file_is_refused(read, finished):
    path = finished / "files" / "layer.1"
    artifact = open_finished(finished, "split")
    assert getattr(artifact, read)("files/layer.1").tolist() == [1, 2, 3]
    path.unlink()
    for make in (path.mkdir, lambda: (path.rmdir(), os.mkfifo(path))):
        make()
        with pytest.raises(MoEficationError, match="is missing although the manifest lists it"):
            getattr(artifact, read)("files/layer.1")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(100)])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(MoEficationError, match="refused"):
        load_tensors(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    for other in (tmp_path, tmp_path / "fifo", tmp_path / "absent"):
        with pytest.raises(MoEficationError, match="is not a file"):
            load_tensors(other)


@pytest.mark.parametrize("entry", [3, None, {}, {"size": "x", "sha256": "y"}, {"size": 3}])
def test_malformed_entries_are_refused(entry, finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    manifest["files"]["files/layer.0"] = entry
    (finished / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        MoEficationError, match=r"is damaged \(no list of files .*remove its folder and run the stage again"
    ):
        open_finished(finished, "split")


def test_a_finished_folder_that_lost_a_file_says_so_and_is_redone(finished):
    before = contents(finished)
    (finished / "files" / "layer.1").unlink()
    with pytest.raises(MoEficationError, match=r"layer.1 is missing .* again with overwrite"):
        ArtifactWriter(finished, CLAIM, PIECES)
    writer = ArtifactWriter(finished, CLAIM, PIECES, overwrite=True)
    fill(writer, PIECES)
    assert writer.finish()
    assert contents(finished) == before


def test_overwrite_is_not_offered_where_it_would_be_refused(finished):
    with pytest.raises(MoEficationError, match=r"llama_split_clustering.py; choose another save_path$"):
        ArtifactWriter(finished, dataclasses.replace(CLAIM, stage="select"), PIECES)
