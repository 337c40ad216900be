"""Folders that hand work from stage to stage: whole or absent, never mixed, never foreign, never executed."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Bomb
from pipeline import Killed, contents

from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.storage import folder as folder_module
from run_moefication.moefication.storage.artifact import history_of, open_finished
from run_moefication.moefication.storage.folder import ArtifactWriter
from run_moefication.moefication.storage.manifest import ArtifactSpec
from run_moefication.moefication.storage.tensors import load_tensors

SPEC = ArtifactSpec(
    stage="split",
    options={"num_experts": 8, "seed": 0},
    source={"name": "llama_7B", "fingerprint": "abc"},
    environment={"torch": "2"},
    inputs={"text": "digest"},
)
OTHER = dataclasses.replace(SPEC, options={"num_experts": 8, "seed": 1})
fork = multiprocessing.get_context("fork")  # a new interpreter would import torch first
PARTS = ["layer.0", "layer.1", "layer.2"]


def fill(writer: ArtifactWriter, parts: list[str]) -> None:
    for part in parts:
        entry = writer.write_tensors(f"files/{part}", torch.arange(3) + int(part[-1]))
        writer.write_part(part, {f"files/{part}": entry}, {"cost": int(part[-1])})


def made(folder: Path, spec: ArtifactSpec = SPEC, parts: list[str] = PARTS, **options: bool) -> dict[str, bytes]:
    """Fill a folder to its end, and read it."""
    writer = ArtifactWriter(folder, spec, parts, **options)
    fill(writer, writer.missing())
    assert writer.finish()
    return contents(folder)


@pytest.fixture
def finished(tmp_path) -> Path:
    made(tmp_path / "folder")
    return tmp_path / "folder"


def test_manifest_appears_with_the_last_part(tmp_path):
    writer = ArtifactWriter(tmp_path / "folder", SPEC, PARTS)
    assert writer.missing() == PARTS
    assert not writer.finish()
    assert not list(tmp_path.iterdir())  # nothing is touched before the first write
    fill(writer, PARTS[:2])
    assert writer.missing() == PARTS[2:]
    assert not writer.finish()
    assert not (writer.folder / "manifest.json").exists()
    assert writer.metrics() == {"layer.0": {"cost": 0}, "layer.1": {"cost": 1}}
    with pytest.raises(MoEficationError, match=r"unfinished \(2 parts done\); run llama_split_clustering.py again"):
        open_finished(writer.folder, "split")

    resumed = ArtifactWriter(writer.folder, SPEC, PARTS)
    assert resumed.missing() == PARTS[2:]
    fill(resumed, PARTS[2:])
    assert resumed.finish()
    assert resumed.finished
    assert not (writer.folder / "manifest.parts").exists()
    manifest = json.loads((writer.folder / "manifest.json").read_text())
    assert manifest["options"] == SPEC.options
    assert manifest["metrics"] == {part: {"cost": i} for i, part in enumerate(PARTS)}
    for name, entry in manifest["files"].items():
        data = (writer.folder / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_part_without_files_may_be_the_first_write(finished):
    writer = ArtifactWriter(finished, OTHER, PARTS, overwrite=True)
    writer.write_part(PARTS[0], {}, {"cost": 7})
    assert writer.missing() == PARTS[1:]
    assert ArtifactWriter(finished, OTHER, PARTS).metrics() == {"layer.0": {"cost": 7}}  # begun, and so resumed
    fill(writer, PARTS[1:])
    assert writer.finish()
    assert writer.metrics()["layer.0"] == {"cost": 7}


def hold(folder, begun):
    """Begin to fill an exclusive folder, and never finish."""
    writer = ArtifactWriter(folder, SPEC, PARTS, exclusive=True)
    fill(writer, PARTS[:1])
    begun.set()
    time.sleep(600)


def test_an_exclusive_folder_is_free_after_an_error(tmp_path):
    """Even while its traceback, and so the writer, is kept, as notebooks do."""

    def interrupted() -> None:
        with ArtifactWriter(tmp_path / "folder", SPEC, PARTS, exclusive=True) as writer:
            fill(writer, PARTS[:1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        interrupted()
    with ArtifactWriter(tmp_path / "folder", SPEC, PARTS, exclusive=True) as again:
        assert again.missing() == PARTS[1:]
        fill(again, PARTS[1:])
        assert again.finish()
    assert kept.traceback


def test_a_part_may_be_written_by_another_thread(tmp_path):
    with ArtifactWriter(tmp_path / "folder", SPEC, PARTS, exclusive=True) as writer:
        with ThreadPoolExecutor(1) as other:
            other.submit(fill, writer, PARTS).result()
        assert writer.finish()


def test_an_exclusive_folder_has_one_writer_at_a_time(tmp_path):
    """A process of its own holds it, until it is killed."""
    folder, begun = tmp_path / "folder", fork.Event()
    first = fork.Process(target=hold, args=(folder, begun))
    first.start()
    try:
        assert begun.wait(300)
        before = contents(tmp_path)
        for overwrite in (False, True):
            second = ArtifactWriter(folder, SPEC, PARTS, exclusive=True, overwrite=overwrite)
            with pytest.raises(MoEficationError, match=r"another run is writing .*: let it finish"):
                second.begin()
        assert contents(tmp_path) == before
    finally:
        first.kill()
        first.join()
    fill(second, second.missing())
    assert second.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}
    assert {path.name for path in folder.iterdir()} == {"files", "manifest.json"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": {"num_experts": 16, "seed": 0}}, "was made with num_experts 8, this run asks for 16"),
        ({"options": {"num_experts": 8, "seed": 0, "new": 1}}, "was made with new None, this run asks for 1"),
        (
            {"source": {"name": "x", "fingerprint": "other"}},
            "was made from another model (llama_7B: its weights or config differ)",
        ),
        ({"inputs": {"text": "other"}}, "was made from another text"),
        ({"stage": "select"}, "was written by llama_split_clustering.py"),
    ],
)
def test_other_specs_are_refused(change, words, finished, tmp_path):
    """Overwriting is offered, but for the folder of another stage, where it would be refused."""
    is_foreign = "stage" in change
    words += "; choose another save_path" + ("" if is_foreign else ", or add overwrite to redo it")
    begun = tmp_path / "begun"
    fill(ArtifactWriter(begun, SPEC, PARTS), PARTS[:1])
    before = contents(tmp_path)
    for folder, overwrite in itertools.product((begun, finished), {False, is_foreign}):
        with pytest.raises(MoEficationError, match=re.escape(f"{folder} {words}") + "$"):
            ArtifactWriter(folder, dataclasses.replace(SPEC, **change), PARTS, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_environment_counts_only_while_unfinished(tmp_path):
    other = dataclasses.replace(SPEC, environment={"torch": "3"})
    writer = ArtifactWriter(tmp_path / "folder", SPEC, PARTS)
    fill(writer, PARTS[:1])
    with pytest.raises(MoEficationError, match="was begun with torch 2, this run has 3"):
        ArtifactWriter(writer.folder, other, PARTS)
    fill(writer, PARTS[1:])
    writer.finish()
    assert ArtifactWriter(writer.folder, other, PARTS).was_finished


def assert_refused(folder: Path, words: str, root: Path) -> None:
    """With overwrite or without; and nothing changes."""
    before = contents(root)
    for overwrite in (False, True):
        with pytest.raises(MoEficationError, match=words):
            ArtifactWriter(folder, SPEC, PARTS, overwrite=overwrite)
    assert contents(root) == before


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert_refused(tmp_path, "holds files but no manifest.json: not ours to fill", tmp_path)
    assert_refused(tmp_path / "notes.txt", "is a file", tmp_path)


def test_overwrite_removes_only_what_was_written_here(finished, tmp_path):
    (finished / "files" / "layer.9").write_text("mine")
    (finished / "empty").mkdir()
    before = contents(tmp_path)
    writer = ArtifactWriter(finished, OTHER, PARTS[2:], overwrite=True)
    assert writer.missing() == PARTS[2:]
    assert contents(tmp_path) == before  # until the first write
    fill(writer, PARTS[2:])
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith(".")} == before
    assert writer.finish()
    assert set(contents(tmp_path)) == {f"folder/{name}" for name in ("files/layer.2", "files/layer.9", "manifest.json")}
    assert (finished / "files" / "layer.9").read_text() == "mine"
    assert (finished / "empty").is_dir()
    # In the place of a new file it is not overwritten either.
    writer = ArtifactWriter(finished, SPEC, ["layer.9"], overwrite=True)
    fill(writer, ["layer.9"])
    with pytest.raises(MoEficationError, match=r"files/layer.9 is in the way, and not ours"):
        writer.finish()
    (finished / "files" / "layer.9").unlink()
    assert ArtifactWriter(finished, SPEC, ["layer.9"]).finish()


@pytest.mark.parametrize("is_link", [True, False])
def test_what_has_the_partial_folder_s_name_and_is_not_ours_is_refused(is_link, tmp_path):
    foreign = tmp_path / ("elsewhere" if is_link else ".folder.partial")
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    if is_link:
        (tmp_path / ".folder.partial").symlink_to(foreign)
    assert_refused(tmp_path / "folder", r"\.folder\.partial is in the way, and not ours: move it away", tmp_path)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "folder").symlink_to(tmp_path / "disk" / "real")
    for spec in (SPEC, OTHER):
        made(tmp_path / "folder", spec, overwrite=True)
    assert (tmp_path / "folder").is_symlink()
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"real"}
    assert open_finished(tmp_path / "folder", "split").options == OTHER.options


def test_a_folder_that_was_moved_and_linked_is_not_replaced(tmp_path):
    before = made(tmp_path / "folder")
    (tmp_path / "folder" / "files").rename(tmp_path / "moved")
    (tmp_path / "folder" / "files").symlink_to(tmp_path / "moved")
    with pytest.raises(MoEficationError, match="files is a link, which cannot be replaced: move its folder back"):
        made(tmp_path / "folder", OTHER, overwrite=True)
    (tmp_path / "folder" / "files").unlink()
    (tmp_path / "moved").rename(tmp_path / "folder" / "files")
    assert contents(tmp_path / "folder") == before


def test_an_unfinished_folder_of_an_earlier_version_is_refused(tmp_path):
    """These filled a folder in place."""
    (tmp_path / "manifest.parts").mkdir()
    (tmp_path / "manifest.parts" / "claim.json").write_text("{}")
    assert_refused(tmp_path, "or remove what an earlier version left unfinished", tmp_path)


def overwrite_in_step(folders, rank, step):
    """One of two processes that overwrite finished folders, each filling its part of them."""
    for folder in folders:
        step.wait()
        writer = ArtifactWriter(folder, OTHER, PARTS, overwrite=True, shared=True)
        fill(writer, PARTS[rank::2])
        writer.finish()


def test_processes_that_overwrite_at_the_same_time(tmp_path):
    folders = [tmp_path / str(number) for number in range(8)]
    for folder in folders:
        made(folder)
    step = fork.Barrier(2, timeout=120)  # one that fails is not waited for
    both = [fork.Process(target=overwrite_in_step, args=(folders, rank, step)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    expected = made(tmp_path / "expected", OTHER)
    assert [contents(folder) for folder in folders] == [expected] * len(folders)
    assert {path.name for path in tmp_path.iterdir()} == {"expected", *map(str, range(8))}


@contextlib.contextmanager
def killed_at(number: int):
    """The process dies at its `number`-th change of a folder. Gives a list, which says whether it did."""
    calls, died = itertools.count(1), []

    def operate(real, *args, **kwargs):
        if next(calls) >= number:
            died.append(1)
            raise Killed
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, functools.partial(operate, getattr(os, name)))
        with contextlib.suppress(Killed):
            yield died


def test_a_run_killed_at_any_change_of_a_folder(tmp_path):
    """Whatever it was doing, the next run ends in the same bytes, whether it resumes or begins anew, and foreign files
    are there. Until then a reader finds the old folder, or is refused."""
    old, new = made(tmp_path / "old", SPEC, PARTS[:2]), made(tmp_path / "new", OTHER)
    foreign = {"notes.txt": b"mine", "files/notes.txt": b"mine"}
    for number in itertools.count(1):
        root = tmp_path / str(number)
        folder = shutil.copytree(tmp_path / "old", root / "folder")
        for name, data in foreign.items():
            (folder / name).write_bytes(data)

        def run(folder, overwrite):
            assert made(folder, OTHER, overwrite=overwrite, exclusive=True) == new | foreign
            # Of a run that was killed when all was done but to let go of its lock.
            assert {path.name for path in folder.parent.iterdir()} <= {"folder", ".folder.lock"}

        with killed_at(number) as died:
            run(folder, True)
        if not died:
            break
        try:
            options = open_finished(folder, "split").options
        except MoEficationError as error:
            assert "unfinished" in str(error)  # noqa: PT017
            options = None
        assert {path.name for path in root.iterdir()} <= {"folder", ".folder.partial", ".folder.lock"}
        anew = shutil.copytree(root, tmp_path / f"{number} anew")
        run(anew / "folder", True)
        # What had not begun has not been asked to replace the old one.
        run(folder, options == SPEC.options and not (root / ".folder.partial/manifest.parts/spec.json").exists())
    assert number > 30
    assert old["manifest.json"] != new["manifest.json"]


def test_damaged_files_of_a_half_finished_folder_are_made_again(finished, tmp_path, caplog):
    for harm in ("cut", "gone"):
        fill(ArtifactWriter(tmp_path / harm, SPEC, PARTS), PARTS[:2])
        file = tmp_path / f".{harm}.partial" / "files" / PARTS[1]
        file.write_bytes(file.read_bytes()[:-1])
        if harm == "gone":
            file.unlink()
        assert ArtifactWriter(tmp_path / harm, SPEC, PARTS).missing() == PARTS[1:]
        assert made(tmp_path / harm) == contents(finished)
        assert f"{harm}: files of layer.1 are missing or cut short; it is made again" in caplog.text


def test_manifest_that_names_files_outside_removes_nothing_there(finished, tmp_path):
    (tmp_path / "precious").write_text("mine")
    manifest = json.loads((finished / "manifest.json").read_text())
    manifest["files"]["../precious"] = {"size": 4, "sha256": "x"}
    (finished / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(finished, r"names ../precious, outside of it", tmp_path)
    with pytest.raises(MoEficationError, match="outside of it"):
        open_finished(finished, "split").load("../precious")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]", "is not a JSON object; remove its folder and run the stage again"),
        (b"\x00\xff", "is not JSON; remove its folder"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"stage": "split"}', "has format None, this version reads 1"),
        (b'{"stage": "split", "format": 2}', "has format 2, this version reads 1"),
        (b'{"stage": "brew", "format": 1}', "is not a manifest of this toolkit"),
        (b'{"stage": "split", "format": 1}', "is damaged (no options)"),
    ],
)
def test_bad_manifests_are_refused(content, words, finished):
    (finished / "manifest.json").write_bytes(content)
    for use in (lambda: open_finished(finished, "split"), lambda: ArtifactWriter(finished, SPEC, PARTS)):
        with pytest.raises(MoEficationError, match=re.escape(f"manifest.json {words}")):
            use()


def test_load_checks_size_and_sum(finished):
    artifact = open_finished(finished, "split")
    path = finished / "files" / "layer.1"
    assert artifact.load("files/layer.1").tolist() == [1, 2, 3]
    good = path.read_bytes()
    for position in (0, len(good) // 2, len(good) - 1):
        flipped = bytearray(good)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(MoEficationError, match=r"layer.1 is damaged: its checksum"):
            artifact.load("files/layer.1")
    path.write_bytes(good[:-1])
    with pytest.raises(MoEficationError, match=r"layer.1 has \d+ bytes, the manifest says"):
        artifact.load("files/layer.1")
    with pytest.raises(MoEficationError, match="the manifest says"):
        artifact.check_sizes()
    path.unlink()
    for make in (lambda: None, path.mkdir, lambda: (path.rmdir(), os.mkfifo(path))):
        make()
        for read in (artifact.load, artifact.map):
            with pytest.raises(MoEficationError, match="is missing although the manifest lists it"):
                read("files/layer.1")
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
        with pytest.raises(MoEficationError, match=re.escape(f"{folder} {words}")):
            open_finished(folder, stage)
    manifest = json.loads((finished / "manifest.json").read_text())
    for files in (None, {"a": 3}, {"a": {}}, {"a": {"size": "x", "sha256": "y"}}, {"a": {"size": 3}}):
        (finished / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
        with pytest.raises(MoEficationError, match=r"damaged \(no list of files .*remove its folder and run the sta"):
            open_finished(finished, "split")


def test_digest_stands_for_the_files_alone(finished, tmp_path):
    for name, parts in (("same", PARTS), ("fewer", PARTS[:2])):
        made(tmp_path / name, OTHER, parts)
    digest, same, fewer = (open_finished(tmp_path / name, "split").digest for name in ("folder", "same", "fewer"))
    assert digest == same != fewer


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_not_run_even_with_a_true_checksum(zipped, tmp_path):
    writer = ArtifactWriter(tmp_path / "folder", SPEC, PARTS[:1])
    bomb = {0: Bomb(tmp_path / "exploded")}
    entry = writer.write("bomb", lambda file: torch.save(bomb, file, _use_new_zipfile_serialization=zipped))
    writer.write_part(PARTS[0], {"bomb": entry})
    assert writer.finish()
    artifact = open_finished(writer.folder, "split")
    for read in (artifact.load, artifact.map, lambda name: load_tensors(writer.folder / name)):
        with pytest.raises(MoEficationError, match="is not a whole file of plain tensors, refused"):
            read("bomb")
    assert not (tmp_path / "exploded").exists()


def test_a_finished_folder_that_lost_a_file_says_so_and_is_redone(finished):
    before = contents(finished)
    (finished / "files" / "layer.1").unlink()
    with pytest.raises(MoEficationError, match=r"layer.1 is missing .* again with overwrite"):
        ArtifactWriter(finished, SPEC, PARTS)
    assert made(finished, overwrite=True) == before


def test_a_manifest_says_how_long_all_runs_together_worked(tmp_path, monkeypatch):
    """Time before an interruption counts; that between two runs does not, nor that of a part that was lost."""
    clock = itertools.count(0, 10)  # each look at it is 10 s after the one before
    monkeypatch.setattr(folder_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    first = ArtifactWriter(tmp_path / "folder", SPEC, PARTS)
    fill(first, PARTS[:2])
    next(clock)
    second = ArtifactWriter(tmp_path / "folder", SPEC, PARTS)
    assert second.lap() == 10
    second.add_to_lap(500)  # which is the next part's
    fill(second, second.missing())
    assert second.finish()
    assert json.loads((tmp_path / "folder" / "manifest.json").read_text())["seconds"] == 10 + 10 + 510


def test_a_manifest_tells_of_those_before_it(finished, tmp_path):
    first = open_finished(finished, "split")
    (own,) = first.history
    assert own == {
        name: first.manifest[name] for name in ("stage", "options", "environment", "facts", "metrics", "seconds")
    }
    made(tmp_path / "second", dataclasses.replace(OTHER, earlier=first.history))
    second = open_finished(tmp_path / "second", "split")
    assert second.history[:1] == [own] == second.manifest["earlier"]
    assert history_of(first, second, first) == second.history  # each once, the earliest first
    for earlier in ({}, [3], [{}], [{"stage": 3}]):
        (finished / "manifest.json").write_text(json.dumps(first.manifest | {"earlier": earlier}))
        with pytest.raises(MoEficationError, match=r"damaged \(earlier stages\); remove its folder and run the stage"):
            open_finished(finished, "split")
