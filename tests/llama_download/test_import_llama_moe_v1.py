"""LLaMA-MoE v1 checkpoints become LlamaMoE checkpoints of equal logits, or one line and nothing is written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Bomb, assert_refused, change_config, change_weights, make_tokenizer, to_bin, to_shards
from pipeline import contents, load, make_moe, some_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from llama_download import import_llama_moe_v1 as script
from llama_download import llama_moe_v1
from run_moefication import llama_evaluate

# A small one of the config.json that was published as LLaMA-MoE-v1-3_5B-2_8, field by field.
CONFIG = {
    "_name_or_path": "llama-moe/LLaMA-MoE-v1-3_5B-2_8",
    "add_weight_norm": False,
    "architectures": ["LlamaMoEForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_llama_moe.LlamaMoEConfig",
        "AutoModel": "modeling_llama_moe_hf.LlamaMoEModel",
        "AutoModelForCausalLM": "modeling_llama_moe_hf.LlamaMoEForCausalLM",
    },
    "bos_token_id": 1,
    "calculator_type": "UniversalCalculator",
    "capacity_factor": 1.25,
    "drop_tokens": True,
    "dropped_padding": "zero",
    "eos_token_id": 2,
    "gate_add_noise": True,
    "gate_balance_loss_weight": 0.01,
    "gate_network": "mlp",
    "gate_noise_epsilon": 0.01,
    "gate_type": "TopKBalancedNoisyGate",
    "gate_use_balance": True,
    "gate_use_softmax": True,
    "gates": "mlp",
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "model_type": "llama_moe",
    "multiply_gate_scores": True,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_selects": 2,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "score_scale_factor": 4.0,
    "size_experts": [[16] * 4] * 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 300,
}
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# LLaMA-MoE-v1-3.5B (2/8)\n"
EXPERT = "model.layers.{}.mlp.calculator.experts.weight_{}.{}"


def write_v1(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A random checkpoint in the layout of v1, its noise and rotary tables included."""
    config = CONFIG | changes
    hidden, width, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    experts, keys = config["num_experts"], hidden // 2
    shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    networks = {"mlp": {"0.": (experts, hidden), "2.": (experts, experts)}, "linear": {"": (experts, hidden)}}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        shapes |= {f"{name}.self_attn.{x}_proj.weight": (hidden, hidden) for x in "qo"}
        shapes |= {f"{name}.self_attn.{x}_proj.weight": (keys, hidden) for x in "kv"}
        shapes[f"{name}.self_attn.rotary_emb.inv_freq"] = (hidden // config["num_attention_heads"] // 2,)
        gate = networks[config["gate_network"]]
        shapes |= {f"{name}.mlp.gate.gate_network.{x}weight": shape for x, shape in gate.items()}
        shapes[f"{name}.mlp.gate.weight_noise.weight"] = (experts, hidden)
        for expert in range(experts):
            shapes |= {EXPERT.format(layer, kind, expert): (width // experts, hidden) for kind in ("gate", "up")}
            shapes[EXPERT.format(layer, "down", expert)] = (hidden, width // experts)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    for name, tensor in state.items():
        if "norm.weight" in name:
            tensor.add_(1)
    folder.mkdir()
    save_file(
        {name: tensor.to(dtype) for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def v1_logits(folder: Path, tokens: Tensor) -> Tensor:
    """What the architecture computes of `[T]` tokens, token by token and expert by expert, in float64: `[T, V]`."""
    config = json.loads((folder / "config.json").read_text())
    state = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * state[f"{name}.weight"]

    hidden = state["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        hidden = hidden + v1_attention(config, state, f"{name}.self_attn", norm(hidden, f"{name}.input_layernorm"))
        x = norm(hidden, f"{name}.post_attention_layernorm")
        hidden = hidden + torch.stack([v1_mlp(config, state, layer, token) for token in x])
    head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    return norm(hidden, "model.norm") @ head.T


def v1_attention(config: dict, state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """`[T, H]` -> the same shape: each head looks back, with the halves of its vectors turned by the position."""
    heads = config["num_attention_heads"]
    size, group = config["hidden_size"] // heads, heads // config["num_key_value_heads"]
    positions, base, rope = torch.arange(len(x)).double(), 10000.0, config["rope_scaling"]
    if rope and rope["type"] == "linear":
        positions = positions / rope["factor"]
    elif rope and len(x) > config["max_position_embeddings"]:
        excess = rope["factor"] * len(x) / config["max_position_embeddings"] - (rope["factor"] - 1)
        base *= excess ** (size / (size - 2))
    angles = positions[:, None] * base ** (-torch.arange(0, size, 2).double() / size)  # [T, size / 2]

    def turned(vectors: Tensor) -> Tensor:
        first, second = vectors.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    outputs = []
    for head in range(heads):
        q, k, v = (
            x @ state[f"{name}.{part}_proj.weight"][index * size : (index + 1) * size].T
            for part, index in (("q", head), ("k", head // group), ("v", head // group))
        )
        scores = turned(q) @ turned(k).T / size**0.5
        future = torch.ones(len(x), len(x)).triu(1).bool()
        outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs, dim=-1) @ state[f"{name}.o_proj.weight"].T


def v1_mlp(config: dict, state: dict[str, Tensor], layer: int, x: Tensor) -> Tensor:
    """`[H]` -> `[H]`: the experts of the highest scores, each times the softmax over these scores, and the scale."""
    gate = f"model.layers.{layer}.mlp.gate.gate_network"
    if config["gate_network"] == "mlp":
        scores = state[f"{gate}.2.weight"] @ torch.tanh(state[f"{gate}.0.weight"] @ x)
    else:
        scores = state[f"{gate}.weight"] @ x
    best = sorted(range(config["num_experts"]), key=lambda expert: -scores[expert])[: config["num_selects"]]
    total = sum(scores[expert].exp() for expert in best)
    scale = config["score_scale_factor"]
    scale = scale[layer] if isinstance(scale, list) else scale
    output = torch.zeros_like(x)
    for expert in best:
        g, u, d = (state[EXPERT.format(layer, kind, expert)] for kind in ("gate", "up", "down"))
        z = g @ x
        weight = scale * scores[expert].exp() / total if config["multiply_gate_scores"] else 1.0
        output += weight * (d @ (z * torch.sigmoid(z) * (u @ x)))
    return output


@pytest.fixture
def import_v1(run_script, tmp_path):
    """`import_v1(folder)` imports into the folder `out` of the test: status, stdout, stderr."""
    return lambda folder, *options: run_script(
        script.main, "--model_path", folder, "--save_path", tmp_path / "out", *options
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_v1(tmp_path / "v1")


def difference(folder: Path, out: Path) -> float:
    """The largest between the logits of a checkpoint of v1 and of what was imported, in float32."""
    tokens = some_tokens(2, 24)
    expected = torch.stack([v1_logits(folder, row) for row in tokens])
    assert expected.std() > 0.5
    with torch.no_grad():
        return (load(out)(tokens).logits - expected).abs().max().item()


LINEAR = {"rope_scaling": {"type": "linear", "factor": 2.0}}
DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 12}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_selects": 1},
        {"num_experts": 8, "num_selects": 3, "score_scale_factor": 8.0, "size_experts": [[8] * 8] * 2},
        {"size_experts": None},
        {"score_scale_factor": [2.5, 2.5]},
        {"gate_network": "linear"},
        {"multiply_gate_scores": False},
        {"multiply_gate_scores": False, "gate_use_softmax": False},
        {"tie_word_embeddings": True},
        LINEAR,
        DYNAMIC,
    ],
    ids=lambda changes: ", ".join(changes) or "as published",
)
def test_logits_are_those_of_a_straight_line_computation(import_v1, tmp_path, changes):
    folder = write_v1(tmp_path / "v1", **changes)
    assert import_v1(folder)[0] == 0
    assert difference(folder, tmp_path / "out") < 1e-4


@pytest.mark.parametrize(
    "changes", [{"score_scale_factor": 3.0}, {"num_selects": 3}, {"multiply_gate_scores": False}, LINEAR, DYNAMIC]
)
def test_the_straight_line_computation_tells_configs_apart(import_v1, folder, tmp_path, changes):
    assert import_v1(folder)[0] == 0
    change_config(folder, **changes)
    assert difference(folder, tmp_path / "out") > 0.1


@pytest.mark.parametrize("shard", [to_shards, to_bin])
def test_shards_and_bin_files_are_read(import_v1, folder, tmp_path, shard):
    shards = write_v1(tmp_path / "shards")
    shard(shards, 2)
    assert len([*shards.glob("*.index.json")]) == 1
    assert import_v1(shards)[0] == 0
    assert difference(folder, tmp_path / "out") < 1e-4


def test_large_models_are_written_in_shards(import_v1, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_moe_v1, "MAX_SHARD_BYTES", 60_000)
    assert import_v1(folder)[0] == 0
    files = [*(tmp_path / "out").glob("model-*.safetensors")]
    assert len(files) > 2
    assert all(file.stat().st_size < 62_000 for file in files)
    assert difference(folder, tmp_path / "out") < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight_is_kept_bit_for_bit_in_its_dtype(import_v1, tmp_path, dtype):
    source = load_file(write_v1(tmp_path / "v1", dtype) / "model.safetensors")
    assert import_v1(tmp_path / "v1")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    state, unpacked = model.state_dict(), {}
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        unpacked[f"{mlp}.gate.gate_network.0.weight"] = state.pop(f"{mlp}.gate.input_weight")
        unpacked[f"{mlp}.gate.gate_network.2.weight"] = state.pop(f"{mlp}.gate.output_weight")
        gate_up, down = (state.pop(f"{mlp}.experts.{name}") for name in ("gate_up_proj", "down_proj"))
        for expert in range(4):
            parts = (gate_up[expert, :16], gate_up[expert, 16:], down[expert])
            unpacked |= {EXPERT.format(layer, k, expert): p for k, p in zip(("gate", "up", "down"), parts, strict=True)}
    unpacked |= state
    unread = {name for name in source if name.endswith(("inv_freq", "weight_noise.weight"))}
    assert unpacked.keys() == source.keys() - unread
    assert all(tensor.dtype == dtype and torch.equal(tensor, source[name]) for name, tensor in unpacked.items())


def test_a_base_model_becomes_one(import_v1, folder, tmp_path):
    base = write_v1(tmp_path / "base", architectures=["LlamaMoEModel"])
    state = load_file(base / "model.safetensors")
    del state["lm_head.weight"]
    save_file({name.removeprefix("model."): tensor for name, tensor in state.items()}, base / "model.safetensors")
    assert import_v1(base)[0] == 0
    model, tokens = load(tmp_path / "out", auto_class=AutoModel), some_tokens(1, 24)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    with torch.no_grad():
        found = model(tokens).last_hidden_state[0] @ head.T
    torch.testing.assert_close(found, v1_logits(folder, tokens[0]).float(), atol=1e-4, rtol=0)


def test_the_noise_is_left_out_knowingly(import_v1, folder):
    status, out, err = import_v1(folder)
    assert (status, "left out: the noise on gate scores" in out, err) == (0, True, "")


def test_the_tokenizer_comes_along(import_v1, folder, tmp_path):
    make_tokenizer().save_pretrained(folder)
    assert import_v1(folder)[0] == 0
    text = "The cat sat on the mat, 3 times."
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == make_tokenizer()(text).input_ids


def test_code_in_the_folder_is_neither_run_nor_copied(import_v1, folder, tmp_path):
    for name in ("configuration_llama_moe.py", "modeling_llama_moe_hf.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    assert import_v1(folder)[0] == 0
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out" / "modeling_llama_moe_hf.py").exists()
    assert "class LlamaMoEConfig" in (tmp_path / "out" / "configuration_llama_moe.py").read_text()


def test_the_card_names_origin_licence_and_weights(import_v1, folder, tmp_path):
    (folder / "README.md").write_text(CARD)
    assert import_v1(folder)[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("base_model: v1", "license: apache-2.0", "2 of 4 experts of 16 neurons", "their scores times 4."):
        assert words in card


def test_a_finished_import_is_left_alone_and_another_refused(import_v1, folder, tmp_path):
    assert import_v1(folder)[0] == 0
    before = contents(tmp_path / "out")
    status, out, _ = import_v1(folder)
    assert (status, "already finished" in out) == (0, True)
    change_config(folder, num_selects=1)
    assert_refused(import_v1(folder), "was made from another model (v1", "--overwrite")
    assert contents(tmp_path / "out") == before
    assert import_v1(folder, "--overwrite")[0] == 0
    assert difference(folder, tmp_path / "out") < 1e-4


def test_what_was_imported_can_be_evaluated(import_v1, folder, tmp_path, text_folder, run_script):
    make_tokenizer().save_pretrained(folder)
    assert import_v1(folder)[0] == 0
    text = text_folder / "c4.jsonl"
    status, out, _ = run_script(llama_evaluate.main, "--model_path", tmp_path / "out", "--text_path", text)
    assert (status, "out, 2 of 4" in out) == (0, True)


def config(**changes) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **changes)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: change_weights(folder, lambda state: state.pop(name))


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return lambda folder: change_weights(folder, lambda state: state.update({name: change(state[name]).contiguous()}))


def added(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: change_weights(folder, lambda state: state.update({name: torch.ones(shape)}))


def lose_a_shard(folder: Path) -> None:
    to_shards(folder, 2)
    (folder / "model-1.safetensors").unlink()


def code_in_bin(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(folder / "exploded"), folder / "pytorch_model.bin")


ALONE = "other models run by their own code alone"
DOWN = EXPERT.format(1, "down", 3)
REFUSED = {
    # What a LlamaMoE cannot compute.
    "another gate": (config(gate_type="SwitchBalancedGate"), "gate_type is 'SwitchBalancedGate'", ALONE),
    "another gate network": (config(gate_network="conv"), "gate_network is 'conv'; 'mlp' or 'linear'", ALONE),
    "raw scores": (config(gate_use_softmax=False), "gate_use_softmax is False", ALONE),
    "dropped tokens": (config(calculator_type="SwitchDropTokenCalculator"), "calculator_type is 'SwitchDrop", ALONE),
    "weight norm": (config(add_weight_norm=True), "add_weight_norm is True; False is imported", ALONE),
    "unequal experts": (
        config(size_experts=[[16] * 4, [8, 24, 16, 16]]),
        "size_experts is [[16,",
        "16 for every",
        ALONE,
    ),
    "experts of one layer": (config(size_experts=[[16] * 4]), "size_experts is [[16,", ALONE),
    "scales by layer": (config(score_scale_factor=[4.0, 8.0]), "score_scale_factor is [4.0, 8.0]; one number", ALONE),
    "scales of one layer": (config(score_scale_factor=[4.0]), "score_scale_factor is [4.0]", ALONE),
    "experts that do not divide": (config(num_experts=7, size_experts=None), "num_experts is 7", "size 64", ALONE),
    "a classifier": (config(architectures=["LlamaMoEForSequenceClassification"]), "architectures is", ALONE),
    "MLP biases": (config(mlp_bias=True), "mlp_bias is True", ALONE),
    "another activation": (config(hidden_act="gelu"), "hidden_act 'gelu'"),
    "quantised": (config(quantization_config={"bits": 4}), "is quantised; give the checkpoint"),
    # Damaged configs.
    "more selects than experts": (config(num_selects=5), "num_selects is 5; 1 to num_experts 4"),
    "experts as text": (config(num_experts="4"), "num_experts is '4'"),
    "softmax as text": (config(multiply_gate_scores="yes"), "multiply_gate_scores is 'yes'"),
    "scale as text": (config(score_scale_factor="4"), "config.json", "score_scale_factor"),
    "infinite scale": (config(score_scale_factor=float("inf")), "score_scale_factor is inf"),
    "a billion layers": (config(num_hidden_layers=10**9, size_experts=None), "layers.2."),
    "no config.json": (
        lambda f: (f / "config.json").unlink(),
        "has no config.json; is this the folder of a LLaMA-MoE v1",
    ),
    "config.json is HTML": (lambda f: (f / "config.json").write_text("<html>"), "config.json is not JSON"),
    "another architecture": (config(model_type="mixtral"), "is a 'mixtral' model, no LLaMA-MoE v1"),
    # Partial and damaged weights.
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights (model.safetensors"),
    "a shard is missing": (lose_a_shard, "model-1.safetensors is missing; download it again"),
    "weights cut short": (lambda f: os.truncate(f / "model.safetensors", 20_000), "is not a whole safetensors file"),
    "weights that run code": (code_in_bin, "pytorch_model.bin is not a whole file of plain tensors"),
    "an expert is missing": (without(DOWN), f"lacks the tensor {DOWN}"),
    "a gate is missing": (without("model.layers.0.mlp.gate.gate_network.2.weight"), "lacks", "gate_network.2.weight"),
    "the head is missing": (without("lm_head.weight"), "lacks the tensor lm_head.weight"),
    "a norm is missing": (without("model.norm.weight"), "lacks the tensor model.norm.weight"),
    "an expert too many": (added(EXPERT.format(0, "up", 4), 16, 32), "holds", "weight_up.4"),
    "a weight norm": (added("model.layers.0.mlp.calculator.mlp_norm.weight", 1), "holds", "calculator.mlp_norm.weight"),
    "expert biases": (added("model.layers.0.mlp.calculator.experts.bias_up.0", 16), "holds", "experts.bias_up.0"),
    "a head of a base model": (config(architectures=["LlamaMoEModel"]), "holds lm_head.weight"),
    "a transposed expert": (changed(DOWN, lambda t: t.T), "weight_down.3 has shape [16, 32]", "calls for [32, 16]"),
    "a gate of another size": (
        changed("model.layers.0.mlp.gate.gate_network.0.weight", lambda t: t[:3]),
        *("gate_network.0.weight has shape [3, 32]", "calls for [4, 32]"),
    ),
    "integer weights": (changed(DOWN, lambda t: t.int()), "weight_down.3 is torch.int32; float32, float16, bfloat16"),
    "NaN": (changed(DOWN, lambda t: t * torch.nan), "weight_down.3 holds NaN or infinite values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_and_partial_folders_are_refused_and_nothing_is_written(import_v1, folder, tmp_path, case):
    spoil, *words = REFUSED[case]
    spoil(folder)
    before = contents(tmp_path)
    assert_refused(import_v1(folder), *words)
    assert contents(tmp_path) == before


def test_a_dense_llama_is_refused_as_one(import_v1, tiny_llama, tmp_path):
    assert_refused(import_v1(tiny_llama), "is a dense model (llama): convert it, run_moefication/1_split.sh first")
    assert not (tmp_path / "out").exists()


def test_a_llama_moe_is_refused_as_one(import_v1, tmp_path):
    make_moe().save_pretrained(tmp_path / "moe")
    assert_refused(import_v1(tmp_path / "moe"), "is a LlamaMoE, no LLaMA-MoE v1: use it as it is")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_ours_is_left_alone(import_v1, folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert_refused(import_v1(folder), "holds files but no manifest.json", "--save_path")
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}
