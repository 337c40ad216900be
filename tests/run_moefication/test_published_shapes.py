"""Checkpoints of the shapes that people publish: each becomes an MoE that, with all its experts, computes what
transformers computes from the dense folder and reads the same tokens."""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    LLAMA3_ROPE,
    TINY,
    assert_refused,
    change_config,
    change_weights,
    make_llama,
    to_bin,
    to_shards,
    write_jsonl,
)
from pipeline import LINEAR, Pipeline, load
from safetensors.torch import save_file
from tiny_tokenizers import save_byte_level, save_sentencepiece, save_tekken, save_tiktoken
from transformers import AutoTokenizer

from run_moefication import llama_evaluate
from run_moefication.moefication.checkpoints.tokenizers import MARKUP_TEXTS, PLAIN_TEXTS

VOCABULARY = 640  # more than any of the tokenizers has
HALF_HEAD = TINY["hidden_size"] // TINY["num_attention_heads"] // 2
LLAMA3_SCALING = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
NUM_LAYERS = 2
WEIGHTS, HEAD = "model.safetensors", "lm_head.weight"
NOT_READ = [f"model.layers.1.self_attn.rotary_emb.{name}_cached" for name in ("cos", "sin")]
NOT_READ += ["model.rotary_emb.inv_freq", "v_head.summary.weight"]


@dataclass
class Shape:
    """How a published checkpoint differs from the tiny LLaMA."""

    built: dict[str, Any] = field(default_factory=dict)  # fields of the config that the weights are made for
    written: dict[str, Any] = field(default_factory=dict)  # those of the file; LEFT_OUT takes one out
    tokenizer: Callable[[Path], None] = save_sentencepiece  # writes its files
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    files: Callable[[Path], None] = lambda folder: None  # changes the folder at the end
    said: str | None = None  # words of a line that each stage says, and goes on
    doubted: str | None = None  # words of the line that is said of its tokenizer, once


LEFT_OUT = object()  # of config.json
MISTRAL = {"model_type": "mistral", "mlp_bias": LEFT_OUT, "sliding_window": None}
LLAMA2 = {"tokenizer_class": "LlamaTokenizer", "legacy": False}


def rope(theta: float | None = None, **scaling: Any) -> dict[str, Any]:
    """rope_theta and rope_scaling in config.json itself, as before 2025."""
    fields = {"rope_theta": theta, "rope_scaling": scaling}
    return {"rope_parameters": LEFT_OUT} | {name: value for name, value in fields.items() if value}


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """`change` works on the dict of the tensors."""
    return lambda folder: change_weights(folder, change)


def old_llama(folder: Path) -> None:
    """LLaMA 1 as converted in 2023."""
    change_weights(folder, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    to_bin(folder, 2)


def sampling(folder: Path) -> None:
    """Vicuna's generation config, which transformers refuses to save again."""
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.9, "top_p": 0.6}))
    to_bin(folder)


def head_in_index_alone(folder: Path) -> None:
    """A tied model whose index was written before its head was left out."""
    to_shards(folder)
    index = folder / f"{WEIGHTS}.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][HEAD] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))


def more_chat_templates(folder: Path) -> None:
    """As transformers saves a tokenizer with several."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)


def stale_index(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")


def consolidated(folder: Path) -> None:
    """Mistral's own file of the same weights, beside those of transformers."""
    shutil.copy(folder / WEIGHTS, folder / "consolidated.safetensors")


SHAPES = {
    "LLaMA 1": Shape(
        {"num_key_value_heads": 4},
        {"num_key_value_heads": LEFT_OUT, "max_sequence_length": 2048},
        files=old_llama,
        dtype=torch.float16,
        said="rotary_emb.inv_freq is not read",
    ),
    "Llama 2": Shape(
        {}, {"pretraining_tp": 1, "rope_scaling": None}, tokenizer_config=LLAMA2, dtype=torch.float16, files=to_shards
    ),
    "Llama 3": Shape({}, rope(500000.0), save_tiktoken, dtype=torch.bfloat16),
    "Llama 3.1": Shape({}, rope(500000.0, **LLAMA3_SCALING) | {"eos_token_id": [2, 3, 4]}, save_tiktoken),
    "Llama 3.2": Shape({"tie_word_embeddings": True, "head_dim": 16}, {}, save_tiktoken, dtype=torch.bfloat16),
    "Code Llama": Shape({}, rope(1000000), tokenizer_config={"tokenizer_class": "CodeLlamaTokenizer"}),
    "Yi": Shape({}, rope(5000000.0), tokenizer_config=LLAMA2 | {"add_bos_token": False}),
    "DeepSeek-LLM": Shape({}, {}, save_byte_level, {"tokenizer_class": "LlamaTokenizerFast"}),
    "Vicuna": Shape({}, {"pad_token_id": 0, "rms_norm_eps": 1e-05}, tokenizer_config=LLAMA2, files=sampling),
    "TinyLlama": Shape({}, {"pretraining_tp": 1}, tokenizer_config=LLAMA2 | {"legacy": True}),
    "OpenLLaMA": Shape({}, {"torch_dtype": "float16"}, tokenizer_config=LLAMA2 | {"add_bos_token": True}),
    "SmolLM2": Shape(
        {"tie_word_embeddings": True},
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"kv_cache_dtype": "x"}},
        save_byte_level,
        {"tokenizer_class": "GPT2Tokenizer"},
        torch.bfloat16,
    ),
    "InternLM as LLaMA": Shape({"attention_bias": True}),
    "Mistral v0.2": Shape({}, MISTRAL | rope(1000000.0), tokenizer_config={"tokenizer_class": "LlamaTokenizer"}),
    "Mistral v0.3": Shape({}, MISTRAL, tokenizer_config={"tokenizer_class": "LlamaTokenizerFast"}, files=consolidated),
    "Mistral, heads and positions left out": Shape(
        {"hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 8},
        MISTRAL | {"num_key_value_heads": LEFT_OUT, "max_position_embeddings": LEFT_OUT},
    ),
    "Mistral, a bias that it ignores": Shape({}, MISTRAL | {"attention_bias": True}),
    "Mistral with tokenizer.model alone": Shape(
        {},
        MISTRAL,
        tokenizer_config=LLAMA2,
        files=lambda folder: (folder / "tokenizer.json").unlink(),
        doubted="transformers puts no <s> before a text",
    ),
    "Devstral": Shape({"head_dim": 16}, MISTRAL, save_tekken, dtype=torch.bfloat16, doubted="has no end of documents"),
    "rope linear": Shape({}, rope(type="linear", factor=4.0)),
    "rope dynamic": Shape({"max_position_embeddings": 32}, rope(type="dynamic", factor=2.0)),
    "rope yarn": Shape({}, rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)),
    "rope longrope": Shape(
        {},
        rope(type="longrope", short_factor=[1.0] * HALF_HEAD, long_factor=[2.0] * HALF_HEAD)
        | {"original_max_position_embeddings": 32},
    ),
    "tied, stored twice": Shape(
        {"tie_word_embeddings": True}, files=weights(lambda s: s.update({HEAD: s["model.embed_tokens.weight"].clone()}))
    ),
    "tied, but another head is stored": Shape(
        {"tie_word_embeddings": True},
        files=weights(lambda s: s.update({HEAD: s["model.embed_tokens.weight"].flip(0)})),
        said="its lm_head.weight is kept",
    ),
    # What `safetensors.torch.save_model` leaves.
    "tied, stored as its head": Shape(
        {"tie_word_embeddings": True}, files=weights(lambda s: s.update({HEAD: s.pop("model.embed_tokens.weight")}))
    ),
    "tied, its head in the index alone": Shape({"tie_word_embeddings": True}, files=head_in_index_alone),
    "a stale index": Shape(files=stale_index),
    "several chat templates": Shape(tokenizer=save_byte_level, files=more_chat_templates),
    "trainable parameters in torch's old format": Shape(
        files=functools.partial(to_bin, change=torch.nn.Parameter, _use_new_zipfile_serialization=False)
    ),
    "tensors that no logit depends on": Shape(
        files=weights(lambda s: s.update({name: torch.ones(4) for name in NOT_READ})),
        said="rotary_emb.cos_cached and 3 more like it are not read",
    ),
    "a LoRA adapter beside": Shape(files=adapter, said="the LoRA adapter beside the weights is not read; merge it"),
    "a config that steers": Shape(
        {},
        {
            "output_attentions": True,
            "output_hidden_states": True,
            "return_dict": False,
            "_attn_implementation": "flash_attention_2",
            "use_cache": False,
            "layer_types": ["full_attention"] * NUM_LAYERS,
        },
    ),
}


def write(shape: Shape, folder: Path) -> Path:
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": NUM_LAYERS}
    make_llama(folder, dtype=shape.dtype, save_tokenizer=shape.tokenizer, **(sizes | shape.built))
    path = folder / "config.json"
    config = json.loads(path.read_text()) | shape.written
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not LEFT_OUT}))
    if shape.tokenizer_config:
        change_config(folder, "tokenizer_config.json", **shape.tokenizer_config)
    shape.files(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    lines = [f"{' ' * (i % 3)}{i}. The cat sat on a mat.  {' ' * (i % 4)}and looked\n\n{i}" for i in range(60)]
    return write_jsonl(folder / "c4.jsonl", lines).parent


def converted(folder: Path, text: Path, save: Path, num_selects: int = 4) -> Pipeline:
    features = ["--block_size", 32, "--max_tokens", 256, "--feature_format", "inputs", "--dtype", "float32"]
    options = dict(split_method="Random", feature_options=features, select_options=[*LINEAR])
    return Pipeline(folder, text, save, num_selects=num_selects, **options).run()


def for_transformers(folder: Path) -> Path:
    """The folder without what would make transformers add to the weights, return something else, or need a package."""
    plain = Path(shutil.copytree(folder, folder.parent / "plain", ignore=shutil.ignore_patterns("adapter*")))
    if "output_attentions" in json.loads((plain / "config.json").read_text()):
        outputs = dict(return_dict=True, output_attentions=False, output_hidden_states=False)
        change_config(plain, **outputs, _attn_implementation=None)
    return plain


@pytest.mark.parametrize("name", SHAPES)
def test_published_shape(name, text, tmp_path, caplog):
    shape = SHAPES[name]
    folder = write(shape, tmp_path / "model")
    moe = converted(folder, text, tmp_path / "out").moe
    records = [record for record in caplog.records if record.name.startswith("run_moefication")]
    doubts = [record.getMessage() for record in records if record.name.endswith(".tokenizers")]
    lines = [record.getMessage() for record in records if not record.name.endswith(".tokenizers")]
    assert len(lines) == (4 if shape.said else 0)  # once in each stage
    assert all(shape.said in line for line in lines)
    assert len(doubts) == (1 if shape.doubted else 0)
    assert all(shape.doubted in line for line in doubts)

    tokens = torch.arange(2 * 48).view(2, 48) % VOCABULARY
    dense = for_transformers(folder)
    source, model = load(dense), load(moe, 4)
    assert model.config.max_position_embeddings == source.config.max_position_embeddings
    with torch.no_grad():
        expected = source(tokens).logits
        assert (model(tokens).logits - expected).abs().max() < 1e-4
    assert expected.abs().max() > 1

    dense_tokenizer, moe_tokenizer = AutoTokenizer.from_pretrained(dense), AutoTokenizer.from_pretrained(moe)
    texts = [*PLAIN_TEXTS, *MARKUP_TEXTS, *dense_tokenizer.all_special_tokens]
    assert moe_tokenizer(texts)["input_ids"] == dense_tokenizer(texts)["input_ids"]
    assert moe_tokenizer.padding_side == dense_tokenizer.padding_side
    assert moe_tokenizer.chat_template == dense_tokenizer.chat_template


@pytest.fixture
def evaluated(text, run_script) -> Callable[..., tuple[int, str, str]]:
    """`evaluated(folder, ..., "--option", value)`: status, stdout, stderr."""
    options = ["--text_path", text / "c4.jsonl", "--max_tokens", 256]
    return lambda *folders: run_script(llama_evaluate.main, *options, "--model_path", *folders)


def test_evaluation_of_a_shape_agrees_with_its_source(text, tmp_path, evaluated):
    """The head, the window, the tokens and the steering fields at once: with all experts on, the ratio is one."""
    shape = Shape({}, SHAPES["Mistral v0.2"].written | SHAPES["a config that steers"].written)
    folder = write(shape, tmp_path / "model")
    moe = converted(folder, text, tmp_path / "out").moe
    status, out, _ = evaluated(folder, moe, "--num_selects", 4, "--json")
    assert status == 0
    dense, everything = json.loads(out)
    assert everything["predicted_tokens"] == dense["predicted_tokens"]
    assert everything["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"pad_token_id": 9999}, "describes no model that can be built (Padding_idx must be within num_embeddings)"),
        ({"id2label": ["a", "b"]}, "config.json: "),
        ({"model_type": "foo"}, "transformers knows no model_type 'foo'"),
        # What says nothing of the weights is passed over.
        ({"dtype": "fp8"}, None),
        ({"text_config": {"hidden_size": 64}}, None),
        ({"use_return_dict": False}, None),
    ],
)
def test_a_wrong_config_is_one_line_in_evaluations_too(field, words, tmp_path, evaluated):
    folder = write(Shape(), tmp_path / "model")
    change_config(folder, **field)
    result = evaluated(folder)
    if words is None:
        assert result[0] == 0
    else:
        assert_refused(result, words)


def test_an_adapter_beside_is_left_out_of_evaluations_or_refused(text, tmp_path, evaluated, caplog):
    plain = write(Shape(), tmp_path / "plain")
    beside = write(SHAPES["a LoRA adapter beside"], tmp_path / "beside")
    status, out, _ = evaluated(plain, beside, "--json")
    assert status == 0
    assert len({row["perplexity"] for row in json.loads(out)}) == 1
    assert "the LoRA adapter beside the weights is not read" in caplog.text
    moe = converted(plain, text, tmp_path / "out").moe
    adapter(moe)
    assert_refused(evaluated(moe), "holds a LoRA adapter beside its weights; merge it")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_checkpoint_runs_and_nothing_is_asked(file, text, tmp_path, evaluated, refuses, monkeypatch):
    """As an InternLM2 in LLaMA's names ships it: a prompt answered with yes would run it."""
    folder = write(Shape(tokenizer=save_byte_level), tmp_path / "model")
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass X: ...\n"
    (folder / "tokenization_x.py").write_text(code)
    auto_map = {"AutoTokenizer": ["tokenization_x.X", None], "AutoConfig": "tokenization_x.X"}
    change_config(folder, file, auto_map=auto_map, tokenizer_class="X")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    refuses(Pipeline(folder, text, tmp_path / "out").features, f"auto_map in {file}")
    assert_refused(evaluated(folder), f"auto_map in {file}")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_change_of_the_kind_of_model_is_noticed_in_the_token_cache(text, tmp_path):
    """The same tokenizer files are another tokenizer beside another kind of model."""
    folder = write(SHAPES["Mistral v0.2"], tmp_path / "model")
    pipeline = Pipeline(folder, text, tmp_path / "out")
    assert pipeline.features() == 0
    cached = {path.read_bytes() for path in (tmp_path / "out" / "cache").glob("*.tokens")}
    change_config(folder, model_type="llama")
    shutil.rmtree(pipeline.features_folder)
    assert pipeline.features() == 0
    assert {path.read_bytes() for path in (tmp_path / "out" / "cache").glob("*.tokens")} > cached
