"""Calibration through its script: each layer's fit against scikit-learn's, the whole model, resuming, refusals."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VARIANTS, make_llama
from pipeline import LINEAR, Pipeline, contents, corpus_of, load, load_dense, shared_pipeline
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge
from torch.nn import functional as F
from transformers import AutoModel, LlamaModel

from llama_moe import record_routing
from run_moefication import llama_calibrate, llama_evaluate
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.stages import calibrate as calibration
from run_moefication.moefication.stages import calibrate_layer as layer_calibration
from run_moefication.moefication.stages.calibrate import calibrate
from run_moefication.moefication.text.batches import batches_of
from run_moefication.moefication.text.corpus import Corpus
from run_moefication.settings import CalibrateSettings

BLOCK, TOKENS = 32, 1500
CORPUS = ["--block_size", BLOCK, "--max_tokens", TOKENS]
REFIT = [*CORPUS, "--refit_gates"]


@pytest.fixture(scope="module")
def finished(tiny_llama, text_folder, tmp_path_factory) -> Pipeline:
    """Converted (2 shared and 6 routed experts, threshold, 4 of 8) and calibrated with new gates; read-only."""
    pipeline = shared_pipeline(tiny_llama, text_folder, tmp_path_factory.mktemp("finished"))
    pipeline.run().calibrate_options = REFIT
    assert pipeline.calibrate() == 0
    return pipeline


@pytest.fixture(scope="module")
def corpus(tiny_llama, text_folder) -> Corpus:
    """The calibration text: blocks as the script reads them."""
    return read_corpus(tiny_llama, text_folder)


def read_corpus(model: Path, text: Path, max_tokens: int = TOKENS) -> Corpus:
    corpus = corpus_of(DenseCheckpoint(str(model)), text, None, block_size=BLOCK, max_tokens=max_tokens)
    assert len({len(block) for block in corpus.blocks}) > 1  # shorter blocks sit among the others
    return corpus


def recalibrated(finished: Pipeline, folder: Path, *options: object, moe: Path | None = None) -> Pipeline:
    """The converted model calibrated with other options."""
    pipeline = Pipeline(finished.model, finished.text, finished.save, moe=moe or finished.moe, calibrated=folder)
    pipeline.calibrate_options = [*CORPUS, *options]
    assert pipeline.calibrate() == 0
    return pipeline


def metrics_of(folder: Path) -> list[dict]:
    """By layer."""
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    return [metrics[name] for name in sorted(metrics) if "error_after" in metrics[name]]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@torch.no_grad()
def logits(model, blocks: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(block[None].long()).logits[0] for block in blocks])


def divergence(model, dense, blocks: list[torch.Tensor]) -> float:
    """KL of the model's next-token distributions from the dense model's, mean over tokens."""
    expected, found = (logits(m, blocks).log_softmax(-1) for m in (dense, model))
    return F.kl_div(found, expected, log_target=True, reduction="batchmean").item()


# ---------------------------------------------------------------------------------------------------- one layer's fit


@dataclass
class Seen:
    """What one layer of the calibrated model and of the dense one see of the calibration text, `[tokens, ...]`."""

    inputs: torch.Tensor  # of the MLP
    stream: torch.Tensor  # that the MLP's output is added to
    dense_stream: torch.Tensor
    target: torch.Tensor  # what the MLP should add


@torch.no_grad()
def seen(dense, moe, layer: int, blocks: list[torch.Tensor]) -> Seen:
    parts = {name: [] for name in ("inputs", "stream", "dense_stream", "dense_after")}
    of_moe, of_dense = moe.model.layers[layer], dense.model.layers[layer]
    hooks = [
        of_moe.mlp.register_forward_pre_hook(lambda _, x: parts["inputs"].append(x[0][0])),
        of_moe.post_attention_layernorm.register_forward_pre_hook(lambda _, x: parts["stream"].append(x[0][0])),
        of_dense.post_attention_layernorm.register_forward_pre_hook(lambda _, x: parts["dense_stream"].append(x[0][0])),
        of_dense.register_forward_hook(lambda _, __, out: parts["dense_after"].append(out[0])),
    ]
    for model in (dense, moe):
        logits(model, blocks)
    for hook in hooks:
        hook.remove()
    found = {name: torch.cat(part) for name, part in parts.items()}
    return Seen(found["inputs"], found["stream"], found["dense_stream"], found["dense_after"] - found["stream"])


def weights_of(s: Seen, corpus: Corpus, num_held_out: int) -> np.ndarray:
    """1 over the larger of both streams' squares, at most 4 medians of the batch."""
    squares = torch.maximum(s.stream.square().sum(1), s.dense_stream.square().sum(1)).double()
    weights = 1 / squares
    for batch in batches_of(corpus.blocks, 4, num_held_out):
        part = weights[batch.rows]
        middle = part.sort().values[(len(part) - 1) // 2]
        weights[batch.rows] = part.clamp(max=4 * middle)
    return weights.numpy()


@torch.no_grad()
def neurons_of(mlp, inputs: torch.Tensor) -> torch.Tensor:
    """Activations of all neurons `[tokens, I]`, routed experts' first."""
    gate, up = torch.einsum("eih,th->tei", mlp.experts.gate_up_proj, inputs).chunk(2, dim=-1)
    shared = F.silu(mlp.shared_experts.gate_proj(inputs)) * mlp.shared_experts.up_proj(inputs)
    return torch.cat([(F.silu(gate) * up).flatten(1), shared], dim=1)


def down_of(mlp) -> np.ndarray:
    """`[I, H]`, in the order of `neurons_of`."""
    routed = mlp.experts.down_proj.detach().transpose(1, 2).flatten(0, 1)
    return torch.cat([routed, mlp.shared_experts.down_proj.weight.detach().T]).double().numpy()


def ridge(x: np.ndarray, y: np.ndarray, w: np.ndarray, strength: float, prior: np.ndarray) -> np.ndarray:
    alpha = strength * (x * x * w[:, None]).sum(0).mean()
    fit = Ridge(alpha=alpha, fit_intercept=False, solver="cholesky").fit(x, y - x @ prior, sample_weight=w)
    return prior + fit.coef_.T


def error(x: np.ndarray, y: np.ndarray, w: np.ndarray, down: np.ndarray) -> float:
    return (((x @ down - y) ** 2).sum(1) * w).sum() / ((y**2).sum(1) * w).sum()


@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize("layer", [0, 2])
def test_down_proj_is_scikit_learns_ridge_on_what_the_calibrated_prefix_produces(
    layer, output_bias, finished, corpus, tmp_path
):
    folder = finished.calibrated
    if output_bias:
        folder = recalibrated(finished, tmp_path / "biased", "--output_bias").calibrated
    dense, before, after = load_dense(finished.model), load(finished.moe), load(folder)
    s = seen(dense, after, layer, corpus.blocks)
    mlp = after.model.layers[layer].mlp
    with torch.no_grad():
        selected = mlp.gate.mask(mlp.gate.score(s.inputs)).float()
    x = neurons_of(mlp, s.inputs).clone()
    x[:, : 6 * 8] *= selected.repeat_interleave(8, dim=1)
    x, y = x.double().numpy(), s.target.double().numpy()
    prior, found = down_of(before.model.layers[layer].mlp), down_of(mlp)
    if output_bias:
        x, prior = np.pad(x, ((0, 0), (0, 1)), constant_values=1), np.pad(prior, ((0, 1), (0, 0)))
        found = np.concatenate([found, mlp.output_bias.detach().double().numpy()[None]])
    num_held_out = -(-len(corpus.blocks) // 6)
    w = weights_of(s, corpus, num_held_out)
    fitted = sum(len(block) for block in corpus.blocks[:-num_held_out])
    train, held_out = ((x[part], y[part], w[part]) for part in (slice(0, fitted), slice(fitted, None)))

    metrics = metrics_of(folder)[layer]
    errors = {strength: error(*held_out, ridge(*train, strength, prior)) for strength in layer_calibration.STRENGTHS}
    assert metrics["strength"] == min(errors, key=errors.get)
    assert metrics["error_after"] == pytest.approx(min(errors.values()), rel=1e-3)
    assert metrics["error_before"] == pytest.approx(error(*held_out, prior), rel=1e-3)
    np.testing.assert_allclose(found, ridge(x, y, w, metrics["strength"], prior), rtol=1e-2, atol=1e-3)
    assert np.abs(found - prior).max() > 0.05  # and that is another matrix


@pytest.mark.parametrize("layer", [0, 2])
def test_gates_are_scikit_learns_ridge_to_the_norms_of_the_experts_outputs(layer, finished, corpus):
    before, after = load(finished.moe), load(finished.calibrated)
    s = seen(load_dense(finished.model), after, layer, corpus.blocks)
    mlp, num_held_out = before.model.layers[layer].mlp, -(-len(corpus.blocks) // 6)
    neurons = neurons_of(mlp, s.inputs)[:, :48].unflatten(1, (6, 8))
    norms = torch.einsum("tei,ehi->teh", neurons, mlp.experts.down_proj.detach()).norm(dim=-1)
    x = np.pad(s.inputs.double().numpy(), ((0, 0), (0, 1)), constant_values=1)
    strength = metrics_of(finished.calibrated)[layer]["gate"]["ridge_strength"]
    w = weights_of(s, corpus, num_held_out)
    expected = x @ ridge(x, norms.double().numpy(), w, strength, np.zeros((33, 6)))
    with torch.no_grad():
        scores = after.model.layers[layer].mlp.gate.score(s.inputs).numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-2, atol=1e-2)
    assert np.corrcoef(scores.flatten(), norms.numpy().flatten())[0, 1] > 0.5


def test_the_final_norm_is_fitted_to_the_dense_models_predictions(finished, corpus):
    """On half of the tokens, drawn by a seed; on the other half it is measured."""
    dense, model = load_dense(finished.model), load(finished.calibrated)
    blocks, hidden = corpus.blocks, []
    hook = model.model.norm.register_forward_pre_hook(lambda _, x: hidden.append(x[0][0]))
    logits(model, blocks)
    hook.remove()
    num_tokens = sum(map(len, blocks))
    measured_on = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0)).chunk(2)[1]
    expected, hidden = logits(dense, blocks)[measured_on].log_softmax(-1), torch.cat(hidden)[measured_on]

    def measured(weight: torch.Tensor) -> float:
        with torch.no_grad():
            normed = F.rms_norm(hidden, hidden.shape[-1:], weight, dense.config.rms_norm_eps)
            found = model.lm_head(normed).log_softmax(-1)
        return F.kl_div(found, expected, log_target=True, reduction="batchmean").item()

    metrics = json.loads((finished.calibrated / "manifest.json").read_text())["metrics"][
        "model-00004-of-00004.safetensors"
    ]
    assert metrics["divergence_before"] == pytest.approx(measured(load(finished.moe).model.norm.weight), rel=1e-3)
    assert metrics["divergence_after"] == pytest.approx(measured(model.model.norm.weight), rel=1e-3)
    assert metrics["divergence_after"] < metrics["divergence_before"]


def test_a_final_norm_that_does_worse_on_other_tokens_is_not_kept(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "fit_final_norm", lambda divergence, weight, progress: 3 * weight)
    folder = recalibrated(finished, tmp_path / "moe").calibrated
    before, after = load(finished.moe), load(folder)
    assert torch.equal(after.model.norm.weight, before.model.norm.weight)
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]["model-00004-of-00004.safetensors"]
    assert metrics["divergence_after"] == metrics["divergence_before"]


# ---------------------------------------------------------------------------------------------------- the whole model


@pytest.mark.parametrize("options", [[], ["--refit_gates"], ["--refit_gates", "--output_bias"]])
def test_with_all_experts_on_the_dense_model_stays(options, finished, corpus, tmp_path):
    folder = recalibrated(finished, tmp_path / "all", "--num_selects", 8, *options).calibrated
    model, dense = load(folder), load_dense(finished.model)
    assert (logits(model, corpus.blocks[:4]) - logits(dense, corpus.blocks[:4])).abs().max() < 1e-3
    for metrics in metrics_of(folder):
        assert metrics["active_share"] == 1
        assert abs(metrics["error_before"]) < 1e-5
        assert abs(metrics["error_after"]) < 1e-5


@torch.no_grad()
def set_shares_on(model, blocks: list[torch.Tensor], share: float) -> None:
    """Thresholds by which this share of the routed experts runs on this text, layer by layer."""
    for layer in model.model.layers:
        inputs = []
        hook = layer.mlp.register_forward_pre_hook(lambda _, x, kept=inputs: kept.append(x[0][0]))
        logits(model, blocks)
        hook.remove()
        layer.mlp.gate.store_score_quantiles(layer.mlp.gate.score(torch.cat(inputs)))
        layer.mlp.gate.set_active_share(share)


@torch.no_grad()
def scores_on(model, blocks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Scores of every gate, `[tokens, experts]` by layer."""
    found = [model(block[None].long(), output_router_logits=True).router_logits for block in blocks]
    return [torch.cat(of_layer) for of_layer in zip(*found, strict=True)]


def quantiles_of(model) -> list[torch.Tensor]:
    return [layer.mlp.gate.score_quantiles for layer in model.model.layers]


def shares(model, blocks: list[torch.Tensor]) -> list[float]:
    """Share of the routed experts that run, by layer."""
    with record_routing(model) as statistics:
        logits(model, blocks)
    return [layer.experts_per_tok / layer.runs.numel() for layer in statistics]


@pytest.mark.parametrize("num_selects", [3, 4])
def test_a_calibrated_model_is_nearer_to_the_dense_one_at_the_same_cost(num_selects, finished, corpus, tmp_path):
    dense, plain = load_dense(finished.model), load(finished.moe)
    folder = recalibrated(finished, tmp_path / "moe", "--refit_gates", "--num_selects", num_selects).calibrated
    calibrated = load(folder)
    assert calibrated.config.num_selects == num_selects
    share = (num_selects - 2) / 6
    assert shares(calibrated, corpus.blocks) == pytest.approx([share] * 3, rel=0.01)
    set_shares_on(plain, corpus.blocks, share)
    assert shares(plain, corpus.blocks) == pytest.approx([share] * 3, rel=0.01)
    assert divergence(calibrated, dense, corpus.blocks) < 0.95 * divergence(plain, dense, corpus.blocks)
    for metrics in metrics_of(folder):
        assert metrics["error_after"] <= metrics["error_before"]
        assert metrics["active_share"] == pytest.approx(share, rel=0.01)


def test_only_gates_and_down_projections_and_the_final_norm_change(finished):
    before, after = tensors_of(finished.moe), tensors_of(finished.calibrated)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    fitted = ("gate.weight", "gate.bias", "threshold", "score_quantiles", "down_proj", "down_proj.weight")
    assert changed == {name for name in before if ".mlp." in name and name.endswith(fitted)} | {"model.norm.weight"}
    for name, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape)


def test_without_refit_gates_stay_and_thresholds_move(finished, corpus, tmp_path):
    folder = recalibrated(finished, tmp_path / "moe").calibrated
    before, after = tensors_of(finished.moe), tensors_of(folder)
    for name in before:
        if name.endswith(("gate.weight", "gate.bias")):
            assert torch.equal(before[name], after[name])
        if name.endswith("threshold"):
            assert not torch.equal(before[name], after[name])
    assert shares(load(folder), corpus.blocks) == pytest.approx([1 / 3] * 3, rel=0.01)
    assert [m["threshold"] for m in metrics_of(folder)] == [
        pytest.approx(after[f"model.layers.{i}.mlp.gate.threshold"].item()) for i in range(3)
    ]


@pytest.mark.parametrize("fraction", [0.3, 0.75])
def test_other_budgets_can_be_set_after_loading(fraction, finished, corpus):
    """The first layer's inputs do not depend on the budget, so there it is met."""
    model = load(finished.calibrated)
    model.set_active_fraction(fraction)
    assert 2 + 6 * shares(model, corpus.blocks)[0] == pytest.approx(8 * fraction, rel=0.02)


def test_shared_experts_alone_can_be_calibrated(finished, corpus, tmp_path, run_script):
    folder = recalibrated(finished, tmp_path / "moe", "--num_selects", 2).calibrated
    text = ["--text_path", finished.text / "c4.jsonl", "--max_tokens", 64, "--json"]
    _, out, _ = run_script(llama_evaluate.main, "--model_path", folder, *text)
    assert [row["num_selects"] for row in json.loads(out)] == [2]
    assert "the 2 shared ones alone run. " in (folder / "README.md").read_text()
    before, after = tensors_of(finished.moe), tensors_of(folder)
    assert shares(load(folder), corpus.blocks) == [0, 0, 0]
    for layer in range(3):
        # What never runs keeps its weights.
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)


def test_bounds_of_a_token_are_kept_while_fitting(finished, corpus, tmp_path):
    pipeline = Pipeline(finished.model, finished.text, finished.save, num_experts=8, num_selects=4, moe=tmp_path / "a")
    pipeline.convert_options = ["--routing", "threshold", "--min_selects", 3, "--max_selects", 5]
    assert pipeline.convert() == 0
    folder = recalibrated(finished, tmp_path / "b", moe=pipeline.moe).calibrated
    with record_routing(model := load(folder)) as statistics:
        logits(model, corpus.blocks)
    for layer, metrics in zip(statistics, metrics_of(folder), strict=True):
        assert layer.tokens_by_cost.nonzero().flatten().tolist() == [1, 2, 3]
        assert layer.experts_per_tok / 6 == pytest.approx(metrics["active_share"], rel=0.01)
        assert metrics["active_share"] == pytest.approx(1 / 3, rel=0.01)


@pytest.mark.parametrize("bounds", [(4, 8), (2, 6), (5, 5)])
def test_layer_budgets_stay_within_the_bounds_of_a_token(bounds, finished, tmp_path, monkeypatch):
    least, most = bounds
    pipeline = Pipeline(finished.model, finished.text, finished.save, num_experts=8, num_selects=5, moe=tmp_path / "a")
    pipeline.convert_options = ["--routing", "threshold", "--min_selects", least, "--max_selects", most]
    assert pipeline.convert() == 0
    # The loss of a random model depends on no layer.
    monkeypatch.setattr(calibration, "measure_sensitivity", lambda *_: [0.5, 0.05, 0.005])
    folder = recalibrated(finished, tmp_path / "b", "--layer_budgets", "sensitivity", moe=pipeline.moe).calibrated
    config = load(folder).config
    budgets = config.layer_num_experts_per_tok or [config.num_experts_per_tok] * 3
    assert sum(budgets) / 3 == pytest.approx(3, abs=1e-3)
    assert all(least - 2 <= budget <= most - 2 for budget in budgets)
    assert (len(set(budgets)) == 1) == (least == most)


# ---------------------------------------------------------------------------------------------------- kinds of models


def test_top_k_models(finished, corpus, tmp_path):
    pipeline = Pipeline(finished.model, finished.text, finished.save, num_experts=8, num_selects=4, moe=tmp_path / "a")
    assert pipeline.convert() == 0
    folder = recalibrated(finished, tmp_path / "b", "--refit_gates", "--num_selects", 5, moe=pipeline.moe).calibrated
    plain, calibrated = load(pipeline.moe), load(folder)
    assert (calibrated.config.routing, calibrated.config.num_experts_per_tok) == ("top_k", 3)
    with record_routing(calibrated) as statistics:
        logits(calibrated, corpus.blocks)
    assert [layer.tokens_by_cost.nonzero().flatten().tolist() for layer in statistics] == [[3]] * 3
    assert not any("threshold" in name or "quantiles" in name for name in tensors_of(folder))
    assert [m["active_share"] for m in metrics_of(folder)] == [0.5] * 3
    plain.set_num_experts_per_tok(3)
    dense = load_dense(finished.model)
    assert divergence(calibrated, dense, corpus.blocks) < 0.95 * divergence(plain, dense, corpus.blocks)


@pytest.mark.parametrize(
    ("variant", "routing"),
    [
        ("tied", "threshold"),
        ("mlp_bias", "threshold"),
        ("mlp_bias", "top_k"),
        ("attention_bias", "top_k"),
        ("one_layer", "threshold"),
        ("head_dim", "top_k"),
    ],
)
def test_any_llama(variant, routing, text_folder, tmp_path):
    """Plain clustering and gates trained by Adam, without a bias, in closed form afterwards."""
    model = make_llama(tmp_path / "llama", **VARIANTS[variant])
    pipeline = Pipeline(model, text_folder, tmp_path / "out")
    pipeline.select_options = [*LINEAR, "--gate_fit", "adam", "--epochs", 1]
    pipeline.convert_options = ["--routing", routing]
    pipeline.calibrate_options = REFIT
    assert pipeline.run().calibrate() == 0
    before, after = tensors_of(pipeline.moe), tensors_of(pipeline.calibrated)
    layers = VARIANTS[variant].get("num_hidden_layers", 3)
    assert after.keys() - before.keys() == {f"model.layers.{i}.mlp.gate.bias" for i in range(layers)}
    assert before.keys() <= after.keys()
    calibrated, plain, dense = load(pipeline.calibrated), load(pipeline.moe), load_dense(model)
    assert calibrated.config.gate_bias
    assert not plain.config.gate_bias
    blocks = read_corpus(model, text_folder).blocks
    assert divergence(calibrated, dense, blocks) < divergence(plain, dense, blocks)
    if variant == "mlp_bias":
        name = "model.layers.1.mlp.output_bias"
        assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("asked", [False, True])
def test_an_output_bias_is_there_if_asked_for(asked, finished, corpus, tmp_path):
    folder = recalibrated(finished, tmp_path / "moe", *["--output_bias"] * asked).calibrated
    biases = {f"model.layers.{i}.mlp.output_bias" for i in range(3)}
    assert tensors_of(folder).keys() - tensors_of(finished.moe).keys() == (biases if asked else set())
    model = load(folder)
    assert model.config.output_bias == asked
    if asked:
        assert all(model.model.layers[i].mlp.output_bias.abs().max() > 1e-3 for i in range(3))
        # It stays when the model is calibrated again without the option.
        again = recalibrated(finished, tmp_path / "again", moe=folder).calibrated
        assert load(again).config.output_bias


def test_bf16_checkpoints_keep_their_dtype(text_folder, tmp_path):
    model = make_llama(tmp_path / "llama", dtype=torch.bfloat16)
    pipeline = shared_pipeline(model, text_folder, tmp_path / "out", calibrate_options=[*REFIT, "--output_bias"])
    assert pipeline.run().calibrate() == 0
    for name, tensor in tensors_of(pipeline.calibrated).items():
        assert tensor.dtype == (torch.float32 if name.endswith(("threshold", "quantiles")) else torch.bfloat16), name
    blocks = read_corpus(model, text_folder).blocks
    dense, plain, calibrated = load_dense(model), load(pipeline.moe), load(pipeline.calibrated)
    set_shares_on(plain, blocks, 1 / 3)
    # Of the weights as they are stored, rounded: what was measured while fitting is what the model does.
    for stored, scores in zip(quantiles_of(calibrated), scores_on(calibrated, blocks), strict=True):
        places = torch.linspace(0, scores.numel() - 1, 1025, dtype=torch.float64).round().long()
        torch.testing.assert_close(stored, scores.flatten().sort().values[places], rtol=1e-4, atol=1e-4)
    assert shares(calibrated, blocks) == pytest.approx([1 / 3] * 3, rel=0.01)
    assert divergence(calibrated, dense, blocks) < divergence(plain, dense, blocks)


def test_base_models(text_folder, tmp_path):
    model = make_llama(tmp_path / "base", model_class=LlamaModel)
    pipeline = shared_pipeline(model, text_folder, tmp_path / "out", calibrate_options=REFIT)
    pipeline.convert_options = [*pipeline.convert_options, "--convert_type", "LlamaMoEModel"]
    assert pipeline.run().calibrate() == 0
    assert not any(name.startswith("model.") for name in tensors_of(pipeline.calibrated))
    blocks = read_corpus(model, text_folder).blocks
    dense = LlamaModel.from_pretrained(model).eval()
    plain, calibrated = (AutoModel.from_pretrained(path).eval() for path in (pipeline.moe, pipeline.calibrated))
    with torch.no_grad():
        states = [
            torch.cat([m(b[None].long()).last_hidden_state[0] for b in blocks]) for m in (dense, plain, calibrated)
        ]
    assert (states[2] - states[0]).square().mean() < (states[1] - states[0]).square().mean()


def test_a_calibrated_model_can_be_calibrated_again(finished, corpus, tmp_path):
    folder = recalibrated(finished, tmp_path / "again", "--refit_gates", moe=finished.calibrated).calibrated
    assert shares(load(folder), corpus.blocks) == pytest.approx([1 / 3] * 3, rel=0.01)
    dense = load_dense(finished.model)
    first, second = (divergence(load(path), dense, corpus.blocks) for path in (finished.calibrated, folder))
    assert second < 1.02 * first
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["stage"] == "calibrate"


def test_without_a_budget_given_a_calibrated_model_keeps_its_own(finished, corpus, tmp_path, monkeypatch):
    alone = recalibrated(finished, tmp_path / "a", "--num_selects", 2).calibrated
    again = recalibrated(finished, tmp_path / "b", moe=alone).calibrated
    assert shares(load(again), corpus.blocks) == [0, 0, 0]

    pipeline = Pipeline(finished.model, finished.text, finished.save, num_experts=8, num_selects=4, moe=tmp_path / "c")
    assert pipeline.convert() == 0  # top-k, two routed experts
    monkeypatch.setattr(calibration, "measure_sensitivity", lambda *_: [0.5, 0.02, 0.02])
    sensitivity = ("--layer_budgets", "sensitivity")
    folder = recalibrated(finished, tmp_path / "d", *sensitivity, moe=pipeline.moe).calibrated
    budgets = load(folder).config.layer_num_experts_per_tok
    assert (sum(budgets), len(set(budgets))) == (6, 2)
    again = recalibrated(finished, tmp_path / "e", moe=folder).calibrated
    assert load(again).config.num_experts_per_tok == 2
    assert load(again).config.layer_num_experts_per_tok is None


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([1.5, 1.7, 2.8], [1, 2, 3]), ([2.0, 2.0, 2.0], [2] * 3), ([2.9999999, 1, 1.0000001], [3, 1, 1])],
)
def test_whole_budgets_keep_their_sum(counts, expected):
    assert calibration._whole(counts) == expected


def test_sensitivities_need_a_model_that_predicts_tokens(text_folder, tmp_path, capfd):
    model = make_llama(tmp_path / "base", model_class=LlamaModel)
    pipeline = shared_pipeline(
        model, text_folder, tmp_path / "out", calibrate_options=["--layer_budgets", "sensitivity"]
    )
    pipeline.convert_options = [*pipeline.convert_options, "--convert_type", "LlamaMoEModel"]
    pipeline.run()
    capfd.readouterr()
    assert pipeline.calibrate() == 2
    assert "--layer_budgets sensitivity needs a loss" in capfd.readouterr().err
    assert not pipeline.calibrated.exists()


# ---------------------------------------------------------------------------------------------------- what is written


def test_the_folder_holds_a_checkpoint_and_nothing_else(finished, corpus):
    folder = finished.calibrated
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert files == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size"], entry["sha256"])
    assert files - {"model.safetensors.index.json"} >= {path.name for path in finished.moe.iterdir()} - {
        "model.safetensors"
    }
    assert manifest["facts"]["tokens"] == corpus.num_tokens == TOKENS
    metrics = metrics_of(folder)
    assert len(metrics) == 3
    assert all(
        {"error_before", "error_after", "threshold", "active_share", "strength", "gate"} <= m.keys() for m in metrics
    )
    card = (folder / "README.md").read_text()
    assert f"{TOKENS:,} tokens" in card
    assert all(f"{m['error_before']:.4f} | {m['error_after']:.4f}" in card for m in metrics)
    assert all(f"| {m['threshold']:.4g} | {m['active_share']:.3f} |" in card for m in metrics)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(folder).keys()


def test_sources_are_only_read(finished, tmp_path):
    before = contents(finished.model), contents(finished.moe)
    recalibrated(finished, tmp_path / "moe", "--refit_gates", "--output_bias")
    assert (contents(finished.model), contents(finished.moe)) == before


def test_it_is_evaluated_and_better_than_before(finished, run_script):
    options = ["--text_path", finished.text / "c4.jsonl", "--block_size", BLOCK, "--max_tokens", 512, "--json"]
    paths = [finished.model, finished.moe, finished.calibrated]
    status, out, _ = run_script(llama_evaluate.main, "--model_path", *paths, *options)
    assert status == 0
    rows = json.loads(out)
    assert [row["num_selects"] for row in rows] == [None, 4, 4]
    assert [len(row["expert_load"] or []) for row in rows] == [0, 3, 3]


def test_it_loads_with_the_code_it_carries(finished, corpus, tmp_path):
    """In a process that does not import llama_moe."""
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(finished.calibrated)!r}, trust_remote_code=True).eval()
assert "transformers_modules" in type(model).__module__ and "llama_moe" not in sys.modules
tokens = torch.load({str(tmp_path / "tokens")!r})
with torch.no_grad():
    torch.save(model(tokens).logits, {str(tmp_path / "logits")!r})
"""
    tokens = corpus.blocks[0][None].long()
    torch.save(tokens, tmp_path / "tokens")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, check=True, capture_output=True)
    with torch.no_grad():
        expected = load(finished.calibrated)(tokens).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- the same bytes


def test_finished_does_nothing(finished, capfd):
    before = contents(finished.calibrated)
    assert finished.calibrate() == 0
    out = capfd.readouterr().out
    assert "already finished" in out
    assert len([line for line in out.splitlines() if line.split()[0] in "012"]) == 3  # the table is said again
    assert contents(finished.calibrated) == before


def test_same_inputs_and_seed_give_the_same_bytes(finished, tmp_path):
    folder = recalibrated(finished, tmp_path / "again", "--refit_gates").calibrated
    assert contents(folder) == contents(finished.calibrated)


def test_activations_that_are_not_kept_are_the_same(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_calibration, "MOST_KEPT_BYTES", 0)
    folder = recalibrated(finished, tmp_path / "again", "--refit_gates").calibrated
    assert contents(folder) == contents(finished.calibrated)


class Killed(BaseException):
    """Stands in for the process's end."""


def test_interrupted_at_any_rename_and_resumed_gives_the_same_bytes(text_folder, tmp_path):
    """Of the streams, the shards, the records of pieces, the files around them and the manifest."""
    model = make_llama(tmp_path / "llama", num_hidden_layers=2)
    pipeline = shared_pipeline(model, text_folder, tmp_path / "out").run()
    checkpoint, corpus = DenseCheckpoint(str(model)), read_corpus(model, text_folder, max_tokens=200)
    settings = CalibrateSettings(refit_gates=True, output_bias=True)

    def run(name: str) -> Path:
        writer = calibrate(checkpoint, pipeline.moe, corpus, tmp_path / name, settings)
        assert writer.finished
        return writer.folder

    expected, names = contents(run("undisturbed")), []
    real_replace = os.replace
    for deaths in range(1, 60):
        names.clear()

        def replace(source, target, limit=deaths):
            names.append(Path(target).name)
            if len(names) == limit:
                raise Killed
            real_replace(source, target)

        killed = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                run(str(deaths))
            except Killed:
                killed = True
        folder = run(str(deaths)) if killed else tmp_path / str(deaths)
        assert contents(folder) == expected, names
        if not killed:
            break
    assert not killed
    assert {"claim.json", "streams.0.scratch", "streams.2.scratch", "config.json", "manifest.json"} <= {*names}


def test_a_run_interrupted_twice_goes_on_where_it_was(finished, tmp_path, monkeypatch):
    """Killed while a layer is being fitted; no layer that is written is fitted again."""
    pipeline = Pipeline(finished.model, finished.text, finished.save, moe=finished.moe, calibrated=tmp_path / "moe")
    pipeline.calibrate_options = REFIT
    fitted, refit = [], layer_calibration.LayerCalibration._refit
    for fatal in (1, 2):

        def die(self, *args, layer=fatal):
            fitted.append(self._mlp_prefix)
            if self._mlp_prefix == f"layers.{layer}.mlp.":
                raise Killed
            return refit(self, *args)

        monkeypatch.setattr(layer_calibration.LayerCalibration, "_refit", die)
        with pytest.raises(Killed):
            pipeline.calibrate()
    monkeypatch.setattr(layer_calibration.LayerCalibration, "_refit", refit)
    assert fitted == [f"layers.{i}.mlp." for i in (0, 1, 1, 2)]
    lost = shutil.copytree(pipeline.calibrated, tmp_path / "lost")
    (lost / "model-00001-of-00004.safetensors").unlink()  # the first layer: all are fitted again
    for folder in (pipeline.calibrated, lost):
        pipeline.calibrated = folder
        assert pipeline.calibrate() == 0
        assert contents(folder) == contents(finished.calibrated)


def test_overwrite_begins_anew_and_spares_foreign_files(finished, tmp_path, capfd):
    pipeline = recalibrated(finished, tmp_path / "moe")
    (pipeline.calibrated / "notes.txt").write_text("mine")
    pipeline.calibrate_options = REFIT
    assert pipeline.calibrate() == 2
    assert "was made with --refit_gates False, this run asks for True" in capfd.readouterr().err
    pipeline.calibrate_options = [*REFIT, "--overwrite"]
    assert pipeline.calibrate() == 0
    assert contents(pipeline.calibrated) == contents(finished.calibrated) | {"notes.txt": b"mine"}


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("bounds", "num_selects", "words"),
    [
        ([], 1, "--num_selects 1 is outside of 2 to 8"),
        ([], 9, "--num_selects 9 is outside of 2 to 8"),
        (["--min_selects", 3, "--max_selects", 5], 2, "--num_selects 2 is outside of 3 to 5"),
        (["--min_selects", 3, "--max_selects", 5], 6, "--num_selects 6 is outside of 3 to 5"),
    ],
)
def test_a_budget_that_the_model_cannot_run_is_refused(bounds, num_selects, words, finished, tmp_path, capfd):
    pipeline = Pipeline(finished.model, finished.text, finished.save, num_experts=8, num_selects=4, moe=tmp_path / "a")
    pipeline.convert_options = ["--routing", "threshold", *bounds]
    assert pipeline.convert() == 0
    pipeline.calibrated = tmp_path / "b"
    pipeline.calibrate_options = [*CORPUS, "--num_selects", num_selects]
    assert pipeline.calibrate() == 2
    message = capfd.readouterr().err
    assert words in message
    assert len(message.splitlines()) == 1
    assert not pipeline.calibrated.exists()


def test_a_dense_model_with_nan_is_refused_before_anything_is_written(finished, tmp_path, capfd):
    model = tmp_path / "nan"
    shutil.copytree(finished.model, model)
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][1, 1] = float("nan")  # not a value that the fingerprint samples
    save_file(tensors, file, metadata={"format": "pt"})
    arguments = ["--model_path", model, "--moe_path", finished.moe, "--save_path", tmp_path / "moe"]
    arguments += ["--train_data_path", finished.text, "--max_tokens", TOKENS, "--block_size", 32]
    capfd.readouterr()
    status = llama_calibrate.main(list(map(str, arguments)))
    assert status == 2
    assert "layers.2.mlp.up_proj.weight holds NaN" in capfd.readouterr().err
    assert not (tmp_path / "moe").exists()


def test_no_expert_at_all_is_no_budget(text_folder, tiny_llama, tmp_path, capfd):
    pipeline = shared_pipeline(tiny_llama, text_folder, tmp_path, num_shared=0).run()
    pipeline.calibrate_options = [*CORPUS, "--num_selects", 0]
    assert pipeline.calibrate() == 2
    assert "--num_selects 0 is outside of 1 to 8" in capfd.readouterr().err
    assert not pipeline.calibrated.exists()
