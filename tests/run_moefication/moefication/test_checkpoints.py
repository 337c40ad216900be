"""Every kind of LLaMA checkpoint is read exactly; everything else is refused by name before any work."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, VARIANTS, as_bin, change_config, make_llama
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification, LlamaModel

from run_moefication.moefication.checkpoints import Checkpoint
from run_moefication.moefication.errors import MoEficationError


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_reads(folder: Path, state: dict[str, torch.Tensor]) -> Checkpoint:
    checkpoint = Checkpoint(str(folder))
    assert set(checkpoint.tensors) == {name.removeprefix("model.") for name in state}
    for name, tensor in state.items():
        read = checkpoint.tensor(name.removeprefix("model."))
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    return checkpoint


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, tmp_path):
    folder = make_llama(tmp_path / "llama", **VARIANTS[variant])
    checkpoint = assert_reads(folder, state_of(folder))
    assert checkpoint.name == "llama"
    assert checkpoint.has_lm_head
    assert checkpoint.config.mlp_bias == (variant == "mlp_bias")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    folder = make_llama(tmp_path / "llama", dtype=dtype)
    assert assert_reads(folder, state_of(folder)).dtype == dtype


def test_base_model_and_classifier(tmp_path):
    base = make_llama(tmp_path / "base", model_class=LlamaModel)
    assert not assert_reads(base, state_of(base)).has_lm_head
    classifier = make_llama(tmp_path / "classifier", model_class=LlamaForSequenceClassification, num_labels=3)
    assert assert_reads(classifier, state_of(classifier)).tensors["score.weight"].shape == (3, TINY["hidden_size"])


def test_mistral_without_window_is_a_llama(tiny_llama, tmp_path):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "mistral"))
    change_config(folder, model_type="mistral", sliding_window=None, architectures=["MistralForCausalLM"])
    assert_reads(folder, state_of(tiny_llama))


def test_layout_does_not_matter(tiny_llama, tmp_path):
    state = state_of(tiny_llama)
    sharded = make_llama(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    layouts = [tiny_llama, sharded, as_bin(tiny_llama, tmp_path / "bin"), as_bin(tiny_llama, tmp_path / "bins", 3)]
    assert len({assert_reads(folder, state).fingerprint for folder in layouts}) == 1


def test_fingerprint_sees_weights_and_config_but_not_noise(tiny_llama, tmp_path):
    original = Checkpoint(str(tiny_llama)).fingerprint
    noise = Path(shutil.copytree(tiny_llama, tmp_path / "noise"))
    change_config(noise, transformers_version="0", _name_or_path="elsewhere", use_cache=False)
    assert Checkpoint(str(noise)).fingerprint == original
    config = Path(shutil.copytree(tiny_llama, tmp_path / "config"))
    change_config(config, rms_norm_eps=1e-3)
    weights = make_llama(tmp_path / "weights", seed=1)
    assert len({original, Checkpoint(str(config)).fingerprint, Checkpoint(str(weights)).fingerprint}) == 3


def test_name_is_the_last_part_of_the_path(tiny_llama, monkeypatch):
    assert Checkpoint(f"{tiny_llama}/").name == "tiny-llama"
    monkeypatch.chdir(tiny_llama)
    assert Checkpoint(".").name == "tiny-llama"


# ---------------------------------------------------------------------------------------------------- refusals


def change_state(change) -> None:
    def damage(folder: Path) -> None:
        state = state_of(folder)
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def config(**changes):
    return lambda folder: change_config(folder, **changes)


def file(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


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


GATE = "model.layers.0.mlp.gate_proj.weight"
NORM = "model.norm.weight"
REFUSED = {
    "gpt2": (config(model_type="gpt2"), "is a 'gpt2' model"),
    "no model_type": (config(model_type=None), "is a None model"),
    "window": (config(model_type="mistral", sliding_window=4096), "is a Mistral with sliding_window"),
    "quantised": (config(quantization_config={"bits": 4}), "is quantised"),
    "own code": (config(auto_map={"AutoModel": "x.Y"}), "brings code of its own"),
    "gelu": (config(hidden_act="gelu"), "has hidden_act 'gelu'"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config not JSON": (file("config.json", b"{"), "is not JSON"),
    "config a list": (file("config.json", b"[]"), "is not a JSON object"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers is 0; a positive integer is needed"),
    "layers in words": (config(num_hidden_layers="x"), "num_hidden_layers is 'x'"),
    "a layer more": (config(num_hidden_layers=4), "lacks the tensor model.layers.3."),
    "a billion layers": (config(num_hidden_layers=10**9), "lacks the tensor model.layers.3."),
    "a layer less": (config(num_hidden_layers=2), "holds layers.2."),
    "other width": (config(intermediate_size=128), "layers.0.mlp.gate_proj.weight has shape [64, 32]"),
    "other heads": (config(num_attention_heads=3), "not a multiple of the number of attention heads"),
    "tensor absent": (change_state(lambda state: state.pop(NORM)), f"lacks the tensor {NORM}"),
    "integers": (change_state(lambda state: state.update({GATE: state[GATE].to(torch.int8)})), "is I8"),
    "tensor too many": (change_state(lambda state: state.update(x=torch.ones(1))), "holds x, which"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "cut": (cut, "model.safetensors is not a whole safetensors file"),
    "LFS pointer": (file("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer?"),
    "web page": (file("model.safetensors", b"<html>not found</html>" * 9), "not a whole safetensors file"),
    "empty": (file("model.safetensors", b""), "not a whole safetensors file"),
    "huge header": (file("model.safetensors", b"\xff" * 8), "not a whole safetensors file"),
    "shard absent": (index(), "a.safetensors is missing"),
    "shard outside": (index({GATE: "../x/evil.safetensors"}), "names ../x/evil.safetensors, outside"),
    "index cut": (lambda folder: [index()(folder), file("model.safetensors.index.json", b"{")(folder)], "is not JSON"),
    "index of nothing": (index({}, {}), "lacks the tensor"),
    "index wrong": (index(None, {"a.safetensors": [NORM]}), "where it is not"),
    "tensor twice": (
        index({GATE: "a.safetensors", NORM: "b.safetensors"}, {"a.safetensors": [GATE, NORM], "b.safetensors": [NORM]}),
        f"{NORM} lies in both a.safetensors and b.safetensors",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, tiny_llama, tmp_path):
    damage, words = REFUSED[case]
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    damage(folder)
    start = time.perf_counter()
    with pytest.raises(MoEficationError) as error:
        Checkpoint(str(folder))
    assert words in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 5  # a billion layers included


def test_code_in_a_bin_is_never_run(tiny_llama, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    folder = as_bin(tiny_llama, tmp_path / "bin")
    torch.save({"model.embed_tokens.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(MoEficationError, match="not a whole file of plain tensors, refused"):
        Checkpoint(str(folder))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("num_experts", "nearby"), [(5, "2, 4, 8"), (0, "1, 2, 4, 8, 16"), (-1, "1, 2"), (60, "32, 64"), (128, "64")]
)
def test_number_of_experts_must_divide(num_experts, nearby, tiny_llama):
    with pytest.raises(MoEficationError, match="does not divide the MLP width 64 of tiny-llama") as error:
        Checkpoint(str(tiny_llama)).require_experts(num_experts)
    assert nearby in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_must_be_finite(value, tiny_llama, tmp_path):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    change_state(lambda state: state[GATE][3].fill_(value))(folder)
    checkpoint = Checkpoint(str(folder))
    with pytest.raises(MoEficationError, match=r"layers.0.mlp.gate_proj.weight holds NaN or infinite values"):
        checkpoint.finite_tensor("layers.0.mlp.gate_proj.weight")
    assert checkpoint.finite_tensor("layers.1.mlp.gate_proj.weight").isfinite().all()
