"""6_distill.sh, from a directory that is not its own, with settings from the environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import Pipeline

SCRIPT = Path(__file__).parents[2] / "run_moefication" / "6_distill.sh"


@pytest.fixture
def run(tiny_llama, text_folder, tmp_path):
    """`run(NAME="value")` in a directory of its own, paths given relative to it."""
    (tmp_path / "a b").mkdir()
    base = os.environ | {
        "MODEL_PATH": str(tiny_llama),
        "MOE_PATH": "moe",
        "TRAIN_DATA_PATH": str(text_folder),
        "TRAIN_DATA_CACHE_PATH": "cache",
        "BLOCK_SIZE": "32",
        "MAX_TOKENS": "512",
        "NUM_GPUS": "1",
        "PYTHON": sys.executable,
    }

    def run(*options: str, **settings: str) -> subprocess.CompletedProcess:
        command = ["bash", SCRIPT, *options]
        return subprocess.run(command, env=base | settings, cwd=tmp_path / "a b", capture_output=True, text=True)

    run.folder = tmp_path / "a b"
    return run


def test_it_distills_with_the_settings_given(run, tiny_llama, text_folder, tmp_path):
    Pipeline(tiny_llama, text_folder, tmp_path / "out", moe=run.folder / "moe-Calibrated").run()
    result = run("--epochs", "2", TRAIN="experts", LR="0.001", DISTILLED_PATH="distilled")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["written: distilled", "next: llama_evaluate.py (evaluate.sh)"]
    options = json.loads((run.folder / "distilled" / "manifest.json").read_text())["options"]
    expected = {"train": "experts", "lr": 0.001, "epochs": 2, "domain_weights": "equal", "max_tokens": 512}
    assert {name: options[name] for name in expected} == expected


def test_a_model_not_given_is_one_line(run):
    result = run(MODEL_PATH="")
    assert result.returncode == 2
    assert "argument --model_path: the path is empty" in result.stderr.splitlines()[-1]
    assert not list(run.folder.iterdir())
