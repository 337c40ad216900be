"""A checkpoint's tokenizer: its files, loading it, and carrying it over to another kind of model unchanged.

transformers picks the class of a tokenizer by the kind of model beside it, and classes differ: the same files may give
other ids in a folder whose config.json names another `model_type`.
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from llama_moe import LlamaMoEConfig

from ..errors import MoEficationError
from ..storage.files import read_json_object
from .transformers_library import CONFIG_ERRORS, first_line, quiet_transformers

# A tokenizer has at least one of these files, which hold the vocabulary.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
# Patterns of all files that make a tokenizer; few checkpoints have all.
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
)
# Tokenizers of the same vocabulary differ on such texts: spaces and line ends at either side and in a row, what
# normalisers change, scripts without spaces, and code.
PLAIN_TEXTS = (
    *("", " ", "  ", "\n", "\t", "a", " a", "  a", "a ", "a  b", "\n\na", "a\n\n\nb", " \n a", "a\r\nb", "\ta\t b"),
    *("\u00a0a", "a\u3000b", "\u200ba", "\ufeffa", "\x1b[0m", "a" * 300),
    *("Hello World", "hello, world!", " I'd say: it's 3,141.59 or 1e-9?", "camelCase snake_case", "2026-11-29"),
    *("café cafe\u0301", "ﬁne ① ＡＢ ½", "straße İstanbul", "naïve “q” —", "∑∫√", "\U00020000"),
    *("你好，世界。", "こんにちは", "안녕 하세요", "مرحبا", "नमस्ते", "สวัสดี", "👨\u200d👩\u200d👧 🇩🇪 😀"),
    "def f(x):\n    if x:\n\t\treturn {'a': [1, 2]}  # note\n\n\nprint(f(0) != 0x1F)\n",
    "<html>\n  <b>x</b> &amp; y</html>\n",
    "https://example.org/a_b?c=%20d#e",
    "A first sentence. And a second one, somewhat longer; after it a third!\n\nA new paragraph.\n",
)
# sentencepiece's character for a space, and tokens of many vocabularies, spelled out.
MARKUP_TEXTS = (
    *("▁", "▁a", "a▁b", " ▁ a", "a\x00b", "<0x0A>", "<0x41>", "<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>"),
    *(" <s> a </s> b", "a<s>b</s>c", "[INST] a [/INST]"),
    *("<|im_start|>user\na<|im_end|>", "<|begin_of_text|>a<|eot_id|>"),
)
COMPARED_ATTRIBUTES = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"),
    *("padding_side", "truncation_side", "model_max_length"),
)
AUTO_MAP = "auto_map"
# Digits after spaces, which pre-tokenizers cut in different ways.
NUMBERS = ("Total:    42", "x:\n  1\n    22\n", "12345 67")
logger = logging.getLogger(__name__)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder; refused if the libraries cannot read it without code of its own. Where it
    seems to cut text otherwise than the one that the model was trained with, a warning says so, once."""
    tokenizer = _load(path)
    for doubt in _doubts(path, tokenizer):
        _warn(f"{path}: {doubt}")
    return tokenizer


@cache
def _warn(message: str) -> None:
    logger.warning(message)


def _load(path: Path) -> PreTrainedTokenizerBase:
    if not any((path / name).is_file() for name in VOCABULARY_FILES):  # some releases make an empty one
        raise MoEficationError(f"{path} has no usable tokenizer (none of {', '.join(VOCABULARY_FILES)} is there)")
    if _json(path / "tokenizer_config.json").get(AUTO_MAP):
        raise MoEficationError(
            f"{path} has a tokenizer with code of its own (auto_map in tokenizer_config.json), which is not run here; "
            f"give a checkpoint whose tokenizer is one of transformers' own"
        )
    try:
        if (path / "tokenizer.json").is_file():
            Tokenizer.from_file(str(path / "tokenizer.json"))  # transformers may pass over one that is damaged
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(path, config=_config_beside(path), trust_remote_code=False)
        tokenizer([*PLAIN_TEXTS])
    except Exception as error:
        # The tokenizers library raises plain Exceptions; the others mean that a file, a class or a package is missing.
        if type(error) is Exception or isinstance(error, (OSError, RuntimeError, ImportError, *CONFIG_ERRORS)):
            reason = first_line(error)
            if isinstance(error, RecursionError):  # as of the first LLaMA checkpoints on the hub
                reason = "a special token in tokenizer_config.json may be empty; LLaMA's are <s>, </s> and <unk>"
            raise MoEficationError(f"{path} has no usable tokenizer ({reason})") from error
        raise
    return tokenizer


def _json(file: Path) -> dict[str, Any]:
    """The content of a JSON file of a checkpoint; empty where there is none."""
    return read_json_object(file, "download it again") if file.is_file() else {}


def _doubts(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What suggests that a model's text was cut otherwise when it was trained.

    Some classes of transformers 5 replace the rules of tokenizer.json by their own (huggingface/transformers#48206),
    which version 4 followed. Only texts that begin with a letter or a digit are compared, since there are two ways to
    put a space before the others.
    """
    file, eos = path / "tokenizer.json", tokenizer.eos_token_id
    settings, of_model = _json(path / "tokenizer_config.json"), _json(path / "config.json").get("eos_token_id")
    if file.is_file():
        written = Tokenizer.from_file(str(file))
        written.no_truncation()
        written.no_padding()
        texts = [text for text in (*PLAIN_TEXTS, *NUMBERS) if text[:1].isascii() and text[:1].isalnum()]
        read = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for text, ids, of_file in zip(texts, read, written.encode_batch(texts, add_special_tokens=False), strict=True):
            if ids != of_file.ids:
                yield (
                    f"transformers reads its tokenizer.json as a {type(tokenizer).__name__}, which makes {ids[:8]} of "
                    f"{text!r}, and the file itself {of_file.ids[:8]}; if the model was trained with the file's, write "
                    f'"tokenizer_class": "TokenizersBackend" into tokenizer_config.json'
                )
                break
        ends = of_model if isinstance(of_model, list) else [of_model]
        if eos is not None and written.id_to_token(eos) is None and eos not in ends:
            yield (
                f"its end of documents, {tokenizer.eos_token!r}, is not in tokenizer.json, and the model never learned "
                f"token {eos}; name the right eos_token in tokenizer_config.json"
            )
    elif (
        not (path / "vocab.json").is_file()  # as of GPT-2, which has no BOS
        and tokenizer.bos_token_id not in [None, *tokenizer("a")["input_ids"]]
        and "add_bos_token" not in settings
    ):
        yield (
            f"transformers puts no {tokenizer.bos_token} before a text, as LLaMA's training did; write "
            f'"add_bos_token": true into tokenizer_config.json, or false if this model wants none'
        )
    if eos is None and of_model is not None:
        yield (
            f"its tokenizer has no end of documents, so nothing parts them, and config.json says {of_model}; "
            f"name the eos_token in tokenizer_config.json"
        )


def _config_beside(path: Path) -> PreTrainedConfig | None:
    """The fields of the model's config.json that decide on the tokenizer's class; the rest need not even be valid."""
    raw = _json(path / "config.json")
    if raw.get("model_type") not in CONFIG_MAPPING:
        return None
    config = CONFIG_MAPPING[raw["model_type"]](name_or_path=str(path))
    if raw.get("tokenizer_class"):
        config.tokenizer_class = raw["tokenizer_class"]
    return config


def provoking_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts on which another tokenizer may differ: those above, and this one's special tokens alone and within text."""
    added = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
    return [*PLAIN_TEXTS, *MARKUP_TEXTS, *(text for token in added for text in (token, f"a{token}b", f" {token} c"))]


def other_ids(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """As `difference`, of ids alone."""
    texts = provoking_texts(one)
    for text, ids, others in zip(texts, one(texts)["input_ids"], other(texts)["input_ids"], strict=True):
        if ids != others:
            return f"makes {others[:8]} of {text!r} instead of {ids[:8]}"
    return None


def difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """What two tokenizers make differently, as the rest of a sentence, or None: ids of texts, text of ids, the ids of
    their special tokens, the form of a chat, and the side and length of batches."""
    if found := other_ids(one, other):
        return found
    for ids in one(provoking_texts(one))["input_ids"]:
        if one.decode(ids) != other.decode(ids):
            return f"makes {other.decode(ids)!r} of the ids {ids[:8]} instead of {one.decode(ids)!r}"
    for name in COMPARED_ATTRIBUTES:
        if getattr(one, name) != getattr(other, name):
            return f"has {name} {getattr(other, name)!r} instead of {getattr(one, name)!r}"
    return None


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files of a checkpoint's tokenizer."""
    files = sorted(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def require_same_tokenizer(source: Path, moe: Path) -> None:
    """Raise MoEficationError where the checkpoint `moe` carries another tokenizer than `source`, of which it was made,
    has by now: text would be cut by one, and the model go on with the other."""
    carried = tokenizer_files(moe)
    if carried in ({}, tokenizer_files(source)):
        return
    if found := other_ids(load_tokenizer(source), load_tokenizer(moe)):
        changed = f"the tokenizer of {source} is not what {moe} was made with, which {found}"
        raise MoEficationError(f"{changed}: make that anew (llama_convert.py --overwrite), or take the tokenizer back")


def carried_over(source: Path, model_type: str = LlamaMoEConfig.model_type) -> dict[str, bytes]:
    """The files by name that make, beside a model of another type, the tokenizer of the checkpoint folder `source`.

    They are the source's own, as they are, if these behave the same there; else the tokenizer as it was resolved, saved
    anew, beside the other files or alone; refused if neither gives its ids. None, where the source has no tokenizer.
    """
    copies = tokenizer_files(source)
    if not copies.keys() & set(VOCABULARY_FILES):
        return copies
    tokenizer = load_tokenizer(source)
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        resolved = tokenizer_files(Path(saved))
    found = None
    for files in (copies, copies | resolved, resolved):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in {**files, "config.json": json.dumps({"model_type": model_type}).encode()}.items():
                Path(folder, name).parent.mkdir(exist_ok=True)
                Path(folder, name).write_bytes(content)
            found = difference(tokenizer, _load(Path(folder)))
        if found is None:
            return files
    raise MoEficationError(
        f"{source}: its tokenizer would change with the conversion (beside a {model_type} model it {found}); "
        f"save it anew with transformers (AutoTokenizer.from_pretrained, save_pretrained) and use that"
    )
