"""Documents, tokens, blocks, the domain mix and its cache."""

import json
import logging
import shutil

import pytest
import torch
from conftest import SENTENCES, make_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from run_moefication.moefication import corpus as corpus_module
from run_moefication.moefication.checkpoints import Checkpoint
from run_moefication.moefication.corpus import (
    LLAMA_MIX,
    find_domains,
    pack,
    parse_domain_weights,
    read_documents,
    require_block_size,
    tokenize,
    training_corpus,
)
from run_moefication.moefication.errors import MoEficationError


@pytest.fixture(scope="module")
def checkpoint(tiny_llama) -> Checkpoint:
    return Checkpoint(str(tiny_llama))


# ---------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        (b'{"text": "a"}\n{"text": "b"}', ["a", "b"]),  # no final newline
        (b'{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"]),
        (b'\xef\xbb\xbf{"text": "a"}\n', ["a"]),  # byte order mark
        ('{"text": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"]),  # line separators of Unicode are text
        (b'{"text": "a"}\n\n  \n{"text": "b", "more": [1]}\n', ["a", "b"]),
        (b'{"text": ""}\n{"text": " \\n"}\n{"text": "b"}\n', ["b"]),
        ('{"text": "雪"}\n'.encode(), ["雪"]),
        (b"", []),
    ],
)
def test_documents_of_a_jsonl(content, texts, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert list(read_documents(tmp_path / "a.jsonl")) == texts


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["text"]', 'not a JSON object with a string "text"'),
        (b"3", 'not a JSON object with a string "text"'),
        (b"null", 'not a JSON object with a string "text"'),
        (b'{"text": ["a"]}', 'not a JSON object with a string "text"'),
        (b'{"content": "a"}', 'no "text" field'),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "not UTF-8"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_broken_line_is_named(line, words, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(MoEficationError) as error:
        list(read_documents(tmp_path / "a.jsonl"))
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}:3: {words}")


def test_a_line_beyond_the_limit_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "MAX_LINE_BYTES", 1 << 20)
    write_jsonl(tmp_path / "a.jsonl", ["short", "x" * (1 << 20)])
    with pytest.raises(MoEficationError, match=r"a.jsonl:2: line longer than 1 MiB"):
        list(read_documents(tmp_path / "a.jsonl"))


def test_other_files_are_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert list(read_documents(tmp_path / "a.txt")) == ["one\n\ntwo\n"]
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    with pytest.raises(MoEficationError, match=r"b.txt is not UTF-8 text \(byte 3\)"):
        list(read_documents(tmp_path / "b.txt"))


# ---------------------------------------------------------------------------------------------------- tokens


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30).filter(str.strip), max_size=12), st.integers(2, 9))
def test_tokens_are_the_documents_joined_with_eos_and_cut(texts, block_size):
    tokenizer = make_tokenizer()
    tokens = tokenize(texts, tokenizer)
    expected = []
    for text in texts:
        expected += ([tokenizer.eos_token_id] if expected else []) + tokenizer(text)["input_ids"]
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == expected
    blocks = pack(tokens, block_size)
    assert [token for block in blocks for token in block.tolist()] == expected
    assert all(len(block) == block_size for block in blocks[:-1])
    assert all(0 < len(block) <= block_size for block in blocks)


def test_documents_beyond_one_batch_keep_their_order(monkeypatch):
    texts = [f"{i}. {sentence}" for i, sentence in enumerate(SENTENCES * 4)]
    whole = tokenize(texts, make_tokenizer())
    monkeypatch.setattr(corpus_module, "DOCUMENTS_PER_BATCH", 5)
    assert torch.equal(tokenize(texts, make_tokenizer()), whole)


@pytest.mark.parametrize(("asked", "positions", "used"), [(None, 128, 128), (None, 4096, 2048), (64, 128, 64)])
def test_block_size(asked, positions, used):
    assert require_block_size(asked, positions, "x") == used


# ---------------------------------------------------------------------------------------------------- the mix


def make_text(folder, **domains: int) -> None:
    """`name.jsonl` of so many sentences each, all different."""
    for name, count in domains.items():
        write_jsonl(folder / f"{name}.jsonl", [f"{name} {i}: {SENTENCES[i % 6]}" for i in range(count)])


def draw(checkpoint, folder, **options):
    return training_corpus(checkpoint, folder, None, **({"block_size": 16} | options))


def assert_blocks_of(corpus, checkpoint, folder, block_size) -> None:
    """Every block is (the start of) a block of its domain's packed stream, and none is there twice."""
    streams = [tokenize(read_documents(file), make_tokenizer()) for file in sorted(folder.glob("*.jsonl"))]
    pool = [tuple(block.tolist()) for stream in streams for block in pack(stream, block_size)]
    for block in corpus.blocks:
        whole = next(one for one in pool if one[: len(block)] == tuple(block.tolist()))
        pool.remove(whole)


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


@pytest.mark.parametrize(
    ("options", "share"),
    [({"data_use_percent": 0.5}, 0.5), ({"data_use_percent": 0.01}, 0.01), ({"max_tokens": 100}, None)],
)
def test_less_text_in_the_same_shares(options, share, checkpoint, tmp_path):
    make_text(tmp_path, c4=60, github=60)
    everything, part = draw(checkpoint, tmp_path), draw(checkpoint, tmp_path, **options)
    expected = 100 if share is None else everything.num_tokens * share
    assert part.num_tokens == pytest.approx(expected, abs=len(part.mix))
    for whole, some in zip(everything.mix, part.mix, strict=True):
        assert some.got / part.num_tokens == pytest.approx(whole.got / everything.num_tokens, abs=2 / part.num_tokens)
    assert_blocks_of(part, checkpoint, tmp_path, 16)


def test_weights_of_the_users_own(checkpoint, tmp_path):
    make_text(tmp_path, c4=60, github=60, notes=60)
    corpus = draw(checkpoint, tmp_path, domain_weights={"github": 1.0, "notes": 3.0}, max_tokens=400)
    assert {row.domain: row.got for row in corpus.mix} == {"github": 100, "notes": 300}


def test_same_seed_same_blocks_other_seed_others(checkpoint, tmp_path):
    make_text(tmp_path, c4=60, github=60)
    first, again, other = (draw(checkpoint, tmp_path, max_tokens=300, seed=seed) for seed in (0, 0, 1))
    assert first.digest == again.digest
    assert first.digest != other.digest
    assert [row.got for row in first.mix] == [row.got for row in other.mix]


def test_what_lies_below_the_folder_is_not_read(checkpoint, tmp_path):
    make_text(tmp_path, c4=20)
    before = draw(checkpoint, tmp_path).digest
    make_text(tmp_path / "heldout", c4=20, github=20)
    assert draw(checkpoint, tmp_path).digest == before


@pytest.mark.parametrize(
    ("names", "weights", "domains"),
    [
        (["c4", "my_GitHub-part1", "github2"], None, {"c4": ["c4"], "github": ["github2", "my_GitHub-part1"]}),
        (["common_crawl", "Books3", "en_arxiv"], None, {"commoncrawl": ["common_crawl"]}),
        (["a", "b"], None, {"text": ["a", "b"]}),
        (["c4", "other"], {"c4": 1.0}, {"c4": ["c4"]}),
        (["c4", "my notes"], {"mynotes": 1.0}, {"mynotes": ["my notes"]}),
    ],
)
def test_domains_are_words_of_file_names(names, weights, domains, tmp_path):
    make_text(tmp_path, **dict.fromkeys(names, 1))
    found = {domain: sorted(file.stem for file in files) for domain, files in find_domains(tmp_path, weights).items()}
    assert found | domains == found


@pytest.mark.parametrize(
    ("names", "weights", "words"),
    [
        (["c4", "other"], None, "other.jsonl names none of the domains"),
        (["c4_github"], None, "c4_github.jsonl names several domains (c4, github)"),
        (["c4"], {"c4": 1.0, "github": 1.0}, "--domain_weights names github"),
        ([], None, "holds no .jsonl file"),
    ],
)
def test_unclear_domains_are_refused(names, weights, words, tmp_path):
    make_text(tmp_path, **dict.fromkeys(names, 1))
    with pytest.raises(MoEficationError) as error:
        find_domains(tmp_path, weights)
    assert words in str(error.value)


def test_domain_weights_are_parsed():
    assert parse_domain_weights("c4=0.5, My_Notes=2") == {"c4": 0.5, "mynotes": 2.0}
    assert parse_domain_weights(None) is None
    for text in ("c4", "c4=", "=1", "c4=-1", "c4=0", "c4=nan", "c4=inf", "c4=1,,"):
        with pytest.raises(MoEficationError, match="is not of the form domain=positive number"):
            parse_domain_weights(text)


def test_vocabulary_beyond_the_embedding_is_refused(checkpoint, tmp_path, monkeypatch):
    make_text(tmp_path, c4=5)
    monkeypatch.setattr(checkpoint.config, "vocab_size", 10)
    with pytest.raises(MoEficationError, match="its embedding has 10 rows"):
        draw(checkpoint, tmp_path)


# ---------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def tokenised(monkeypatch) -> list[str]:
    """The domains that were really tokenised, in order."""
    seen, real = [], corpus_module.tokenize

    def counted(documents, tokenizer, progress, what):
        seen.append(what)
        return real(documents, tokenizer, progress, what)

    monkeypatch.setattr(corpus_module, "tokenize", counted)
    return seen


def cached(checkpoint, folder, **options) -> str:
    cache = folder.parent / "cache"
    return training_corpus(checkpoint, folder, cache, **({"block_size": 16} | options)).digest


def test_text_is_tokenised_once(checkpoint, tmp_path, tokenised):
    folder = tmp_path / "text"
    make_text(folder, c4=20, github=20)
    first = cached(checkpoint, folder)
    assert tokenised == ["c4", "github"]
    assert cached(checkpoint, folder) == first
    assert tokenised == ["c4", "github"]


def test_a_changed_input_is_never_served_from_the_cache(checkpoint, tiny_llama, tmp_path, tokenised):
    folder = tmp_path / "text"
    make_text(folder, c4=20)
    cached(checkpoint, folder)
    cached(checkpoint, folder, block_size=8)
    assert tokenised == ["c4"] * 2
    text = (folder / "c4.jsonl").read_text()
    (folder / "c4.jsonl").write_text(text.replace("cat", "dog"))  # same name, same size
    changed = cached(checkpoint, folder)
    assert tokenised == ["c4"] * 3
    assert changed == draw(checkpoint, folder).digest
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert cached(Checkpoint(str(other)), folder) != changed


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_cache_is_rebuilt_and_said(damage, checkpoint, tmp_path, tokenised, caplog):
    folder = tmp_path / "text"
    make_text(folder, c4=20)
    good = cached(checkpoint, folder)
    (path,) = (tmp_path / "cache").iterdir()
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-10] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-1], "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert cached(checkpoint, folder) == good
    assert f"{path} is damaged; tokenising again" in caplog.text
    caplog.clear()
    assert cached(checkpoint, folder) == good
    assert not caplog.text
