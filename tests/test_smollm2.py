"""The whole way on a real model and real text: SmolLM2-135M in eight experts, the description's recipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pipeline import Pipeline, load
from transformers import AutoTokenizer

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
