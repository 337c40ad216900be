"""LLaMA's `tokenizer.model`, sentencepiece or tiktoken, as a fast tokenizer that gives the same ids."""

import base64
import binascii
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from run_moefication.moefication.checkpoints.tokenizers import MARKUP_TEXTS, PLAIN_TEXTS
from run_moefication.moefication.errors import MoEficationError

Piece = TypeVar("Piece", str, bytes)

# How Llama 3 cuts text before it merges bytes (Meta's llama-models, llama3/tokenizer.py).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_SPECIAL_TOKENS = 256
# Those of Llama 3 with a meaning, by their place after the ordinary tokens; 3.1 gave some reserved ones a name.
LLAMA3_TOKENS = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
LLAMA31_TOKENS = LLAMA3_TOKENS | {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}


def convert_tokenizer(path: Path, family: str, max_positions: int) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a `tokenizer.model`, adding BOS as the original does for a prompt.

    Args:
        family: of the model, such as "Llama 3.1".
        max_positions: what the model takes at most, recorded as `model_max_length`.

    Raises:
        MoEficationError: neither a sentencepiece BPE model nor a tiktoken file.
    """
    content = path.read_bytes()
    ranks = _tiktoken_ranks(content)
    if ranks is not None:
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


# ---------------------------------------------------------------------------------------------------- sentencepiece


def _from_sentencepiece(content: bytes, path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Byte-pair encoding over characters, unknown ones as their bytes; spaces are written as U+2581."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)  # checks more than the parser
        proto.ParseFromString(content)
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
    dummy_prefix = normalizer.add_dummy_prefix
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if dummy_prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", left=1)] if dummy_prefix else steps)
    tokenizer.post_processor = _begin_with(begin, trainer.bos_id)
    special = {"unk_token": unknown, "bos_token": begin, "eos_token": end}
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special.values()])
    own = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    texts = [
        *PLAIN_TEXTS,
        *MARKUP_TEXTS,
        *(text for piece in own for text in (piece, f"a{piece}b", f" {piece} c{piece}")),
    ]
    _require_same_ids(path, processor, tokenizer, [text for text in texts if not _names_any(text, special.values())])
    return tokenizer, special


def _names_any(text: str, tokens: Iterable[str]) -> bool:
    """Whether special tokens are spelled out: sentencepiece takes them for text, and transformers for the tokens."""
    return any(token in text for token in tokens)


def _require_same_ids(
    path: Path, original: sentencepiece.SentencePieceProcessor, tokenizer: Tokenizer, texts: list[str]
) -> None:
    """Refuse a model to which the fast tokenizer does not do justice."""
    for text in texts:
        expected, found = [original.bos_id(), *original.encode(text)], tokenizer.encode(text).ids
        if found != expected:
            raise MoEficationError(
                f"{path} cannot be converted: sentencepiece makes {expected[:8]} of {text!r}, the fast tokenizer "
                f"{found[:8]}; its normaliser or its own symbols are not as LLaMA's"
            )


# ---------------------------------------------------------------------------------------------------- tiktoken


def _tiktoken_ranks(content: bytes) -> dict[bytes, int] | None:
    """The tokens of a tiktoken file, one `base64 rank` a line; None for anything else."""
    try:
        lines = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error):
        return None
    return ranks if ranks and sorted(ranks.values()) == list(range(len(lines))) else None


def _from_tiktoken(ranks: dict[bytes, int], names: Mapping[int, str]) -> tuple[Tokenizer, dict[str, str]]:
    """Byte-pair encoding over bytes, each shown as one printable character, and Llama 3's special tokens."""
    letters = bytes_to_unicode()

    def shown(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {shown(token): rank for token, rank in ranks.items()}
    merges = [(shown(left), shown(right)) for left, right in _merges(ranks)]
    # A whole word that is a token is taken as such, whether or not merges lead to it: so does tiktoken.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    reserved = iter(range(NUM_SPECIAL_TOKENS))
    special = [
        f"<|{names[i]}|>" if i in names else f"<|reserved_special_token_{next(reserved)}|>"
        for i in range(NUM_SPECIAL_TOKENS)
    ]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    begin = special[0]
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _begin_with(begin, len(ranks))]
    )
    return tokenizer, {"bos_token": begin, "eos_token": special[1]}
