"""The shell scripts, from a directory that is not theirs, with settings from the environment."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipeline
import pytest
from conftest import assert_refused
from pipeline import contents

import run_moefication as rm
from run_moefication import settings
from run_moefication.command_line import settings_of

STAGES = Path(__file__).parents[2] / "run_moefication"
SCRIPTS = {
    "1_split.sh": pipeline.SCRIPTS["split"],
    "2_get_hidden_features.sh": pipeline.SCRIPTS["features"],
    "3_select.sh": pipeline.SCRIPTS["select"],
    "4_convert.sh": pipeline.SCRIPTS["convert"],
    "5_calibrate.sh": pipeline.SCRIPTS["calibrate"],
    "6_distill.sh": pipeline.SCRIPTS["distill"],
    "evaluate.sh": pipeline.SCRIPTS["evaluate"],
}
# Prints the words of the command, unless it is one of those that the scripts need to make up their own.
PYTHON = f"""#!/bin/bash
case "$1 $2" in
    "-c "* | "-P -c" | "-m run_moefication.settings") exec "{sys.executable}" "$@" ;;
    *) printf '%s\\n' "$@" ;;
esac
"""


@pytest.fixture
def run(tiny_llama, text_folder, tmp_path, monkeypatch) -> Callable[..., subprocess.CompletedProcess]:
    """`run("1_split.sh", "--option", NAME="value")` in a directory of its own, paths given relative to it."""
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    base = os.environ | {
        "MODEL_PATH": str(tiny_llama),
        "SAVE_PATH": "out",
        "MOE_PATH": "out/tiny-llama-MoE",
        "TRAIN_DATA_PATH": str(text_folder),
        "TRAIN_DATA_CACHE_PATH": "out/cache",
        "TEXT_PATH": str(text_folder / "c4.jsonl"),
        "BLOCK_SIZE": "32",
        "MAX_TOKENS": "512",
        "NUM_GPUS": "1",
        "PYTHON": sys.executable,
    }

    def run(script: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
        command = ["bash", STAGES / script, *options]
        return subprocess.run(command, env=base | environment, capture_output=True, text=True)

    return run


@pytest.fixture
def typed(run, tmp_path) -> Callable[..., list[str]]:
    """`typed("1_split.sh", NAME="value")`: what the script types after `python`."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def typed(script: str, *options: str, **environment: str) -> list[str]:
        result = run(script, *options, PYTHON=str(tmp_path / "python"), **environment)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.splitlines()

    return typed


@pytest.fixture
def options(typed) -> Callable[..., dict[str, Any]]:
    """`options("1_split.sh", NAME="value")`: what the options that the script types set."""

    def options(script: str, **environment: str) -> dict[str, Any]:
        module = SCRIPTS[script]
        path, *words = typed(script, **environment)
        assert Path(path).samefile(module.__file__)
        arguments = module.main.build_parser().parse_args(words)
        return vars(arguments) | vars(settings_of(arguments, module.main.settings))

    return options


@pytest.mark.parametrize(
    ("recipe", "environment", "changes"),
    [
        (rm.PLAIN, {"NUM_EXPERTS": "4"}, {}),
        (rm.CALIBRATED, {"NUM_EXPERTS": "8", "GATE_RANK": "2"}, {"gate_rank": 2, "rank_from": 1}),
        (rm.ENGINE, {"NUM_EXPERTS": "8"}, {}),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_scripts_in_order_do_what_the_library_does(
    recipe, environment, changes, typed, run_script, tiny_llama, text_folder, tmp_path
):
    def printed(script: str, **settings: str) -> list[str]:
        """The lines that a stage prints, which runs in this process."""
        words = typed(script, RECIPE=recipe.name, **environment, **settings)
        status, out, err = run_script(SCRIPTS[script].main, *words[1:])
        assert status == 0, err
        return out.splitlines()

    out, heldout = tmp_path / "a b" / "out", text_folder / "c4.jsonl"
    for script in list(SCRIPTS)[: 5 if recipe.is_calibrated else 4]:
        assert printed(script)[-1].startswith("next: ")
    rows = [line.split() for line in printed("evaluate.sh", TEXT_PATH=str(heldout), NUM_SELECTS="4 2")[2:]]
    names = {row[0].rstrip(",:") for row in rows if row and row[0].startswith("tiny-llama")}
    assert re.fullmatch(r"evaluated in [\d.]+ s", " ".join(rows[-1]))
    calibrated = {"tiny-llama-MoE-Calibrated"} if recipe.is_calibrated else set()
    assert names == {"tiny-llama", "tiny-llama-MoE"} | calibrated

    # MAX_TOKENS of the environment is the number of tokens of stages 1, 2 and 5.
    recipe = replace(recipe, split_tokens=512, feature_tokens=512, calibration_tokens=512, **changes)
    dense, num_experts = rm.DenseCheckpoint(str(tiny_llama)), int(environment["NUM_EXPERTS"])
    library = rm.moefy(dense, text_folder, tmp_path / "moe", recipe, block_size=32, num_experts=num_experts)
    config = library.config
    assert (config.routing, config.output_bias) == (recipe.routing, recipe.output_bias)
    assert (config.gate_network, config.gate_rank) == (recipe.gate_network, recipe.rank(num_experts))
    made = {path.name: path for path in out.iterdir() if path.name != "cache"}
    last = made.pop("tiny-llama-MoE-Calibrated" if recipe.is_calibrated else "tiny-llama-MoE")
    assert len(made) == (4 if recipe.is_calibrated else 3)
    for one, other in [(last, library.path), *((path, tmp_path / "moe-work" / name) for name, path in made.items())]:
        files = [contents(folder) for folder in (one, other)]
        manifests = [json.loads(content.pop("manifest.json")) for content in files]
        assert files[0] == files[1]
        assert manifests[0]["options"] == manifests[1]["options"]


@pytest.mark.parametrize("recipe", settings.RECIPES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_recipe_gives_options_that_have_an_effect(script, recipe, options):
    """Settings refuse those that have none."""
    options(script, RECIPE=recipe)


UP = settings.TEMPLATES[1]
UNTRAINED = {"use_softmax": None, "seed": None}


@pytest.mark.parametrize(
    ("script", "environment", "expected"),
    [
        # Gates that are not trained take no options of training.
        ("3_select.sh", {}, {"gate_fit": "ridge"} | UNTRAINED),
        ("3_select.sh", {"GATE_FIT": "adam", "GATE_RANK": ""}, {"gate_fit": "adam", "use_softmax": True, "seed": 3}),
        ("3_select.sh", {"GATE_NETWORK": "mlp", "GATE_RANK": ""}, {"gate_fit": "adam", "use_softmax": True, "seed": 3}),
        ("3_select.sh", {"GATE_NETWORK": "similarity", "GATE_RANK": ""}, {"gate_fit": None} | UNTRAINED),
        # A rank is proposed only for gates that can have one.
        ("3_select.sh", {"NUM_EXPERTS": "256"}, {"gate_rank": 64}),
        ("3_select.sh", {"NUM_EXPERTS": "256", "GATE_NETWORK": "mlp"}, {"gate_fit": "adam", "gate_rank": None}),
        ("3_select.sh", {"NUM_EXPERTS": "256", "GATE_FIT": "adam"}, {"gate_fit": "adam", "gate_rank": None}),
        ("3_select.sh", {"NUM_EXPERTS": "256", "GATE_BIAS": "off"}, {"gate_bias": "off", "gate_rank": None}),
        ("1_split.sh", {}, {"max_tokens": 512}),
        ("1_split.sh", {"MAX_TOKENS": ""}, {"max_tokens": settings.CALIBRATED.split_tokens}),
        ("2_get_hidden_features.sh", {"FEATURE_FORMAT": "full", "TEMPLATES": UP}, {"templates": UP}),
        ("6_distill.sh", {"TRAIN": "experts", "LR": "0.001"}, {"train": "experts", "lr": 0.001, "block_size": 32}),
        ("6_distill.sh", {"NESTED_SELECTS": "6 2"}, {"nested_selects": [6, 2]}),
        # The budget stays unless it is given; paths follow from one another, and can be given.
        ("5_calibrate.sh", {}, {"num_selects": None, "save_path": "out/tiny-llama-MoE-Calibrated"}),
        ("6_distill.sh", {}, {"num_selects": None, "moe_path": "out/tiny-llama-MoE-Calibrated", "max_tokens": 512}),
        ("5_calibrate.sh", {"NUM_SELECTS": "6", "CALIBRATED_PATH": "here"}, {"num_selects": 6, "save_path": "here"}),
        ("6_distill.sh", {"NUM_SELECTS": "6", "DISTILLED_PATH": "here"}, {"num_selects": 6, "save_path": "here"}),
    ],
)
def test_what_a_script_types(script, environment, expected, options):
    made = options(script, SEED="3", **environment)
    assert {name: made[name] for name in expected} == expected


def test_the_graph_splits_where_it_is_asked_for(typed):
    path, *words = typed("1_split.sh", CLUSTER_ON="graph", SEED="3", NUM_EXPERTS="8")
    script = pipeline.SCRIPTS["split_graph"]
    assert Path(path).samefile(script.__file__)
    made = script.main.build_parser().parse_args(words)
    assert (made.num_experts, made.num_shared_experts, made.seed) == (8, 1, 3)
    assert made.max_tokens == 512
    for stage in ("3_select.sh", "4_convert.sh"):
        assert "out/tiny-llama-8Expert-Split-Graph" in typed(stage, CLUSTER_ON="graph", NUM_EXPERTS="8")


def test_a_model_called_dot_has_a_name(options, tiny_llama, tmp_path):
    shutil.copy(tiny_llama / "config.json", ".")
    how = dict(MODEL_PATH=".", MOE_PATH="", NUM_EXPERTS="8", GATE_RANK="")
    made = options("3_select.sh", **how) | options("4_convert.sh", **how)
    assert made["split_file_path"] == "out/a b-8Expert-Split-Clustering"
    assert made["hidden_features_path"] == "out/a b-Hidden-Features"
    assert made["select_file_path"] == "out/a b-8Expert-Select-MLP"
    assert made["save_path"] == str(tmp_path / "a b-MoE")


@pytest.mark.parametrize(
    ("words", "is_on"), [(("off", "0", "no"), False), (("", "false", ""), False), (("on", "1", "true"), True)]
)
def test_what_is_on_can_be_off(words, is_on, options):
    names = ("FIT_LOGITS", "OUTPUT_BIAS", "REFIT_GATES")
    made = options("5_calibrate.sh", **dict(zip(names, words, strict=True)))
    assert [made[name.lower()] for name in names] == [is_on] * 3


def test_several_processes_are_launched_by_torchrun(typed):
    for script in ("2_get_hidden_features.sh", "6_distill.sh"):
        words = typed(script, "--batch_size", "2", NUM_GPUS="3")
        assert words[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
        assert Path(words[4]).samefile(SCRIPTS[script].__file__)
        assert words[-2:] == ["--batch_size", "2"]
    # Each has as much text as one would have: as many steps.
    tokens = words[words.index("--max_tokens") + 1]
    assert tokens == "512"
    words = typed(script, MAX_TOKENS="", NUM_GPUS="3")
    assert words[words.index("--max_tokens") + 1] == str(3 * settings.CALIBRATED.distillation_tokens)


@pytest.mark.parametrize(
    ("script", "setting", "words"),
    [("6_distill.sh", {"NUM_GPUS": "two"}, "error: NUM_GPUS=two: a whole number is needed, 1 or more")]
    + [(script, {"MODEL_PATH": ""}, "error: MODEL_PATH is not set: MODEL_PATH=") for script in SCRIPTS]
    + [(script, {"MODEL_PATH": "/x"}, "error: MODEL_PATH=/x is no folder here, and no hub id") for script in SCRIPTS]
    + [
        ("1_split.sh", {"MODEL_PATH": "."}, "error: MODEL_PATH=. has no config.json: name the folder of a checkpoint"),
        ("evaluate.sh", {"MOE_PATH": "/x-MoE"}, "error: MOE_PATH=/x-MoE is no folder here, and no hub id"),
        ("evaluate.sh", {"CALIBRATED_PATH": "typo"}, "error: CALIBRATED_PATH=typo has no config.json"),
        ("evaluate.sh", {"DISTILLED_PATH": "typo"}, "error: DISTILLED_PATH=typo has no config.json"),
        ("evaluate.sh", {"TEXT_PATH": "typo"}, "error: TEXT_PATH=typo is not a file: set it to held-out text, such as"),
        ("5_calibrate.sh", {"FIT_LOGITS": "maybe"}, "error: FIT_LOGITS=maybe: on or off"),
        ("../scripts/quickstart.sh", {"DISTILL": "maybe"}, "error: DISTILL=maybe: on or off"),
        ("../scripts/quickstart.sh", {"MODEL": "/x"}, "error: MODEL=/x is no folder here, and no hub id"),
        ("../scripts/quickstart.sh", {"DATA": "/x"}, "error: DATA=/x is not there: name a folder of text"),
        ("../scripts/quickstart.sh", {"TEXT": "/x"}, "error: TEXT=/x is not a file"),
        ("../scripts/convert_7b.sh MODEL", {"TEXT": "/x"}, "error: TEXT=/x is not a file"),
        ("../scripts/convert_7b.sh MODEL", {"DATA": "/x"}, "error: DATA=/x is not there: name a folder of text"),
        ("../scripts/convert_7b.sh MODEL", {"PLAN": "maybe"}, "error: PLAN=maybe: on or off"),
    ],
)
def test_a_wrong_setting_is_one_line_before_any_work(script, setting, words, run):
    result = run(*script.split(), **setting)
    assert_refused((result.returncode, result.stdout, result.stderr), words)
    assert not Path("out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_the_project_is_named(script, run, tmp_path, monkeypatch):
    """In the root of the project, too, where `python -c` would find it."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nexec "{sys.executable}" -E -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(STAGES.parent)
    result = run(script, PYTHON=str(python))
    words = [f"error: '{python}' is no Python >= 3.11 that has this project", "pip install -e .", "set PYTHON"]
    assert_refused((result.returncode, result.stdout, result.stderr), *words)


def test_the_evaluation_takes_every_checkpoint_that_is_there(typed, tiny_llama):
    """A manifest is not asked for: whoever changes a checkpoint removes it."""
    folder = Path("out/tiny-llama-MoE-Calibrated")
    assert str(folder) not in typed("evaluate.sh")
    folder.mkdir(parents=True)
    shutil.copy(tiny_llama / "config.json", folder)
    assert str(folder) in typed("evaluate.sh")
    assert typed("evaluate.sh", DISTILLED_PATH=str(tiny_llama)).count(str(tiny_llama)) == 2
    assert "/elsewhere" in typed("evaluate.sh", "--text_path", "/elsewhere", TEXT_PATH="")


@pytest.mark.parametrize("script", [*SCRIPTS, "../scripts/quickstart.sh"])
def test_help_needs_no_settings(script):
    environment = os.environ | {"PYTHON": sys.executable, "NUM_GPUS": "1"}
    result = subprocess.run(["bash", STAGES / script, "--help"], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) > 5


@pytest.fixture
def says(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """`says("quickstart.sh", ..., NAME="value")`: a copy of the scripts, where Python only says what it is asked."""
    for file in (*STAGES.parent.glob("scripts/*.sh"), *STAGES.glob("*.sh")):
        copy = tmp_path / file.parent.name / file.name
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(file, copy)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(STAGES.parent / name, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)

    def says(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = ["bash", tmp_path / "scripts" / script, *arguments]
        environment = os.environ | {"NUM_GPUS": "1"} | environment
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return says


def test_the_quick_start_ends_with_a_total(says, tiny_llama, text_folder, tmp_path):
    settings = {"MODEL": str(tiny_llama), "DATA": str(text_folder), "TEXT": str(text_folder / "c4.jsonl")}
    settings |= {"MOE_PATH": str(tiny_llama), "CALIBRATED_PATH": str(tiny_llama)}  # as if the stages had made them
    result = says("quickstart.sh", DISTILLED_PATH="of another run", **settings)
    assert result.returncode == 0, result.stderr
    total = r"== Done in \d+ min \d+ s, of which the stages, the evaluation and the page took \d+ min \d+ s"
    assert re.fullmatch(total, result.stdout.splitlines()[-1])
    # Before that, the page: of the evaluation that was made, at its budgets.
    words = result.stdout.splitlines()
    options = words[words.index(str(tmp_path / "run_moefication/llama_report.py")) + 1 : -2]
    arguments = pipeline.SCRIPTS["report"].main.build_parser().parse_args(options)
    assert arguments.text_path == [settings["TEXT"]]
    assert arguments.evaluation_path == words[words.index("--json") + 1]
    assert settings_of(arguments, rm.ReportSettings).num_selects == [48, 32, 16]  # of 64


def test_a_whole_conversion_evaluates_what_it_made(says, tiny_llama, text_folder, tmp_path):
    made = [tmp_path / "work" / f"tiny-llama-MoE{name}" for name in ("", "-Calibrated")]  # as if by the stages
    for folder in made:
        shutil.copytree(tiny_llama, folder)
        (folder / "README.md").touch()
    text = {"DATA": str(text_folder), "TEXT": str(text_folder / "c4.jsonl")}
    result = says("convert_7b.sh", tiny_llama, WORK=str(tmp_path / "work"), DISTILLED_PATH="of another run", **text)
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()
    first = words.index(str(tmp_path / "run_moefication/llama_evaluate.py")) + 2
    assert words[first : words.index("--text_path", first)] == [str(path) for path in (tiny_llama, *made)]
    assert any(line.startswith("== The report, ") for line in words)
