"""LlamaMoE checkpoints of version 0.1 go on as they are."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import change_config

import run_moefication as rm
from run_moefication.moefication.storage.files import file_sha256


def test_budgets_of_layers_are_loaded_and_distilled(checkpoint, shared_run, tmp_path):
    """The config of a model that was calibrated with `--layer_budgets sensitivity`."""
    budgets, folder = [1.0, 3.0, 2.0], Path(shutil.copytree(shared_run.moe, tmp_path / "moe"))
    change_config(folder, layer_num_experts_per_tok=budgets)
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "config.json"
    manifest["files"]["config.json"] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    moe = rm.MoECheckpoint(folder, checkpoint)
    assert moe.experts_per_tok == budgets

    text = rm.read_text(checkpoint, shared_run.text, block_size=32, max_tokens=1200)
    distilled = rm.distill(checkpoint, moe, text, tmp_path / "distilled", rm.DistillSettings())
    assert distilled.experts_per_tok == distilled.load().config.layer_num_experts_per_tok == budgets
    shares = distilled.artifact.manifest["metrics"]["distillation"]["active_share"]
    assert shares == pytest.approx([budget / 6 for budget in budgets], rel=0.01)
