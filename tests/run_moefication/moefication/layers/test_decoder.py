"""Batches hold every token once; streams on the disk are whole or absent. (`test_calibrate` walks through models.)"""

import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from run_moefication.moefication.artifacts.streams import Streams
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.layers.decoder import Batch, batches_of
from run_moefication.moefication.storage.folder import ArtifactWriter
from run_moefication.moefication.storage.manifest import Claim

# ---------------------------------------------------------------------------------------------------- batches


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5), st.data())
def test_batches_cover_the_tokens_in_order_and_keep_held_out_blocks_apart(lengths, batch_size, data):
    num_held_out = data.draw(st.integers(0, len(lengths)))
    blocks = [torch.zeros(length) for length in lengths]
    batches = batches_of(blocks, batch_size, num_held_out)
    assert [length for batch in batches for length in batch.lengths] == lengths
    assert [row for batch in batches for row in range(batch.rows.start, batch.rows.stop)] == list(range(sum(lengths)))
    assert all(batch.rows.stop - batch.rows.start == sum(batch.lengths) for batch in batches)
    assert all(1 <= len(batch.lengths) <= batch_size for batch in batches)
    held_out = [batch.held_out for batch in batches for _ in batch.lengths]
    assert held_out == [False] * (len(lengths) - num_held_out) + [True] * num_held_out


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_padded_and_flat_are_each_others_inverse(lengths):
    batch = Batch(slice(0, sum(lengths)), lengths)
    rows = torch.arange(1.0, sum(lengths) + 1)[:, None].expand(-1, 3)
    padded = batch.padded(rows)
    assert padded.shape == (len(lengths), max(lengths), 3)
    start = 0
    for block, length in zip(padded, lengths, strict=True):
        assert torch.equal(block[:length], rows[start : start + length])
        assert (block[length:] == 0).all()
        start += length
    assert torch.equal(batch.flat(padded), rows)


# ---------------------------------------------------------------------------------------------------- streams

SHAPE = (2, 5, 3)


@pytest.fixture
def writer(tmp_path) -> ArtifactWriter:
    return ArtifactWriter(tmp_path / "folder", Claim("calibrate", {}, {"fingerprint": "abc"}, {}), ["only"])


def test_what_is_committed_is_read_again_by_another_process(writer):
    values = torch.randn(SHAPE)
    streams = Streams(writer, SHAPE)
    assert not streams.has(1)
    streams.begin(1).copy_(values)
    assert not streams.has(1)  # begun is not whole
    streams.commit(1)
    assert Streams(writer, SHAPE).has(1)
    assert torch.equal(Streams(writer, SHAPE).before(1), values)
    assert not streams.has(0)
    streams.remove(1)
    assert not streams.has(1)
    streams.remove(1)  # twice does not matter


def test_a_stream_begun_twice_is_the_second_one(writer):
    streams = Streams(writer, SHAPE)
    streams.begin(0).fill_(1)
    second = streams.begin(0)
    assert (second == 0).all()
    streams.commit(0)
    assert (streams.before(0) == 0).all()


@pytest.mark.parametrize("damage", ["missing", "begun", "cut", "of more tokens"])
def test_streams_that_are_not_whole_are_refused_by_name(damage, writer):
    streams = Streams(writer, SHAPE)
    streams.begin(2).fill_(1)
    path = writer.scratch("streams.2")
    if damage != "begun":
        streams.commit(2)
    if damage == "missing":
        path.unlink()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    if damage == "of more tokens":
        streams = Streams(writer, (2, 4, 3))
    with pytest.raises(MoEficationError, match=r"streams\.2\.scratch is missing or cut; run again with --overwrite"):
        streams.before(2)


def test_finishing_takes_the_streams_away(writer):
    streams = Streams(writer, SHAPE)
    for layer in (0, 1):
        streams.begin(layer)
        streams.commit(layer)
    streams.begin(2)  # of a run that died
    writer.write_piece("only", {"file": writer.write("file", lambda file: file.write(b"x"))})
    assert writer.finish()
    assert {path.name for path in writer.folder.rglob("*")} == {"file", "manifest.json"}


def test_no_room_for_a_stream_is_an_error_before_it_is_filled(writer):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            Streams(writer, SHAPE).begin(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
