"""Blocks of a text, and the mix of its domains."""

import shutil
import tempfile
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import SENTENCES, VOCABULARY, make_text, make_tokenizer, write_jsonl
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pipeline import corpus_of

from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.text.corpus import STRETCHES, pack, parse_domain_weights, require_block_size
from run_moefication.moefication.text.documents import DocumentReader
from run_moefication.moefication.text.domains import LLAMA_MIX
from run_moefication.moefication.text.text_files import TextFile
from run_moefication.moefication.text.tokens import tokenize


def tokens_of(file: Path) -> torch.Tensor:
    """The token stream of a file."""
    reader = DocumentReader([TextFile(file)])
    pieces = tokenize(reader, make_tokenizer(), VOCABULARY, reader.bad)
    return torch.cat([torch.from_numpy(piece) for piece in pieces])


@pytest.mark.parametrize(("asked", "positions", "used"), [(None, 128, 128), (None, 4096, 2048), (64, 128, 64)])
def test_block_size(asked, positions, used):
    assert require_block_size(asked, positions, "x") == used

    for beyond in (positions + 1, 1, 0, -5):
        with pytest.raises(MoEficationError, match=f"block_size {beyond} is outside of 2 to {positions}"):
            require_block_size(beyond, positions, "x")


def draw(checkpoint, folder, **options):
    return corpus_of(checkpoint, folder, None, **({"block_size": 16} | options))


def assert_blocks_of(corpus, checkpoint, folder, block_size) -> None:
    """Every block is (the start of) a block of its domain's packed stream, and none is there twice."""
    streams = [tokens_of(file) for file in sorted(folder.glob("*.jsonl"))]
    pool = [tuple(block.tolist()) for stream in streams for block in pack(stream, block_size)]
    # Whole blocks first, so that one cut short cannot take the place of a whole one that begins alike.
    for block in sorted((tuple(block.tolist()) for block in corpus.blocks), key=len, reverse=True):
        matches = [one for one in pool if one[: len(block)] == block]
        assert matches, f"{block} is no block of the text, or was drawn twice"
        pool.remove(block if block in matches else matches[0])


def test_shares_are_exact_and_the_scarcest_domain_is_used_up(checkpoint, tmp_path):
    make_text(tmp_path, c4=40, github=30, arxiv=20)
    corpus = draw(checkpoint, tmp_path)
    total_weight = LLAMA_MIX["c4"] + LLAMA_MIX["github"] + LLAMA_MIX["arxiv"]
    rows = {row.domain: row for row in corpus.mix}
    possible = min(row.available * total_weight / LLAMA_MIX[name] for name, row in rows.items())
    for name, row in rows.items():
        assert row.got == row.asked == round(possible * LLAMA_MIX[name] / total_weight)
    assert rows["c4"].got == rows["c4"].available  # it has the largest share of the three
    assert corpus.num_tokens == sum(row.got for row in corpus.mix)
    assert_blocks_of(corpus, checkpoint, tmp_path, 16)
    asked = {row.domain: row.asked for row in draw(checkpoint, tmp_path, max_tokens=10**6).mix}
    assert asked == {name: round(10**6 * LLAMA_MIX[name] / total_weight) for name in rows}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
    st.sampled_from([1.0, 0.7, 0.05]),
    st.one_of(st.none(), st.integers(1, 300)),
    st.integers(8, 40),
)
def test_shares_are_exact_for_any_sizes_weights_and_limits(
    checkpoint, counts, weights, percent, max_tokens, block_size
):
    names = ["c4", "github", "book", "arxiv"][: len(counts)]
    weights = dict(zip(names, weights, strict=False))
    with tempfile.TemporaryDirectory() as root:
        make_text(Path(root, "text"), **dict(zip(names, counts, strict=True)))
        options = dict(domain_weights=weights, data_use_percent=percent, max_tokens=max_tokens, block_size=block_size)
        available = {name: len(tokens_of(Path(root, "text", f"{name}.jsonl"))) for name in names}
        total = percent * min(available[name] * sum(weights.values()) / weights[name] for name in names)
        wanted = min(total, max_tokens or total)
        exact = {name: wanted * weights[name] / sum(weights.values()) for name in names}
        assume(wanted >= len(names))  # with less, there may be no token to take
        corpus = draw(checkpoint, Path(root, "text"), **options)
        got = {row.domain: row.got for row in corpus.mix}
        assert {row.domain: row.available for row in corpus.mix} == available
        # Each share is rounded; what that adds up to beyond the limit is taken back.
        slack = 0.5 if max_tokens is None else len(names) / 2
        assert all(abs(got[name] - exact[name]) <= slack + 1e-6 for name in names)
        assert sum(got.values()) == corpus.num_tokens
        assert max_tokens is None or corpus.num_tokens <= max_tokens
        assert_blocks_of(corpus, checkpoint, Path(root, "text"), block_size)


@pytest.mark.parametrize("name", ["c4.jsonl", "notes.txt"])
def test_a_single_file_is_a_corpus(name, checkpoint, tmp_path):
    write_jsonl(tmp_path / name, SENTENCES)
    corpus = draw(checkpoint, tmp_path / name)
    stream = tokens_of(tmp_path / name)
    assert sorted(block.tolist() for block in corpus.blocks) == sorted(block.tolist() for block in pack(stream, 16))


def test_wrong_amounts_are_refused(checkpoint, tmp_path):
    make_text(tmp_path, c4=5)
    for name, value, words in (
        *(("data_use_percent", value, r"is not a fraction in \(0, 1\]") for value in (0, 1.01, float("nan"))),
        *(("max_tokens", value, "max_tokens .* must be at least 1") for value in (0, -3)),
        ("data_use_percent", 1e-9, "the options leave no token to read"),
    ):
        with pytest.raises(MoEficationError, match=words):
            _ = draw(checkpoint, tmp_path, **{name: value}).blocks


def test_no_text_or_no_tokenizer_is_refused(checkpoint, tiny_llama, tmp_path):
    with pytest.raises(MoEficationError, match="nowhere does not exist"):
        draw(checkpoint, tmp_path / "nowhere")
    make_text(tmp_path / "text", c4=5)
    ignored = shutil.ignore_patterns("tokenizer*", "special_tokens*")
    bare = shutil.copytree(tiny_llama, tmp_path / "bare", ignore=ignored)
    with pytest.raises(MoEficationError, match="bare has no usable tokenizer"):
        _ = draw(DenseCheckpoint(str(bare)), tmp_path / "text").blocks


def test_same_seed_same_blocks_other_seed_others(checkpoint, tmp_path):
    make_text(tmp_path, c4=60, github=60)
    first, again, other = (draw(checkpoint, tmp_path, max_tokens=300, seed=seed) for seed in (0, 0, 1))
    assert first.digest == again.digest
    assert first.digest != other.digest
    assert [row.got for row in first.mix] == [row.got for row in other.mix]


def test_what_is_held_out_has_all_domains_and_documents_of_its_own(checkpoint, tmp_path):
    counts = {"c4": 64, "github": 32}
    words, random = sorted(set(" ".join(SENTENCES).split())), Random(0)
    for name, count in counts.items():  # documents of some blocks each, no two of which are alike
        write_jsonl(tmp_path / f"{name}.jsonl", [" ".join(random.choices(words, k=80)) for _ in range(count)])
    corpus = draw(checkpoint, tmp_path, domain_weights={"c4": 2, "github": 1})
    blocks = [tuple(block.tolist()) for block in corpus.blocks]
    held_out = set(blocks[-(len(blocks) // 4) :])
    for name, count in counts.items():
        stream = tokens_of(tmp_path / f"{name}.jsonl")
        documents = (stream == 2).cumsum(0).split(16)  # by the ends of text before
        sides: dict[int, set[bool]] = {}
        number_held_out = 0
        for block, numbers in zip(pack(stream, 16), documents, strict=True):
            is_held_out = tuple(block.tolist()) in held_out
            number_held_out += is_held_out
            for number in numbers.tolist():
                sides.setdefault(number, set()).add(is_held_out)
        assert len(sides) == count
        assert number_held_out == pytest.approx(len(documents) / 4, rel=0.02)
        # A quarter of the stretches, each of which has two edges, and one stretch that is cut.
        assert sum(len(both) == 2 for both in sides.values()) <= 2 * STRETCHES / 4 + 2


def test_domain_weights_are_parsed():
    assert parse_domain_weights("c4=0.5, My_Notes=2") == {"c4": 0.5, "mynotes": 2.0}
    assert parse_domain_weights(None) is None
    assert parse_domain_weights({"Books": 1, "My Notes": 0.5}) == {"book": 1.0, "mynotes": 0.5}
    for wrong in ({"c4": -1.0}, "c4", "c4=", "=1", "c4=-1", "c4=0", "c4=nan", "c4=inf", "c4=1,,"):
        with pytest.raises(MoEficationError, match="is not of the form domain=positive number"):
            parse_domain_weights(wrong)
    with pytest.raises(MoEficationError, match="names C4 twice"):
        parse_domain_weights("c4=0.5,C4=0.2")
