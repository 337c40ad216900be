"""The whole way on a real model and real text: SmolLM2-135M in eight experts, the description's recipe."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipeline import Pipeline, load
from transformers import AutoTokenizer

import run_moefication as rm
from run_moefication.moefication import llama_cpp
from run_moefication.moefication.stages.evaluate import evaluate

PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time, there was a small"]


@pytest.fixture(scope="module", autouse=True)
def all_threads():
    """A real model has work for every core, unlike the tiny ones of the other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipeline(smollm2, sample_data, tmp_path_factory) -> Pipeline:
    """Split, features of 8,192 tokens, gates and conversion: about a minute and a half on two cores."""
    return Pipeline(
        smollm2,
        sample_data,
        tmp_path_factory.mktemp("smollm2"),
        num_experts=8,
        feature_options=["--block_size", 512, "--max_tokens", 8192, "--feature_format", "inputs"],
        select_options=["--use_softmax", "--epochs", 15],
    ).run()


def test_all_experts_speak_like_the_dense_model(pipeline, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(pipeline.moe)
    dense, moe = load(smollm2), load(pipeline.moe, 8)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        texts = [
            tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]) for model in (dense, moe)
        ]
        assert texts[0] == texts[1]
        assert len(texts[0]) > len(prompt) + 20


def test_all_experts_have_the_dense_perplexity_to_four_digits(pipeline, smollm2, sample_data):
    text = sample_data / "heldout" / "wikipedia.jsonl"
    dense, full, three_quarters = evaluate(
        [str(smollm2), str(pipeline.moe)], text, num_selects=[8, 6], block_size=512, max_tokens=2048
    )
    assert f"{full.perplexity:.4g}" == f"{dense.perplexity:.4g}"
    assert 10 < dense.perplexity < 40  # a language model that reads Wikipedia, and not noise
    assert three_quarters.perplexity > 1.1 * dense.perplexity


def test_gates_beat_the_best_constant_choice(pipeline):
    metrics = json.loads((pipeline.select_folder / "manifest.json").read_text())["metrics"]
    assert len(metrics) == 30
    better = [layer for layer in metrics.values() if layer["mass_recall"] > layer["constant_mass_recall"]]
    assert len(better) >= 28


def test_usage_example(pipeline):
    script = Path(__file__).parents[1] / "scripts" / "test_llama_moe_transformers.py"
    command = [sys.executable, script, "--model_path", pipeline.moe, "--num_selects", "8"]
    command += ["--dense_path", pipeline.model]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    dense, moe = result.stdout.split("8 of 8 experts:\n")
    assert dense.startswith("dense:\n> 'The capital of France is Paris")
    assert dense.removeprefix("dense:\n").splitlines() == moe.splitlines()[:-1]
    assert "8 of 8 experts: 100.2% of the MLP parameters ran per token, gate included" in result.stdout


@pytest.fixture(scope="module")
def engine_model(smollm2, sample_data, tmp_path_factory) -> Path:
    """RECIPE=engine on little text, calibrated: some five minutes on two cores."""
    recipe = replace(rm.ENGINE, split_tokens=4096, feature_tokens=8192, calibration_tokens=8192)
    folder = tmp_path_factory.mktemp("engine") / "MoE"
    return rm.moefy(rm.DenseCheckpoint(smollm2), sample_data, folder, recipe, block_size=512).path


@pytest.mark.slow
def test_llama_cpp_says_what_the_model_says(engine_model, sample_data, tmp_path):
    settings = rm.ExportSettings(format="gguf", outtype=["f32"], max_tokens=1025)
    writer = rm.export(engine_model, sample_data / "heldout" / "wikipedia.jsonl", tmp_path / "gguf", settings)
    ((file, check),) = writer.metrics().items()
    assert check["argmax_agreement"] >= 0.999
    assert check["max_logprob_difference"] < 1e-3
    assert check["perplexity"] == pytest.approx(check["reference_perplexity"], rel=0.01)
    assert check["cut_otherwise"] == []
    tokenizer, model = AutoTokenizer.from_pretrained(engine_model), load(engine_model)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    found = llama_cpp.ask(tmp_path / "gguf" / file, {"prompts": prompts, "new_tokens": 32})["greedy"]
    for prompt, tokens in zip(prompts, found, strict=True):
        said = model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)[0, len(prompt) :]
        assert tokens == said.tolist()


@pytest.mark.slow
def test_stock_classes_of_a_calibrated_model(engine_model, sample_data, tmp_path):
    text = sample_data / "heldout" / "wikipedia.jsonl"
    settings = rm.ExportSettings(format="glm4_moe", max_tokens=4096)
    check = rm.export(engine_model, text, tmp_path / "glm", settings).metrics()["check"]
    assert check["perplexity"] == pytest.approx(check["reference_perplexity"], rel=0.01)
