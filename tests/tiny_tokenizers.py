"""Small vocabularies in the formats that checkpoints come with, and the folders that hold them."""

import base64
import json
from pathlib import Path

import sentencepiece
from conftest import make_tokenizer

from llama_download.tokenizer_conversion import LLAMA3_PATTERN, convert_tokenizer

SENTENCEPIECE = {
    "model_type": "bpe",
    "byte_fallback": True,
    "hard_vocab_limit": False,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "minloglevel": 2,
}


def write_sentencepiece(path: Path, vocab_size: int = 400, **options) -> Path:
    """A small BPE model with byte fallback, as LLaMA's, trained on a few sentences; `options` of sentencepiece."""
    sentences = [f"The {a} cat {b} sat on a mat, {c} and looked." for a in "abcd" for b in "efgh" for c in "xyz"]
    with path.with_suffix(".model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            **(SENTENCEPIECE | {"vocab_size": vocab_size} | options),
        )
    return path


def write_tiktoken(path: Path) -> Path:
    """A small file of ranks: the 256 bytes and some words grown letter by letter."""
    tokens = [bytes([i]) for i in range(256)]
    for word in (b" the", b"ing", b" and", b" of", b"\n\n", b"1234", "é".encode(), "日本".encode()):
        tokens += [word[:end] for end in range(2, len(word) + 1) if word[:end] not in tokens]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def write_tekken(path: Path) -> Path:
    """A small vocabulary as Mistral's tekken.json has it: ids of ordinary tokens come after those of special ones."""
    ranks = [line.split()[0].decode() for line in write_tiktoken(path).read_bytes().splitlines()]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    content = {
        "config": {
            "pattern": LLAMA3_PATTERN,
            "num_vocab_tokens": len(ranks),
            "default_vocab_size": len(ranks) + len(special),
            "default_num_special_tokens": len(special),
            "version": "v7",
        },
        "vocab": [{"rank": rank, "token_bytes": token, "token_str": None} for rank, token in enumerate(ranks)],
        "special_tokens": [{"rank": i, "token_str": token, "is_control": True} for i, token in enumerate(special)],
    }
    path.write_text(json.dumps(content))
    return path


def save_byte_level(folder: Path) -> None:
    """As of DeepSeek-LLM or SmolLM2."""
    make_tokenizer().save_pretrained(folder)


def save_sentencepiece(folder: Path) -> None:
    """As of LLaMA 1, Llama 2 and Mistral: `tokenizer.model`, and a tokenizer.json that puts a space before the text."""
    path = write_sentencepiece(folder / "tokenizer.model")
    convert_tokenizer(path, "Llama 2", 4096).save_pretrained(folder)


def save_tiktoken(folder: Path) -> None:
    """As of Llama 3."""
    convert_tokenizer(write_tiktoken(folder / "ranks"), "Llama 3.1", 131072).save_pretrained(folder)
    (folder / "ranks").unlink()


def save_tekken(folder: Path) -> None:
    """As of Devstral: tekken.json alone."""
    write_tekken(folder / "tekken.json")
