"""The numbered shell scripts, from a directory that is not theirs, with settings from the environment."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pipeline import Pipeline, contents

import run_moefication as rm

STAGES = Path(__file__).parents[2] / "run_moefication"


@pytest.fixture
def run(tiny_llama, text_folder, tmp_path):
    """`run("1_split.sh", NAME="value")` in a directory of its own, paths given relative to it."""
    (tmp_path / "a b").mkdir()
    base = os.environ | {
        "MODEL_PATH": str(tiny_llama),
        "SAVE_PATH": "out",
        "MOE_PATH": "out/tiny-llama-MoE",
        "TRAIN_DATA_PATH": str(text_folder),
        "TRAIN_DATA_CACHE_PATH": "out/cache",
        "RECIPE": "plain",
        "NUM_EXPERTS": "4",
        "BLOCK_SIZE": "32",
        "MAX_TOKENS": "512",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",  # as the tests' own process: sums are in another order on more threads
    }

    def run(script: str, **settings: str) -> subprocess.CompletedProcess:
        command = ["bash", STAGES / script]
        return subprocess.run(command, env=base | settings, cwd=tmp_path / "a b", capture_output=True, text=True)

    run.folder = tmp_path / "a b" / "out"
    return run


def moefy(model: Path, text: Path, save_path: Path, recipe: rm.Recipe, num_experts: int, **changes) -> rm.MoECheckpoint:
    """The library's way of what the scripts do."""
    dense = rm.DenseCheckpoint(str(model))
    return rm.moefy(dense, text, save_path, replace(recipe, **changes), num_experts=num_experts, block_size=32)


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Every file has the same bytes, and both were made with the same options."""
    files = [contents(folder) for folder in (one, other)]
    manifests = [json.loads(content.pop("manifest.json")) for content in files]
    assert files[0] == files[1]
    assert manifests[0]["options"] == manifests[1]["options"]


def test_scripts_in_order_do_what_the_stages_do(run, tiny_llama, text_folder, tmp_path):
    for script in ("1_split.sh", "2_get_hidden_features.sh", "3_select.sh", "4_convert.sh"):
        result = run(script, NUM_GPUS="1")
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1].startswith("next: ")
    result = run("evaluate.sh", TEXT_PATH=str(text_folder / "c4.jsonl"), NUM_SELECTS="4 2")
    assert result.returncode == 0, result.stderr
    dense, full, half = (line.split()[-3] for line in result.stdout.splitlines()[-3:])  # perplexities
    assert dense == full != half

    # MAX_TOKENS of the environment is the number of tokens of stage 2.
    library = moefy(tiny_llama, text_folder, tmp_path / "moe", rm.PLAIN, num_experts=4, feature_tokens=512)
    assert_same_checkpoint(library.path, run.folder / "tiny-llama-MoE")

    pipeline = Pipeline(tiny_llama, text_folder, tmp_path / "python", select_options=["--use_softmax"])
    pipeline.feature_options += ["--feature_format", "inputs"]
    pipeline.run()
    assert contents(run.folder) == contents(pipeline.save)


def test_the_default_recipe_ends_with_a_calibrated_model(run, tiny_llama, text_folder, tmp_path):
    recipe = {"RECIPE": "", "NUM_EXPERTS": "8", "GATE_RANK": "2", "NUM_GPUS": "1"}
    for script in ("1_split.sh", "2_get_hidden_features.sh", "3_select.sh", "4_convert.sh", "5_calibrate.sh"):
        result = run(script, **recipe)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1].startswith("next: ")
    config = json.loads((run.folder / "tiny-llama-MoE-Calibrated" / "config.json").read_text())
    expected = {
        "routing": "threshold",
        "num_experts": 7,
        "num_shared_experts": 1,
        "num_experts_per_tok": 3,
        "gate_network": "linear",
        "gate_rank": 2,
        "gate_bias": True,
        "output_bias": True,
    }
    assert {name: config[name] for name in expected} == expected
    tokens = dict(feature_tokens=512, calibration_tokens=512)
    library = moefy(tiny_llama, text_folder, tmp_path / "moe", rm.CALIBRATED, 8, gate_rank=2, rank_from=1, **tokens)
    assert_same_checkpoint(library.path, run.folder / "tiny-llama-MoE-Calibrated")
    elsewhere = {"CALIBRATED_PATH": "out/another", "NUM_SELECTS": "6"}
    assert run("5_calibrate.sh", **recipe, **elsewhere).returncode == 0
    assert json.loads((run.folder / "another" / "config.json").read_text())["num_experts_per_tok"] == 5
    result = run("evaluate.sh", TEXT_PATH=str(text_folder / "c4.jsonl"))
    assert [line.split()[0] for line in result.stdout.splitlines()[-3:]] == [
        "tiny-llama",
        "tiny-llama-MoE,",
        "tiny-llama-MoE-Calibrated,",
    ]


def test_an_unknown_recipe_is_one_line(run):
    result = run("1_split.sh", RECIPE="best")
    assert (result.returncode, result.stderr) == (2, "error: RECIPE=best: calibrated or plain\n")
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"NUM_EXPERTS": "abc"}, "NUM_EXPERTS=abc: a whole number is needed, 1 or more"),
        ({"NUM_EXPERTS": "08"}, "NUM_EXPERTS=08: a whole number is needed, 1 or more"),
        ({"NUM_SELECTS": "2.5"}, "NUM_SELECTS=2.5: a whole number is needed, 1 or more"),
        ({"NUM_SELECTS": "5"}, "NUM_SELECTS=5 is outside of 1 to NUM_EXPERTS=4"),
        ({"NUM_EXPERTS": "0"}, "NUM_EXPERTS=0: a whole number is needed, 1 or more"),
        ({"NUM_EXPERTS": "1", "RECIPE": ""}, "NUM_SELECTS=0 is outside of 1 to NUM_EXPERTS=1"),
        ({"NUM_SHARED_EXPERTS": "-1"}, "NUM_SHARED_EXPERTS=-1: a whole number is needed, 0 or more"),
        ({"NUM_EXPERTS": "9" * 20}, f"NUM_EXPERTS={'9' * 20}: a whole number is needed, 1 or more"),
    ],
)
def test_wrong_numbers_are_one_line_before_any_work(settings, words, run):
    result = run("1_split.sh", **settings)
    assert (result.returncode, result.stderr) == (2, f"error: {words}\n")
    assert not run.folder.exists()


@pytest.mark.parametrize("script", ["2_get_hidden_features.sh", "6_distill.sh"])
@pytest.mark.parametrize("count", ["two", "0", "-1"])
def test_a_wrong_number_of_gpus_is_one_line(script, count, run):
    result = run(script, NUM_GPUS=count)
    assert (result.returncode, result.stderr) == (
        2,
        f"error: NUM_GPUS={count}: a whole number is needed, 1 or more\n",
    )
    assert not run.folder.exists()


def test_a_model_called_dot_has_a_name(run, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "a b", dirs_exist_ok=True)
    for script in ("1_split.sh", "2_get_hidden_features.sh", "3_select.sh", "4_convert.sh"):
        result = run(script, MODEL_PATH=".", MOE_PATH="", NUM_GPUS="1")
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "a b-MoE" / "manifest.json").is_file()


def test_features_on_two_processes(run):
    result = run("2_get_hidden_features.sh", NUM_GPUS="2")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in run.folder.rglob("hidden_inputs/*.pth")} >= {"0_0.pth", "1_0.pth"}


@pytest.mark.parametrize(
    "script", ["1_split.sh", "2_get_hidden_features.sh", "3_select.sh", "4_convert.sh", "5_calibrate.sh", "evaluate.sh"]
)
def test_a_model_not_given_is_one_line(script, run):
    result = run(script, MODEL_PATH="", NUM_GPUS="1")
    assert result.returncode == 2
    assert "argument --model_path: the path is empty" in result.stderr.splitlines()[-1]
    assert not run.folder.exists()


@pytest.mark.parametrize("script", [*sorted(STAGES.glob("[0-9e]*.sh")), STAGES.parent / "scripts" / "quickstart.sh"])
def test_help_needs_no_settings(script):
    result = subprocess.run(
        ["bash", script, "--help"], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) > 5
