"""LlamaMoE checkpoints: damaged ones are refused, those of version 0.1 go on as they are."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import change_config
from pipeline import contents

import run_moefication as rm
from run_moefication.moefication.errors import MoEficationError
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


@pytest.mark.parametrize(
    ("stage", "settings"), [(rm.calibrate, rm.CalibrateSettings()), (rm.distill, rm.DistillSettings())]
)
def test_all_weights_are_checked_where_there_is_work_alone(stage, settings, checkpoint, shared_run, tmp_path):
    moe = rm.MoECheckpoint(Path(shutil.copytree(shared_run.moe, tmp_path / "moe")), checkpoint)
    text = rm.read_text(checkpoint, shared_run.text, block_size=32, max_tokens=256)
    stage(checkpoint, moe, text, tmp_path / "new", settings)
    file = moe.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    before = contents(tmp_path / "new")
    stage(checkpoint, moe, text, tmp_path / "new", settings)  # it is finished
    for folder, overwrite in (("other", False), ("new", True)):
        with pytest.raises(MoEficationError, match=r"model.safetensors is damaged"):
            stage(checkpoint, moe, text, tmp_path / folder, settings, overwrite=overwrite)
    assert contents(tmp_path / "new") == before
    assert {path.name for path in tmp_path.iterdir()} == {"moe", "new"}
