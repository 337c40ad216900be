"""What bench_gpu.py computes and measures, on a CPU: Triton interprets the kernels, and no graph is captured."""

import json
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import bench_gpu
import pytest
import random_models
import torch
from conftest import assert_refused
from test_benchmarks import CPU
from triton.runtime.interpreter import InterpretedFunction

from llama_moe import triton_kernels
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint

ARGUMENTS = SimpleNamespace(dtypes=["fp32"], rounds=1)


@pytest.fixture
def small(monkeypatch):
    """Small layers on the CPU, of which 2 tokens are few, and every function run as it is instead of as a graph."""
    sizes = dict(HIDDEN=64, NEURONS=48, EXPERTS=(12,), TOKENS=(2, 5), BUDGETS=(0.25,), ROUTINGS=("threshold",))
    for name, value in (sizes | dict(MODEL_LAYERS=1, MODEL_EXPERTS=(3,), PROMPT_TOKENS=5, NEW_TOKENS=2)).items():
        monkeypatch.setattr(bench_gpu, name, value)
    for module in (bench_gpu, triton_kernels):
        monkeypatch.setattr(module, "FEW_TOKENS", 2)
    monkeypatch.setattr(bench_gpu, "captured", lambda function: function)
    monkeypatch.setattr(bench_gpu.timing, "peak_rates", lambda *_: bench_gpu.H200)


def test_the_plan_is_of_bytes_and_operations():
    row = next(row for row in bench_gpu.plans() if (row["experts"], row["tokens"]) == ("16x688", 1))
    weights = 0.25 * 3 * 4096 * 11008 * 2  # of a quarter of the experts, in bf16
    assert row["megabytes"] * 1e6 == pytest.approx(weights, rel=0.01)
    assert row["bound_us"] == pytest.approx(weights / 4.8e12 * 1e6, rel=0.01)
    assert row["bound"] == pytest.approx(0.25, abs=0.002)
    many = [row for row in bench_gpu.plans() if row["tokens"] == 4096 and row["experts"] == "16x688"]
    assert [row["bound"] for row in many] == pytest.approx([0.25, 0.5] * 2)  # arithmetic alone


def test_layers_are_compared_with_the_reference_and_the_plan(small, monkeypatch):
    launched, run = [], InterpretedFunction.run
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *a, **k: launched.append(self) or run(self, *a, **k))
    monkeypatch.setattr(bench_gpu, "launches", lambda function: launched.clear() or function() is None or len(launched))
    for row in bench_gpu.layers(ARGUMENTS, CPU):
        assert not row["is_wrong"]
        assert row["triton"] > 0 < row["ours"]
        planned = bench_gpu.plan(12, "threshold", row["tokens"], 3 * row["tokens"], 12, 4, bench_gpu.H200)["launches"]
        assert planned == row["launches"] + (row["tokens"] > 2)  # zeros are filled in before, by PyTorch


def test_a_wrong_layer_is_told(small, monkeypatch):
    monkeypatch.setattr(bench_gpu, "launches", lambda function: 0)
    monkeypatch.setattr(bench_gpu, "LARGEST_ERROR", {"fp32": 1e-12})
    assert next(bench_gpu.layers(ARGUMENTS, CPU))["is_wrong"]


def test_models_are_measured_both_ways(small, monkeypatch):
    shape = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2)
    monkeypatch.setitem(random_models.SHAPES, "7B", shape)
    rows = list(bench_gpu.models(ARGUMENTS, CPU))
    assert [(row["routing"], row["way"]) for row in rows] == list(product(("top_k", "threshold"), ("ours", "triton")))
    assert all(row["prefill_over"] > 0 for row in rows)


def test_without_a_gpu_there_is_a_plan(run_script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(run_script(bench_gpu.main), "no GPU is here; --plan computes")
    status, out, _ = run_script(bench_gpu.main, "--plan")
    assert (status, len(out.splitlines())) == (0, 2 + 5 * 2 * 5 * 2)


def test_whoever_reads_the_output_may_stop():
    """As `| head` does: no message then, and the status of a process that a closed pipe ended."""
    command = [sys.executable, bench_gpu.__file__, "--plan"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"bench_gpu.py: error" not in process.stderr.read()
    assert process.returncode == 141


def test_random_models_are_checkpoints_with_text(tmp_path, run_script):
    options = ["--output_dir", tmp_path / "random", "--shape", "SmolLM2", "--layers", 1, "--characters", 500]
    assert run_script(random_models.main, *options)[0] == 0
    checkpoint = DenseCheckpoint(str(tmp_path / "random/model"))
    assert (checkpoint.config.intermediate_size, checkpoint.dtype) == (1536, torch.bfloat16)
    text = json.loads((tmp_path / "random/text/text.jsonl").read_text())["text"]
    assert len(text) == 500
    assert_refused(run_script(random_models.main, *options), "exists: name a new folder")
