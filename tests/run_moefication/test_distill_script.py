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


def test_left_over_names_of_processes_are_told(run, tiny_llama, text_folder, tmp_path):
    """Processes that do not meet are not started; where they would meet is told before it is waited for."""
    Pipeline(tiny_llama, text_folder, tmp_path / "out", moe=run.folder / "moe-Calibrated").run()
    command = [sys.executable, SCRIPT.parent / "llama_distill.py", "--model_path", tiny_llama]
    command += ["--moe_path", run.folder / "moe-Calibrated", "--save_path", tmp_path / "distilled"]
    command += ["--train_data_path", text_folder, "--block_size", "32", "--max_tokens", "128"]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    told, error = result.stderr.splitlines()
    assert result.returncode == 2
    assert "RANK 0 of WORLD_SIZE 2: it trains with the others, and waits for them at MASTER_ADDR:MASTER_PORT" in told
    assert "MASTER_ADDR does not say where they meet: start them with torchrun" in error
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    waiting = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert "waits for them at 127.0.0.1:29517" in waiting.stderr.readline()
    finally:
        waiting.kill()
        waiting.communicate()
