"""Residual streams on the disk are whole or absent."""

import contextlib
import resource
from pathlib import Path

import pytest
import torch

from run_moefication.moefication.artifacts.streams import Streams
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.storage.folder import ArtifactWriter
from run_moefication.moefication.storage.manifest import ArtifactSpec

SHAPE = (2, 5, 3)


@pytest.fixture
def writer(tmp_path) -> ArtifactWriter:
    return writer_of(tmp_path / "folder")


def writer_of(folder: Path, overwrite: bool = False) -> ArtifactWriter:
    return ArtifactWriter(
        folder, ArtifactSpec("calibrate", {}, {"fingerprint": "abc"}, {}), ["only"], overwrite=overwrite
    )


def test_what_is_filled_is_read_again_by_another_process(writer):
    values = torch.randn(SHAPE)
    streams = Streams(writer, SHAPE)
    assert not streams.has(1)
    with streams.filling(1) as stream:
        stream.fill_(1)
        assert not streams.has(1)  # begun is not whole
    with streams.filling(1) as stream:  # twice: it is the second one
        assert (stream == 0).all()
        stream.copy_(values)
    assert Streams(writer, SHAPE).has(1)
    assert torch.equal(Streams(writer, SHAPE).before(1), values)
    assert not streams.has(0)
    for _ in range(2):  # twice does not matter
        streams.remove(1)
        assert not streams.has(1)


@pytest.mark.parametrize("damage", ["missing", "begun", "cut", "of more tokens"])
def test_streams_that_are_not_whole_are_refused_by_name(damage, writer):
    streams = Streams(writer, SHAPE)
    path = writer.temporary_path("streams.2")
    with contextlib.suppress(RuntimeError), streams.filling(2):
        if damage == "begun":
            raise RuntimeError
    if damage == "missing":
        path.unlink()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    if damage == "of more tokens":
        streams = Streams(writer, (2, 4, 3))
    with pytest.raises(MoEficationError, match=r"streams\.2 is missing or cut; run again with overwrite"):
        streams.before(2)


def test_streams_of_a_run_that_is_overwritten_are_not_read(writer):
    with Streams(writer, SHAPE).filling(0):
        pass
    assert not Streams(writer_of(writer.folder, overwrite=True), SHAPE).has(0)


def test_finishing_takes_the_streams_away(writer):
    with Streams(writer, SHAPE).filling(0):
        pass
    writer.write_part("only", {"file": writer.write("file", lambda file: file.write(b"x"))})
    assert writer.finish()
    assert {path.name for path in writer.folder.rglob("*")} == {"file", "manifest.json"}


def test_no_room_for_a_stream_is_an_error_before_it_is_filled(writer):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with pytest.raises(OSError, match="File too large"), Streams(writer, SHAPE).filling(0):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
