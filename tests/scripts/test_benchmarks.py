"""The benchmarks measure what they say they measure."""

import json
import os
import re
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import bench_engine
import bench_generate
import bench_moe_layer
import bench_stages
import bench_tokenize
import conversion_cost
import numpy as np
import pytest
import random_models
import torch
from conftest import assert_refused, make_llama
from timing import busy_core, median_seconds

import run_moefication as rm
from llama_moe import record_routing
from llama_moe.gates import LinearGate
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint

CPU = torch.device("cpu")


def test_threshold_cases_spread_over_the_experts_and_keep_the_average():
    gate = LinearGate(64, 16, num_experts_per_tok=1, routing="threshold")
    torch.nn.init.normal_(gate.weight)
    x = torch.randn(400, 64)
    random_models.spread_costs(gate, x, budget=4)
    with torch.no_grad():
        costs = gate.mask(gate.score(x)).sum(-1)
    assert costs.float().mean().item() == pytest.approx(4, abs=0.1)
    assert (costs.min().item(), costs.max().item()) == (1, 15)
    one = torch.randn(1, 64)
    random_models.spread_costs(gate, one, budget=4)
    assert gate.mask(gate.score(one)).sum().item() == 4


def test_layer_bench_times_the_same_computation():
    arguments = SimpleNamespace(num_experts=16, tokens=[5], active=[1.0])
    _, block, x = next(bench_moe_layer.cases(arguments, "SmolLM2", torch.float32, CPU))
    with torch.no_grad():
        expected = random_models.run_block(block, x, "llama_moe")
        for name in bench_moe_layer.IMPLEMENTATIONS:
            torch.testing.assert_close(random_models.run_block(block, x, name), expected, rtol=1e-4, atol=1e-5)
    assert expected.any()


@pytest.mark.parametrize(("active", "routings"), [(1.0, 1), (0.0625, 1), (0.9375, 2)])
def test_layer_bench_takes_any_whole_number_of_experts(active, routings):
    arguments = SimpleNamespace(num_experts=16, tokens=[8], active=[active])
    cases = bench_moe_layer.cases(arguments, "SmolLM2", torch.float32, CPU)
    assert len({block.gate.routing for _, block, _ in cases}) == routings


def test_layer_bench_writes_its_numbers(tmp_path, capsys):
    options = ["--shapes", "SmolLM2", "--tokens", "1", "8", "--active", "0.25", "--rounds", "1", "--dtypes", "fp32"]
    assert bench_moe_layer.main([*options, "--json", str(tmp_path / "layer.json")]) == 0
    rows = json.loads((tmp_path / "layer.json").read_text())["rows"]
    assert [(row["routing"], row["tokens"]) for row in rows] == list(product(("top_k", "threshold"), (1, 8)))
    for row in rows:
        assert row["active"] == pytest.approx(0.25, abs=0.02)
        assert row["active"] <= row["bound"] <= 1
        assert row["ours"] > 0
        assert ("eager" in row) == (row["routing"] == "top_k")
    assert "SmolLM2 layer, 16 experts, fp32" in capsys.readouterr().out


def test_a_busy_core_is_wanted_by_one_process_of_our_priority():
    with busy_core() as process:
        assert os.sched_getaffinity(process) < os.sched_getaffinity(0) or len(os.sched_getaffinity(0)) == 1
        assert os.getpriority(os.PRIO_PROCESS, process) == os.getpriority(os.PRIO_PROCESS, 0)
        time.sleep(0.2)
        user, system = (int(ticks) for ticks in Path(f"/proc/{process}/stat").read_text().rsplit(")")[1].split()[11:13])
        assert user + system > 0
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_layer_bench_measures_beside_a_busy_core(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_moe_layer, "BUSY_SECONDS", 0.01)
    options = ["--shapes", "SmolLM2", "--tokens", "1", "--active", "0.25", "--rounds", "1", "--dtypes", "fp32"]
    assert bench_moe_layer.main([*options, "--busy", "--json", str(tmp_path / "layer.json")]) == 0
    rows = json.loads((tmp_path / "layer.json").read_text())["rows"]
    assert [(row["routing"], row["busy"]) for row in rows] == [("top_k", True), ("threshold", True)]


def test_models_of_the_whole_bench_share_all_but_their_mlps():
    prompt = torch.randint(3, 32000, (1, 6))
    dense, moe, threshold = random_models.make_models(random_models.SHAPES["1B"], 1, 16, prompt, torch.float32)
    experts, threshold_experts = (model.model.layers[0].mlp.experts for model in (moe, threshold))
    assert threshold_experts.down_proj.data_ptr() == experts.down_proj.data_ptr()
    assert dense.model.embed_tokens.weight.data_ptr() == moe.model.embed_tokens.weight.data_ptr()
    mlp = sum(parameter.numel() for parameter in experts.parameters())
    assert mlp == sum(parameter.numel() for parameter in dense.model.layers[0].mlp.parameters())
    threshold.set_active_fraction(0.25)
    with torch.inference_mode():
        with record_routing(threshold) as routing:
            threshold(prompt)
        assert routing[0].experts_per_tok == pytest.approx(0.25 * 16, abs=0.3)
        decode = bench_generate.runs("decode", moe, prompt, 3)
        expected = moe.generate(prompt, max_new_tokens=3, do_sample=False)[:, -1:]
        for _ in range(2):  # each run begins at the end of the prompt
            assert torch.equal(decode(), expected)


def test_the_whole_bench_writes_its_numbers(tmp_path, run_script):
    options = ["--layers", 1, "--prompt_tokens", 4, "--new_tokens", 2, "--active", 0.25, "--rounds", 1]
    status, out, _ = run_script(bench_generate.main, *options, "--json", tmp_path / "generate.json")
    rows = json.loads((tmp_path / "generate.json").read_text())["rows"]
    assert (status, len(out.splitlines())) == (0, 2 + 4)
    routings = ("top_k", "threshold")
    assert [(row["phase"], row["routing"]) for row in rows] == list(product(("prefill", "decode"), routings))
    for row in rows:
        assert 0 < row["mlp_share"]
        assert row["possible"] == pytest.approx(1 - 0.75 * row["mlp_share"])
        assert row["time_ratio"] == pytest.approx(row["dense_tokens_per_second"] / row["moe_tokens_per_second"])


def test_times_are_medians_of_all_alternatives():
    calls = {"slow": 0, "fast": 0}

    def work(name, size):
        calls[name] += 1
        torch.randn(size, size) @ torch.randn(size, size)

    alternatives = {"slow": lambda: work("slow", 600), "fast": lambda: work("fast", 20)}
    seconds = median_seconds(alternatives, rounds=3, device=CPU, at_least=0.005)
    assert seconds["slow"] > seconds["fast"] > 0
    assert calls["fast"] > calls["slow"] >= 5


@pytest.mark.parametrize(
    ("bench", "options", "words"),
    [
        (bench_moe_layer, ["--num_experts", "7"], "--num_experts 7 does not divide 11008 neurons"),
        (bench_moe_layer, ["--active", "0.3"], "--active 0.3 of 16 experts is not a whole number"),
        (bench_moe_layer, ["--tokens", "0"], "argument --tokens: 0 must be a whole number, at least 1"),
        (bench_generate, ["--active", "0"], "--active 0.0"),
        (bench_generate, ["--device", "nowhere"], "--device 'nowhere' cannot be used here"),
    ],
)
def test_wrong_options_give_one_line(bench, options, words, run_script):
    assert_refused(run_script(bench.main, *options), words)


def test_tokenize_bench_counts_the_same_tokens_every_way(tiny_llama, text_folder, tmp_path, run_script):
    options = ["--model_path", tiny_llama, "--text_path", text_folder, "--rounds", 1, "--gigabytes", 0.001]
    status, out, _ = run_script(bench_tokenize.main, *options, "--json", tmp_path / "out.json")
    assert (status, "times the loop" in out) == (0, True)
    *ways, memory = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(ways) == 3
    assert len({row["tokens"] for row in ways}) == 1
    assert memory["bytes"] >= 1_000_000
    assert memory["tokens"] > ways[0]["tokens"]
    assert memory["peak"] >= memory["before"] > 0


class InOrder:
    """In place of k-means-constrained: clusters of consecutive rows."""

    def __init__(self, n_clusters, *, size_min, size_max, init, n_init):
        assert (len(init), size_min, n_init) == (n_clusters, size_max, 1)
        self.labels_, self.n_iter_ = np.arange(n_clusters).repeat(size_min), 1

    def fit(self, rows):
        assert len(rows) == len(self.labels_)
        return self


def test_stages_bench_writes_its_numbers(tiny_llama, text_folder, tmp_path, run_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "k_means_constrained", SimpleNamespace(KMeansConstrained=InOrder))
    options = ["--shape", 96, 8, "--clusters", 2, 4, "--rounds", 1, "--tokens", 256, "--block_size", 32]
    options += ["--model_path", tiny_llama, "--train_data_path", text_folder, "--num_experts", 16]
    status, out, _ = run_script(bench_stages.main, *options, "--json", tmp_path / "out.json")
    assert (status, "balanced k-means, 96 x 8" in out) == (0, True)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    kmeans, features, profile = ([row for row in rows if row["part"] == part] for part in bench_stages.PARTS)
    assert [row["clusters"] for row in kmeans] == [2, 4]
    assert all(0 < row["inertia_ratio"] < 1 and 0 < row["products"] < 1 for row in kmeans)
    assert [row["way"] for row in features] == ["forward", "inputs", "full"]
    assert features[0]["of_forward"] == 1
    shares = {row["function"]: row["share"] for row in profile}
    stages = ("split_on_activations: split_by_activations", "features: extract_features", "calibrate: calibrate")
    parts = [shares[f"stages/{stage.replace(':', '.py:')}"] for stage in stages]
    assert 0 < sum(parts) <= shares["stages/moefy.py: moefy"] == 1


def test_inertia_is_of_the_means():
    rows = torch.tensor([[0.0], [2.0], [10.0], [14.0]])
    assert bench_stages.inertia(rows, torch.tensor([0, 0, 1, 1])) == 2 + 8


def test_stages_bench_names_the_package_it_lacks(run_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "k_means_constrained", None)
    assert_refused(run_script(bench_stages.main, "--parts", "kmeans"), "pip install k-means-constrained==0.9.1")
    assert_refused(run_script(bench_stages.main, "--parts", "features"), "need --model_path and --train_data_path")


def test_engine_bench_compares_models_of_the_same_weights(tmp_path, run_script, text_folder):
    """With all experts on, the MoE has the dense model's perplexity in llama.cpp, whatever the type."""
    dense = make_llama(tmp_path / "dense", hidden_size=64, intermediate_size=256)
    text = text_folder / "c4.jsonl"
    checkpoint = DenseCheckpoint(str(dense))
    corpus = rm.read_text(checkpoint, text_folder, block_size=32, max_tokens=256)
    experts = rm.split(checkpoint, tmp_path / "work", rm.SplitSettings(num_experts=4))
    features = rm.record_features(checkpoint, corpus, tmp_path / "work", rm.FeatureSettings(feature_format="inputs"))
    counts = dict(num_experts=4, num_selects=4)
    gates = dict(gate_network="linear", select_criterion="output_norm")
    gates = rm.fit_gates(checkpoint, experts, features, tmp_path / "work", rm.GateSettings(**counts, **gates))
    moe = rm.convert(checkpoint, experts, gates, tmp_path / "moe", rm.ConvertSettings(**counts))
    options = ["--model_path", dense, "--moe_path", moe.path, "--text_path", text, "--text_tokens", 64]
    options += ["--types", "f32", "q8_0", "--prompt_tokens", 16, "--new_tokens", 4, "--rounds", 1]
    options += ["--work", tmp_path / "files", "--json", tmp_path / "engine.json"]
    status, _, err = run_script(bench_engine.main, *options)
    assert status == 0, err
    rows = json.loads((tmp_path / "engine.json").read_text())["rows"]
    assert [(row["model"], row["type"]) for row in rows] == list(product(("dense", "4/4x64"), ("f32", "q8_0")))
    perplexities = [row["perplexity"] for row in rows]
    assert perplexities[2] == pytest.approx(perplexities[0], rel=1e-4)
    assert perplexities[3] == pytest.approx(perplexities[1], rel=0.02)
    assert perplexities[1] != pytest.approx(perplexities[0], rel=1e-6)
    assert all(row[name] > 0 for row in rows for name in ("prefill", "decode", "over", "over_decode"))
    assert rows[1]["megabytes"] < rows[0]["megabytes"]


def test_engine_bench_writes_nothing_for_models_that_an_engine_cannot_hold(tmp_path, run_script, plain_run):
    options = ["--model_path", plain_run.model, "--moe_path", plain_run.moe, "--work", tmp_path / "files"]
    assert_refused(run_script(bench_engine.main, *options, "--new_tokens", 1), "decode at least 2")
    status, out, err = run_script(bench_engine.main, *options)
    assert (status, out) == (2, "")
    assert "RECIPE=engine" in err
    assert not (tmp_path / "files").exists()


LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "torch_dtype": "float16",
}


def test_the_cost_of_a_7b_is_that_of_its_sizes(tmp_path, run_script):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    (tmp_path / "evaluation.json").write_text('[{"seconds": 60}, {"seconds": 180}]')
    options = ["--model_path", tmp_path, "--work", tmp_path, "--teraflops", 100, "--gpus", 4]
    options += ["--measured", "--json", tmp_path / "cost.json"]
    status, out, err = run_script(conversion_cost.main, *options)
    assert status == 0, err
    assert out.startswith(f"{tmp_path.name}: 6.74B parameters, 43 experts a layer; GPUs: 4")
    rows = {row["name"]: row for row in json.loads((tmp_path / "cost.json").read_text())}
    weights, features = 2 * 6_738_415_616 - 2 * 65 * 4096, 2 * 4096 * 32 * 65_536  # norms are not counted
    assert rows["4_convert"]["kept"] == rows["5_calibrate"]["kept"] == weights
    assert rows["2_get_hidden_features"]["kept"] == features
    forward = 65_536 * (2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32 * 2 * 4096 * 2048)
    assert rows["2_get_hidden_features"]["flops"] == forward
    assert rows["2_get_hidden_features"]["minutes"] == pytest.approx(forward / (0.4 * 100e12 * 4) / 60)
    solutions = 32 * 5 * (11008**3 / 3 + 4 * 11008**2 * 4096)  # in float64: a sixteenth as fast
    calibrate = rows["5_calibrate"]
    expected = (calibrate["flops"] + 15 * solutions) / (0.4 * 100e12) + 3 * weights / 5e8
    assert calibrate["minutes"] == pytest.approx(expected / 60)
    assert (rows["evaluate"]["measured"], rows["4_convert"]["measured"]) == (4, None)
    assert "4.0 measured" in out


def test_an_export_is_part_of_the_plan(tmp_path, run_script, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    monkeypatch.setenv("RECIPE", "engine")
    monkeypatch.setenv("OUTTYPE", "f16 q8_0")
    options = ["--model_path", tmp_path, "--work", tmp_path, "--teraflops", 100, "--gpus", 1, "--measured"]
    run_script(conversion_cost.main, *options, "--json", tmp_path / "cost.json")
    export = json.loads((tmp_path / "cost.json").read_text())[-1]
    assert export["name"] == "export"
    assert export["kept"] == pytest.approx(6.738e9 * (2 + 34 / 32), rel=1e-3)
    monkeypatch.setenv("OUTTYPE", "f12")
    assert_refused(run_script(conversion_cost.main, *options), "OUTTYPE=f12: choose of f32, f16")


def test_what_is_finished_tells_its_minutes_and_needs_no_room(plain_run, tmp_path, run_script, monkeypatch):
    """The folders of a real conversion."""
    monkeypatch.setenv("NUM_EXPERTS", str(plain_run.num_experts))
    options = [
        "--model_path",
        plain_run.model,
        "--work",
        plain_run.save,
        "--teraflops",
        1,
        "--json",
        tmp_path / "cost.json",
    ]
    status, _, err = run_script(conversion_cost.main, *options, "--measured")
    assert status == 0, err
    rows = {row["name"]: row for row in json.loads((tmp_path / "cost.json").read_text())}
    seconds = json.loads((plain_run.split_folder / "manifest.json").read_text())["seconds"]
    assert rows["1_split"]["measured"] == pytest.approx(seconds / 60)
    assert [name for name, row in rows.items() if row["measured"] is None] == ["5_calibrate", "evaluate"]
    free = max(row["scratch"] for row in rows.values()) + rows["5_calibrate"]["kept"]
    for room, expected in ((free + 1, 0), (free - 1, 2)):
        monkeypatch.setattr(conversion_cost.shutil, "disk_usage", lambda _, room=room: SimpleNamespace(free=room))
        assert run_script(conversion_cost.main, *options)[0] == expected


def test_a_plan_that_cannot_be_is_refused(tmp_path, run_script, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    options = ["--model_path", tmp_path, "--work", tmp_path]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = "--gpus 8: none is here to measure; give --teraflops"
    assert_refused(run_script(conversion_cost.main, *options, "--gpus", 8), words)
    monkeypatch.setenv("NUM_EXPERTS", "7")
    words = "NUM_EXPERTS=7 does not divide the MLP width 11008"
    assert_refused(run_script(conversion_cost.main, *options, "--teraflops", 1), words)


def test_a_plan_for_a_place_that_cannot_be_written_is_shown_all_the_same(tmp_path, run_script):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    options = ["--model_path", tmp_path, "--work", "/dev/null/new", "--teraflops", 1]
    status, out, err = run_script(conversion_cost.main, *options)
    assert (status, out.count("\n| ")) == (2, 7)
    assert err.endswith("/dev/null is no folder to write to: set WORK to another one than /dev/null/new\n")


def test_a_machine_that_is_too_small_is_refused(tmp_path, run_script):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B | {"num_hidden_layers": 32_000}))
    options = ["--model_path", tmp_path, "--work", tmp_path / "new", "--teraflops", 1]
    status, out, err = run_script(conversion_cost.main, *options)
    assert (status, out.count("\n| ")) == (2, 7)  # after the table
    assert re.search(r"--work .* needs .* GB are free there$", err.strip())
    assert not (tmp_path / "new").exists()
