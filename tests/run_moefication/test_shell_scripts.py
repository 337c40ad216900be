"""The shell scripts, from a directory that is not theirs, with settings from the environment."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pipeline import contents

import run_moefication as rm
from run_moefication import (
    llama_calibrate,
    llama_convert,
    llama_distill,
    llama_evaluate,
    llama_get_hidden_features,
    llama_select_mlp,
    llama_split_clustering,
    settings,
)
from run_moefication.command_line import settings_of

STAGES = Path(__file__).parents[2] / "run_moefication"
NUMBERED = sorted(path.name for path in STAGES.glob("[0-9]_*.sh"))
SCRIPTS = {
    "1_split.sh": (llama_split_clustering, settings.SplitSettings),
    "2_get_hidden_features.sh": (llama_get_hidden_features, settings.FeatureSettings),
    "3_select.sh": (llama_select_mlp, settings.GateSettings),
    "4_convert.sh": (llama_convert, settings.ConvertSettings),
    "5_calibrate.sh": (llama_calibrate, settings.CalibrateSettings),
    "6_distill.sh": (llama_distill, settings.DistillSettings),
    "evaluate.sh": (llama_evaluate, settings.EvaluateSettings),
}


@pytest.fixture
def run(tiny_llama, text_folder, tmp_path):
    """`run("1_split.sh", "--option", NAME="value")` in a directory of its own, paths given relative to it."""
    (tmp_path / "a b").mkdir()
    base = os.environ | {
        "MODEL_PATH": str(tiny_llama),
        "SAVE_PATH": "out",
        "MOE_PATH": "out/tiny-llama-MoE",
        "TRAIN_DATA_PATH": str(text_folder),
        "TRAIN_DATA_CACHE_PATH": "out/cache",
        "BLOCK_SIZE": "32",
        "MAX_TOKENS": "512",
        "NUM_GPUS": "1",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",  # as the tests' own process: sums are in another order on more threads
    }

    def run(script: str, *options: str, **settings: str) -> subprocess.CompletedProcess:
        command = ["bash", STAGES / script, *options]
        return subprocess.run(command, env=base | settings, cwd=tmp_path / "a b", capture_output=True, text=True)

    run.folder = tmp_path / "a b" / "out"
    return run


@pytest.fixture
def typed(run, tmp_path):
    """`typed("1_split.sh", NAME="value")`: the words after `python` of the command that the script ends with."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\ncase "$1 $2" in "-c "* | "-m run_moefication.settings") '
        f'exec "{sys.executable}" "$@" ;; *) printf "%s\\n" "$@" ;; esac\n'
    )
    python.chmod(0o755)

    def typed(script: str, **settings: str) -> list[str]:
        result = run(script, PYTHON=str(python), **settings)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.splitlines()

    return typed


@pytest.fixture
def options(typed):
    """`options("1_split.sh", NAME="value")`: the options that the script gives to its stage, and the settings that they
    are."""

    def options(script: str, **settings: str) -> tuple[argparse.Namespace, settings.Settings]:
        module, kind = SCRIPTS[script]
        path, *words = typed(script, **settings)
        assert Path(path).samefile(module.__file__)
        arguments = module.build_parser().parse_args(words)
        return arguments, settings_of(arguments, kind)

    return options


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


# ---------------------------------------------------------------------------------------------------- whole runs


def test_scripts_in_order_do_what_the_library_does(run, tiny_llama, text_folder, tmp_path):
    plain = {"RECIPE": "plain", "NUM_EXPERTS": "4"}
    for script in NUMBERED[:4]:
        result = run(script, **plain)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1].startswith("next: ")
    result = run("evaluate.sh", TEXT_PATH=str(text_folder / "c4.jsonl"), NUM_SELECTS="4 2")
    assert result.returncode == 0, result.stderr
    dense, full, half = (line.split()[-3] for line in result.stdout.splitlines()[-3:])  # perplexities
    assert dense == full != half

    # MAX_TOKENS of the environment is the number of tokens of stage 2.
    library = moefy(tiny_llama, text_folder, tmp_path / "moe", rm.PLAIN, num_experts=4, feature_tokens=512)
    assert_same_checkpoint(library.path, run.folder / "tiny-llama-MoE")
    made = {path.name for path in run.folder.iterdir()} - {"cache", "tiny-llama-MoE"}
    assert len(made) == 3
    for name in made:
        assert_same_checkpoint(tmp_path / "moe-work" / name, run.folder / name)


def test_the_default_recipe_ends_with_a_calibrated_model(run, tiny_llama, text_folder, tmp_path):
    for script in NUMBERED[:5]:
        result = run(script, NUM_EXPERTS="8", GATE_RANK="2")
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
    result = run("evaluate.sh", TEXT_PATH=str(text_folder / "c4.jsonl"))
    names = [line.split()[0] for line in result.stdout.splitlines()[-3:]]
    assert names == ["tiny-llama", "tiny-llama-MoE,", "tiny-llama-MoE-Calibrated,"]

    result = run("6_distill.sh", "--epochs", "2", TRAIN="experts", LR="0.001", DISTILLED_PATH="distilled")
    assert result.returncode == 0, result.stderr
    written, following = result.stdout.splitlines()[-2:]
    assert written.startswith("written: distilled (")
    assert following == "next: llama_evaluate.py (evaluate.sh)"
    options = json.loads((run.folder.parent / "distilled" / "manifest.json").read_text())["options"]
    expected = {"train": "experts", "lr": 0.001, "epochs": 2, "domain_weights": "equal", "max_tokens": 512}
    assert {name: options[name] for name in expected} == expected


def test_features_on_two_processes(run):
    result = run("2_get_hidden_features.sh", NUM_GPUS="2")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in run.folder.rglob("hidden_inputs/*.pth")} >= {"0_0.pth", "1_0.pth"}


# ---------------------------------------------------------------------------------------------------- their commands


@pytest.mark.parametrize("recipe", rm.settings.RECIPES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_recipe_gives_options_that_have_an_effect(script, recipe, options):
    """Settings refuse those that have none."""
    options(script, RECIPE=recipe)


@pytest.mark.parametrize(
    ("changes", "fit", "use_softmax", "seed"),
    [
        ({}, "ridge", None, None),
        ({"GATE_FIT": "adam", "GATE_RANK": ""}, "adam", True, 3),
        ({"GATE_NETWORK": "mlp", "GATE_RANK": ""}, "adam", True, 3),
        ({"GATE_NETWORK": "similarity", "GATE_RANK": ""}, None, None, None),
    ],
)
def test_gates_that_are_not_trained_take_no_options_of_training(changes, fit, use_softmax, seed, options):
    _, made = options("3_select.sh", SEED="3", **changes)
    assert (made.gate_fit, made.use_softmax, made.seed) == (fit, use_softmax, seed)


def test_recorded_activations_have_a_template(options):
    up_proj = settings.TEMPLATES[1]
    _, made = options("2_get_hidden_features.sh", FEATURE_FORMAT="full", TEMPLATES=up_proj)
    assert made.templates == up_proj


@pytest.mark.parametrize("script", ["5_calibrate.sh", "6_distill.sh"])
def test_the_budget_stays_unless_it_is_given(script, options):
    assert options(script)[1].num_selects is None
    assert options(script, NUM_SELECTS="6")[1].num_selects == 6


def test_paths_follow_from_one_another_and_can_be_given(options):
    assert options("5_calibrate.sh")[0].save_path == "out/tiny-llama-MoE-Calibrated"
    assert options("6_distill.sh")[0].moe_path == "out/tiny-llama-MoE-Calibrated"
    assert options("5_calibrate.sh", CALIBRATED_PATH="elsewhere")[0].save_path == "elsewhere"


def test_a_model_called_dot_has_a_name(options, tmp_path):
    arguments, _ = options("3_select.sh", MODEL_PATH=".", MOE_PATH="")
    assert arguments.split_file_path == "out/a b-256Expert-Split-Clustering"
    assert arguments.hidden_features_path == "out/a b-Hidden-Features"
    arguments, _ = options("4_convert.sh", MODEL_PATH=".", MOE_PATH="")
    assert arguments.select_file_path == "out/a b-256Expert-Select-MLP"
    assert arguments.save_path == str(tmp_path / "a b-MoE")


def test_several_gpus_have_a_process_each(typed):
    words = typed("6_distill.sh", NUM_GPUS="3")
    assert words[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]


# ---------------------------------------------------------------------------------------------------- wrong settings


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RECIPE": "best"}, "RECIPE=best: calibrated or plain"),
        ({"NUM_EXPERTS": "abc"}, "NUM_EXPERTS=abc: a whole number is needed, 1 or more"),
        ({"NUM_EXPERTS": "08"}, "NUM_EXPERTS=08: a whole number is needed, 1 or more"),
        ({"NUM_EXPERTS": "0"}, "NUM_EXPERTS=0: a whole number is needed, 1 or more"),
        ({"NUM_EXPERTS": "9" * 20}, f"NUM_EXPERTS={'9' * 20}: a whole number is needed, 1 or more"),
        ({"NUM_SELECTS": "2.5"}, "NUM_SELECTS=2.5: a whole number is needed, 1 or more"),
        ({"NUM_EXPERTS": "4", "NUM_SELECTS": "5"}, "NUM_SELECTS=5 is outside of 1 to NUM_EXPERTS=4"),
        ({"NUM_EXPERTS": "1"}, "NUM_SELECTS=0 is outside of 1 to NUM_EXPERTS=1"),
        ({"NUM_SHARED_EXPERTS": "-1"}, "NUM_SHARED_EXPERTS=-1: a whole number is needed, 0 or more"),
    ],
)
def test_wrong_counts_are_refused(environment, words):
    with pytest.raises(rm.SettingError) as error:
        settings.shell_settings(environment)
    assert str(error.value) == words


@pytest.mark.parametrize(
    ("script", "setting", "words"),
    [
        ("1_split.sh", {"RECIPE": "best"}, "RECIPE=best: calibrated or plain"),
        ("2_get_hidden_features.sh", {"NUM_GPUS": "two"}, "NUM_GPUS=two: a whole number is needed, 1 or more"),
        ("6_distill.sh", {"NUM_GPUS": "0"}, "NUM_GPUS=0: a whole number is needed, 1 or more"),
    ],
)
def test_a_wrong_setting_is_one_line_before_any_work(script, setting, words, run):
    result = run(script, **setting)
    assert (result.returncode, result.stderr) == (2, f"error: {words}\n")
    assert not run.folder.exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_not_given_is_one_line(script, run):
    result = run(script, MODEL_PATH="")
    assert result.returncode == 2
    assert "argument --model_path: the path is empty" in result.stderr.splitlines()[-1]
    assert not run.folder.exists()


@pytest.mark.parametrize("script", [*SCRIPTS, "../scripts/quickstart.sh"])
def test_help_needs_no_settings(script):
    environment = os.environ | {"PYTHON": sys.executable, "NUM_GPUS": "1"}
    command = ["bash", STAGES / script, "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) > 5
