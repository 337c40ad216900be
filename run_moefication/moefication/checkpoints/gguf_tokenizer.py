"""A tokenizer as a GGUF file holds it: llama.cpp has its own code for each way of cutting text, chosen by a name."""

import json
import re
from pathlib import Path
from typing import Any

from gguf import TokenType

from ..errors import MoEficationError
from .tokenizers import load_tokenizer

BYTE_LEVEL = {"type": "ByteLevel"}
WORDS = {"type": "ByteLevel", "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of the steps in which byte-level tokenizers cut text before they merge.
CUTS: dict[str, list[Any]] = {
    "gpt-2": [WORDS],
    "smollm": [DIGITS, WORDS],
    "llama-bpe": [CONTRACTIONS + "{1,3}" + REST, BYTE_LEVEL],
    "qwen2": [CONTRACTIONS + REST, BYTE_LEVEL],
}
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer:
    """The tokenizer of a checkpoint, refused if llama.cpp would cut text in another way."""

    def __init__(self, folder: Path, vocab_size: int):
        """`vocab_size`: rows of the embedding; those without a token get names that no text has."""
        self.loaded = load_tokenizer(folder)
        self._folder, self._vocab_size = folder, vocab_size
        backend = getattr(self.loaded, "backend_tokenizer", None)
        self._steps = json.loads(backend.to_str()) if backend else {}
        self._cut = self._known_cut()

    def metadata(self) -> dict[str, Any]:
        """Values by key, which follows `tokenizer.` in the file."""
        tokens, types = self._tokens()
        values: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": types}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in self._steps["model"]["merges"]]
        if self._cut is None:  # sentencepiece: the engine merges what has the highest score, that is, was first merged
            space = self.loaded.tokenize("a")[0].startswith("▁")
            values |= {"ggml.model": "llama", "ggml.pre": "default", "ggml.add_space_prefix": space}
            values["ggml.scores"] = [-float(index) for index in range(len(tokens))]
        else:
            values |= {"ggml.model": "gpt2", "ggml.pre": self._cut, "ggml.merges": merges}
        specials = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        for name, key in specials.items():
            if (index := getattr(self.loaded, f"{name}_token_id")) is not None:
                values[f"ggml.{key}_token_id"] = index
        ids = self.loaded("a")["input_ids"]
        values["ggml.add_bos_token"] = ids[0] == self.loaded.bos_token_id
        values["ggml.add_eos_token"] = ids[-1] == self.loaded.eos_token_id
        if isinstance(self.loaded.chat_template, str):
            values["chat_template"] = self.loaded.chat_template
        return values

    def _known_cut(self) -> str | None:
        """llama.cpp's name of how text is cut; None for sentencepiece's way, which cuts nothing."""
        model, cut = self._steps.get("model", {}), self._steps.get("pre_tokenizer")
        if model.get("type") == "BPE" and model.get("byte_fallback") and (cut is None or cut["type"] == "Metaspace"):
            return None
        steps = cut.get("pretokenizers", [cut]) if cut else []
        if model.get("type") == "BPE" and not self._steps.get("normalizer"):
            for name, known in CUTS.items():
                if len(known) == len(steps) and all(map(_is_step, known, steps)):
                    return name
        raise MoEficationError(
            f"{self._folder} has a tokenizer whose way of cutting text is not among those known here of llama.cpp's "
            f"({', '.join(CUTS)}, llama); use another format"
        )

    def _tokens(self) -> tuple[list[str], list[int]]:
        """Text and type of each token."""
        names = {index: token for token, index in self.loaded.get_vocab().items()}
        added = self.loaded.added_tokens_decoder
        tokens, types = [], []
        for index in range(self._vocab_size):
            token, kind = names.get(index), TokenType.NORMAL
            if token is None:
                token, kind = f"[PAD{index}]", TokenType.UNUSED
            elif index == self.loaded.unk_token_id and self._cut is None:
                kind = TokenType.UNKNOWN
            elif index in added:
                kind = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
            elif self._cut is None and BYTE_TOKEN.fullmatch(token):
                kind = TokenType.BYTE
            tokens.append(token)
            types.append(int(kind))
        return tokens, types


def _is_step(known: str | dict[str, Any], step: dict[str, Any]) -> bool:
    """Whether a step of a tokenizers file is this one: a pattern that isolates what it matches, or these fields."""
    if isinstance(known, str):
        pattern = step.get("pattern", {}).get("Regex")
        return (pattern, step.get("behavior"), step.get("invert")) == (known, "Isolated", False)
    return known.items() <= step.items() and not step.get("add_prefix_space")
