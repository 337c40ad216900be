"""Converted tokenizers give the ids of the libraries that the originals were made for, and every text back."""

import json
import zipfile
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
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
HARD_TEXTS = [
    "",
    " ",
    "  two  spaces  ",
    "\n\nlines\r\n",
    "日本語のテキスト",
    "🙂\u200d↔\ufe0f",
    "\x00\x7f",
    "ﬁ Å",
    "a" * 300,
]


def reloaded(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def from_wheel(wheel: Package, member: str, folder: Path) -> Path:
    try:
        archive = fetch(wheel, CACHE)
    except RegistryError as error:
        pytest.skip(str(error))
    (folder / "tokenizer.model").write_bytes(zipfile.ZipFile(archive).read(member))
    return folder / "tokenizer.model"


@pytest.fixture(scope="module", params=["trained here", "Mistral-7B"])
def sentencepiece_pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    if request.param == "Mistral-7B":
        path = from_wheel(MISTRAL, "mistral_common/data/tokenizer.model.v1", folder)
    else:
        path = write_sentencepiece(folder / "tokenizer.model")
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return original, reloaded(convert_tokenizer(path, "Llama 2", 4096), folder)


@pytest.fixture(scope="module", params=["written here", "Llama 3"])
def tiktoken_pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiktoken")
    if request.param == "Llama 3":
        path = from_wheel(LLAMA_MODELS, "llama_models/llama3/tokenizer.model", folder)
    else:
        path = write_tiktoken(folder / "tokenizer.model")
    original = tiktoken.Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=load_tiktoken_bpe(str(path)), special_tokens={}
    )
    return original, reloaded(convert_tokenizer(path, "Llama 3.1", 131072), folder)


def check_sentencepiece(pair, text: str) -> None:
    original, tokenizer = pair
    ids = tokenizer(text)["input_ids"]
    assert ids == [original.bos_id(), *original.encode(text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def check_tiktoken(pair, text: str) -> None:
    original, tokenizer = pair
    ids = tokenizer(text)["input_ids"]
    assert ids == [tokenizer.bos_token_id, *original.encode(text, disallowed_special=())]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@settings(deadline=None, max_examples=200)
@given(text=TEXT | LIKELY)
def test_sentencepiece_ids_are_kept(sentencepiece_pair, text):
    check_sentencepiece(sentencepiece_pair, text)


@settings(deadline=None, max_examples=200)
@given(text=TEXT | LIKELY)
def test_tiktoken_ids_are_kept(tiktoken_pair, text):
    check_tiktoken(tiktoken_pair, text)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts(sentencepiece_pair, tiktoken_pair, text):
    check_sentencepiece(sentencepiece_pair, text)
    check_tiktoken(tiktoken_pair, text)


def test_real_documents(sentencepiece_pair, tiktoken_pair, sample_data):
    for path in (sample_data / "heldout").glob("*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:8]:
            if line:
                check_sentencepiece(sentencepiece_pair, json.loads(line)["text"])
                check_tiktoken(tiktoken_pair, json.loads(line)["text"])


@pytest.mark.parametrize(
    ("family", "number", "token"),
    [
        ("Llama 3", 0, "<|begin_of_text|>"),
        ("Llama 3", 1, "<|end_of_text|>"),
        ("Llama 3", 5, "<|reserved_special_token_3|>"),
        ("Llama 3", 6, "<|start_header_id|>"),
        ("Llama 3", 8, "<|reserved_special_token_4|>"),
        ("Llama 3", 9, "<|eot_id|>"),
        ("Llama 3", 255, "<|reserved_special_token_250|>"),
        ("Llama 3.1", 4, "<|finetune_right_pad_id|>"),
        ("Llama 3.1", 5, "<|reserved_special_token_2|>"),
        ("Llama 3.1", 8, "<|eom_id|>"),
        ("Llama 3.1", 9, "<|eot_id|>"),
        ("Llama 3.2", 10, "<|python_tag|>"),
        ("Llama 3.2", 255, "<|reserved_special_token_247|>"),
    ],
)
def test_special_tokens_stand_where_the_published_tokenizers_have_them(tmp_path, family, number, token):
    """As in tokenizer_config.json of meta-llama's repositories of each generation."""
    tokenizer = convert_tokenizer(write_tiktoken(tmp_path / "tokenizer.model"), family, 8192)
    ordinary = len((tmp_path / "tokenizer.model").read_text().splitlines())
    assert tokenizer.convert_tokens_to_ids(token) == ordinary + number
    assert tokenizer(f"a{token}b")["input_ids"][2] == ordinary + number


@pytest.mark.parametrize(
    "options",
    [{"remove_extra_whitespaces": True}, {"treat_whitespace_as_suffix": True}, {"user_defined_symbols": ["cat"]}],
)
def test_a_model_that_the_fast_tokenizer_would_not_do_justice_is_refused(options, tmp_path):
    """The first is OpenLLaMA v1's."""
    path = write_sentencepiece(tmp_path / "tokenizer.model", **options)
    with pytest.raises(MoEficationError, match=r"cannot be converted: sentencepiece makes .* the fast tokenizer"):
        convert_tokenizer(path, "LLaMA 1", 2048)
