"""Streams on the disk are whole or absent. (`test_calibrate` walks through whole models.)"""

from contextlib import suppress

import pytest
import torch
from pipeline import limited_files

from run_moefication.moefication.artifacts.streams import Streams
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.storage.folder import ArtifactWriter
from run_moefication.moefication.storage.manifest import ArtifactSpec

SHAPE = (2, 5, 3)


@pytest.fixture
def writer(tmp_path) -> ArtifactWriter:
    return ArtifactWriter(tmp_path / "folder", ArtifactSpec("calibrate", {}, {"fingerprint": "abc"}, {}), ["only"])


def test_what_is_filled_is_read_again_by_another_process(writer):
    values, streams = torch.randn(SHAPE), Streams(writer, SHAPE)
    assert not streams.has(1)
    with streams.filling(1) as stream:
        stream.copy_(values)
        assert not streams.has(1)  # it is not whole yet
    assert Streams(writer, SHAPE).has(1)
    assert torch.equal(Streams(writer, SHAPE).before(1), values)
    assert not streams.has(0)
    streams.remove(1)
    assert not streams.has(1)
    streams.remove(1)  # twice does not matter


def test_a_filling_that_failed_begins_anew(writer):
    streams = Streams(writer, SHAPE)
    with suppress(KeyboardInterrupt), streams.filling(0) as stream:
        stream.fill_(1)
        raise KeyboardInterrupt
    with pytest.raises(MoEficationError, match=r"streams\.0.* is missing or cut; run again with overwrite"):
        streams.before(0)
    with streams.filling(0) as stream:
        assert (stream == 0).all()


def test_streams_of_another_number_of_tokens_are_refused_by_name(writer):
    with Streams(writer, SHAPE).filling(2) as stream:
        stream.fill_(1)
    with pytest.raises(MoEficationError, match=r"streams\.2.* is missing or cut; run again with overwrite"):
        Streams(writer, (2, 4, 3)).before(2)


def test_finishing_takes_the_streams_away(writer):
    streams = Streams(writer, SHAPE)
    with streams.filling(0), streams.filling(1):
        pass
    with suppress(KeyboardInterrupt), streams.filling(2):
        raise KeyboardInterrupt
    writer.write_part("only", {"file": writer.write("file", lambda file: file.write(b"x"))})
    assert writer.finish()
    assert {path.name for path in writer.folder.rglob("*")} == {"file", "manifest.json"}


def test_no_room_for_a_stream_is_an_error_before_it_is_filled(writer):
    with limited_files(16), pytest.raises(OSError, match="File too large"), Streams(writer, SHAPE).filling(0):
        pytest.fail("there is no room")
