"""The four stages together: what they write, kinds of checkpoints, killed and shared runs."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, change_weights, make_llama
from huggingface_hub.repocard import metadata_load
from pipeline import GATE, SCRIPTS, Pipeline, contents, corpus_of, load, logits
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, LlamaForSequenceClassification, LlamaModel

import llama_moe
from run_moefication import llama_get_hidden_features
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.stages import convert as conversion

# float32 sums of the same terms in another order: the design's bound for "the dense model" (invariant 1).
DENSE_TOLERANCE = 1e-4


def test_values_beyond_the_new_dtype_are_refused_before_anything_is_written(text_folder, tmp_path, refuses):
    model = make_llama(tmp_path / "llama")
    change_weights(model, lambda state: state["lm_head.weight"][5].fill_(1e5))
    pipeline = Pipeline(model, text_folder, tmp_path / "out", convert_options=["--dtype", "float16"])
    assert [pipeline.split(), pipeline.features(), pipeline.select()] == [0, 0, 0]
    refuses(pipeline.convert, "lm_head.weight has values beyond float16; choose another --dtype")
    assert not pipeline.moe.exists()
    pipeline.convert_options = ["--dtype", "bfloat16"]
    assert pipeline.convert() == 0
    assert {tensor.dtype for tensor in load_file(pipeline.moe / "model.safetensors").values()} == {torch.bfloat16}


def test_experts_have_a_dtype_that_holds_all_of_their_layer(text_folder, tmp_path):
    model = make_llama(tmp_path / "llama")

    def halve_some(state):
        for name in state:
            if ".0.mlp." in name or name.endswith("1.mlp.gate_proj.weight"):
                state[name] = state[name].half()
        state["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e5  # beyond float16

    change_weights(model, halve_some)
    run = Pipeline(model, text_folder, tmp_path / "out").run()
    state = load_file(run.moe / "model.safetensors")
    dtypes = [state[f"model.layers.{layer}.mlp.experts.down_proj"].dtype for layer in range(3)]
    assert dtypes == [torch.float16, torch.float32, torch.float32]
    assert state["model.layers.1.mlp.experts.down_proj"].max() == 1e5
    assert logits(load(run.moe, run.num_experts)).sub(logits(load(model))).abs().max() < DENSE_TOLERANCE


def test_names_are_those_of_the_description(plain_run):
    layers = {f"layers.{i}.mlp.gate_proj.weight" for i in range(3)}
    # 512 tokens, 394 of c4 and 118 of github by LLaMA's mix: 13 + 4 blocks of 32, 4 a batch, 1 batch a file.
    shards = {f"{kind}/0_{i}.pth" for kind in ("hidden_inputs", "hidden_gate_outputs") for i in range(5)}
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    code = {path.name for path in Path(llama_moe.__file__).parent.glob("*.py")} - {"__init__.py"}
    converted = copied | code | {"config.json", "model.safetensors", "README.md"}
    for folder, files in [
        (plain_run.split_folder, layers),
        (plain_run.select_folder, layers),
        (plain_run.features_folder, shards),
        (plain_run.moe, converted),
    ]:
        assert contents(folder).keys() == files | {"manifest.json"}
        assert set(json.loads((folder / "manifest.json").read_text())["files"]) == files
    config = json.loads((plain_run.moe / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["LlamaMoEForCausalLM"], "llama_moe")
    assert (config["num_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"]) == (4, 2, 16)
    assert len(config["auto_map"]) == 4
    assert all((plain_run.moe / name).read_bytes() == (plain_run.model / name).read_bytes() for name in copied)
    assert "from_pretrained" in (plain_run.moe / "README.md").read_text()


def test_cards_say_what_the_hub_reads(shared_run, tmp_path, text_folder, run_script):
    """Licence and languages come from the dense model's card, and every stage keeps them and the base model."""
    model = shutil.copytree(shared_run.model, tmp_path / "tiny-llama")
    (model / "README.md").write_text("---\nlicense: llama2\nlanguage:\n- en\n- de\nbase_model: other\n---\n# LLaMA\n")
    run = replace(shared_run, model=model, moe=tmp_path / "moe", calibrated=tmp_path / "calibrated")
    run.convert_options = [*shared_run.convert_options, "--base_model_id", "owner/tiny-llama"]
    assert run.convert() == 0
    text = (run.moe / "README.md").read_text()
    (run.moe / "README.md").write_text(text + "A line of the owner's.\n")  # which does not damage the checkpoint
    assert run.calibrate() == 0
    expected = {
        "base_model": "owner/tiny-llama",
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "llama2",
        "pipeline_tag": "text-generation",
        "tags": ["llama_moe", "mixture-of-experts", "moefication"],
    }
    for folder in (run.moe, run.calibrated):
        assert metadata_load(folder / "README.md") == expected
    assert "on 512 tokens (c4 " in (run.calibrated / "README.md").read_text()

    # The evaluation puts its table in, and the next one in its place.
    options = ["--model_path", model, run.moe, "--text_path", text_folder / "c4.jsonl", "--device", "cpu", "--card"]
    for selects in ([6], [8, 4]):
        status, out, err = run_script(SCRIPTS["evaluate"].main, *options, "--block_size", 32, "--num_selects", *selects)
        assert status == 0, err
    card = (run.moe / "README.md").read_text()
    rows = re.findall(r"^\| (\d) of 8 \| .* \| ([\d.]+) \| ([\d.]+) \| .*\|$", card, re.MULTILINE)
    assert [row[0] for row in rows] == ["8", "4"]
    assert all(perplexity in out and ratio in out for _, perplexity, ratio in rows)
    assert "A line of the owner's." in card
    assert card.split("<!-- evaluation -->")[0] == text.split("<!-- evaluation -->")[0]
    (run.moe / "README.md").write_text(card.replace("<!-- end of the evaluation -->", ""))
    assert run_script(SCRIPTS["evaluate"].main, *options, "--block_size", 32, "--num_selects", 8)[0] == 0
    assert "A line of the owner's." in (run.moe / "README.md").read_text()


def test_another_tokenizer_than_the_converted_one_is_noticed(shared_run, tmp_path, refuses):
    model = shutil.copytree(shared_run.model, tmp_path / "tiny-llama")
    run = replace(shared_run, model=model, moe=tmp_path / "moe", calibrated=tmp_path / "calibrated")
    assert run.convert() == 0
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = f"the tokenizer of {model} is not what {run.moe} was made with, which makes"
    refuses(run.convert, words)
    refuses(run.calibrate, words)
    assert not run.calibrated.exists()


def test_a_licence_without_a_card_is_named_by_its_file(shared_run, tmp_path):
    model = shutil.copytree(shared_run.model, tmp_path / "tiny-llama")
    (model / "LICENSE.txt").write_text("Terms.")
    run = replace(shared_run, model=model, moe=tmp_path / "moe")
    assert run.convert() == 0
    fields = metadata_load(run.moe / "README.md")
    named = [fields[name] for name in ("license", "license_name", "license_link", "base_model")]
    assert named == ["other", "licence-of-tiny-llama", "LICENSE.txt", "tiny-llama"]
    assert (run.moe / "LICENSE.txt").read_text() == "Terms."


def test_base_model_converts_and_is_calibrated_without_head(text_folder, tmp_path, refuses):
    model = make_llama(tmp_path / "base", model_class=LlamaModel)
    pipeline = Pipeline(model, text_folder, tmp_path / "out")
    assert [pipeline.split(), pipeline.features(), pipeline.select()] == [0, 0, 0]
    refuses(pipeline.convert, "use --convert_type LlamaMoEModel")  # a causal LM needs a head
    assert not pipeline.moe.exists()
    pipeline.convert_options = ["--convert_type", "LlamaMoEModel"]
    assert [pipeline.convert(), pipeline.calibrate()] == [0, 0]
    for folder in (pipeline.moe, pipeline.calibrated):
        names = [name for file in folder.glob("*.safetensors") for name in load_file(file)]
        assert not any(name.startswith("model.") for name in names)
    tokens = corpus_of(DenseCheckpoint(str(model)), text_folder, block_size=32, max_tokens=512).blocks[0][None].long()
    with torch.no_grad():
        dense, all_experts, plain, calibrated = (
            load(folder, count, AutoModel)(tokens).last_hidden_state
            for folder, count in ((model, None), (pipeline.moe, 4), (pipeline.moe, 2), (pipeline.calibrated, 2))
        )
    assert (all_experts - dense).abs().max() < DENSE_TOLERANCE
    assert (calibrated - dense).square().mean() < (plain - dense).square().mean()


def test_classifier_keeps_its_head(text_folder, tmp_path):
    fields = dict(model_class=LlamaForSequenceClassification, num_labels=5, pad_token_id=0)
    options = ["--convert_type", "LlamaMoEForSequenceClassification"]
    model = make_llama(tmp_path / "classifier", **fields)
    moe = Pipeline(model, text_folder, tmp_path / "out", convert_options=options).run().moe
    dense = logits(load(model, auto_class=AutoModelForSequenceClassification))
    assert dense.shape == (2, 5)
    assert (dense - logits(load(moe, 4, AutoModelForSequenceClassification))).abs().max() < DENSE_TOLERANCE


def test_new_classification_head_is_said(plain_run, tmp_path, capfd):
    plain_run.converted(tmp_path / "moe", "--convert_type", "LlamaMoEForSequenceClassification", "--num_labels", 3)
    assert "head of 3 labels is new" in capfd.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe")
    assert model.score.weight.shape == (3, TINY["hidden_size"])


def test_sharded_output_is_the_unsharded_one(plain_run, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "MAX_SHARD_BYTES", 20_000)
    plain_run.converted(tmp_path / "moe", num_selects=2)
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())
    whole = load_file(plain_run.moe / "model.safetensors")
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"].keys() == whole.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "moe" / file)[name], whole[name])


def test_the_same_bytes_again_which_finished_stages_leave_and_overwrite_restores(plain_run, tmp_path, capfd):
    pipeline = Pipeline(plain_run.model, plain_run.text, tmp_path).run()
    assert contents(tmp_path) == contents(plain_run.save)
    for folder in (pipeline.split_folder, pipeline.moe):
        (folder / "notes.txt").write_text("mine")  # and foreign files are spared
    before = contents(tmp_path)
    pipeline.run()
    assert capfd.readouterr().out.count("already finished") == 4
    assert contents(tmp_path) == before
    for stage in ("split", "feature", "select", "convert"):
        getattr(pipeline, f"{stage}_options").append("--overwrite")
    pipeline.run()
    assert "already finished" not in capfd.readouterr().out
    assert contents(tmp_path) == before


def test_two_processes_give_the_same_features_as_one(plain_run, tmp_path):
    """By the older launcher, which gives each process an option of its own as well."""
    pipeline = Pipeline(plain_run.model, plain_run.text, tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2"]
    command = [*launch, llama_get_hidden_features.__file__, *pipeline.feature_arguments()]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("written: ") >= 1
    for kind in ("hidden_inputs", "hidden_gate_outputs"):
        alone, shared = (sorted((run.features_folder / kind).iterdir()) for run in (plain_run, pipeline))
        assert [path.name for path in shared] == ["0_0.pth", "0_1.pth", "0_2.pth", "1_0.pth", "1_1.pth"]
        in_global_order = [shared[i] for i in (0, 3, 1, 4, 2)]
        assert [path.read_bytes() for path in in_global_order] == [path.read_bytes() for path in alone]


def test_left_over_names_of_processes_are_told(plain_run, tmp_path, monkeypatch, capfd, refuses):
    """A plain run in a shell where torchrun's variables are set."""
    features = Pipeline(plain_run.model, plain_run.text, tmp_path).features
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert features() == 0
    out, err = capfd.readouterr()
    assert "the environment says RANK 0 of WORLD_SIZE 2: it records its share, and the others must be started" in err
    assert "`unset RANK WORLD_SIZE` if this process is to do all" in err
    assert "(2 of 5 parts still missing, which the other processes of WORLD_SIZE 2 make)" in out
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # of torchrun
    assert features() == 0
    assert "environment" not in capfd.readouterr().err
    monkeypatch.setenv("RANK", "2")
    refuses(features, "RANK 2, which is outside of WORLD_SIZE 2: start the processes with torchrun")
    monkeypatch.setenv("RANK", "")  # as good as unset
    monkeypatch.setenv("WORLD_SIZE", "")
    assert features() == 0


def test_runs_over_different_layers_fill_one_folder(plain_run, tmp_path, refuses, capfd, caplog):
    pipeline = Pipeline(plain_run.model, plain_run.text, tmp_path)
    for folder in (plain_run.split_folder, plain_run.features_folder):
        (tmp_path / folder.name).symlink_to(folder)
    options = pipeline.select_options
    pipeline.select_options = [*options, "--specify_layer", 1]
    assert pipeline.select() == 0
    assert "2 of 3 parts still missing" in capfd.readouterr().out
    refuses(pipeline.convert, "unfinished (1 parts done); run llama_select_mlp.py again")
    pipeline.select_options = [*options, "--specify_layer", "2-3", 0]  # clipped: there are layers 0-2
    assert pipeline.select() == 0
    assert "the last of 3 layers is 2" in caplog.text
    assert contents(pipeline.select_folder) == contents(plain_run.select_folder)


def test_random_splits_differ_by_seed_and_layer(shared_run, tmp_path):
    splits = []
    for seed in (0, 1):
        pipeline = Pipeline(shared_run.model, shared_run.text, tmp_path / str(seed), split_method="Random")
        pipeline.split_options = ["--seed", seed, "--num_shared_experts", 1]
        assert pipeline.split() == 0
        splits += [pipeline.labels(layer) for layer in range(3)]
    assert all(not torch.equal(a, b) for i, a in enumerate(splits) for b in splits[:i])
    # No run of neurons stays together, as it would in a deal by place.
    assert all((labels[1:] == labels[:-1]).float().mean() < 0.5 for labels in splits)


def test_select_and_convert_want_a_routed_expert_beside_the_shared_ones(shared_run, tmp_path, refuses):
    pipeline = replace(shared_run, num_selects=2, moe=tmp_path / "moe")
    before = contents(shared_run.save)
    for stage in (pipeline.select, pipeline.convert):
        refuses(stage, "--num_selects 2 is outside of 3 to --num_experts 8 (2 are shared)")
    assert contents(shared_run.save) == before
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, tensor: {} if "quantiles" in name else {name: tensor}, "is of an older version; run it again"),
        (lambda name, tensor: {name: 0 * tensor}, "layer 1: no score quantiles are stored, or all are equal"),
    ],
)
def test_gates_without_quantiles_are_refused(change, words, shared_run, tmp_path, refuses, monkeypatch):
    """Of an older version, or that score everything alike, as their manifest says too."""
    monkeypatch.setattr(conversion, "MAX_SHARD_BYTES", 20_000)  # layer 0 is in a shard before that of layer 1
    pipeline = replace(shared_run, save=tmp_path, moe=tmp_path / "moe")
    (tmp_path / shared_run.split_folder.name).symlink_to(shared_run.split_folder)
    shutil.copytree(shared_run.select_folder, pipeline.select_folder)
    manifest_path, file = pipeline.select_folder / "manifest.json", pipeline.select_folder / GATE.format(1)
    state = torch.load(file, weights_only=True)
    torch.save({n: t for name, tensor in state.items() for n, t in change(name, tensor).items()}, file)
    manifest, data = json.loads(manifest_path.read_text()), file.read_bytes()
    manifest["files"][file.name] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest_path.write_text(json.dumps(manifest))
    refuses(pipeline.convert, words)
    assert not pipeline.moe.exists()
