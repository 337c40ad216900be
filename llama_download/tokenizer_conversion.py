"""LLaMA's `tokenizer.model`, sentencepiece or tiktoken, as a fast tokenizer that gives the same ids.

A sentencepiece model is converted here: transformers' LlamaConverter (5.24) fails, and its reader of such models keeps
no merges in 5.4.
"""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from run_moefication.moefication.checkpoints.tokenizers import MARKUP_TEXTS, PLAIN_TEXTS
from run_moefication.moefication.errors import MoEficationError

Piece = TypeVar("Piece", str, bytes)
LLAMA3_PATTERN = TikTokenConverter().pattern  # Llama 3 cuts text by this before it merges bytes
NUM_SPECIAL_TOKENS = 256
# Llama 3's special tokens that have a meaning, by their place after the ordinary ones; 3.1 named some reserved ones.
LLAMA3_TOKENS = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
LLAMA31_TOKENS = LLAMA3_TOKENS | {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}


def convert_tokenizer(path: Path, family: str, max_positions: int) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a `tokenizer.model`, adding BOS as the original does for a prompt. `family` is the model's,
    such as "Llama 3.1". Raises MoEficationError where the file is neither a sentencepiece BPE nor a tiktoken model."""
    content = path.read_bytes()
    if ranks := _tiktoken_ranks(content):
        names = LLAMA3_TOKENS if family == "Llama 3" else LLAMA31_TOKENS
        tokenizer, special = _from_tiktoken(ranks, names)
    else:
        tokenizer, special = _from_sentencepiece(content, path)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


def _merges(ranks: Mapping[Piece, int]) -> list[tuple[Piece, Piece]]:
    """All pairs of tokens that join to a token, the joined token of the lowest rank first: what BPE applies."""
    pairs = [
        (rank, ranks[left], ranks[right], left, right)
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if (left := token[:cut]) in ranks and (right := token[cut:]) in ranks
    ]
    return [(left, right) for *_, left, right in sorted(pairs)]


def _begin_with(token: str, number: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, number)]
    )


def _from_sentencepiece(content: bytes, path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Byte-pair encoding over characters, unknown ones as their bytes; spaces are written as U+2581."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)  # checks more than the parser
        proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    except (RuntimeError, OSError, DecodeError) as error:
        raise MoEficationError(f"{path} is neither a sentencepiece nor a tiktoken model ({error})") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    special_ids = (trainer.unk_id, trainer.bos_id, trainer.eos_id)
    plain = trainer.model_type == trainer.BPE and trainer.byte_fallback and not normalizer.precompiled_charsmap
    if not plain or not all(0 <= i < len(proto.pieces) for i in special_ids):
        raise MoEficationError(f"{path} is not a BPE model with byte fallback and plain text, as LLaMA's are")

    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    # Scores order the merges; control and byte pieces take no part.
    ordinary = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    ordinary.sort(key=lambda piece: -piece.score)
    merges = _merges({piece.piece: rank for rank, piece in enumerate(ordinary)})
    unknown, begin, end = (proto.pieces[i].piece for i in special_ids)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        spaces = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", left=1))
    tokenizer.normalizer, tokenizer.decoder = spaces, decoders.Sequence(steps)
    tokenizer.post_processor = _begin_with(begin, trainer.bos_id)
    special = {"unk_token": unknown, "bos_token": begin, "eos_token": end}
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special.values()])
    symbols = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    for text in [*PLAIN_TEXTS, *MARKUP_TEXTS, *(f"{symbol} a{symbol}b {symbol} c" for symbol in symbols)]:
        # sentencepiece takes special tokens that are spelled out for text, transformers for the tokens.
        if any(token in text for token in special.values()):
            continue
        expected, found = [trainer.bos_id, *processor.encode(text)], tokenizer.encode(text).ids
        if found != expected:
            raise MoEficationError(
                f"{path} cannot be converted: sentencepiece makes {expected[:8]} of {text!r}, the fast tokenizer "
                f"{found[:8]}; its normaliser or its own symbols are not as LLaMA's"
            )
    return tokenizer, special


def _tiktoken_ranks(content: bytes) -> dict[bytes, int] | None:
    """The tokens of a tiktoken file, one `base64 rank` a line; None for anything else."""
    try:
        lines = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error):
        return None
    return ranks if ranks and sorted(ranks.values()) == list(range(len(lines))) else None


class _Llama3Converter(TikTokenConverter):
    """Takes tokens that are read already: tiktoken's reader caches files by their path, and may give an older one."""

    def __init__(self, ranks: Mapping[bytes, int], special_tokens: list[str]):
        super().__init__(extra_special_tokens=special_tokens)
        self.ranks = ranks

    def extract_vocab_merges_from_model(self, tiktoken_url: str | None) -> tuple[dict, list]:
        letters = bytes_to_unicode()
        shown = {token: "".join(letters[byte] for byte in token) for token in self.ranks}
        vocabulary = {shown[token]: rank for token, rank in self.ranks.items()}
        return vocabulary, [(shown[left], shown[right]) for left, right in _merges(self.ranks)]


def _from_tiktoken(ranks: Mapping[bytes, int], names: Mapping[int, str]) -> tuple[Tokenizer, dict[str, str]]:
    """Byte-pair encoding over bytes, each shown as one printable character, and Llama 3's special tokens."""
    reserved = iter(range(NUM_SPECIAL_TOKENS))
    special = [
        f"<|{names[i]}|>" if i in names else f"<|reserved_special_token_{next(reserved)}|>"
        for i in range(NUM_SPECIAL_TOKENS)
    ]
    tokenizer = _Llama3Converter(ranks, special).converted()
    begin, end = special[:2]
    tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, _begin_with(begin, len(ranks))])
    return tokenizer, {"bos_token": begin, "eos_token": end}
