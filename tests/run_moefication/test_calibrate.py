"""Calibration through its script: each layer's fit against scikit-learn's, the whole model, resuming, refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from conftest import LLAMA3_ROPE, SENTENCES, make_llama, write_jsonl
from pipeline import (
    LINEAR,
    Killed,
    Pipeline,
    contents,
    corpus_of,
    divergence,
    inputs_to,
    load,
    logits_of,
    mlp_inputs,
    renames,
    shared_pipeline,
    shares_on,
)
from safetensors.torch import load_file
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from run_moefication import llama_evaluate
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.stages import calibrate_layer as layer_calibration
from run_moefication.moefication.stages import calibrate_logits as logit_calibration
from run_moefication.moefication.text.corpus import Corpus

BLOCK, TOKENS = 32, 1500
CORPUS = ["--block_size", BLOCK, "--max_tokens", TOKENS]
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the pull to the original down_proj


@pytest.fixture(scope="module")
def finished(shared_run, tmp_path_factory) -> Pipeline:
    """Calibrated with new gates: 2 shared and 6 routed experts, a threshold for 4 of 8; read-only."""
    return recalibrated(shared_run, tmp_path_factory.mktemp("finished") / "moe", "--refit_gates")


@pytest.fixture(scope="module")
def corpus(tiny_llama, text_folder) -> Corpus:
    """The calibration text: blocks as the script reads them."""
    return read_corpus(tiny_llama, text_folder)


def read_corpus(model: Path, text: Path) -> Corpus:
    corpus = corpus_of(DenseCheckpoint(str(model)), text, None, block_size=BLOCK, max_tokens=TOKENS)
    assert len({len(block) for block in corpus.blocks}) > 1  # shorter blocks sit among the others
    return corpus


def recalibrated(run: Pipeline, folder: Path, *options: object, moe: Path | None = None) -> Pipeline:
    """The converted model calibrated with other options."""
    pipeline = replace(run, moe=moe or run.moe, calibrated=folder, calibrate_options=[*CORPUS, *options])
    assert pipeline.calibrate() == 0
    return pipeline


def metrics_of(folder: Path, name: str = "error_after") -> list[dict]:
    """By layer; with the name `divergence_after`, that of all layers together."""
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    return [metrics[file] for file in sorted(metrics) if name in metrics[file]]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def seen(dense, moe, layer: int, blocks: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a layer of the calibrated model, `[tokens, ...]`: what enters its MLP, what that should add to make the
    residual stream the dense model's, and the weight of each token."""
    after_layer = [*dense.model.layers[1:], dense.model.norm][layer]
    stream, dense_stream = (
        inputs_to(model.model.layers[layer].post_attention_layernorm, model, blocks) for model in (moe, dense)
    )
    target = inputs_to(after_layer, dense, blocks) - stream
    # 1 over the larger of both streams' squares, at most 4 medians.
    weights = 1 / torch.maximum(stream.square().sum(1), dense_stream.square().sum(1)).double()
    return mlp_inputs(moe, layer, blocks), target, weights.clamp(max=4 * weights.median()).numpy()


@torch.no_grad()
def neurons_of(mlp, inputs: torch.Tensor) -> torch.Tensor:
    """Activations of all neurons `[tokens, I]`, routed experts' first."""
    gate_up = torch.einsum("eih,th->tei", mlp.experts.gate_up_proj, inputs)
    if mlp.experts.has_bias:
        gate_up = gate_up + mlp.experts.gate_up_proj_bias
    gate, up = gate_up.chunk(2, dim=-1)
    routed, shared = (F.silu(gate) * up).flatten(1), mlp.shared_experts
    if shared is None:
        return routed
    return torch.cat([routed, F.silu(shared.gate_proj(inputs)) * shared.up_proj(inputs)], dim=1)


def down_of(mlp) -> np.ndarray:
    """`[I, H]`, in the order of `neurons_of`, and the output bias below it if there is one."""
    parts = [mlp.experts.down_proj.transpose(1, 2).flatten(0, 1)]
    if mlp.shared_experts is not None:
        parts.append(mlp.shared_experts.down_proj.weight.T)
    if mlp.output_bias is not None:
        parts.append(mlp.output_bias[None])
    return torch.cat(parts).detach().double().numpy()


def ridge(x: np.ndarray, y: np.ndarray, w: np.ndarray, strength: float, prior: np.ndarray) -> np.ndarray:
    alpha = strength * (x * x * w[:, None]).sum(0).mean()
    fit = Ridge(alpha=alpha, fit_intercept=False, solver="cholesky").fit(x, y - x @ prior, sample_weight=w)
    return prior + fit.coef_.T


def error(x: np.ndarray, y: np.ndarray, w: np.ndarray, down: np.ndarray) -> float:
    return (((x @ down - y) ** 2).sum(1) * w).sum() / ((y**2).sum(1) * w).sum()


def held_out_errors(blocks: list[torch.Tensor], data: list[np.ndarray], prior: np.ndarray, strengths) -> dict:
    """On the last quarter of the blocks: of each strength's fit to the others, and of `prior` itself (None)."""
    fitted = sum(len(block) for block in blocks[: len(blocks) * 3 // 4])
    train, held_out = ([array[part] for array in data] for part in (slice(0, fitted), slice(fitted, None)))
    return {s: error(*held_out, ridge(*train, s, prior)) for s in strengths} | {None: error(*held_out, prior)}


THRESHOLD = ["--routing", "threshold"]
# Fields of the dense model; shared experts (None: a split and gates of the description); conversion; calibration.
FITS = {
    "shared experts": ({}, 2, THRESHOLD, ["--refit_gates"]),
    "output bias": ({}, 2, THRESHOLD, ["--output_bias"]),
    "bounds": ({"tie_word_embeddings": True}, 1, [*THRESHOLD, "--min_selects", 3, "--max_selects", 5], []),
    "top_k": ({"head_dim": 16, "attention_bias": True}, 2, [], ["--refit_gates"]),
    "mlp gates and biases": ({"mlp_bias": True, "num_key_value_heads": 4}, None, [], []),
    "one layer": ({"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 1, "hidden_size": 40}, 0, THRESHOLD, []),
}


@pytest.mark.parametrize("kind", FITS)
def test_down_proj_is_scikit_learns_ridge_on_what_the_calibrated_prefix_produces(kind, text_folder, tmp_path):
    """In the first and the last layer, from what the models themselves compute."""
    fields, num_shared, convert_options, calibrate_options = FITS[kind]
    options = dict(convert_options=convert_options, calibrate_options=[*CORPUS, *calibrate_options])
    model = make_llama(tmp_path / "llama", **fields)
    run = shared_pipeline(model, text_folder, tmp_path / "out", num_shared, **options).run()
    assert run.calibrate() == 0
    blocks = read_corpus(model, text_folder).blocks
    dense, before, after = load(model), load(run.moe), load(run.calibrated)
    for layer in {0, dense.config.num_hidden_layers - 1}:
        inputs, target, w = seen(dense, after, layer, blocks)
        mlp = after.model.layers[layer].mlp
        with torch.no_grad():
            runs = mlp.gate.mask(mlp.gate.score(inputs))
        selected = runs.repeat_interleave(64 // run.num_experts, dim=1)
        x = neurons_of(mlp, inputs)
        x[:, : selected.shape[1]] *= selected
        x, y = x.double().numpy(), target.double().numpy()
        prior, found = down_of(before.model.layers[layer].mlp), down_of(mlp)
        if mlp.output_bias is not None:
            x = np.pad(x, ((0, 0), (0, 1)), constant_values=1)
            prior = np.pad(prior, ((0, x.shape[1] - len(prior)), (0, 0)))

        metrics = metrics_of(run.calibrated)[layer]
        share = (run.num_selects - after.config.num_shared_experts) / runs.shape[1]
        assert runs.float().mean().item() == pytest.approx(share, rel=0.01)
        assert metrics["active_share"] == pytest.approx(share, rel=0.01)
        if kind == "bounds":  # of a token: 3 to 5, the shared one included
            assert set(runs.sum(dim=1).tolist()) == {2, 3, 4}
        errors = held_out_errors(blocks, [x, y, w], prior, STRENGTHS)
        assert metrics["error_before"] == pytest.approx(errors.pop(None), rel=1e-3)
        assert metrics["error_after"] == pytest.approx(min(errors.values()), rel=1e-3)
        assert metrics["strength"] == min(errors, key=errors.get)
        np.testing.assert_allclose(found, ridge(x, y, w, metrics["strength"], prior), rtol=1e-2, atol=1e-3)
        assert np.abs(found - prior).max() > 0.02  # and that is another matrix


def test_gates_are_scikit_learns_ridge_from_what_they_were_to_the_norms_of_the_experts_outputs(finished, corpus):
    """Of the strength that does best on held-out tokens, and then fitted to these as well."""
    before, after = load(finished.moe), load(finished.calibrated)
    for layer in (0, 2):
        inputs, _, w = seen(load(finished.model), after, layer, corpus.blocks)
        mlp, gate = before.model.layers[layer].mlp, after.model.layers[layer].mlp.gate
        neurons = neurons_of(mlp, inputs)[:, :48].unflatten(1, (6, 8))
        y = torch.einsum("tei,ehi->teh", neurons, mlp.experts.down_proj.detach()).norm(dim=-1).double().numpy()
        x = np.pad(inputs.double().numpy(), ((0, 0), (0, 1)), constant_values=1)
        prior, found = (torch.cat([g.weight.T, g.bias[None]]).detach().double().numpy() for g in (mlp.gate, gate))
        errors = held_out_errors(corpus.blocks, [x, y, w], prior, (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0))
        del errors[None]
        strength = metrics_of(finished.calibrated)[layer]["gate"]["ridge_strength"]
        assert strength == min(errors, key=errors.get)
        np.testing.assert_allclose(found, ridge(x, y, w, strength, prior), rtol=1e-2, atol=1e-2)
        assert np.abs(found - prior).max() > 0.02  # and that is another gate


@pytest.fixture(scope="module")
def together(finished, tmp_path_factory) -> Pipeline:
    """As `finished`, with output biases, and all layers fitted together at the end; read-only."""
    return recalibrated(finished, tmp_path_factory.mktemp("together") / "moe", *TOGETHER)


TOGETHER = ["--refit_gates", "--output_bias", "--fit_logits"]


def held_out(corpus: Corpus) -> list[torch.Tensor]:
    """What the layers are not fitted to: a quarter of the blocks, the last ones."""
    return corpus.blocks[3 * len(corpus.blocks) // 4 :]


def factors_of(folder: Path, before: Path) -> list[torch.Tensor]:
    """By layer, how much larger each routed expert's part of down_proj is, `[E]`; it must be so in all its entries."""
    ratios = [
        tensors_of(folder)[name] / tensors_of(before)[name]
        for name in (f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(3))
    ]
    for ratio in ratios:
        torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)
    return [ratio[:, 0, 0] for ratio in ratios]


def test_gradients_of_the_small_parameters_are_those_of_the_models_own_code(together, corpus):
    """Which experts run is the same; a factor of an expert moves all of its part of down_proj."""
    model = load(together.calibrated).float()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("norm.weight", "output_bias", "experts.down_proj")))
    model.eval()
    tensors = dict(model.state_dict())
    small = {name: torch.nn.Parameter(tensors[f"model.{name}"].clone()) for name in small_names(model.config)}
    factors = {f"layers.{i}.mlp.factors": torch.ones(6, requires_grad=True) for i in range(3)}
    whole = logit_calibration.WholeModel(
        model.config, lambda name: small[name] if name in small else tensors[f"model.{name}"], "cpu", factors
    )
    block = corpus.blocks[0]
    states = whole.states([block])
    states = F.rms_norm(states, states.shape[-1:], small["norm.weight"], model.config.rms_norm_eps)
    expected = model.model(block[None].long()).last_hidden_state[0]
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    (states * direction).sum().backward()
    with torch.no_grad():  # scores must not pass gradients on, as routing is what it is
        scores = [layer.mlp.gate.score(mlp_inputs(model, i, [block])) for i, layer in enumerate(model.model.layers)]
    for layer, of_layer in zip(model.model.layers, scores, strict=True):
        layer.mlp.gate.score = lambda inputs, fixed=of_layer: fixed
    (model.model(block[None].long()).last_hidden_state[0] * direction).sum().backward()
    own = dict(model.named_parameters())
    for name, parameter in small.items():
        torch.testing.assert_close(parameter.grad, own[f"model.{name}"].grad, rtol=1e-3, atol=1e-3)
    for i in range(3):
        down = own[f"model.layers.{i}.mlp.experts.down_proj"]
        expected = (down.grad * down.detach()).sum(dim=(1, 2))
        torch.testing.assert_close(factors[f"layers.{i}.mlp.factors"].grad, expected, rtol=1e-3, atol=1e-3)


def small_names(config) -> list[str]:
    names = ("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.output_bias")
    return [f"layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in names] + ["norm.weight"]


def test_the_fit_of_all_layers_brings_the_model_nearer_on_text_that_no_layer_saw(finished, tmp_path):
    # Documents that are not alike, and enough of them: of few, what is held out has too little to fit.
    words, random = sorted(set(" ".join(SENTENCES).split())), Random(0)
    for name in ("c4", "github"):
        documents = [" ".join(random.choices(words, k=40)) for _ in range(800)]
        write_jsonl(tmp_path / "text" / f"{name}.jsonl", documents)
    run, most = replace(finished, text=tmp_path / "text"), ("--max_tokens", 8000)
    together = recalibrated(run, tmp_path / "together", *TOGETHER, *most)
    layers = recalibrated(run, tmp_path / "layers", *TOGETHER[:2], *most).calibrated
    corpus = corpus_of(DenseCheckpoint(str(run.model)), run.text, None, block_size=BLOCK, max_tokens=8000)
    (metrics,) = metrics_of(together.calibrated, "divergence_after")
    measured_on, dense = held_out(corpus)[7::8], load(together.model)
    model = load(together.calibrated)
    assert metrics["divergence_after"] == pytest.approx(divergence(model, dense, measured_on), rel=1e-3)
    assert metrics["divergence_after"] < 0.97 * metrics["divergence_before"]
    assert divergence(model, dense, corpus.blocks) < divergence(load(layers), dense, corpus.blocks)
    # Thresholds meet the budget on text that these parameters are not fitted to, and the card tells of them.
    others = corpus.blocks[: -len(held_out(corpus))][::3]
    assert shares_on(model, others) == pytest.approx([1 / 3] * 3, rel=0.02)
    thresholds = [layer.mlp.gate.threshold.item() for layer in model.model.layers]
    assert [metrics["threshold"] for metrics in metrics_of(together.calibrated)] == pytest.approx(thresholds)


def test_without_a_gain_the_layers_fits_stay_which_saw_no_held_out_text(together, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(logit_calibration, "LEARNING_RATE", 10.0)
    folder = recalibrated(together, tmp_path / "moe", *TOGETHER).calibrated
    (metrics,) = metrics_of(folder, "divergence_after")
    assert metrics["divergence_after"] == metrics["divergence_before"]
    model, dense, blocks = load(folder), load(together.model), corpus.blocks
    assert torch.equal(model.model.norm.weight, load(together.moe).model.norm.weight)
    inputs, target, w = seen(dense, model, 0, blocks)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        x = neurons_of(mlp, inputs)
        x[:, :48] *= mlp.gate.mask(mlp.gate.score(inputs)).repeat_interleave(8, dim=1)
    x = np.pad(x.double().numpy(), ((0, 0), (0, 1)), constant_values=1)
    prior = np.pad(down_of(load(together.moe).model.layers[0].mlp), ((0, 1), (0, 0)))
    train = slice(0, sum(map(len, blocks)) - sum(map(len, held_out(corpus))))
    strength = metrics_of(folder)[0]["strength"]
    expected = ridge(x[train], target.double().numpy()[train], w[train], strength, prior)
    np.testing.assert_allclose(down_of(mlp), expected, rtol=1e-2, atol=1e-3)


def test_one_piece_of_text_is_measured_on_and_not_fitted_to(together, tmp_path):
    folder = recalibrated(together, tmp_path / "moe", *TOGETHER, "--max_tokens", 2 * BLOCK).calibrated
    (metrics,) = metrics_of(folder, "divergence_after")
    assert metrics["divergence_after"] == metrics["divergence_before"]
    assert torch.equal(load(folder).model.norm.weight, load(together.moe).model.norm.weight)


def test_the_fit_of_all_layers_leaves_every_matrix_but_for_a_factor_for_each_expert(together, tmp_path, monkeypatch):
    monkeypatch.setattr(logit_calibration, "LEARNING_RATE", 0.0)
    unmoved = recalibrated(together, tmp_path / "moe", *TOGETHER).calibrated
    before, after = tensors_of(unmoved), tensors_of(together.calibrated)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    fitted = ("norm.weight", "output_bias", "experts.down_proj", "threshold", "score_quantiles")
    assert changed == {name for name in before if name.endswith(fitted)}
    for factors in factors_of(together.calibrated, unmoved):
        assert 0.01 < (factors - 1).abs().max() < 0.3


def test_a_model_without_logits_is_calibrated_layer_by_layer(finished, tmp_path):
    moe = finished.converted(tmp_path / "moe", "--convert_type", "LlamaMoEModel", "--routing", "threshold")
    folders = [
        recalibrated(finished, tmp_path / name, *options, moe=moe).calibrated
        for name, options in (("layers", []), ("asked", ["--fit_logits"]))
    ]
    assert contents(folders[0]) == contents(folders[1])
    assert metrics_of(folders[1], "divergence_after") == []


def test_the_same_bytes_whether_layers_are_kept_or_loaded_anew(together, tmp_path, monkeypatch):
    monkeypatch.setattr(logit_calibration, "MOST_KEPT_BYTES", 0)
    assert contents(recalibrated(together, tmp_path / "moe", *TOGETHER).calibrated) == contents(together.calibrated)


@pytest.mark.parametrize("options", [[], ["--refit_gates", "--output_bias"]])
def test_with_all_experts_on_the_dense_model_stays(options, finished, corpus, tmp_path):
    folder = recalibrated(finished, tmp_path / "all", "--num_selects", 8, *options).calibrated
    model, dense = load(folder), load(finished.model)
    assert (logits_of(model, corpus.blocks[:4]) - logits_of(dense, corpus.blocks[:4])).abs().max() < 1e-3
    for metrics in metrics_of(folder):
        assert metrics["active_share"] == 1
        assert abs(metrics["error_before"]) < 1e-5
        assert abs(metrics["error_after"]) < 1e-5


@torch.no_grad()
def set_shares_on(model, blocks: list[torch.Tensor], share: float) -> None:
    """Thresholds by which this share of the routed experts runs on this text, layer by layer."""
    for index, layer in enumerate(model.model.layers):
        layer.mlp.gate.store_score_quantiles(layer.mlp.gate.score(mlp_inputs(model, index, blocks)))
        layer.mlp.gate.set_active_share(share)


@pytest.mark.parametrize(("routing", "num_selects"), [("threshold", 3), ("top_k", 5)])
def test_a_calibrated_model_is_nearer_to_the_dense_one_at_the_same_cost(
    routing, num_selects, finished, corpus, tmp_path
):
    moe, routed = finished.converted(tmp_path / "moe", "--routing", routing), num_selects - 2
    options = ["--refit_gates", "--num_selects", num_selects]
    folder = recalibrated(finished, tmp_path / "calibrated", *options, moe=moe).calibrated
    dense, calibrated, plain = load(finished.model), load(folder), load(moe)
    assert (calibrated.config.routing, calibrated.config.num_experts_per_tok) == (routing, routed)
    if routing == "threshold":
        set_shares_on(plain, corpus.blocks, routed / 6)
    else:
        plain.set_num_experts_per_tok(routed)
        assert not any("threshold" in name or "quantiles" in name for name in tensors_of(folder))
    for model in (plain, calibrated):
        assert shares_on(model, corpus.blocks) == pytest.approx([routed / 6] * 3, rel=0.01)
    assert divergence(calibrated, dense, corpus.blocks) < 0.95 * divergence(plain, dense, corpus.blocks)
    for metrics in metrics_of(folder):
        assert metrics["error_after"] <= metrics["error_before"]
        assert metrics["active_share"] == pytest.approx(routed / 6, rel=0.01)


@pytest.mark.parametrize("refit", [True, False])
def test_gates_if_asked_for_and_down_projections_change(refit, finished, corpus, tmp_path):
    folder = finished.calibrated if refit else recalibrated(finished, tmp_path / "moe").calibrated
    before, after = tensors_of(finished.moe), tensors_of(folder)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    fitted = ("threshold", "score_quantiles", "down_proj", "down_proj.weight", *["gate.weight", "gate.bias"] * refit)
    assert changed == {name for name in before if ".mlp." in name and name.endswith(fitted)}
    for name, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape)
    assert shares_on(load(folder), corpus.blocks) == pytest.approx([1 / 3] * 3, rel=0.01)
    thresholds = [after[f"model.layers.{i}.mlp.gate.threshold"].item() for i in range(3)]
    assert [metrics["threshold"] for metrics in metrics_of(folder)] == pytest.approx(thresholds)


def test_shared_experts_alone_can_be_calibrated(finished, corpus, tmp_path, run_script):
    folder = recalibrated(finished, tmp_path / "moe", "--num_selects", 2).calibrated
    text = ["--text_path", finished.text / "c4.jsonl", "--max_tokens", 64, "--json"]
    _, out, _ = run_script(llama_evaluate.main, "--model_path", folder, *text)
    assert [row["num_selects"] for row in json.loads(out)] == [2]
    assert "the 2 shared ones alone run. " in (folder / "README.md").read_text()
    before, after = tensors_of(finished.moe), tensors_of(folder)
    assert shares_on(load(folder), corpus.blocks) == [0, 0, 0]
    for layer in range(3):
        # What never runs keeps its weights.
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)
    # Asked for no budget, a calibrated model keeps its own.
    again = recalibrated(finished, tmp_path / "again", moe=folder).calibrated
    assert shares_on(load(again), corpus.blocks) == [0, 0, 0]


def test_gates_without_a_bias_get_one(finished, tmp_path):
    """Gates trained by Adam, in closed form afterwards."""
    gates = replace(finished, save=tmp_path, select_options=[*LINEAR, "--gate_fit", "adam", "--epochs", 1])
    for folder in (finished.split_folder, finished.features_folder):
        (tmp_path / folder.name).symlink_to(folder)
    assert gates.select() == 0
    moe = gates.converted(tmp_path / "moe")
    folder = recalibrated(finished, tmp_path / "calibrated", "--refit_gates", moe=moe).calibrated
    added = tensors_of(folder).keys() - tensors_of(moe).keys()
    assert added == {f"model.layers.{i}.mlp.gate.bias" for i in range(3)}
    assert [load(path).config.gate_bias for path in (moe, folder)] == [False, True]


def test_an_output_bias_is_there_if_asked_for_and_stays(finished, tmp_path):
    folder = recalibrated(finished, tmp_path / "moe", "--output_bias").calibrated
    biases = {f"model.layers.{i}.mlp.output_bias" for i in range(3)}
    assert tensors_of(folder).keys() - tensors_of(finished.moe).keys() == biases
    again = recalibrated(finished, tmp_path / "again", moe=folder).calibrated
    assert [load(path).config.output_bias for path in (finished.calibrated, folder, again)] == [False, True, True]


def test_bf16_checkpoints_keep_their_dtype(text_folder, tmp_path):
    model = make_llama(tmp_path / "llama", dtype=torch.bfloat16)
    options = [*CORPUS, "--refit_gates", "--output_bias"]
    pipeline = shared_pipeline(model, text_folder, tmp_path / "out", calibrate_options=options)
    assert pipeline.run().calibrate() == 0
    for name, tensor in [*tensors_of(pipeline.moe).items(), *tensors_of(pipeline.calibrated).items()]:
        assert tensor.dtype == (torch.float32 if name.endswith(("threshold", "quantiles")) else torch.bfloat16), name
    blocks, calibrated = read_corpus(model, text_folder).blocks, load(pipeline.calibrated)
    # Of the weights as they are stored, rounded: what was measured while fitting is what the model does.
    for index, layer in enumerate(calibrated.model.layers):
        scores = layer.mlp.gate.score(mlp_inputs(calibrated, index, blocks)).detach()
        places = torch.linspace(0, scores.numel() - 1, 1025, dtype=torch.float64).round().long()
        expected = scores.flatten().sort().values[places]
        torch.testing.assert_close(layer.mlp.gate.score_quantiles, expected, rtol=1e-4, atol=1e-4)
    assert shares_on(calibrated, blocks) == pytest.approx([1 / 3] * 3, rel=0.01)


def test_a_calibrated_model_can_be_calibrated_again(finished, corpus, tmp_path):
    folder = recalibrated(finished, tmp_path / "again", "--refit_gates", moe=finished.calibrated).calibrated
    assert shares_on(load(folder), corpus.blocks) == pytest.approx([1 / 3] * 3, rel=0.01)
    dense = load(finished.model)
    first, second = (divergence(load(path), dense, corpus.blocks) for path in (finished.calibrated, folder))
    assert second < 1.02 * first


def test_the_folder_holds_a_checkpoint_and_nothing_else(finished, corpus):
    folder = finished.calibrated
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["stage"] == "calibrate"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert files == {*manifest["files"], "manifest.json"}
    assert files >= {path.name for path in finished.moe.iterdir()} - {"model.safetensors"}
    assert manifest["facts"]["tokens"] == corpus.num_tokens == TOKENS
    metrics = metrics_of(folder)
    assert len(metrics) == 3
    card = (folder / "README.md").read_text()
    assert f"{TOKENS:,} tokens" in card
    assert all(f"{m['error_before']:.4f} | {m['error_after']:.4f}" in card for m in metrics)
    assert all(f"| {m['threshold']:.4g} | {m['active_share']:.3f} |" in card for m in metrics)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(folder).keys()
    codes = [{name: data for name, data in contents(f).items() if ".py" in name} for f in (finished.moe, folder)]
    assert codes[0] == codes[1] != {}
    assert len({json.dumps(load(f).config.auto_map) for f in (finished.moe, folder)}) == 1


def test_the_same_bytes_whether_activations_are_kept_or_not(finished, tmp_path, monkeypatch):
    """And the models that it reads stay as they are."""
    before = contents(finished.model), contents(finished.moe)
    monkeypatch.setattr(layer_calibration, "MOST_KEPT_BYTES", 0)
    folder = recalibrated(finished, tmp_path / "again", "--refit_gates").calibrated
    assert contents(folder) == contents(finished.calibrated)
    assert (contents(finished.model), contents(finished.moe)) == before


def test_an_interrupted_run_goes_on_where_it_was(together, tmp_path):
    """Killed while a layer's fit is saved, the next one's, that of all layers, and a file of weights; no fit that is
    there is done again."""
    pipeline, written = replace(together, calibrated=tmp_path / "moe", calibrate_options=[*CORPUS, *TOGETHER]), {}
    for fatal in ("layer.1.fit", "layer.2.fit", "together.fit", "model-00002-of-00004.safetensors"):
        with renames(fatal=fatal), pytest.raises(Killed):
            pipeline.calibrate()
        for path in tmp_path.rglob("*.fit"):
            time = path.stat().st_mtime_ns
            assert written.setdefault(path.name, time) == time
    assert len(written) == 4
    fits = [torch.load(path, weights_only=True) for path in tmp_path.rglob("*.fit")]
    spent = sum(seconds for _, _, seconds in fits)
    lost = shutil.copytree(tmp_path, tmp_path.with_name("lost"))
    next(lost.rglob("layer.0.fit")).unlink()  # the first layer: all are fitted again
    for root in (tmp_path, lost):
        pipeline.calibrated = root / "moe"
        assert pipeline.calibrate() == 0
        assert contents(pipeline.calibrated) == contents(together.calibrated)
    seconds = json.loads((tmp_path / "moe" / "manifest.json").read_text())["seconds"]
    assert 0 < spent < seconds  # what was interrupted counts


def test_finished_does_nothing_and_overwrite_begins_anew_and_spares_foreign_files(finished, tmp_path, refuses, capfd):
    pipeline = recalibrated(finished, tmp_path / "moe")
    (pipeline.calibrated / "notes.txt").write_text("mine")
    before, _ = contents(pipeline.calibrated), capfd.readouterr()
    assert pipeline.calibrate() == 0
    out = capfd.readouterr().out
    assert "already finished" in out
    assert len([line for line in out.splitlines() if line.split()[0] in "012"]) == 3  # the table is said again
    pipeline.calibrate_options.append("--refit_gates")
    refuses(pipeline.calibrate, "was made with --refit_gates False, this run asks for True")
    assert contents(pipeline.calibrated) == before
    pipeline.calibrate_options.append("--overwrite")
    assert pipeline.calibrate() == 0
    assert contents(pipeline.calibrated) == contents(finished.calibrated) | {"notes.txt": b"mine"}


def test_a_budget_that_the_model_cannot_run_is_refused(finished, tmp_path, refuses):
    bounded = finished.converted(tmp_path / "bounded", *THRESHOLD, "--min_selects", 3, "--max_selects", 5)
    for moe, count, limits in [(finished.moe, n, "2 to 8") for n in (1, 9)] + [(bounded, n, "3 to 5") for n in (2, 6)]:
        options = [*CORPUS, "--num_selects", count]
        pipeline = replace(finished, moe=moe, calibrated=tmp_path / "out", calibrate_options=options)
        refuses(pipeline.calibrate, f"--num_selects {count} is outside of {limits}")
        assert not pipeline.calibrated.exists()
