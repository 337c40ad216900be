"""One place of every setting: scripts, shell and README say what `settings.py` says."""

import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline import SCRIPTS

import llama_moe
from llama_moe.configuration_llama_moe import GATE_NETWORKS, ROUTINGS
from run_moefication import command_line, settings
from run_moefication.command_line import with_dashes
from run_moefication.moefication.checkpoints.dense import DTYPES
from run_moefication.moefication.errors import SettingError
from run_moefication.moefication.layers.scores import ACTIVATION_CRITERIA
from run_moefication.moefication.stages.distill_trainer import TRAINED
from run_moefication.moefication.storage.manifest import difference

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_scripts_options_are_its_settings(stage):
    main = SCRIPTS[stage].main
    options = {action.dest: action for action in main.build_parser()._actions}
    for one in fields(main.settings):
        if not one.metadata["is_option"]:
            continue
        option = options[one.name]
        assert option.required == (one.default is MISSING)
        assert option.default == (None if one.default is MISSING else one.default)
        assert option.choices == one.metadata["choices"]
        assert option.help == one.metadata["help"]
        assert re.match(r"[a-z].{7,}", option.help)


def test_choices_are_what_the_code_knows():
    assert set(settings.CRITERIA) == {*ACTIVATION_CRITERIA, "output_norm"}
    assert set(settings.TRAINED) == set(TRAINED)
    assert set(settings.ROUTINGS) == set(ROUTINGS)
    assert set(settings.DTYPES) == set(DTYPES)
    assert set(settings.GATE_NETWORKS.values()) == set(GATE_NETWORKS)
    assert all(hasattr(llama_moe, name) for name in settings.CONVERT_TYPES)


@pytest.mark.parametrize("recipe", settings.RECIPES.values(), ids=lambda recipe: recipe.name)
def test_the_shell_has_the_recipe(recipe):
    experts = recipe.num_experts(11_008)  # LLaMA-7B's, while no model is named
    selects = recipe.num_selects(experts)
    expected = {
        "NUM_EXPERTS": experts,
        "NUM_SELECTS": selects,
        "BUDGET": "",  # only what was given
        "NUM_SHARED_EXPERTS": recipe.num_shared_experts(experts, selects),
        "GATE_RANK": recipe.rank(experts) or "",
        "OUTPUT_BIAS": 1 if recipe.output_bias else "",
        "ROUTING": recipe.routing,
        "SPLIT_TOKENS": recipe.split_tokens,
    }
    shell = settings.shell_settings({"RECIPE": recipe.name})
    assert {name: shell[name] for name in expected} == {name: str(value) for name, value in expected.items()}


@pytest.mark.parametrize(
    ("intermediate_size", "num_experts", "of_engines"),
    [
        (1_536, 48, 24),  # of 32 and 64 neurons: SmolLM2, in which 6 of 256 would be too few
        (5_504, 43, 43),  # of 128
        (5_632, 44, 22),  # of 128 and 256: TinyLlama
        (8_192, 64, 32),  # of 128 and 256: Llama-3.2-1B
        (8_640, 45, 45),  # of 192
        (11_008, 43, 43),  # of 256: LLaMA-7B
        (14_336, 56, 32),  # of 256 and 448: Llama-3-8B
        (8_656, 541, 16),  # of 16, the only multiple of 16 among its divisors, and 541
        (8_663 * 2, 8_663, 2),  # of 2: nothing else divides it
    ],
)
def test_the_number_of_experts_follows_the_model(intermediate_size, num_experts, of_engines):
    assert settings.CALIBRATED.num_experts(intermediate_size) == num_experts
    assert settings.ENGINE.num_experts(intermediate_size) == of_engines
    assert settings.PLAIN.num_experts(intermediate_size) == 8


@given(st.integers(1, 40_000), st.sampled_from([settings.CALIBRATED, settings.ENGINE]))
def test_the_number_of_experts_divides_the_neurons(intermediate_size, recipe):
    assert intermediate_size % recipe.num_experts(intermediate_size) == 0


@pytest.mark.parametrize("num_experts", range(16, 49))
@pytest.mark.parametrize("budget", [0.25, 0.5, 0.75])
def test_engines_can_run_the_experts_of_their_recipe(num_experts, budget):
    """llama.cpp has room for 29 a token in a model of 32 layers."""
    selects = settings.ENGINE.at(budget).num_selects(num_experts)
    assert 1 <= selects - settings.ENGINE.num_shared_experts(num_experts, selects) <= 29


def test_the_shell_proposes_the_number_of_experts_for_the_model(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"intermediate_size": 1536}')
    assert settings.shell_settings({"MODEL_PATH": str(tmp_path)})["NUM_EXPERTS"] == "48"
    for text in ("{}", "[]", '{"intermediate_size": "8"}', '{"intermediate_size": 9999999999999}', "no JSON"):
        config.write_text(text)
        with pytest.raises(SettingError, match=r"NUM_EXPERTS is not given, and MODEL_PATH=[^ ]* has no"):
            settings.shell_settings({"MODEL_PATH": str(tmp_path)})
        given = {"MODEL_PATH": str(tmp_path), "NUM_EXPERTS": "8"}
        assert settings.shell_settings(given)["NUM_SELECTS"] == "4"
        assert settings.shell_settings({"MODEL_PATH": str(tmp_path), "RECIPE": "plain"})["NUM_EXPERTS"] == "8"


def test_a_model_that_is_not_there_is_named_before_the_number_of_experts():
    with pytest.raises(SettingError, match=r"^MODEL_PATH=models/typo is no folder here, and no hub id \(owner/name\)"):
        settings.shell_settings({"MODEL_PATH": "models/typo"})


def test_the_shell_proposes_the_number_of_experts_for_a_hub_id(tmp_path):
    """From the hub's cache, of which this has the layout."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    for file, text in {"refs/main": commit, f"snapshots/{commit}/config.json": '{"intermediate_size": 11008}'}.items():
        (repository / file).parent.mkdir(parents=True)
        (repository / file).write_text(text)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "MODEL_PATH": "owner/name"}
    command = [sys.executable, "-m", "run_moefication.settings"]
    printed = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "NUM_EXPERTS=43" in printed.splitlines()


def test_the_environment_goes_before_the_recipe():
    given = {"NUM_EXPERTS": "512", "GATE_RANK": "", "SPLIT_TOKENS": "7", "CLUSTER_ON": "weights", "NUM_SELECTS": "9"}
    assert given.items() <= settings.shell_settings(given).items()
    assert settings.shell_settings({"NUM_EXPERTS": "512"})["NUM_SELECTS"] == "256"
    assert settings.shell_settings({"NUM_EXPERTS": "255"})["GATE_RANK"] == ""  # small gates have no rank
    assert settings.shell_settings(given)["BUDGET"] == "9"
    on_weights = {"NUM_EXPERTS": "8", "CLUSTER_ON": "weights"}
    assert settings.shell_settings(on_weights)["NUM_SHARED_EXPERTS"] == "0"
    assert settings.shell_settings(on_weights | {"NUM_SHARED_EXPERTS": "0"})["NUM_SHARED_EXPERTS"] == "0"


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, "64"),
        ({"GATE_FIT": "ridge"}, "64"),
        ({"GATE_FIT": "adam"}, ""),
        ({"GATE_BIAS": "off"}, ""),
        ({"GATE_NETWORK": "mlp"}, ""),
        ({"GATE_NETWORK": "similarity"}, ""),
        ({"GATE_NETWORK": "mlp", "GATE_RANK": "8"}, "8"),  # which the stage refuses
    ],
)
def test_a_rank_is_proposed_for_gates_that_can_have_one(environment, rank):
    assert settings.shell_settings({"NUM_EXPERTS": "256"} | environment)["GATE_RANK"] == rank


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RECIPE": "best"}, "RECIPE=best: calibrated or engine or plain"),
        ({"CLUSTER_ON": "grap"}, "CLUSTER_ON=grap: weights, activations or graph"),
        ({"NUM_EXPERTS": "08"}, "NUM_EXPERTS=08: a whole number is needed, 1 or more"),
        ({"NUM_EXPERTS": "0"}, "NUM_EXPERTS=0: a whole number is needed, 1 or more"),
        ({"NUM_EXPERTS": "9" * 20}, f"NUM_EXPERTS={'9' * 20}: a whole number is needed, 1 or more"),
        ({"NUM_EXPERTS": "4", "NUM_SELECTS": "5"}, "NUM_SELECTS=5 is outside of 1 to NUM_EXPERTS=4"),
        ({"NUM_EXPERTS": "1"}, "NUM_SELECTS=0 is outside of 1 to NUM_EXPERTS=1"),
        (
            {"RECIPE": "plain", "NUM_SHARED_EXPERTS": "2"},
            "NUM_SHARED_EXPERTS=2 is for CLUSTER_ON=activations or graph, not weights",
        ),
        ({"NUM_SHARED_EXPERTS": "-1"}, "NUM_SHARED_EXPERTS=-1: a whole number is needed, 0 or more"),
    ],
)
def test_wrong_counts_are_refused(environment, words):
    with pytest.raises(SettingError) as error:
        settings.shell_settings(environment)
    assert str(error.value) == words


@given(st.integers(1, 1024).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_shared_experts_follow_the_budget(counts):
    """An eighth above two fifths, a sixteenth above an eighth, half of what runs below: in whole numbers."""
    experts, selects = counts
    if selects * 5 > experts * 2:
        expected = experts // 8
    elif selects * 8 > experts:
        expected = experts // 16
    else:
        expected = selects // 2
    assert settings.CALIBRATED.num_shared_experts(experts, selects) == expected < selects


def test_the_readmes_name_the_default_recipe():
    default = settings.CALIBRATED
    text = (ROOT / "README.md").read_text()
    text = " ".join(text.split())
    llama, smollm2 = default.num_experts(11_008), default.num_experts(1_536)
    counts = f"({llama} for a LLaMA-7B, {smollm2} of {1_536 // smollm2} neurons for SmolLM2)"
    assert f"makes experts of about {settings.EXPERT_WIDTH} neurons {counts}, of which half run on average" in text
    assert f"calibrates on {default.calibration_tokens:,} tokens" in text
    assert default.selects == settings.Fraction(1, 2)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("num_selects 9 is outside of 1 to num_experts 8", "--num_selects 9 is outside of 1 to --num_experts 8"),
        ("model_path /x/num_experts is a file", "--model_path /x/num_experts is a file"),
        ("seed_of is not seed", "seed_of is not --seed"),
    ],
)
def test_the_command_line_adds_the_dashes(message, shown):
    assert with_dashes(message, ["num_selects", "num_experts", "model_path", "seed"]) == shown


@pytest.mark.parametrize(
    ("recorded", "wanted", "said"),
    [
        ({"gate_fit": "ridge", "epochs": 30}, {"gate_fit": "ridge"}, None),  # epochs had no effect
        ({"gate_fit": "adam", "epochs": 30}, {"gate_fit": "ridge"}, "was made with gate_fit adam"),
        ({"gate_fit": "adam"}, {"gate_fit": "adam", "new": 1}, "was made with new None"),
        ({"layer_budgets": "equal"}, {}, None),
        ({"layer_budgets": "sensitivity"}, {}, "was made with layer_budgets sensitivity"),
    ],
)
def test_options_that_older_versions_recorded(recorded, wanted, said):
    claim = {"source": {"fingerprint": "1"}, "inputs": {}, "environment": {}}
    told = difference(claim | {"options": recorded}, claim | {"options": wanted}, is_finished=True)
    assert told is None if said is None else told.startswith(said)


def test_a_broken_pipe_that_is_not_the_output_is_an_error(run_script):
    def work(_):
        raise BrokenPipeError(32, "Broken pipe")

    def main(argv):
        return command_line.run(command_line.new_parser("A script."), work, argv)

    status, _, err = run_script(main)
    assert (status, err.endswith("error: Broken pipe\n")) == (2, True)
