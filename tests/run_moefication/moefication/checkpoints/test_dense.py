"""Every kind of LLaMA checkpoint is read exactly; everything else is refused by name before any work."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import LLAMA3_ROPE, TINY, Bomb, as_bin, change_config, change_weights, make_llama, to_bin
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel, MistralForCausalLM

from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.errors import MoEficationError


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_reads(folder: Path, state: dict[str, torch.Tensor]) -> DenseCheckpoint:
    checkpoint = DenseCheckpoint(str(folder))
    assert set(checkpoint.tensors) == {name.removeprefix("model.") for name in state}
    for name, tensor in state.items():
        read = checkpoint.tensor(name.removeprefix("model."))
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    return checkpoint


def test_tied_and_base_models_and_classifiers(tmp_path):
    tied = make_llama(tmp_path / "tied", tie_word_embeddings=True)
    assert assert_reads(tied, state_of(tied)).lm_head == "embed_tokens.weight"
    base = make_llama(tmp_path / "base", model_class=LlamaModel)
    assert assert_reads(base, state_of(base)).lm_head is None
    classifier = make_llama(tmp_path / "classifier", model_class=LlamaForSequenceClassification, num_labels=3)
    assert assert_reads(classifier, state_of(classifier)).tensors["score.weight"].shape == (3, TINY["hidden_size"])


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (LlamaForCausalLM, {"mlp_bias": True}),
        (LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE}),
        (LlamaModel, {}),
        (LlamaForSequenceClassification, {}),
    ],
)
def test_loaded_model_computes_what_transformers_does(model_class, fields, tmp_path):
    folder = make_llama(tmp_path / "llama", model_class=model_class, **fields)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        hidden = DenseCheckpoint(str(folder)).load_model("cpu", torch.float32)(tokens).last_hidden_state
        expected = model_class.from_pretrained(folder).base_model(tokens).last_hidden_state
    assert torch.equal(hidden, expected)  # the same code on the same numbers


def test_mlp_tensors_come_in_float32(tmp_path):
    folder = make_llama(tmp_path / "llama", dtype=torch.bfloat16)
    checkpoint = assert_reads(folder, state_of(folder))
    assert checkpoint.dtype == torch.bfloat16
    read = checkpoint.mlp_tensor(1, "up_proj.weight")
    assert read.dtype == torch.float32
    assert torch.equal(read, state_of(folder)["model.layers.1.mlp.up_proj.weight"].float())


def test_layout_does_not_matter(tiny_llama, tmp_path):
    state = state_of(tiny_llama)
    sharded = make_llama(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    layouts = [tiny_llama, sharded, as_bin(tiny_llama, tmp_path / "bin"), as_bin(tiny_llama, tmp_path / "bins", 3)]
    assert len({assert_reads(folder, state).fingerprint for folder in layouts}) == 1


def test_fingerprint_sees_config_and_every_tensor_but_not_noise(tiny_llama, tmp_path):
    original = DenseCheckpoint(str(tiny_llama)).fingerprint
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    change_config(folder, transformers_version="0", _name_or_path="elsewhere", use_cache=False)
    assert DenseCheckpoint(str(folder)).fingerprint == original
    fingerprints = {original}
    for name in (state := state_of(tiny_llama)):
        save_file(state | {name: state[name] * 2}, folder / "model.safetensors", metadata={"format": "pt"})
        fingerprints.add(DenseCheckpoint(str(folder)).fingerprint)
    change_config(folder, rms_norm_eps=1e-3)
    fingerprints.add(DenseCheckpoint(str(folder)).fingerprint)
    assert len(fingerprints) == 2 + len(state)


def test_fingerprint_samples_all_over_a_tensor(tiny_llama, tmp_path):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    change_state(lambda state: state[GATE][60:].neg_())(folder)  # the last sixteenth of the rows
    assert DenseCheckpoint(str(folder)).fingerprint != DenseCheckpoint(str(tiny_llama)).fingerprint


def test_name_is_the_last_part_of_the_path(tiny_llama, tmp_path, monkeypatch):
    assert DenseCheckpoint(f"{tiny_llama}/").name == "tiny-llama"
    monkeypatch.chdir(tiny_llama)
    assert DenseCheckpoint(".").name == "tiny-llama"
    below = tmp_path / "llama" / "below"
    shutil.copytree(tiny_llama, below.parent)
    below.mkdir()
    monkeypatch.chdir(below)
    assert DenseCheckpoint("..").name == "llama"


def change_state(change):
    return lambda folder: change_weights(folder, change)


def config(**changes):
    return lambda folder: change_config(folder, **changes)


def file(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str = "model.safetensors"):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


def pipe(name: str):
    return lambda folder: [(folder / name).unlink(), os.mkfifo(folder / name)]


def with_tensors(tensors: dict[str, torch.Tensor]):
    return change_state(lambda state: state.update(tensors))


def renamed(old: str, new: str):
    return change_state(lambda state: state.update({new: state.pop(old)}))


def index(weight_map: dict[str, str] | None = None, shards: dict[str, list[str]] | None = None):
    """Replace the single file by shards (file -> names, None: all the others) and an index of our choice."""

    def damage(folder: Path) -> None:
        state = state_of(folder)
        (folder / "model.safetensors").unlink()
        for name, keys in (shards or {}).items():
            save_file({key: state[key] for key in keys or state}, folder / name, metadata={"format": "pt"})
        content = weight_map if weight_map is not None else dict.fromkeys(state, "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": content}))

    return damage


def bins(damage: Callable[[Path], object]):
    return lambda folder: [to_bin(folder), damage(folder)]


GATE = "model.layers.0.mlp.gate_proj.weight"
NORM = "model.norm.weight"
SCORE = "score.weight"
BIN = "pytorch_model.bin"
NO_MODEL = "config.json describes no model that can be built"
REFUSED = {
    "gpt2": (config(model_type="gpt2"), "is a 'gpt2' model"),
    "no model_type": (config(model_type=None), "is a None model"),
    "gelu": (config(hidden_act="gelu"), "has hidden_act 'gelu'"),
    "config not JSON": (file("config.json", b"{"), "is not JSON"),
    "config a list": (file("config.json", b"[]"), "is not a JSON object"),
    "config nested": (file("config.json", b"[" * 100_000), "is not JSON"),
    "config a pipe": (pipe("config.json"), "has no config.json"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers is 0; a positive integer is needed"),
    "layers true": (config(num_hidden_layers=True), "num_hidden_layers is True"),
    "no width": (config(intermediate_size=None), "intermediate_size is None"),
    "a billion layers": (config(num_hidden_layers=10**9), "lacks the tensor model.layers.3."),
    "a layer less": (config(num_hidden_layers=2), "holds layers.2."),
    "other width": (config(intermediate_size=128), "layers.0.mlp.gate_proj.weight has shape [64, 32]"),
    "other heads": (config(num_attention_heads=3), "not a multiple of the number of attention heads"),
    "no key-value heads": (config(num_key_value_heads=0), NO_MODEL),
    "head_dim below zero": (config(head_dim=-4), NO_MODEL),
    "vocabulary beyond any tensor": (config(vocab_size=10**18), NO_MODEL),
    "width beyond any integer": (config(hidden_size=10**20), NO_MODEL),
    "key-value heads that do not divide": (config(num_key_value_heads=3), "4 is no multiple of num_key_value_heads 3"),
    "rope in words": (config(rope_parameters="x"), "config.json: "),
    "rope of no kind": (config(rope_parameters={"rope_type": "spiral", "factor": 2.0}), NO_MODEL),
    "rope of half a head": (
        config(rope_parameters={"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}),
        "its rope turns 4 of the 8 dimensions of a head",
    ),
    "layers that differ": (config(per_layer_config={"0": {"intermediate_size": 32}}), "has layers of different shapes"),
    "no causal mask": (config(is_causal=False), "is no causal model"),
    "quantised": (config(quantization_config={"bits": 4}), "is quantised"),
    "code of its own": (config(auto_map={"AutoConfig": "x.X"}), "brings code of its own (auto_map in config.json)"),
    "Mistral v0.1": (config(model_type="mistral", sliding_window=64), "is a Mistral with sliding_window 64"),
    "Mistral v0.1, window left out": (
        config(model_type="mistral", max_position_embeddings=32768),
        'sliding_window 4096 (what its config.json means by leaving it out; "sliding_window": null',
    ),
    "tensor absent": (change_state(lambda state: state.pop(NORM)), f"lacks the tensor {NORM}"),
    "float64": (change_state(lambda state: state.update({GATE: state[GATE].double()})), "is torch.float64"),
    "name without prefix": (renamed(NORM, "norm.weight"), "holds norm.weight, which"),
    "name with and without prefix": (with_tensors({"norm.weight": torch.ones(32)}), "holds norm.weight, which"),
    "head with prefix": (renamed("lm_head.weight", "model.lm_head.weight"), "holds model.lm_head.weight, which"),
    "classifier of other width": (with_tensors({SCORE: torch.ones(2, 31)}), "score.weight has shape [2, 31]"),
    "classifier a vector": (with_tensors({SCORE: torch.ones(32)}), "score.weight has shape [32]"),
    "classifier of integers": (with_tensors({SCORE: torch.ones(2, 32).long()}), "score.weight is torch.int64"),
    "tensor too many": (with_tensors({"x": torch.ones(1)}), "holds x, which"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "weights a pipe": (pipe("model.safetensors"), "model.safetensors is missing"),
    "cut": (cut(), "model.safetensors is not a whole safetensors file"),
    "LFS pointer": (file("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer?"),
    "shard absent": (index(), "a.safetensors is missing"),
    "shard outside": (index({GATE: "../x/evil.safetensors"}), "names ../x/evil.safetensors, outside"),
    "index of numbers": (index({GATE: 1}), "has no weight_map from tensor to file"),
    "index of nothing": (index({}, {}), "lacks the tensor"),
    "index wrong": (index(None, {"a.safetensors": [NORM]}), "where it is not"),
    "index swapped": (
        index({GATE: "b.safetensors", NORM: "a.safetensors"}, {"a.safetensors": [GATE], "b.safetensors": [NORM]}),
        "where it is not",
    ),
    "tensor twice": (
        index({GATE: "a.safetensors", NORM: "b.safetensors"}, {"a.safetensors": [GATE, NORM], "b.safetensors": [NORM]}),
        f"{NORM} lies in both a.safetensors and b.safetensors",
    ),
    "bin cut": (bins(cut(BIN)), f"{BIN} is not a whole file of plain tensors, refused"),
    "bin a list": (bins(lambda f: torch.save([torch.ones(1)], f / BIN)), f"{BIN} is not a dict of tensors by name"),
    "bin nested": (bins(lambda f: torch.save({"model": {}}, f / BIN)), f"{BIN} is not a dict of tensors by name"),
    "bin numbered": (bins(lambda f: torch.save({3: torch.ones(1)}, f / BIN)), "is not a dict of tensors by name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, tiny_llama, tmp_path):
    damage, words = REFUSED[case]
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    damage(folder)
    start = time.perf_counter()
    with pytest.raises(MoEficationError) as error:
        DenseCheckpoint(str(folder))
    assert words in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 5  # a billion layers included


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for path, words in [
        (tmp_path / "file", "is a file; name the folder of the checkpoint"),
        (tmp_path / "nowhere", "is no folder here, and no hub id (owner/name)"),
        (tmp_path / "dangling", "is no folder here, and no hub id"),
        ("../nowhere", "is no folder here, and no hub id"),
        ("nowhere", "is no folder here, and no hub id"),
        ("nobody/no-such-model", "is no folder here and the hub has no answer"),  # the tests are offline
    ]:
        with pytest.raises(MoEficationError, match=re.escape(str(path)) + ".*" + re.escape(words)):
            DenseCheckpoint(str(path))


def test_code_in_a_bin_is_never_run(tiny_llama, tmp_path):
    folder = as_bin(tiny_llama, tmp_path / "bin")
    torch.save({"model.embed_tokens.weight": Bomb(tmp_path / "exploded")}, folder / "pytorch_model.bin")
    with pytest.raises(MoEficationError, match="not a whole file of plain tensors, refused"):
        DenseCheckpoint(str(folder))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("num_experts", "nearby"), [(5, "2, 4, 8"), (0, "1, 2, 4, 8, 16"), (-1, "1, 2"), (60, "32, 64"), (128, "64")]
)
def test_number_of_experts_must_divide(num_experts, nearby, checkpoint):
    with pytest.raises(MoEficationError, match=f"does not divide the MLP width 64 of tiny-llama; .*{nearby}"):
        checkpoint.require_experts(num_experts)
    checkpoint.require_experts(64)


def test_values_must_be_finite(tmp_path):
    name = "layers.0.mlp.gate_proj.weight"
    folder = make_llama(tmp_path / "llama", dtype=torch.float16)
    change_state(lambda state: state[GATE].fill_(65504.0))(folder)  # their sum is beyond float16
    assert (DenseCheckpoint(str(folder)).finite_tensor(name) == 65504.0).all()
    for value in (float("nan"), float("-inf")):
        change_state(lambda state, value=value: state[GATE][3].fill_(value))(folder)
        with pytest.raises(MoEficationError, match=f"{name} holds NaN or infinite values"):
            DenseCheckpoint(str(folder)).finite_tensor(name)


def test_an_index_may_name_what_no_model_needs(tmp_path):
    """Such as the embedding of a tied model that was saved under the name of its head, and old rotary tables."""
    folder = make_llama(tmp_path / "llama", tie_word_embeddings=True)
    state = state_of(folder)
    index(dict.fromkeys([*state, "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"], "a"))(folder)
    moved = {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in state.items()}
    save_file(moved, folder / "a", metadata={"format": "pt"})
    assert_reads(folder, state)


def test_names_of_one_thing_are_read_alike(tiny_llama, tmp_path):
    """A window as long as the longest text is full attention, and swish is SiLU."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    positions = TINY["max_position_embeddings"]
    change_config(folder, model_type="mistral", sliding_window=positions, hidden_act="swish")
    model = DenseCheckpoint(folder).load_causal_lm("cpu", torch.float32)
    tokens = torch.arange(positions)[None] % TINY["vocab_size"]
    expected = MistralForCausalLM.from_pretrained(folder)
    assert expected.config.sliding_window == positions
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)
    assert model.config.hidden_act == "silu"
