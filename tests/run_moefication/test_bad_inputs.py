"""Wrong input to any stage: one line on stderr that names it and the cure, exit status 2, nothing written or run."""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import assert_refused, change_weights, make_llama, write_jsonl
from pipeline import SCRIPTS, Pipeline, contents

from run_moefication.settings import TEMPLATES

LABELS = "layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def finished(tiny_llama, text_folder, tmp_path_factory) -> Pipeline:
    """All stages run once, and again for models and options that the runs below must not confuse with the first."""
    root = tmp_path_factory.mktemp("finished")
    pipeline = Pipeline(tiny_llama, text_folder, root / "out").run()
    other = make_llama(root / "other-llama", seed=1)
    Pipeline(other, text_folder, root / "other").run()
    Pipeline(tiny_llama, text_folder, root / "out", num_experts=8).split()
    Pipeline(tiny_llama, text_folder, root / "seed1", split_options=["--seed", 1]).split()
    return pipeline


@pytest.fixture(scope="module")
def places(finished, tmp_path_factory) -> dict[str, object]:
    """What the tables below may name in braces: good things, and bad ones of every kind."""
    root, tmp_path = finished.save.parent, tmp_path_factory.mktemp("places")
    cut = Path(shutil.copytree(finished.model, tmp_path / "cut"))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1])
    nan = Path(shutil.copytree(finished.model, tmp_path / "nan"))
    # Not a value that the fingerprint samples.
    change_weights(nan, lambda state: state["model.layers.1.mlp.gate_proj.weight"][1, 1].fill_(float("nan")))
    (tmp_path / "no_text").mkdir()
    (tmp_path / "no_text" / "c4.jsonl").touch()
    write_jsonl(tmp_path / "bad" / "c4.jsonl", ["fine", "fine"])
    (tmp_path / "bad" / "github.jsonl").write_text('{"text": "fine"}\n{"text": "fine"}\n{"text": "cut')
    (tmp_path / "file").write_text("a file")
    for name in ("unfinished_moe", "damaged_moe", "old_moe"):
        shutil.copytree(finished.moe, tmp_path / name)
    partial = (tmp_path / "unfinished_moe").rename(tmp_path / ".unfinished_moe.partial")
    (partial / "manifest.parts").mkdir()
    (partial / "manifest.json").rename(partial / "manifest.parts" / "spec.json")
    flip(tmp_path / "damaged_moe" / "model.safetensors")
    config = tmp_path / "old_moe" / "config.json"
    config.write_text(config.read_text().replace('"num_experts"', '"num_selects"'))  # as LLaMA-MoE v1 had
    return {
        "model": finished.model,
        "text": finished.text,
        "save": tmp_path / "save",
        "split": finished.split_folder,
        "features": finished.features_folder,
        "select": finished.select_folder,
        "moe": finished.moe,
        "root": root,
        "out": finished.save,
        "other_moe": root / "other/other-llama-MoE",
        "other_features": root / "other/other-llama-Hidden-Features",
        "split8": root / "out/tiny-llama-8Expert-Split-Clustering",
        "split_seed1": root / "seed1/tiny-llama-4Expert-Split-Clustering",
        "tmp": tmp_path,
        "gate_proj": TEMPLATES[0],
        "both": ",".join(TEMPLATES),
    }


@pytest.fixture(scope="module")
def untouched(finished, places) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Every file before any of the runs below, none of which may write one."""
    return contents(finished.save.parent), contents(places["tmp"])


ON_FEATURES = {"cluster_on": "activations", "hidden_features_path": "{features}"}
TEXT = {"train_data_path": "{text}", "block_size": 32, "max_tokens": 128}
ON_TEXT = TEXT | {"cluster_on": "activations"}
NO_TEXT = dict.fromkeys(TEXT)
ON_MOE = TEXT | {"model_path": "{model}", "moe_path": "{moe}", "save_path": "{save}"}
THERE = {"save_path": "{out}"}
TO_SPLIT = {"model_path": "{model}", "save_path": "{save}", "num_experts": 4}
FROM_SPLIT = TO_SPLIT | {"num_selects": 2, "split_file_path": "{split}"}
GOOD = {
    "split": TO_SPLIT,
    "split_graph": TO_SPLIT | TEXT,
    "split_random": TO_SPLIT,
    "features": {"model_path": "{model}", "train_data_path": "{text}", "save_path": "{save}", "block_size": 32},
    "select": FROM_SPLIT | {"hidden_features_path": "{features}"},
    "convert": FROM_SPLIT | {"select_file_path": "{select}"},
    "calibrate": ON_MOE,
    "distill": ON_MOE,
    "evaluate": {"model_path": "{moe}", "text_path": "{text}/c4.jsonl", "max_tokens": 64, "block_size": 32},
}

# stage, options changed (None: left out), words that the line must have
WRONG = [
    ("split", {"model_path": "{tmp}/nowhere"}, "no folder here, and no hub id"),
    ("split", {"model_path": ""}, "path is empty"),
    *[
        (stage, {"model_path": "{tmp}/cut"}, "not a whole safetensors file")
        for stage in ("split", "split_graph", "split_random", "features", "select", "convert", "calibrate", "evaluate")
    ],
    ("split", {"num_experts": 5}, "5 does not divide the MLP width 64 of tiny-llama; near it, 1, 2, 4, 8"),
    ("split", {"num_experts": 2.5}, "--num_experts: invalid int value"),
    ("split", {"num_experts": None}, "required: --num_experts"),
    ("split", {"templates": "layers.{}.mlp.gate_proj.weight," * 2}, "--templates"),
    ("split", {"seed": -1}, "--seed -1 is outside of 0 to 2^32 - 1"),
    ("split", {"device": "warp"}, "--device 'warp' cannot be used here"),
    ("split", {"model_path": "{tmp}/nan"}, "layers.1.mlp.gate_proj.weight holds NaN"),
    ("split", {"save_path": "{tmp}/file"}, "tmp}/file"),
    ("split", {"num_shared_experts": 1}, "--num_shared_experts is for --cluster_on activations"),
    ("split", {"keep_fraction": 0.3}, "--keep_fraction is for --cluster_on activations"),
    ("split", {"batch_size": 4}, "--batch_size is for --cluster_on activations"),
    ("split", {"max_tokens": 128}, "--max_tokens is for --train_data_path"),
    ("split", {"train_data_path": "{text}"}, "--train_data_path is for --cluster_on activations"),
    ("split", {"hidden_features_path": "{features}"}, "--hidden_features_path is for --cluster_on activations"),
    ("split", {"cluster_on": "activations"}, "either --train_data_path or --hidden_features_path"),
    ("split", ON_FEATURES | {"train_data_path": "{text}"}, "either --train_data_path or --hidden_features_path"),
    ("split", ON_FEATURES | {"batch_size": 4}, "--batch_size is for --train_data_path"),
    ("split", ON_FEATURES | {"train_data_cache_path": "{tmp}/cache"}, "cache_path is for --train_data_path"),
    ("features", {"train_data_cache_path": "{text}"}, "is the folder of the text, and would be read as text"),
    ("split", ON_FEATURES | {"templates": "{both}"}, "takes one of --templates"),
    ("split", ON_FEATURES | {"hidden_features_path": "{other_features}"}, "another model (other-llama)"),
    ("split", ON_TEXT | {"num_shared_experts": 4}, "--num_shared_experts 4 is outside of 0 to 3"),
    ("split", ON_TEXT | {"keep_fraction": 0}, "--keep_fraction 0.0 is not a fraction between 0 and 1"),
    ("split", ON_TEXT | {"batch_size": 0}, "--batch_size 0 must be at least 1"),
    ("split", ON_TEXT | {"model_path": "{tmp}/nan"}, "layers.1.mlp.gate_proj.weight holds NaN"),
    ("split_graph", {"num_experts": 5}, "5 does not divide the MLP width 64 of tiny-llama; near it, 1, 2, 4, 8"),
    ("split_graph", {"num_shared_experts": 4}, "--num_shared_experts 4 is outside of 0 to 3"),
    ("split_graph", {"num_neighbours": 0}, "--num_neighbours 0 must be at least 1"),
    ("split_graph", {"keep_fraction": 1}, "--keep_fraction 1.0 is not a fraction between 0 and 1"),
    ("split_graph", {"templates": "layers.{}.mlp.down_proj.weight"}, "--templates: invalid choice"),
    ("split_graph", {"model_path": "{tmp}/nan"}, "layers.1.mlp.gate_proj.weight holds NaN"),
    ("split_graph", {"hidden_features_path": "{features}"}, "either --train_data_path or --hidden_features_path"),
    ("split_graph", NO_TEXT, "either --train_data_path or --hidden_features_path"),
    ("split_graph", NO_TEXT | {"hidden_features_path": "{features}", "batch_size": 8}, "is for --train_data_path"),
    ("split_random", {"num_shared_experts": 4}, "--num_shared_experts 4 is outside of 0 to 3"),
    ("split_random", {"templates": "layers.{}.mlp.down_proj.weight"}, "is not one of"),
    ("features", {"seed": 2**32}, "--seed 4294967296 is outside of 0 to 2^32 - 1"),
    ("features", {"train_data_path": "{tmp}/bad"}, "bad/github.jsonl:3: not valid JSON"),
    ("features", {"block_size": 129}, "--block_size 129 is outside of 2 to 128, the positions of tiny-llama"),
    ("features", {"data_use_percent": 0}, "--data_use_percent 0.0 is not a fraction in (0, 1]; one percent is 0.01"),
    ("features", {"save_interval": 0}, "--save_interval 0 must be at least 1"),
    ("features", {"templates": "layers.{}.mlp.down_proj.weight"}, "--templates: invalid choice"),
    ("features", {"feature_format": "inputs", "templates": "{gate_proj}"}, "--templates is for --feature_format full"),
    ("select", {"split_file_path": "{features}"}, "was written by llama_get_hidden_features.py, not by llama_split"),
    ("select", {"split_file_path": "{split8}"}, "was made for --num_experts 8 of tiny-llama, this run asks for 4"),
    ("select", {"num_selects": 5}, "--num_selects 5 is outside of 1 to --num_experts 4"),
    ("select", {"specify_layer": "4"}, "--specify_layer 4 goes beyond the model's layers 0-2"),
    ("select", {"specify_layer": "2-1"}, "--specify_layer '2-1' is neither a layer nor a range"),
    ("select", {"templates": "layers.{}.mlp.up_proj.weight"}, "was not made on layers.{{}}.mlp.up_proj.weight"),
    ("select", {"lr": 0}, "--lr 0.0 must be a positive number"),
    ("select", {"valid_percent": 1}, "--valid_percent 1.0 is not a fraction"),
    ("select", {"epochs": -1}, "--epochs -1 must be at least 0"),
    ("select", {"gate_fit": "ridge"}, "--gate_fit ridge is for --gate_network linear"),
    ("select", {"gate_network": "similarity", "gate_fit": "adam"}, "--gate_fit is for --gate_network mlp or linear"),
    ("select", {"gate_network": "linear", "gate_fit": "adam", "gate_rank": 2}, "--gate_rank is for --gate_fit ridge"),
    (
        "select",
        {"gate_network": "linear", "gate_rank": 2, "gate_bias": "off"},
        "--gate_bias off is for gates without a",
    ),
    ("select", {"gate_bias": "off"}, "--gate_bias is for --gate_fit ridge"),
    *[
        ("select", {"gate_network": "linear", name: value}, f"--{name} is for --gate_fit adam")
        for name, value in {"epochs": 30, "lr": 0.01, "batch_size": 1024, "use_softmax": True, "seed": 0}.items()
    ],
    ("convert", {"select_file_path": "{split}"}, "by llama_split_clustering.py, not by llama_select_mlp.py"),
    ("convert", {"split_file_path": "{split_seed1}"}, "holds gates of another split than"),
    ("convert", {"min_selects": 1}, "--min_selects is for --routing threshold"),
    ("convert", {"max_selects": 3}, "--max_selects is for --routing threshold"),
    ("convert", {"routing": "threshold", "min_selects": 3}, "must not decrease"),
    ("convert", {"routing": "threshold", "max_selects": 5}, "must not decrease"),
    ("convert", {"num_labels": 3}, "--num_labels is for --convert_type LlamaMoEForSequenceClassification"),
    ("convert", {"base_model_id": "a/b/c"}, "--base_model_id a/b/c is no id of the hub, such as owner/name"),
    ("convert", {"save_path": "{model}"}, "is the source checkpoint itself"),
    ("convert", {"save_path": "{text}"}, "holds files but no manifest.json: not ours to fill"),
    # Other options than those of the folder that is there; `test_stages` goes on with --overwrite.
    ("split", THERE | {"seed": 1}, "was made with --seed 0, this run asks for 1"),
    ("features", THERE | {"max_tokens": 512, "batch_size": 2}, "was made with --batch_size 4, this run asks for 2"),
    ("select", THERE | {"use_softmax": True, "epochs": 4}, "was made with --epochs 3, this run asks for 4"),
    ("convert", {"save_path": "{moe}", "dtype": "bfloat16"}, "was made with --dtype None, this run asks for bfloat16"),
    ("calibrate", {"model_path": "{root}/other-llama"}, "was made from another model (tiny-llama) than other-llama"),
    ("calibrate", {"model_path": "{tmp}/nan"}, "layers.1.mlp.gate_proj.weight holds NaN"),
    ("calibrate", {"moe_path": "{other_moe}"}, "was made from another model (other-llama) than tiny-llama"),
    ("calibrate", {"moe_path": "{tmp}/unfinished_moe"}, "is unfinished (0 parts done); run llama_convert.py again"),
    ("calibrate", {"moe_path": "{tmp}/damaged_moe"}, "is damaged: its checksum is not the manifest's"),
    ("calibrate", {"moe_path": "{tmp}/old_moe"}, "has no usable config.json"),
    ("calibrate", {"save_path": "{moe}"}, "is one of the source checkpoints; choose another folder"),
    ("calibrate", {"save_path": "{model}"}, "is one of the source checkpoints; choose another folder"),
    ("calibrate", {"max_tokens": 16, "domain_weights": "c4=1"}, "a single block, and one is held out; use a smaller"),
    ("calibrate", {"refit_gates": True}, "--refit_gates is for linear gates, not for the 'mlp' ones given"),
    ("calibrate", {"gate_bias": "off"}, "--gate_bias is for --refit_gates"),
    ("calibrate", {"layer_budgets": "sensitivity"}, "unrecognized arguments: --layer_budgets"),
    ("evaluate", {"text_path": "{tmp}/nowhere"}, "nowhere is not a file"),
    ("evaluate", {"text_path": "{tmp}/no_text/c4.jsonl"}, "holds fewer than 2 tokens"),
    ("evaluate", {"model_path": "{tmp}/damaged_moe"}, "is damaged: its checksum is not the manifest's"),
    ("evaluate", {"num_selects": 5}, "--num_selects 5 is outside of 1 to 4"),
    ("evaluate", {"model_path": "{model}", "num_selects": 2}, "--num_selects is for MoE checkpoints"),
    ("evaluate", {"block_size": 129}, "--block_size 129 is outside"),
    ("evaluate", {"max_tokens": 1}, "--max_tokens 1 must be at least 2"),
    ("evaluate", {"card": True}, "--card compares with the dense model: name that first of --model_path"),
    ("evaluate", {"json": "{tmp}/nowhere/rows.json"}, "cannot be written: name a file in a folder that exists"),
]


def arguments_of(stage: str, changes: dict[str, object], places: dict[str, object]) -> list[str]:
    options = {name: value for name, value in (GOOD[stage] | changes).items() if value is not None}
    fill = lambda value: str(value).replace("{}", "{{}}").format(**places)  # noqa: E731
    pairs = [(f"--{name}",) if value is True else (f"--{name}", fill(value)) for name, value in options.items()]
    return [text for pair in pairs for text in pair]


@pytest.mark.parametrize(("stage", "changes", "words"), WRONG)
def test_wrong_input_is_refused(stage, changes, words, places, finished, untouched, run_script, tmp_path):
    reads_text = "train_data_path" in GOOD[stage] | changes
    cache = {"train_data_cache_path": tmp_path / "cache"} if reads_text else {}
    result = run_script(SCRIPTS[stage].main, *arguments_of(stage, cache | changes, places))
    assert_refused(result, words.replace("tmp}", str(places["tmp"])).replace("{{}}", "{}"))
    domains = {path.name.partition("-")[0] for path in (tmp_path / "cache").rglob("*")}
    # Tokens are kept where text, weights or options turn out to be wrong only after the reading.
    reads_first = any(word in str(changes) for word in ("/bad", "{tmp}/nan", "max_tokens': 16", "max_tokens': 512"))
    assert reads_first or not domains
    assert (contents(finished.save.parent), contents(places["tmp"])) == untouched


def test_one_variable_shows_the_traceback(places, run_script, monkeypatch):
    monkeypatch.setenv("MOEFICATION_TRACEBACK", "1")
    status, _, err = run_script(SCRIPTS["split"].main, *arguments_of("split", {"model_path": "{tmp}/cut"}, places))
    assert status == 2
    assert "SafetensorError" in err  # the cause, too
    assert "Traceback (most recent call last)" in err
    assert "not a whole safetensors file" in err.splitlines()[-1]


def test_a_split_by_the_graph_wants_pymetis(places, run_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymetis", None)  # as if it were not installed
    words = "a split by the graph needs the package pymetis: pip install -e '.[graph]'"
    assert_refused(run_script(SCRIPTS["split_graph"].main, *arguments_of("split_graph", {}, places)), words)


@pytest.mark.parametrize("stage", GOOD)
def test_unknown_option_and_abbreviation_are_refused(stage, places, run_script):
    for option in ("--nonsense", "--model"):
        result = run_script(SCRIPTS[stage].main, *arguments_of(stage, {}, places), option, "x")
        assert_refused(result, "unrecognized arguments")


def test_left_over_names_of_processes_are_told(places, run_script, monkeypatch):
    """Processes that do not meet are not started; where they would meet is told before anything is read."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    main = SCRIPTS["distill"].main
    status, _, err = run_script(main, *arguments_of("distill", {}, places))
    told, error = err.splitlines()
    assert status == 2
    assert "RANK 0 of WORLD_SIZE 2: it trains with the others, and waits for them at MASTER_ADDR:MASTER_PORT" in told
    assert "MASTER_ADDR does not say where they meet: start them with torchrun" in error
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29517")
    _, _, err = run_script(main, *arguments_of("distill", {"model_path": "{tmp}/nowhere"}, places))
    assert "waits for them at 127.0.0.1:29517" in err.splitlines()[0]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("stage", "folder", "file", "damage", "words"),
    [
        ("select", "split", LABELS, flip, "damaged"),
        ("select", "features", "hidden_inputs/0_1.pth", flip, "damaged"),
        ("select", "features", "hidden_gate_outputs/0_0.pth", cut_short, "bytes, the manifest says"),
        ("convert", "select", LABELS, Path.unlink, "is missing although the manifest lists it"),
    ],
)
def test_damaged_artifacts_are_named(stage, folder, file, damage, words, finished, tmp_path, refuses):
    pipeline = Pipeline(finished.model, finished.text, Path(shutil.copytree(finished.save, tmp_path / "out")))
    target = pipeline.select_folder if stage == "select" else pipeline.moe
    shutil.rmtree(target)
    path = getattr(pipeline, f"{folder}_folder") / file
    damage(path)
    refuses(getattr(pipeline, stage), str(path), words)
    assert not target.exists()
