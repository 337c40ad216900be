"""Shared experts, threshold routing and random splits through the stages beyond the invariants."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipeline import GATE, Pipeline, contents, load, logits
from safetensors.torch import load_file

from llama_moe import record_routing
from run_moefication.moefication.stages import convert as conversion

# ---------------------------------------------------------------------------------------------------- neurons


def test_shared_experts_are_the_neurons_that_add_most(shared_run):
    dense = load_file(shared_run.model / "model.safetensors")
    for layer in range(3):
        mlp = f"model.layers.{layer}.mlp."
        x = shared_run.recorded(layer)
        gate, up, down = (dense[f"{mlp}{name}_proj.weight"] for name in ("gate", "up", "down"))
        added = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).square() * down.square().sum(0)
        heat = (added / added.sum(1, keepdim=True)).mean(0)
        shared = shared_run.labels(layer) >= 6
        assert heat[shared].mean() > 2 * heat[~shared].mean()


def test_random_splits_deal_evenly_and_differ_by_seed_and_layer(shared_run, tmp_path):
    folders = []
    for seed in (0, 1, 0):
        pipeline = Pipeline(shared_run.model, shared_run.text, tmp_path / str(len(folders)), split_method="Random")
        pipeline.split_options = ["--seed", seed, "--num_shared_experts", 1]
        pipeline.save.mkdir()
        assert pipeline.split() == 0
        folders.append([pipeline.labels(layer) for layer in range(3)])
        assert all(labels.bincount().tolist() == [16] * 4 for labels in folders[-1])
    first, other, again = folders
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    distinct = [*first, *other]
    assert all(not torch.equal(a, b) for i, a in enumerate(distinct) for b in distinct[:i])
    # No run of neurons stays together, as it would in a deal by place.
    assert all((labels[1:] == labels[:-1]).float().mean() < 0.5 for labels in distinct)


# ---------------------------------------------------------------------------------------------------- budgets


def test_the_shared_experts_alone_are_the_least_budget(shared_run):
    model = load(shared_run.moe)
    model.set_active_fraction(0.25)
    with record_routing(model) as statistics:
        logits(model)
    assert sum(layer.runs.sum() for layer in statistics) == 0
    with pytest.raises(ValueError, match=r"outside of 0\.25 to 1, what this model can run"):
        model.set_active_fraction(0.2)


@pytest.mark.parametrize(("least", "most"), [(3, None), (None, 5), (4, 4)])
def test_bounds_hold_for_every_token(least, most, shared_run, tmp_path):
    bounds = [("--min_selects", least), ("--max_selects", most)]
    bounds = [option for bound in bounds if bound[1] is not None for option in bound]
    moe = shared_run.converted(tmp_path / "moe", "--routing", "threshold", *bounds)
    for model, widened in ((load(moe), False), (load(shared_run.moe), True)):
        counts = []
        for index, layer in enumerate(model.model.layers):
            gate = layer.mlp.gate
            counts.append(2 + gate.mask(gate.score(shared_run.recorded(index))).sum(1))
        counts = torch.cat(counts)
        inside = ((counts >= (least or 2)) & (counts <= (most or 8))).all()
        assert inside != widened  # without bounds, tokens do leave them


def test_top_k_runs_k_with_the_shared_experts_among_them(shared_run, tmp_path):
    moe = shared_run.converted(tmp_path / "moe", num_selects=5)
    model = load(moe)
    assert (model.config.num_experts, model.config.num_experts_per_tok, model.config.num_shared_experts) == (6, 3, 2)
    assert "gate.threshold" not in " ".join(load_file(moe / "model.safetensors"))
    with record_routing(model) as statistics:
        logits(model)
    for layer in statistics:
        assert layer.tokens_by_cost.tolist() == [0, 0, 0, 48, 0, 0, 0]
    model.set_active_fraction(0.5)
    assert model.config.num_selects == 4


def test_threshold_tensors_stay_in_float32_whatever_the_weights(shared_run, tmp_path):
    moe = shared_run.converted(tmp_path / "moe", "--routing", "threshold", "--dtype", "bfloat16")
    for name, tensor in load_file(moe / "model.safetensors").items():
        buffer = name.endswith(("threshold", "score_quantiles"))
        assert tensor.dtype == (torch.float32 if buffer else torch.bfloat16), name


def test_stored_quantiles_are_those_of_the_gates_scores(shared_run):
    model = load(shared_run.moe)
    for index, layer in enumerate(model.model.layers):
        gate = layer.mlp.gate
        with torch.no_grad():
            scores = gate.score(shared_run.recorded(index)).flatten()
        levels = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])
        expected = torch.quantile(scores, levels)
        torch.testing.assert_close(gate.score_quantiles[(levels * 1024).long()], expected, rtol=1e-2, atol=1e-3)
        assert (gate.score_quantiles.diff() >= 0).all()


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("num_selects", [1, 2])
def test_select_and_convert_want_a_routed_expert_beside_the_shared_ones(num_selects, shared_run, tmp_path, capfd):
    pipeline = replace(shared_run, num_selects=num_selects, moe=tmp_path / "moe", convert_options=[])
    before = contents(shared_run.save)
    words = f"--num_selects {num_selects} is outside of 3 to --num_experts 8 (2 are shared)"
    for stage in (pipeline.select, pipeline.convert):
        assert stage() == 2
        message = capfd.readouterr().err
        assert words in message
        assert len(message.splitlines()) == 1
    assert contents(shared_run.save) == before
    assert not (tmp_path / "moe").exists()


def with_gate(shared_run: Pipeline, save: Path, change: Callable[[dict], dict]) -> tuple[Pipeline, Path]:
    """A pipeline with the gate of layer 1 changed, as its manifest says, too; and that gate's file."""
    pipeline = replace(shared_run, save=save, moe=save / "moe")
    (save / shared_run.split_folder.name).symlink_to(shared_run.split_folder)
    shutil.copytree(shared_run.select_folder, pipeline.select_folder)
    manifest_path, file = pipeline.select_folder / "manifest.json", pipeline.select_folder / GATE.format(1)
    torch.save(change(torch.load(file, weights_only=True)), file)
    manifest, data = json.loads(manifest_path.read_text()), file.read_bytes()
    manifest["files"][file.name] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest_path.write_text(json.dumps(manifest))
    return pipeline, file


@pytest.mark.parametrize("routing", ["top_k", "threshold"])
def test_gates_of_an_older_version_are_refused(routing, shared_run, tmp_path, capfd):
    pipeline, file = with_gate(shared_run, tmp_path, lambda state: {name: state[name] for name in ("weight", "bias")})
    pipeline.convert_options = ["--routing", routing]
    assert pipeline.convert() == 2
    message = capfd.readouterr().err
    assert f"{file} is of an older version; run it again with --overwrite" in message
    assert len(message.splitlines()) == 1
    assert not pipeline.moe.exists()


def test_gates_that_score_everything_alike_have_no_threshold(shared_run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(conversion, "MAX_SHARD_BYTES", 20_000)  # layer 0 is in a shard before that of layer 1
    zeros = lambda state: {name: torch.zeros_like(tensor) for name, tensor in state.items()}  # noqa: E731
    pipeline, _ = with_gate(shared_run, tmp_path, zeros)
    pipeline.convert_options = ["--routing", "threshold"]
    assert pipeline.convert() == 2
    assert "layer 1: no score quantiles are stored, or all are equal" in capfd.readouterr().err
    assert not pipeline.moe.exists()
    pipeline.convert_options = []  # top-k needs none
    assert pipeline.convert() == 0
