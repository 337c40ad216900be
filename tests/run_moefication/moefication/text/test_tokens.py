"""Documents to tokens, and the cache that keeps them."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, make_text, make_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import corpus_of
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.checkpoints.tokenizers import load_tokenizer
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.text import tokens as tokens_module
from run_moefication.moefication.text.corpus import pack
from run_moefication.moefication.text.documents import Document
from run_moefication.moefication.text.tokens import tokenize

fork = multiprocessing.get_context("fork")


def joined(texts: list[str], tokenizer) -> torch.Tensor:
    """All pieces of the stream."""
    pieces = tokenize((Document(text, "somewhere") for text in texts), tokenizer, len(tokenizer), pytest.fail)
    return torch.cat([torch.from_numpy(piece) for piece in pieces] or [torch.empty(0).int()])


def draw(checkpoint, folder, cache=None, **options):
    return corpus_of(checkpoint, folder, cache, **({"block_size": 16} | options))


def cached(checkpoint, folder, **options) -> str:
    """The digest of a corpus whose tokens are kept in the folder `cache` beside it."""
    return draw(checkpoint, folder, folder.parent / "cache", **options).digest


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30).filter(str.strip), max_size=12), st.integers(2, 9))
def test_tokens_are_the_documents_joined_with_eos_and_cut(texts, block_size):
    tokenizer = make_tokenizer()
    tokens = joined(texts, tokenizer)
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
    whole = joined(texts, make_tokenizer())
    monkeypatch.setattr(tokens_module, "BATCH_CHARACTERS", 100)
    assert torch.equal(joined(texts, make_tokenizer()), whole)


def test_tokens_with_bos_where_the_tokenizer_adds_one_and_without_eos_where_it_has_none():
    tokenizer = make_tokenizer()
    plain = [tokenizer(text)["input_ids"] for text in SENTENCES[:2]]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert joined(SENTENCES[:2], tokenizer).tolist() == [1, *plain[0], tokenizer.eos_token_id, 1, *plain[1]]
    tokenizer.eos_token = None
    assert joined(SENTENCES[:2], tokenizer).tolist() == [1, *plain[0], 1, *plain[1]]


def test_truncation_and_padding_of_the_tokenizers_own_are_not_applied(tiny_llama, tmp_path):
    """Some tokenizer.json ask for both."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fixed = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] = fixed | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert torch.equal(joined(SENTENCES, load_tokenizer(folder)), joined(SENTENCES, make_tokenizer()))


def test_real_text_gives_what_the_tokenizer_itself_gives(smollm2, sample_data):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for path in (sample_data / "heldout").glob("*.jsonl"):
        texts = [json.loads(line)["text"] for line in path.read_bytes().split(b"\n")[:20] if line]
        expected = []
        for text in texts:
            expected += ([tokenizer.eos_token_id] if expected else []) + tokenizer(text)["input_ids"]
        assert joined(texts, load_tokenizer(smollm2)).tolist() == expected


@pytest.mark.parametrize("use_cache", [True, False])
def test_bad_lines_are_counted_each_time(use_cache, checkpoint, tmp_path):
    make_text(tmp_path / "text", c4=20)
    good = draw(checkpoint, tmp_path / "text").digest
    with (tmp_path / "text" / "c4.jsonl").open("a") as file:
        file.write("{\n[]\n")
    cache = tmp_path / "cache" if use_cache else None
    for _ in range(2):
        corpus = draw(checkpoint, tmp_path / "text", cache, skip_bad_lines=True)
        assert [row.skipped_lines for row in corpus.mix] == [2]
        assert corpus.digest == good


def test_processes_that_need_the_same_text_tokenise_it_once(checkpoint, tmp_path, tokenised):
    make_text(tmp_path / "text", c4=2000)
    start, results = fork.Barrier(3), fork.Queue()

    def work() -> None:
        start.wait()
        results.put((cached(checkpoint, tmp_path / "text"), len(tokenised)))

    processes = [fork.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    digests, counts = zip(*(results.get(timeout=60) for _ in processes), strict=True)
    for process in processes:
        process.join()
    assert sorted(counts) == [0, 0, 1]
    assert len(set(digests)) == 1


@pytest.fixture
def tokenised(monkeypatch) -> list[None]:
    """An entry for each time that a domain's text is really tokenised."""
    seen, real = [], tokens_module.tokenize

    def counted(*arguments):
        seen.append(None)
        return real(*arguments)

    monkeypatch.setattr(tokens_module, "tokenize", counted)
    return seen


def test_text_is_tokenised_once_and_a_changed_input_never_served(checkpoint, tiny_llama, tmp_path, tokenised):
    folder = tmp_path / "text"
    make_text(folder, c4=20, github=20)
    first = cached(checkpoint, folder)
    assert cached(checkpoint, folder) == first
    cached(checkpoint, folder, block_size=8)  # blocks are cut anew
    assert len(tokenised) == 2
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".json", ".tokens"}  # and no locks
    text = (folder / "c4.jsonl").read_text()
    (folder / "c4.jsonl").write_text(text.replace("cat", "dog"))  # same name, same size
    changed = cached(checkpoint, folder)
    assert len(tokenised) == 3
    assert changed == draw(checkpoint, folder).digest  # which has no cache
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert cached(DenseCheckpoint(str(other)), folder) != changed
    assert len(tokenised) == 7


def test_the_same_bytes_as_lines_and_as_one_text_are_two_texts(checkpoint, tmp_path, tokenised):
    make_text(tmp_path, c4=5)
    shutil.copy(tmp_path / "c4.jsonl", tmp_path / "c4.txt")
    lines, whole = (cached(checkpoint, tmp_path / name) for name in ("c4.jsonl", "c4.txt"))
    assert len(tokenised) == 2
    assert whole == draw(checkpoint, tmp_path / "c4.txt").digest != lines


def test_a_damaged_cache_is_rebuilt_and_said(checkpoint, tmp_path, caplog):
    make_text(tmp_path / "text", c4=20)
    good = cached(checkpoint, tmp_path / "text")
    (path,) = (tmp_path / "cache").glob("*.tokens")
    data = path.read_bytes()
    for damaged in (data[:-10] + b"\xff" + data[-9:], data[:-1]):
        path.write_bytes(damaged)
        for words in (f"{path} is damaged; tokenising again", ""):
            caplog.clear()
            assert cached(checkpoint, tmp_path / "text") == good
            assert "".join(caplog.messages) == words


def test_a_token_outside_of_the_embedding_is_named_by_file_and_line(tiny_llama, tmp_path):
    """A [PAD] was added to the tokenizer by hand, and the model's embedding was not made longer."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    checkpoint = DenseCheckpoint(str(folder))
    write_jsonl(tmp_path / "text" / "c4.jsonl", [SENTENCES[0], f"{SENTENCES[1]} [PAD]", SENTENCES[2]])
    words = r"c4.jsonl:2: holds token 300 \('\[PAD\]'\), but the embedding has 300 rows; skip_bad_lines goes on"
    with pytest.raises(MoEficationError, match=words):
        _ = draw(checkpoint, tmp_path / "text").blocks
    corpus = draw(checkpoint, tmp_path / "text", skip_bad_lines=True, domain_weights="equal")
    assert [row.skipped_lines for row in corpus.mix] == [1]
    write_jsonl(tmp_path / "without" / "c4.jsonl", [SENTENCES[0], SENTENCES[2]])
    assert corpus.digest == draw(checkpoint, tmp_path / "without", domain_weights="equal").digest


def test_an_end_of_documents_outside_of_the_embedding_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    with pytest.raises(MoEficationError, match=r"ends documents with token 300 \(\[END\]\), but .* has 300 rows"):
        next(tokenize([Document("a", "x")], tokenizer, 300, pytest.fail))


def test_refused_text_leaves_nothing(checkpoint, tmp_path):
    write_jsonl(tmp_path / "text" / "c4.jsonl", ["", "  "])
    corpus = draw(checkpoint, tmp_path / "text", tmp_path / "new" / "cache")
    assert not (tmp_path / "new").exists()  # until its blocks are asked for
    with pytest.raises(MoEficationError, match=r"c4.jsonl holds no text"):
        _ = corpus.blocks
    assert not (tmp_path / "new").exists()
