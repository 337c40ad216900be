"""A tokenizer that may cut text otherwise than its model learned it is told of, with the cure."""

import json
from pathlib import Path

import pytest
from conftest import make_tokenizer
from tiny_tokenizers import save_byte_level, save_sentencepiece, save_tiktoken, write_sentencepiece

from run_moefication.moefication.checkpoints.tokenizers import load_tokenizer
from run_moefication.moefication.errors import MoEficationError

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write(folder: Path, **settings) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_with_digits(folder: Path) -> None:
    """A byte-level tokenizer whose tokenizer.json cuts each digit apart, as SmolLM2's does."""
    make_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_a_class_that_passes_over_the_rules_of_tokenizer_json(tmp_path, caplog):
    save_with_digits(tmp_path)
    write(tmp_path, **NAMES, tokenizer_class="GPT2Tokenizer")
    wrong = load_tokenizer(tmp_path)("Total:    42")["input_ids"]
    assert '"tokenizer_class": "TokenizersBackend"' in caplog.text
    caplog.clear()
    write(tmp_path, **NAMES, tokenizer_class="TokenizersBackend")
    assert load_tokenizer(tmp_path)("Total:    42")["input_ids"] != wrong
    assert caplog.text == ""


def test_no_beginning_of_text_where_llama_has_one(tmp_path, caplog):
    write_sentencepiece(tmp_path / "tokenizer.model")
    write(tmp_path, **NAMES, tokenizer_class="LlamaTokenizer")
    assert load_tokenizer(tmp_path)("a")["input_ids"][0] != 1
    assert "transformers puts no <s> before a text" in caplog.text
    caplog.clear()
    write(tmp_path, **NAMES, tokenizer_class="LlamaTokenizer", add_bos_token=True)
    assert load_tokenizer(tmp_path)("a")["input_ids"][0] == 1
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({}, "no end of documents, so nothing parts them, and config.json says 2"),
        (NAMES | {"eos_token": "<end>"}, "its end of documents, '<end>', is not in tokenizer.json"),
    ],
)
def test_no_end_of_documents_that_the_model_knows(names, said, tmp_path, caplog):
    make_tokenizer().save_pretrained(tmp_path)
    write(tmp_path, **names, tokenizer_class="TokenizersBackend")
    load_tokenizer(tmp_path)
    assert said in caplog.text


@pytest.mark.parametrize("save", [save_byte_level, save_sentencepiece, save_tiktoken])
def test_nothing_is_said_of_tokenizers_that_are_in_order(save, tmp_path, caplog):
    save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    for _ in range(2):
        load_tokenizer(tmp_path)
    assert caplog.text == ""


def test_empty_special_tokens_are_refused_with_the_cure(tmp_path):
    """The layout of the first LLaMA checkpoints on the hub."""
    write_sentencepiece(tmp_path / "tokenizer.model")
    write(tmp_path, bos_token="", eos_token="", unk_token="", tokenizer_class="LLaMATokenizer")
    with pytest.raises(MoEficationError, match="may be empty; LLaMA's are <s>, </s> and <unk>"):
        load_tokenizer(tmp_path)
