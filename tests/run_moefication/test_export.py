"""Exports in the engines that they are for: the real llama.cpp, and the classes that transformers brings along."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from conftest import LLAMA3_ROPE, SENTENCES, make_tokenizer, write_jsonl
from pipeline import LINEAR, load, make_moe, shared_pipeline
from tiny_tokenizers import save_sentencepiece, save_tiktoken
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_moefication as rm
from run_moefication import llama_evaluate, llama_export
from run_moefication.moefication import llama_cpp
from run_moefication.moefication.stages import export_check

SHAPE = {"hidden_size": 64, "intermediate_size": 320, "num_hidden_layers": 2}
ROUTED = {"num_experts": 8, "num_experts_per_tok": 3, "num_shared_experts": 2, "gate_network": "linear"}
BIASED = ROUTED | {"gate_bias": True, "gate_rank": 6}
THRESHOLD = BIASED | {"routing": "threshold"}
CAP = ["--max_selects", 6]  # of which two are shared


def save_moe(folder: Path, save_tokenizer=lambda folder: make_tokenizer().save_pretrained(folder), **config) -> Path:
    """A random LlamaMoE, every parameter random, as `save_pretrained` leaves it; thresholds are near the mean score."""
    model = make_moe(**(SHAPE | config))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name or "bias" in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
            elif name.endswith("threshold"):
                tensor.fill_(0.05)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A few hundred tokens to check on."""
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", [f"{i}: {SENTENCES[i % 6]}" for i in range(30)])


@pytest.fixture
def export(tmp_path, text, run_script):
    """Export a model, or one made with these fields; returns the folder, and what the manifest says of each part."""

    def run(model: dict | Path, *options: object, **how) -> tuple[Path, dict]:
        model = model if isinstance(model, Path) else save_moe(tmp_path / "moe", **how, **model)
        paths = ["--model_path", model, "--text_path", text, "--save_path", tmp_path / "out", "--max_tokens", 200]
        status, out, err = run_script(llama_export.main, *paths, "--device", "cpu", *options)
        assert status == 0, err
        assert out.splitlines()[-2].startswith("written: ")
        return tmp_path / "out", json.loads((tmp_path / "out/manifest.json").read_text())["metrics"]

    return run


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (BIASED, []),
        (ROUTED | {"num_shared_experts": 0, "num_experts": 10, "tie_word_embeddings": True}, []),
        (BIASED | {"score_scale_factor": 2.0, "head_dim": 24}, []),
        (BIASED | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}, []),
        (BIASED | {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}, []),
        (THRESHOLD, CAP),
        (THRESHOLD | {"min_experts_per_tok": 1, "max_experts_per_tok": 5}, []),
        (THRESHOLD | {"rope_parameters": LLAMA3_ROPE}, CAP),
    ],
    ids=["top-k", "no shared", "scaled", "linear rope", "llama3 rope", "threshold", "bounds", "threshold, llama3"],
)
def test_llama_cpp_computes_what_the_model_does(export, config, options):
    _, parts = export(config, "--format", "gguf", "--outtype", "f32", *options)
    check = parts["moe-F32.gguf"]
    assert check["run"]
    assert check["argmax_agreement"] >= 0.999
    assert check["max_logprob_difference"] < 1e-3
    assert check["perplexity"] == pytest.approx(check["reference_perplexity"], rel=1e-4)
    assert check["cut_otherwise"] == []


@pytest.mark.parametrize(
    ("format", "config", "options"),
    [
        ("granitemoeshared", ROUTED, []),
        ("granitemoeshared", ROUTED | {"num_shared_experts": 0, "num_experts": 10}, []),
        ("glm4_moe", BIASED, []),
        ("glm4_moe", THRESHOLD | {"tie_word_embeddings": True}, CAP),
        ("glm4_moe", ROUTED | {"num_shared_experts": 0, "num_experts": 10}, []),
    ],
    ids=["granite", "granite, no shared", "glm", "glm, threshold", "glm, no shared"],
)
def test_stock_classes_compute_what_the_model_does(export, format, config, options):
    """glm4_moe's weights differ by up to a hundredth, so that now and then another expert is chosen."""
    folder, parts = export(config, "--format", format, *options)
    check = parts["check"]
    assert check["argmax_agreement"] > 0.95
    if format == "granitemoeshared":
        assert check["max_logit_difference"] < 1e-4
    assert check["perplexity"] == pytest.approx(check["reference_perplexity"], rel=1e-2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == format
    if format == "glm4_moe":  # transformers 5.4 looks for it there, or rotates half of each head
        assert json.loads((folder / "config.json").read_text())["partial_rotary_factor"] == 1.0
    assert AutoTokenizer.from_pretrained(folder)("The cat")["input_ids"] == make_tokenizer()("The cat")["input_ids"]


@pytest.mark.parametrize("format", ["gguf", "glm4_moe"])
def test_a_head_that_is_not_the_embedding_is_taken_whatever_the_config_says(export, format, tmp_path):
    model = load(save_moe(tmp_path / "tied", **BIASED, tie_word_embeddings=True))
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.05 * torch.randn(model.lm_head.weight.shape))
    model.save_pretrained(tmp_path / "moe")
    make_tokenizer().save_pretrained(tmp_path / "moe")
    _, parts = export(tmp_path / "moe", "--format", format, *["--outtype", "f32"])
    (check,) = parts.values()
    assert check["argmax_agreement"] > 0.95


def test_a_file_runs_at_another_budget(export, tmp_path):
    """llama.cpp's `--override-kv` reads other values than the header's; here they are put into the header."""
    folder, _ = export(BIASED, "--format", "gguf", "--outtype", "f32")
    reader = gguf.GGUFReader(folder / "moe-F32.gguf", "r+")
    for name in ("expert_used_count", "expert_weights_scale"):
        field = reader.fields[f"glm4moe.{name}"]
        assert field.parts[field.data[0]][0] == 3
        field.parts[field.data[0]][0] = 5
    reader.data.flush()
    model, tokens = load(tmp_path / "moe"), torch.arange(3, 60)
    model.set_num_experts_per_tok(5)
    with torch.no_grad():
        logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
    (answered,) = llama_cpp.ask(folder / "moe-F32.gguf", {"blocks": [tokens.tolist()]})["logprobs"]
    differences = [
        abs(own - other) for own, other in zip(logprobs.tolist(), answered, strict=True) if other is not None
    ]
    assert len(differences) > 40
    assert max(differences) < 1e-3


def test_what_a_bound_loses_is_measured(export):
    _, parts = export(THRESHOLD, "--format", "glm4_moe", "--max_selects", 3)
    check = parts["check"]
    assert check["perplexity_without_bound"] != pytest.approx(check["reference_perplexity"], rel=1e-3)


def test_quantised_files_choose_the_same_experts(export):
    """Their gates are those of the F32 file, bit by bit; the rest is in the type that the file is named after."""
    folder, parts = export(BIASED, "--format", "gguf", "--outtype", "f32", "f16", "bf16", "q8_0", "q4_0")
    whole, *others = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(folder / file).tensors} for file in parts if "gguf" in file
    )
    assert len(others) == 4
    for file, kind in zip(others, ("F16", "BF16", "Q8_0", "Q4_0"), strict=True):
        for name, tensor in whole.items():
            if "ffn_gate_inp" in name or "exp_probs_b" in name or "norm" in name:
                assert file[name].data.tobytes() == tensor.data.tobytes()
            else:
                expected = "Q8_0" if kind == "Q4_0" and not name.startswith("blk.") else kind
                assert file[name].tensor_type.name == expected
    ratios = [check["perplexity"] / check["reference_perplexity"] for check in parts.values()]
    assert all(0.5 < ratio < 2 for ratio in ratios)
    assert len(set(ratios)) == 5


def test_rows_that_blocks_do_not_divide_stay_in_f16(export):
    folder, parts = export(ROUTED | {"intermediate_size": 240}, "--format", "gguf", "--outtype", "q8_0")  # width 24
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(folder / "moe-Q8_0.gguf").tensors}
    assert (kinds["blk.0.ffn_down_exps.weight"], kinds["blk.0.ffn_gate_exps.weight"]) == ("F16", "Q8_0")
    assert parts["moe-Q8_0.gguf"]["run"]


def test_without_the_engine_files_are_read_back_alone(export, monkeypatch):
    monkeypatch.setattr(llama_cpp, "ENGINE", "no_such_package")
    _, parts = export(BIASED, "--format", "gguf")
    assert parts["moe-F16.gguf"] == {"run": False}


def test_the_engine_recipe_makes_what_llama_cpp_holds(export, checkpoint, text_folder, tmp_path):
    small = dict(split_tokens=512, feature_tokens=512, calibration_tokens=512)
    recipe = replace(rm.ENGINE, experts=16, **small)
    made = rm.moefy(checkpoint, text_folder, tmp_path / "engine", recipe, block_size=32)
    assert (made.config.routing, made.config.output_bias, made.config.num_shared_experts) == ("top_k", False, 2)
    _, parts = export(made.path, "--format", "gguf", "--outtype", "f32")
    (check,) = parts.values()
    assert check["argmax_agreement"] >= 0.999
    assert check["max_logprob_difference"] < 1e-3


def test_gates_without_a_bias_are_granites(export, tiny_llama, text_folder, tmp_path):
    off = ["--gate_bias", "off"]
    stages = dict(select_options=[*LINEAR, *off], convert_options=["--routing", "top_k"])
    calibrate = ["--block_size", 32, "--max_tokens", 512, "--refit_gates", *off]
    pipeline = shared_pipeline(tiny_llama, text_folder, tmp_path, **stages, calibrate_options=calibrate).run()
    assert pipeline.calibrate() == 0
    for folder in (pipeline.moe, pipeline.calibrated):
        _, parts = export(folder, "--format", "granitemoeshared", "--overwrite")
        assert parts["check"]["max_logit_difference"] < 1e-4


def test_a_gate_loses_its_bias_when_it_is_refitted_without(shared_run, tmp_path):
    options = ["--block_size", 32, "--max_tokens", 512, "--refit_gates", "--gate_bias", "off"]
    run = replace(shared_run, calibrated=tmp_path / "calibrated", calibrate_options=options)
    assert run.calibrate() == 0
    model = load(run.calibrated)
    assert load(run.moe).model.layers[0].mlp.gate.bias is not None
    assert all(layer.mlp.gate.bias is None for layer in model.model.layers)


@pytest.mark.parametrize("save_tokenizer", [save_sentencepiece, save_tiktoken])
def test_llama_cpp_cuts_text_as_the_tokenizer_does(export, save_tokenizer):
    _, parts = export(ROUTED | {"vocab_size": 1024}, "--format", "gguf", save_tokenizer=save_tokenizer)
    check = parts["moe-F16.gguf"]
    assert check["cut_otherwise"] == []
    assert check["texts"] > 50


def test_digits_are_cut_as_smollm2_cuts_them(export):
    def save(folder):
        tokenizer = make_tokenizer()
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.save_pretrained(folder)

    folder, parts = export(ROUTED, "--format", "gguf", save_tokenizer=save)
    assert gguf.GGUFReader(folder / "moe-F16.gguf").fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert parts["moe-F16.gguf"]["cut_otherwise"] == []


def save_tokenizer_of_another_cut(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(folder)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({"num_experts": 8}, ["gguf"], "has gates of two layers, which no engine has; fit linear ones: GATE_NETWORK="),
        (ROUTED | {"output_bias": True}, ["gguf"], "calibrate without one: OUTPUT_BIAS= bash run_moefication/5_cal"),
        (ROUTED | {"mlp_bias": True}, ["gguf"], "has MLP biases, which no engine for MoEs has"),
        (ROUTED | {"multiply_gate_scores": True}, ["gguf"], "weighs its experts by gate scores"),
        (ROUTED | {"hidden_act": "gelu"}, ["gguf"], "has experts with gelu"),
        (ROUTED | {"layer_num_experts_per_tok": [3, 2]}, ["gguf"], "runs other numbers of experts in other layers"),
        (ROUTED, ["gguf", *CAP], "--max_selects is for models that route by threshold"),
        (THRESHOLD, ["gguf"], "Give --max_selects, the most that one runs"),
        (THRESHOLD, ["gguf", "--max_selects", 11], "--max_selects 11 is outside of 3 to 10, the model's experts"),
        (ROUTED | {"attention_bias": True}, ["gguf"], "has biases in attention, which such a file does not hold"),
        (ROUTED | {"rope_parameters": YARN}, ["gguf"], "has rotary embeddings of kind yarn; in a GGUF they can be"),
        (ROUTED | {"num_experts": 38, "num_experts_per_tok": 30}, ["gguf"], "and llama.cpp has room for 29"),
        (BIASED, ["granitemoeshared"], "by more than a product (gate bias or threshold)"),
        (ROUTED, ["granitemoeshared", "--outtype", "f16"], "float16 cannot hold the small logits"),
        (ROUTED | {"attention_bias": True}, ["glm4_moe"], "has biases in attention, which such a file does not hold"),
        (
            ROUTED | {"attention_bias": True},
            ["granitemoeshared"],
            "has biases in attention, which vLLM and",
        ),
        (ROUTED | {"head_dim": 24}, ["granitemoeshared"], "has heads of 24 values, which vLLM and SGLang pass over"),
        (
            ROUTED | {"num_experts": 1, "num_shared_experts": 3, "num_experts_per_tok": 1},
            ["glm4_moe"],
            "among two or more",
        ),
        (ROUTED, ["glm4_moe", "--outtype", "q8_0"], "--outtype q8_0: --format glm4_moe has one of f32, f16, bf16"),
        (ROUTED, ["glm4_moe", "--outtype", "f32", "f16"], "has one of f32, f16, bf16"),
        (ROUTED, ["gguf", "--outtype", "f16", "f16"], "--outtype f16 f16 names a type twice"),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_the_cure(config, options, words, tmp_path, text, run_script):
    model = save_moe(tmp_path / "moe", **config)
    paths = ["--model_path", model, "--text_path", text, "--save_path", tmp_path / "out", "--device", "cpu"]
    status, _, err = run_script(llama_export.main, *paths, "--format", *options)
    (line,) = err.splitlines()
    assert status == 2
    assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["gguf", "glm4_moe"])
def test_a_result_that_computes_something_else_leaves_nothing(format, tmp_path, text, run_script, monkeypatch):
    paths = ["--model_path", save_moe(tmp_path / "moe", **ROUTED), "--text_path", text, "--device", "cpu"]
    monkeypatch.setattr(export_check, "MOST_RATIO", 0.5)  # which no ratio is within
    (tmp_path / "out").mkdir()
    options = [*paths, "--save_path", tmp_path / "out/model", "--format", format]
    status, _, err = run_script(llama_export.main, *options)
    assert (status, "it computes something else" in err) == (2, True)
    assert not [*(tmp_path / "out").iterdir()]


def test_how_much_of_an_export_runs_is_not_known_to_the_evaluation(export, tmp_path, text, run_script):
    folder, _ = export(ROUTED, "--format", "glm4_moe")
    options = ["--model_path", tmp_path / "moe", folder, "--text_path", text, "--device", "cpu"]
    _, out, _ = run_script(llama_evaluate.main, *options)
    own, stock = [line.split() for line in out.splitlines()[-3:-1]]
    assert own[4].endswith("%")
    assert stock[1] == "-"


def test_other_wrong_input_is_refused(tmp_path, text, tiny_llama, run_script, monkeypatch):
    model = save_moe(tmp_path / "moe", save_tokenizer=save_tokenizer_of_another_cut, **ROUTED)
    paths = {"--model_path": model, "--text_path": text, "--save_path": tmp_path / "out", "--device": "cpu"}

    def refused(**changes: object) -> str:
        options = paths | {"--format": "gguf"} | {f"--{name}": value for name, value in changes.items()}
        status, _, err = run_script(llama_export.main, *(item for pair in options.items() for item in pair))
        (line,) = err.splitlines()
        assert status == 2
        assert not (tmp_path / "out").exists()
        return line

    assert "has a tokenizer whose way of cutting text is not among those known" in refused()
    assert f"{tiny_llama} is a llama model, not a LlamaMoE" in refused(model_path=tiny_llama)
    assert "--text_path nowhere is not a file" in refused(text_path="nowhere")
    monkeypatch.setattr("run_moefication.moefication.stages.export.find_spec", lambda name: None)
    assert "--format gguf needs the package gguf: pip install -e '.[engine]' -c constraints.txt" in refused()
