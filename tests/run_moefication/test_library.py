"""The library does what the scripts do, takes and returns handles, and imports nothing heavy before it is used."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, make_llama, write_jsonl

import run_moefication as rm

ROOT = Path(__file__).parents[2]
BLOCK = {"block_size": 32}


@pytest.fixture(scope="module")
def dense(tiny_llama) -> rm.DenseCheckpoint:
    return rm.DenseCheckpoint(str(tiny_llama))


def test_importing_it_and_its_settings_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    code = f"import sys, run_moefication as rm; rm.CALIBRATED, dir(rm); sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_all_that_is_public_is_there():
    for name in rm._MODULES:
        assert getattr(rm, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'moeify'"):
        _ = rm.moeify


def test_stages_take_and_return_handles(dense, text_folder, tmp_path):
    text = rm.read_text(dense, text_folder, max_tokens=256, **BLOCK)
    on_activations = rm.SplitSettings(num_experts=8, cluster_on="activations", num_shared_experts=2)
    experts = rm.split(dense, tmp_path, on_activations, text)
    features = rm.record_features(dense, text, tmp_path, rm.FeatureSettings(feature_format="inputs", dtype="float32"))
    settings = rm.GateSettings(num_experts=8, num_selects=4, gate_network="linear", select_criterion="output_norm")
    gates = rm.fit_gates(dense, experts, features, tmp_path, settings)
    settings = rm.ConvertSettings(num_experts=8, num_selects=8, routing="threshold")
    moe = rm.convert(dense, experts, gates, tmp_path / "moe", settings)
    tokens = torch.arange(40)[None]
    model = moe.load(torch.float32).eval()
    model.set_num_experts_per_tok(6)  # all that are routed
    with torch.no_grad():
        difference = model(tokens).logits - dense.load_causal_lm("cpu", torch.float32)(tokens).logits
    assert difference.abs().max() < 1e-4
    calibrated = rm.calibrate(dense, moe, text, tmp_path / "calibrated", rm.CalibrateSettings(num_selects=4))
    distilled = rm.distill(dense, calibrated, text, tmp_path / "distilled", rm.DistillSettings(num_selects=4))
    rows = rm.evaluate([dense.path, moe.path, distilled.path], text_folder / "c4.jsonl", max_tokens=256, **BLOCK)
    assert [row.model for row in rows] == ["tiny-llama", "moe", "distilled"]


def test_errors_speak_of_fields():
    with pytest.raises(rm.SettingError, match=r"^num_selects 9 is outside of 1 to num_experts 8$"):
        rm.ConvertSettings(num_experts=8, num_selects=9)
    with pytest.raises(rm.SettingError, match=r"^batch_size 0 must be at least 1$"):
        rm.CalibrateSettings(batch_size=0)


def test_the_lines_of_the_readme_run(tmp_path, monkeypatch):
    (lines,) = re.findall(r"## As a library\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(lines.splitlines()) <= 12
    sizes = dict(hidden_size=64, intermediate_size=512, num_hidden_layers=1, num_key_value_heads=4)
    make_llama(tmp_path / "models" / "llama_7B", **sizes)
    for name in ("llama_data/c4.jsonl", "heldout.txt"):
        write_jsonl(tmp_path / name, [f"{i}. {SENTENCES[i % 6]}" for i in range(60)])
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(lines, names)
    assert [row.num_selects for row in names["rows"]] == [None, 192, 128, 64]
    assert names["experts"].num_shared_experts == 16
