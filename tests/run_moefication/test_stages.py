"""The four stages together, and the promises that hold across them (DESIGN, invariants 1, 3, 6)."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, VARIANTS, as_bin, change_config, make_llama
from pipeline import Pipeline, contents, load_dense, load_moe
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, LlamaForSequenceClassification, LlamaModel

from run_moefication import llama_convert
from run_moefication.moefication.stages import convert as conversion

SCRIPTS = Path(llama_convert.__file__).parent
# float32 sums of the same terms in another order: the design's bound for "the dense model" (invariant 1).
DENSE_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def finished(tiny_llama, text_folder, tmp_path_factory) -> Pipeline:
    """All stages run once on the tiny LLaMA; read-only."""
    return Pipeline(tiny_llama, text_folder, tmp_path_factory.mktemp("finished")).run()


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(0))


def assert_dense_when_all_run(model: Path, moe: Path, num_experts: int = 4) -> None:
    with torch.no_grad():
        dense, converted = load_dense(model)(tokens()).logits, load_moe(moe, num_experts)(tokens()).logits
        partial = load_moe(moe, 1)(tokens()).logits
    assert dense.std() > 0.1  # the comparison is not between zeros
    assert (dense - converted).abs().max() < DENSE_TOLERANCE
    assert (dense - partial).abs().max() > 100 * DENSE_TOLERANCE  # and experts do matter


def test_values_beyond_the_new_dtype_are_refused_before_anything_is_written(text_folder, tmp_path, capfd):
    model = make_llama(tmp_path / "llama")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][5, 5] = 1e5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    pipeline = Pipeline(model, text_folder, tmp_path / "out", convert_options=["--dtype", "float16"])
    assert [pipeline.split(), pipeline.features(), pipeline.select(), pipeline.convert()] == [0, 0, 0, 2]
    assert "lm_head.weight has values beyond torch.float16; choose another --dtype" in capfd.readouterr().err
    assert not pipeline.moe.exists()
    pipeline.convert_options = ["--dtype", "bfloat16"]
    assert pipeline.convert() == 0
    assert {tensor.dtype for tensor in load_file(pipeline.moe / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_experts_selected_is_the_dense_model(variant, text_folder, tmp_path):
    model = make_llama(tmp_path / "llama", **VARIANTS[variant])
    pipeline = Pipeline(model, text_folder, tmp_path / "out").run()
    assert_dense_when_all_run(model, pipeline.moe)


def test_rope_fields_of_older_checkpoints_carry_over(text_folder, tmp_path):
    model = make_llama(tmp_path / "llama", **VARIANTS["llama3_rope"])
    with torch.no_grad():
        expected = load_dense(model)(tokens()).logits
    config = json.loads((model / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    (model / "config.json").write_text(json.dumps(config))
    pipeline = Pipeline(model, text_folder, tmp_path / "out").run()
    with torch.no_grad():
        converted = load_moe(pipeline.moe, 4)(tokens()).logits
    assert (expected - converted).abs().max() < DENSE_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sources_keep_their_dtype_and_values(dtype, text_folder, tmp_path):
    model = make_llama(tmp_path / "llama", dtype=dtype)
    pipeline = Pipeline(model, text_folder, tmp_path / "out").run()
    assert {tensor.dtype for tensor in load_file(pipeline.moe / "model.safetensors").values()} == {dtype}
    assert_dense_when_all_run(model, pipeline.moe)


@pytest.mark.parametrize("layout", ["shards", "bin", "bin_shards", "mistral"])
def test_any_layout_gives_the_same_checkpoint(layout, finished, tmp_path):
    folder = tmp_path / "tiny-llama"
    if layout == "shards":
        make_llama(folder, max_shard_size="40KB")
    elif layout == "mistral":
        shutil.copytree(finished.model, folder)
        change_config(folder, model_type="mistral", sliding_window=None)
    else:
        as_bin(finished.model, folder, shards=3 if layout == "bin_shards" else 1)
    pipeline = Pipeline(folder, finished.text, tmp_path / "out").run()
    same = [path.name for path in finished.moe.iterdir()]
    if layout == "mistral":
        same.remove("manifest.json")  # the fingerprint covers the config
    for name in same:
        assert (pipeline.moe / name).read_bytes() == (finished.moe / name).read_bytes(), name


@pytest.mark.parametrize("gate", ["mlp", "linear", "similarity"])
@pytest.mark.parametrize("criterion", ["plain", "positive", "l2_norm", "output_norm"])
def test_any_gate_and_criterion_gives_the_dense_model(gate, criterion, finished, tmp_path):
    pipeline = Pipeline(finished.model, finished.text, tmp_path)
    for folder in (finished.split_folder, finished.features_folder):
        (tmp_path / folder.name).symlink_to(folder)
    training = ["--epochs", 2] if gate == "mlp" else []
    pipeline.select_options = ["--gate_network", gate, "--select_criterion", criterion, *training]
    assert pipeline.select() == 0
    assert pipeline.convert() == 0
    assert_dense_when_all_run(pipeline.model, pipeline.moe)


@pytest.mark.parametrize("rank", [None, 2])
def test_gates_in_closed_form_score_in_the_model_as_they_were_fitted(rank, finished, tmp_path):
    pipeline = Pipeline(finished.model, finished.text, tmp_path)
    for folder in (finished.split_folder, finished.features_folder):
        (tmp_path / folder.name).symlink_to(folder)
    pipeline.select_options = ["--gate_network", "linear", "--select_criterion", "output_norm"]
    pipeline.select_options += [] if rank is None else ["--gate_rank", rank]
    assert (pipeline.select(), pipeline.convert()) == (0, 0)
    assert_dense_when_all_run(pipeline.model, pipeline.moe)
    moe = load_moe(pipeline.moe, 2)
    assert (moe.config.gate_network, moe.config.gate_rank, moe.config.gate_bias) == ("linear", rank, True)
    state = torch.load(pipeline.select_folder / "layers.1.mlp.gate_proj.weight", weights_only=True)
    weight = state["weight"] if rank is None else state["output_weight"] @ state["input_weight"]
    x = torch.randn(5, 32)
    expected = x @ weight.T + state["bias"]
    torch.testing.assert_close(moe.model.layers[1].mlp.gate.score(x), expected, rtol=1e-4, atol=1e-4)


def test_up_proj_template_and_full_features_give_the_dense_model(tiny_llama, text_folder, tmp_path):
    template = ["--templates", "layers.{}.mlp.up_proj.weight"]
    pipeline = Pipeline(tiny_llama, text_folder, tmp_path, split_options=template, convert_options=template)
    pipeline.feature_options = pipeline.feature_options + template
    pipeline.select_options = pipeline.select_options + template
    pipeline.run()
    assert (pipeline.split_folder / "layers.0.mlp.up_proj.weight").is_file()
    assert_dense_when_all_run(tiny_llama, pipeline.moe)


def test_names_are_those_of_the_description(finished):
    layers = {f"layers.{i}.mlp.gate_proj.weight" for i in range(3)}
    assert {path.name for path in finished.split_folder.iterdir()} == layers | {"manifest.json"}
    assert {path.name for path in finished.select_folder.iterdir()} == layers | {"manifest.json"}
    assert {path.name for path in finished.features_folder.iterdir()} == {
        "hidden_inputs",
        "hidden_gate_outputs",
        "manifest.json",
    }
    # 512 tokens, 394 of c4 and 118 of github by LLaMA's mix: 13 + 4 blocks of 32, 4 a batch, 1 batch a file.
    shards = {f"0_{i}.pth" for i in range(5)}
    assert {path.name for path in (finished.features_folder / "hidden_inputs").iterdir()} == shards
    labels = torch.load(finished.split_folder / "layers.0.mlp.gate_proj.weight", weights_only=True)
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [16] * 4


def test_converted_folder_holds_config_code_tokenizer_and_card(finished):
    config = json.loads((finished.moe / "config.json").read_text())
    assert config["architectures"] == ["LlamaMoEForCausalLM"]
    assert config["model_type"] == "llama_moe"
    assert (config["num_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"]) == (4, 2, 16)
    assert len(config["auto_map"]) == 4
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (finished.moe / name).read_bytes() == (finished.model / name).read_bytes()
    assert "from_pretrained" in (finished.moe / "README.md").read_text()
    manifest = json.loads((finished.moe / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in finished.moe.iterdir()} - {"manifest.json"}


def test_budget_may_differ_between_select_and_convert(finished, tmp_path):
    pipeline = Pipeline(finished.model, finished.text, finished.save, num_selects=3, moe=tmp_path / "moe")
    assert pipeline.convert() == 0
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["num_experts_per_tok"] == 3


# ---------------------------------------------------------------------------------------------------- result classes


def test_base_model_converts_without_head(text_folder, tmp_path, capfd):
    model = make_llama(tmp_path / "base", model_class=LlamaModel)
    pipeline = Pipeline(model, text_folder, tmp_path / "out")
    assert [pipeline.split(), pipeline.features(), pipeline.select()] == [0, 0, 0]
    assert pipeline.convert() == 2  # a causal LM needs a head
    assert "use --convert_type LlamaMoEModel" in capfd.readouterr().err
    assert not pipeline.moe.exists()
    pipeline.convert_options = ["--convert_type", "LlamaMoEModel"]
    assert pipeline.convert() == 0
    assert not any(name.startswith("model.") for name in load_file(pipeline.moe / "model.safetensors"))
    with torch.no_grad():
        dense = LlamaModel.from_pretrained(model).eval()(tokens()).last_hidden_state
        converted = load_moe(pipeline.moe, 4, AutoModel)(tokens()).last_hidden_state
    assert (dense - converted).abs().max() < DENSE_TOLERANCE


def test_classifier_keeps_its_head(text_folder, tmp_path):
    model = make_llama(
        tmp_path / "classifier", model_class=LlamaForSequenceClassification, num_labels=5, pad_token_id=0
    )
    pipeline = Pipeline(model, text_folder, tmp_path / "out")
    pipeline.convert_options = ["--convert_type", "LlamaMoEForSequenceClassification"]
    pipeline.run()
    converted = AutoModelForSequenceClassification.from_pretrained(pipeline.moe).eval()
    converted.set_num_experts_per_tok(4)
    with torch.no_grad():
        dense = LlamaForSequenceClassification.from_pretrained(model).eval()(tokens()).logits
        assert dense.shape == (2, 5)
        assert (dense - converted(tokens()).logits).abs().max() < DENSE_TOLERANCE


def test_new_classification_head_is_said(finished, tmp_path, capfd):
    pipeline = Pipeline(finished.model, finished.text, finished.save, moe=tmp_path / "moe")
    pipeline.convert_options = ["--convert_type", "LlamaMoEForSequenceClassification", "--num_labels", 3]
    assert pipeline.convert() == 0
    assert "head of 3 labels is new" in capfd.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe")
    assert model.score.weight.shape == (3, TINY["hidden_size"])


def test_sharded_output_is_the_unsharded_one(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "MAX_SHARD_BYTES", 20_000)
    pipeline = Pipeline(finished.model, finished.text, finished.save, moe=tmp_path / "moe")
    assert pipeline.convert() == 0
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())
    whole = load_file(finished.moe / "model.safetensors")
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"].keys() == whole.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "moe" / file)[name], whole[name])
    assert_dense_when_all_run(finished.model, tmp_path / "moe")


# ---------------------------------------------------------------------------------------------------- the same bytes


def test_finished_stages_do_nothing(finished, capfd):
    before = contents(finished.save)
    finished.run()
    assert capfd.readouterr().out.count("already finished") == 4
    assert contents(finished.save) == before


def test_same_inputs_and_seed_give_the_same_bytes(finished, tmp_path):
    again = Pipeline(finished.model, finished.text, tmp_path).run()
    assert contents(again.save) == contents(finished.save)


def test_overwrite_gives_the_same_bytes_and_spares_foreign_files(finished, tmp_path):
    pipeline = Pipeline(finished.model, finished.text, tmp_path).run()
    (pipeline.split_folder / "notes.txt").write_text("mine")
    (pipeline.moe / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    for options in (
        pipeline.split_options,
        pipeline.feature_options,
        pipeline.select_options,
        pipeline.convert_options,
    ):
        options.append("--overwrite")
    pipeline.run()
    assert contents(tmp_path) == before


class Killed(BaseException):
    """Stands in for the process's end."""


@pytest.mark.parametrize("stage", ["split", "features", "select", "convert"])
def test_interrupted_at_any_rename_and_resumed_gives_the_same_bytes(stage, finished, tmp_path, monkeypatch):
    real_replace = os.replace
    expected = contents(finished.save)
    for deaths in range(1, 30):
        pipeline = Pipeline(finished.model, finished.text, tmp_path / str(deaths))
        pipeline.save.mkdir()
        for name in ("split_folder", "features_folder", "select_folder"):
            if stage in ("select", "convert") and not (stage == "select" and name == "select_folder"):
                (pipeline.save / getattr(finished, name).name).symlink_to(getattr(finished, name))
        renames = 0

        def replace(source, target, limit=deaths):
            nonlocal renames
            renames += 1
            if renames == limit:
                raise Killed
            real_replace(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            status = getattr(pipeline, stage)()
        except Killed:
            status = None
        monkeypatch.setattr(os, "replace", real_replace)
        if status is None:
            assert getattr(pipeline, stage)() == 0
        made = {name: data for name, data in contents(pipeline.save).items() if not (pipeline.save / name).is_symlink()}
        assert made
        assert all(expected[name] == data for name, data in made.items())
        assert not any(name.endswith(".tmp") or "manifest.parts" in name for name in made)
        if status == 0:
            break
    assert deaths > 3  # the sweep did interrupt something, and ended on an undisturbed run
    assert status == 0


def test_killed_extraction_resumes_to_the_same_bytes(finished, tmp_path):
    """A real SIGKILL, as soon as the first shard is there."""
    pipeline = Pipeline(finished.model, finished.text, tmp_path)
    # One thread in both runs, and a shard a block: fp32 sums depend on threads, and the kill must hit midway.
    pipeline.feature_options = [
        "--block_size",
        32,
        "--max_tokens",
        2048,
        "--batch_size",
        1,
        "--feature_format",
        "inputs",
    ]
    command = [sys.executable, SCRIPTS / "llama_get_hidden_features.py", *map(str, pipeline.feature_arguments())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(pipeline.features_folder.glob("hidden_inputs/*.pth")):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (pipeline.features_folder / "manifest.json").exists()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    undisturbed = Pipeline(
        finished.model, finished.text, tmp_path / "undisturbed", feature_options=pipeline.feature_options
    )
    command = [sys.executable, SCRIPTS / "llama_get_hidden_features.py", *map(str, undisturbed.feature_arguments())]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert contents(pipeline.features_folder) == contents(undisturbed.features_folder)


# ---------------------------------------------------------------------------------------------------- several processes


def shard_tensors(folder: Path) -> list[dict[int, torch.Tensor]]:
    """hidden_inputs of every shard in global order."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    names = sorted((name for name in files if name.startswith("hidden_inputs/")), key=lambda name: files[name]["shard"])
    return [torch.load(folder / name, weights_only=True) for name in names]


@pytest.mark.parametrize("launcher", ["torch.distributed.run", "torch.distributed.launch"])
def test_two_processes_give_the_same_features_as_one(launcher, finished, tmp_path):
    pipeline = Pipeline(finished.model, finished.text, tmp_path)
    script = SCRIPTS / "llama_get_hidden_features.py"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    launch = [sys.executable, "-m", launcher, "--nproc_per_node=2"]
    if launcher == "torch.distributed.run":
        launch.append("--standalone")
    command = [*launch, script, *map(str, pipeline.feature_arguments())]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("written: ") >= 1
    names = {path.name for path in (pipeline.features_folder / "hidden_inputs").iterdir()}
    assert names == {"0_0.pth", "1_0.pth", "0_1.pth", "1_1.pth", "0_2.pth"}
    for two, one in zip(shard_tensors(pipeline.features_folder), shard_tensors(finished.features_folder), strict=True):
        assert all(torch.equal(two[layer], one[layer]) for layer in one)
    # Gates cannot tell how many processes recorded what they learn from.
    (tmp_path / finished.split_folder.name).symlink_to(finished.split_folder)
    assert pipeline.select() == 0
    gates = contents(pipeline.select_folder)
    assert all(
        gates[name] == data for name, data in contents(finished.select_folder).items() if name != "manifest.json"
    )


def test_left_over_names_of_processes_are_told(finished, tmp_path, monkeypatch, capfd):
    """A plain run in a shell where torchrun's variables are set."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Pipeline(finished.model, finished.text, tmp_path).features() == 0
    out, err = capfd.readouterr()
    assert "the environment says RANK 0 of WORLD_SIZE 2: it records its share, and the others must be started" in err
    assert "`unset RANK WORLD_SIZE` if this process is to do all" in err
    assert "(2 of 5 parts still missing, which the other processes of WORLD_SIZE 2 make)" in out
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # of torchrun
    assert Pipeline(finished.model, finished.text, tmp_path).features() == 0
    assert "environment" not in capfd.readouterr().err
    monkeypatch.setenv("RANK", "2")
    assert Pipeline(finished.model, finished.text, tmp_path).features() == 2
    assert "RANK 2, which is outside of WORLD_SIZE 2: start the processes with torchrun" in capfd.readouterr().err
    monkeypatch.setenv("RANK", "")  # as good as unset
    monkeypatch.setenv("WORLD_SIZE", "")
    assert Pipeline(finished.model, finished.text, tmp_path).features() == 0


def test_more_processes_may_finish_what_one_began(finished, tmp_path, monkeypatch):
    pipeline = Pipeline(finished.model, finished.text, tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert pipeline.features() == 0  # rank 1 of 3 does shards 1 and 4 of 0-4
    assert not (pipeline.features_folder / "manifest.json").exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert pipeline.features() == 0  # one process does the rest
    for mixed, one in zip(
        shard_tensors(pipeline.features_folder), shard_tensors(finished.features_folder), strict=True
    ):
        assert all(torch.equal(mixed[layer], one[layer]) for layer in one)


def test_runs_over_different_layers_fill_one_folder(finished, tmp_path, capfd, caplog):
    pipeline = Pipeline(finished.model, finished.text, tmp_path)
    for folder in (finished.split_folder, finished.features_folder):
        (tmp_path / folder.name).symlink_to(folder)
    options = pipeline.select_options
    pipeline.select_options = [*options, "--specify_layer", 1]
    assert pipeline.select() == 0
    assert "2 of 3 parts still missing" in capfd.readouterr().out
    pipeline.convert_options = []
    assert pipeline.convert() == 2
    assert "unfinished (1 parts done); run llama_select_mlp.py again" in capfd.readouterr().err
    pipeline.select_options = [*options, "--specify_layer", "2-3", 0]  # clipped: there are layers 0-2
    assert pipeline.select() == 0
    assert "the last of 3 layers is 2" in caplog.text
    assert contents(pipeline.select_folder) == contents(finished.select_folder)
