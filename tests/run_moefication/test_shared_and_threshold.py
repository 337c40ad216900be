"""Shared experts, threshold routing and random splits through the stages (DESIGN, invariants 1, 3 and 7)."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, VARIANTS, make_llama
from pipeline import LINEAR, Pipeline, contents, load, load_dense, shared_pipeline
from safetensors.torch import load_file

from llama_moe import record_routing
from run_moefication import llama_evaluate
from run_moefication.moefication.stages import convert as conversion

GATE = "layers.{}.mlp.gate_proj.weight"
# float32 sums of the same terms in another order: the design's bound for "the dense model" (invariant 1).
DENSE_TOLERANCE = 1e-4


def after_select(finished: Pipeline, **options) -> Pipeline:
    """Another conversion from the same split and gates."""
    return Pipeline(finished.model, finished.text, finished.save, num_experts=8, **options)


@pytest.fixture(scope="module")
def finished(tiny_llama, text_folder, tmp_path_factory) -> Pipeline:
    """All stages run once; read-only."""
    return shared_pipeline(tiny_llama, text_folder, tmp_path_factory.mktemp("finished")).run()


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(tokens()).logits


def inputs_of(pipeline: Pipeline, layer: int) -> torch.Tensor:
    """The recorded inputs of a layer's MLP, all shards."""
    shards = sorted((pipeline.features_folder / "hidden_inputs").iterdir())
    return torch.cat([torch.load(shard, weights_only=True)[layer].float() for shard in shards])


def labels_of(pipeline: Pipeline, layer: int) -> torch.Tensor:
    return torch.load(pipeline.split_folder / GATE.format(layer), weights_only=True)


# ---------------------------------------------------------------------------------------------------- the dense model


@pytest.mark.parametrize("routing", ["top_k", "threshold"])
@pytest.mark.parametrize("variant", ["grouped_query", "tied", "mlp_bias", "attention_bias"])
def test_all_experts_selected_is_the_dense_model(routing, variant, text_folder, tmp_path):
    model = make_llama(tmp_path / "llama", **VARIANTS[variant])
    pipeline = shared_pipeline(model, text_folder, tmp_path / "out", convert_options=["--routing", routing])
    pipeline.num_selects = 8
    converted = load(pipeline.run().moe)
    assert converted.config.num_selects == 8
    dense = logits(load_dense(model))
    assert dense.std() > 0.1
    assert (dense - logits(converted)).abs().max() < DENSE_TOLERANCE
    converted.set_active_fraction(0.5)
    assert (dense - logits(converted)).abs().max() > 100 * DENSE_TOLERANCE


def test_a_threshold_of_minus_infinity_is_the_dense_model(finished):
    model = load(finished.moe)
    for threshold in (-float("inf"), -1e30):
        for layer in model.model.layers:
            layer.mlp.gate.threshold.fill_(threshold)
        assert (logits(load_dense(finished.model)) - logits(model)).abs().max() < DENSE_TOLERANCE


@pytest.mark.parametrize("num_shared", [0, 3])
def test_a_random_split_is_the_dense_model_too(num_shared, finished, tmp_path):
    pipeline = Pipeline(finished.model, finished.text, tmp_path, num_experts=8, num_selects=8, split_method="Random")
    pipeline.split_options = ["--num_shared_experts", num_shared]
    pipeline.select_options = LINEAR
    converted = load(pipeline.run().moe)
    assert converted.config.num_shared_experts == num_shared
    assert (logits(load_dense(finished.model)) - logits(converted)).abs().max() < DENSE_TOLERANCE


# ---------------------------------------------------------------------------------------------------- neurons


def test_shared_and_routed_experts_partition_the_neurons(finished):
    """Each neuron's rows and column lie, once, where the split says."""
    dense, moe = load_file(finished.model / "model.safetensors"), load_file(finished.moe / "model.safetensors")
    for layer in range(3):
        labels, mlp = labels_of(finished, layer), f"model.layers.{layer}.mlp."
        assert labels.bincount().tolist() == [8] * 8
        gate, up = moe[mlp + "experts.gate_up_proj"].chunk(2, dim=1)  # [E, W, H] each
        down = moe[mlp + "experts.down_proj"].transpose(1, 2)
        found = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        for projection, routed in found.items():
            source = dense[mlp + projection + ".weight"]
            shared = moe[mlp + f"shared_experts.{projection}.weight"]
            if projection == "down_proj":
                source, shared = source.T, shared.T
            assert routed.shape[:2] == (6, 8)
            assert len(shared) == 16
            for expert in range(8):
                place = routed[expert] if expert < 6 else shared[8 * (expert - 6) : 8 * (expert - 5)]
                assert torch.equal(place, source[labels == expert])


def test_shared_experts_are_the_neurons_that_add_most(finished):
    dense = load_file(finished.model / "model.safetensors")
    for layer in range(3):
        mlp = f"model.layers.{layer}.mlp."
        x = inputs_of(finished, layer)
        gate, up, down = (dense[f"{mlp}{name}_proj.weight"] for name in ("gate", "up", "down"))
        added = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).square() * down.square().sum(0)
        heat = (added / added.sum(1, keepdim=True)).mean(0)
        shared = labels_of(finished, layer) >= 6
        assert heat[shared].mean() > 2 * heat[~shared].mean()


def test_random_splits_deal_evenly_and_differ_by_seed_and_layer(finished, tmp_path):
    folders = []
    for seed in (0, 1, 0):
        pipeline = Pipeline(finished.model, finished.text, tmp_path / str(len(folders)), split_method="Random")
        pipeline.split_options = ["--seed", seed, "--num_shared_experts", 1]
        pipeline.save.mkdir()
        assert pipeline.split() == 0
        folders.append([labels_of(pipeline, layer) for layer in range(3)])
        assert all(labels.bincount().tolist() == [16] * 4 for labels in folders[-1])
    first, other, again = folders
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    distinct = [*first, *other]
    assert all(not torch.equal(a, b) for i, a in enumerate(distinct) for b in distinct[:i])
    # No run of neurons stays together, as it would in a deal by place.
    assert all((labels[1:] == labels[:-1]).float().mean() < 0.5 for labels in distinct)


# ---------------------------------------------------------------------------------------------------- budgets


def active_share(gate, x: torch.Tensor) -> float:
    with torch.no_grad():
        return gate.mask(gate.score(x)).float().mean().item()


@pytest.mark.parametrize("num_selects", [3, 4, 6, 7])
def test_a_threshold_runs_k_of_n_on_average_on_the_text_of_the_features(num_selects, finished, tmp_path):
    pipeline = after_select(finished, num_selects=num_selects, moe=tmp_path / "moe")
    pipeline.convert_options = ["--routing", "threshold"]
    assert pipeline.convert() == 0
    model = load(pipeline.moe)
    assert (model.config.num_experts_per_tok, model.config.num_selects) == (num_selects - 2, num_selects)
    for index, layer in enumerate(model.model.layers):
        share = active_share(layer.mlp.gate, inputs_of(finished, index))
        assert 2 + 6 * share == pytest.approx(num_selects, rel=0.02)


@pytest.mark.parametrize("fraction", [0.25, 0.4, 0.5, 0.8, 1.0])
def test_any_budget_can_be_set_after_loading(fraction, finished):
    model = load(finished.moe)
    model.set_active_fraction(fraction)
    for index, layer in enumerate(model.model.layers):
        share = active_share(layer.mlp.gate, inputs_of(finished, index))
        assert (2 + 6 * share) / 8 == pytest.approx(fraction, rel=0.02)
    if fraction == 0.25:  # only the shared experts
        with record_routing(model) as statistics:
            logits(model)
        assert sum(layer.runs.sum() for layer in statistics) == 0
    with pytest.raises(ValueError, match=r"outside of 0\.25 to 1, what this model can run"):
        model.set_active_fraction(0.2)


@pytest.mark.parametrize(("least", "most"), [(3, None), (None, 5), (3, 5), (4, 4)])
def test_bounds_hold_for_every_token(least, most, finished, tmp_path):
    pipeline = after_select(finished, num_selects=4, moe=tmp_path / "moe")
    bounds = [("--min_selects", least), ("--max_selects", most)]
    pipeline.convert_options = ["--routing", "threshold", *(o for b in bounds if b[1] is not None for o in b)]
    assert pipeline.convert() == 0
    for model, widened in ((load(pipeline.moe), False), (load(finished.moe), True)):
        counts = []
        for index, layer in enumerate(model.model.layers):
            gate = layer.mlp.gate
            counts.append(2 + gate.mask(gate.score(inputs_of(finished, index))).sum(1))
        counts = torch.cat(counts)
        inside = ((counts >= (least or 2)) & (counts <= (most or 8))).all()
        assert inside != widened  # without bounds, tokens do leave them


def test_top_k_runs_k_with_the_shared_experts_among_them(finished, tmp_path):
    pipeline = after_select(finished, num_selects=5, moe=tmp_path / "moe")
    assert pipeline.convert() == 0
    model = load(pipeline.moe)
    assert (model.config.num_experts, model.config.num_experts_per_tok, model.config.num_shared_experts) == (6, 3, 2)
    assert "gate.threshold" not in " ".join(load_file(pipeline.moe / "model.safetensors"))
    with record_routing(model) as statistics:
        logits(model)
    for layer in statistics:
        assert layer.tokens_by_cost.tolist() == [0, 0, 0, 48, 0, 0, 0]
    model.set_active_fraction(0.5)
    assert model.config.num_selects == 4


def test_threshold_tensors_stay_in_float32_whatever_the_weights(finished, tmp_path):
    pipeline = after_select(finished, num_selects=4, moe=tmp_path / "moe")
    pipeline.convert_options = ["--routing", "threshold", "--dtype", "bfloat16"]
    assert pipeline.convert() == 0
    for name, tensor in load_file(pipeline.moe / "model.safetensors").items():
        buffer = name.endswith(("threshold", "score_quantiles"))
        assert tensor.dtype == (torch.float32 if buffer else torch.bfloat16), name


def test_stored_quantiles_are_those_of_the_gates_scores(finished):
    model = load(finished.moe)
    for index, layer in enumerate(model.model.layers):
        gate = layer.mlp.gate
        with torch.no_grad():
            scores = gate.score(inputs_of(finished, index)).flatten()
        levels = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])
        expected = torch.quantile(scores, levels)
        torch.testing.assert_close(gate.score_quantiles[(levels * 1024).long()], expected, rtol=1e-2, atol=1e-3)
        assert (gate.score_quantiles.diff() >= 0).all()


# ---------------------------------------------------------------------------------------------------- again


def test_the_same_bytes_again_and_nothing_when_finished(finished, tmp_path, capfd):
    again = shared_pipeline(finished.model, finished.text, tmp_path).run()
    names = [folder.name for folder in (again.split_folder, again.features_folder, again.select_folder, again.moe)]
    for name in names:
        assert contents(tmp_path / name) == contents(finished.save / name)
    capfd.readouterr()
    again.run()
    assert capfd.readouterr().out.count("already finished") == 4


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("num_selects", [1, 2])
def test_select_and_convert_want_a_routed_expert_beside_the_shared_ones(num_selects, finished, tmp_path, capfd):
    pipeline = after_select(finished, num_selects=num_selects, moe=tmp_path / "moe")
    pipeline.select_options = LINEAR
    before = contents(finished.save)
    words = f"--num_selects {num_selects} is outside of 3 to --num_experts 8 (2 are shared)"
    for stage in (pipeline.select, pipeline.convert):
        assert stage() == 2
        message = capfd.readouterr().err
        assert words in message
        assert len(message.splitlines()) == 1
    assert contents(finished.save) == before
    assert not (tmp_path / "moe").exists()


def with_gate(finished: Pipeline, save: Path, change: Callable[[dict], dict]) -> tuple[Pipeline, Path]:
    """A pipeline with the gate of layer 1 changed, as its manifest says, too; and that gate's file."""
    pipeline = Pipeline(finished.model, finished.text, save, num_experts=8, num_selects=4)
    (save / finished.split_folder.name).symlink_to(finished.split_folder)
    shutil.copytree(finished.select_folder, pipeline.select_folder)
    manifest_path, file = pipeline.select_folder / "manifest.json", pipeline.select_folder / GATE.format(1)
    torch.save(change(torch.load(file, weights_only=True)), file)
    manifest, data = json.loads(manifest_path.read_text()), file.read_bytes()
    manifest["files"][file.name] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest_path.write_text(json.dumps(manifest))
    return pipeline, file


@pytest.mark.parametrize("routing", ["top_k", "threshold"])
def test_gates_of_an_older_version_are_refused(routing, finished, tmp_path, capfd):
    pipeline, file = with_gate(finished, tmp_path, lambda state: {name: state[name] for name in ("weight", "bias")})
    pipeline.convert_options = ["--routing", routing]
    assert pipeline.convert() == 2
    message = capfd.readouterr().err
    assert f"{file} is of an older version; run it again with --overwrite" in message
    assert len(message.splitlines()) == 1
    assert not pipeline.moe.exists()


def test_gates_that_score_everything_alike_have_no_threshold(finished, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(conversion, "MAX_SHARD_BYTES", 20_000)  # layer 0 is in a shard before that of layer 1
    zeros = lambda state: {name: torch.zeros_like(tensor) for name, tensor in state.items()}  # noqa: E731
    pipeline, _ = with_gate(finished, tmp_path, zeros)
    pipeline.convert_options = ["--routing", "threshold"]
    assert pipeline.convert() == 2
    assert "layer 1: no score quantiles are stored, or all are equal" in capfd.readouterr().err
    assert not pipeline.moe.exists()
    pipeline.convert_options = []  # top-k needs none
    assert pipeline.convert() == 0


def test_evaluate_counts_shared_experts(finished, run_script):
    text = finished.text / "c4.jsonl"
    options = ["--text_path", text, "--block_size", 32, "--max_tokens", 256, "--json"]
    status, out, _ = run_script(
        llama_evaluate.main, "--model_path", finished.model, finished.moe, "--num_selects", 8, 4, *options
    )
    assert status == 0
    dense, full, half = json.loads(out)
    assert full["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-4)
    assert half["perplexity"] != pytest.approx(dense["perplexity"], rel=1e-2)
    assert [row["num_selects"] for row in (full, half)] == [8, 4]
