"""Batches cover the tokens in order; padding is put in and taken out again."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from run_moefication.moefication.text.batches import Batch, batches_of


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
