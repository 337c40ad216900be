"""The ten invariants of the design (DESIGN, section 4), through the real stages, each computed anew here."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import LLAMA3_ROPE, assert_refused, make_llama, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline import (
    GATE,
    LINEAR,
    UP,
    Killed,
    Pipeline,
    contents,
    corpus_of,
    load,
    logits,
    mlp_inputs,
    renames,
    shared_pipeline,
    some_tokens,
)
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from run_moefication import llama_evaluate
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint

# float32 sums of the same terms in another order.
DENSE_TOLERANCE = 1e-4

BY_UP = ["--templates", UP]
TEXT = ["--block_size", 32, "--max_tokens", 512]
# Fields of the dense model; shared experts of a split on activations (None: of weights); options of the stages.
KINDS = {
    "plain": ({}, None, {}),
    "shared": ({}, 2, {}),
    "mlp_bias": ({"mlp_bias": True}, 2, {"select_options": [*LINEAR, "--gate_rank", 2], "convert_options": []}),
    "mlp_bias, threshold": ({"mlp_bias": True, "attention_bias": True}, 1, {}),
    "bfloat16, tied": ({"dtype": torch.bfloat16, "tie_word_embeddings": True}, 3, {}),
    "float16, one layer": ({"dtype": torch.float16, "num_hidden_layers": 1, "hidden_size": 40}, None, {}),
    "random split": (
        {"num_key_value_heads": 4},
        None,
        {"split_method": "Random", "split_options": ["--num_shared_experts", 1], "select_options": LINEAR},
    ),
    "graph split": ({"num_hidden_layers": 2}, 2, {"split_method": "Graph"}),
    "up_proj": (
        {"head_dim": 16},
        None,
        {
            "split_options": [*BY_UP, "--distance", "cos"],
            "feature_options": [*TEXT, *BY_UP],
            "select_options": [*BY_UP, "--gate_network", "similarity", "--select_criterion", "positive"],
            "convert_options": [*BY_UP, "--routing", "threshold"],
        },
    ),
    "linear gates by Adam": (
        {"rope_parameters": LLAMA3_ROPE},
        None,
        {"select_options": ["--gate_network", "linear", "--gate_fit", "adam", "--select_criterion", "plain"]},
    ),
}


@pytest.fixture(scope="module")
def run_of(plain_run, shared_run, text_folder, tmp_path_factory) -> Callable[[str], Pipeline]:
    """`run_of(kind)`: a finished pipeline of `KINDS`, made once; read-only."""

    @functools.cache
    def run(kind: str) -> Pipeline:
        if kind in ("plain", "shared"):
            return plain_run if kind == "plain" else shared_run
        fields, num_shared, options = KINDS[kind]
        root = tmp_path_factory.mktemp("kind")
        model = make_llama(root / "llama", **fields)
        return shared_pipeline(model, text_folder, root / "out", num_shared, **options).run()

    return run


def labels_of(run: Pipeline, layer: int) -> torch.Tensor:
    """The expert of each neuron of a layer, shared ones last: `[I]`."""
    return run.labels(layer, UP if UP in run.split_options else GATE)


def mlp_of(run: Pipeline, layer: int) -> dict[str, torch.Tensor]:
    """The tensors of a layer's MLP in the dense checkpoint, in float32."""
    prefix = f"model.layers.{layer}.mlp."
    state = load_file(run.model / "model.safetensors")
    return {name.removeprefix(prefix): tensor.float() for name, tensor in state.items() if name.startswith(prefix)}


def activations(mlp: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What enters down_proj in the dense model: `[T, H]` -> `[T, I]`."""
    gate, up = (F.linear(x, mlp[f"{name}.weight"], mlp.get(f"{name}.bias")) for name in ("gate_proj", "up_proj"))
    return F.silu(gate) * up


@pytest.mark.parametrize("kind", KINDS)
def test_1_all_experts_selected_are_the_dense_model(kind, run_of):
    run = run_of(kind)
    dense, converted = logits(load(run.model)), load(run.moe)
    partial = logits(converted)
    converted.set_active_fraction(1.0)
    assert dense.std() > 0.1  # the comparison is not between zeros
    assert (dense - logits(converted)).abs().max() < DENSE_TOLERANCE
    assert (dense - partial).abs().max() > 50 * DENSE_TOLERANCE  # and the choice of experts matters


@pytest.mark.parametrize("kind", KINDS)
def test_2_a_selected_expert_has_weight_one(kind, run_of):
    """A block's output is the dense MLP's with the neurons of the other experts silenced, and nothing rescaled."""
    run = run_of(kind)
    model = load(run.moe)
    assert not model.config.multiply_gate_scores
    for index, layer in enumerate(model.model.layers):
        mlp, labels = mlp_of(run, index), labels_of(run, index)
        num_routed = model.config.num_experts
        x = torch.randn(50, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            output, scores = layer.mlp(x[None])[0], layer.mlp.gate.score(x)
        if model.config.routing == "threshold":
            runs = scores >= layer.mlp.gate.threshold
        else:
            runs = scores >= scores.sort(dim=1, descending=True).values[:, model.config.num_experts_per_tok - 1, None]
        assert 0 < runs.float().mean() < 1
        runs = F.pad(runs, (0, labels.max() + 1 - num_routed), value=True)  # the shared ones
        expected = F.linear(activations(mlp, x) * runs[:, labels], mlp["down_proj.weight"], mlp.get("down_proj.bias"))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_3_experts_partition_the_neurons(kind, run_of):
    """Each neuron's rows and column lie once, and bit by bit, where the split says."""
    run = run_of(kind)
    dense, moe = load_file(run.model / "model.safetensors"), load_file(run.moe / "model.safetensors")
    for layer in range(load(run.model).config.num_hidden_layers):
        labels, mlp = labels_of(run, layer), f"model.layers.{layer}.mlp."
        width = 64 // run.num_experts
        assert labels.dtype == torch.int64
        assert labels.bincount().tolist() == [width] * run.num_experts
        gate, up = moe[mlp + "experts.gate_up_proj"].chunk(2, dim=1)  # [E, W, H] each
        down = moe[mlp + "experts.down_proj"].transpose(1, 2)
        for name, routed in {"gate_proj": gate, "up_proj": up, "down_proj": down}.items():
            source, places = dense[mlp + name + ".weight"], routed.flatten(0, 1)
            if mlp + f"shared_experts.{name}.weight" in moe:
                shared = moe[mlp + f"shared_experts.{name}.weight"]
                places = torch.cat([places, shared.T if name == "down_proj" else shared])
            source = source.T if name == "down_proj" else source
            assert len(places) == 64
            for expert in range(run.num_experts):
                place = places[expert * width : (expert + 1) * width]
                assert place.dtype == source.dtype
                assert torch.equal(place, source[labels == expert])


def test_4_gates_see_what_the_mlp_sees(plain_run, shared_run):
    for run, tolerance in ((plain_run, dict(rtol=0.02, atol=0.005)), (shared_run, dict(rtol=1e-4, atol=1e-5))):
        blocks = corpus_of(DenseCheckpoint(str(run.model)), run.text, None, block_size=32, max_tokens=512).blocks
        dense = load(run.model)
        for layer in range(3):
            torch.testing.assert_close(run.recorded(layer), mlp_inputs(dense, layer, blocks), **tolerance)
    x, rows = mlp_inputs(dense, 1, blocks), mlp_of(plain_run, 1)["gate_proj.weight"]
    recorded = plain_run.recorded(1, "hidden_gate_outputs")
    torch.testing.assert_close(recorded, F.silu(x @ rows.T), rtol=0.05, atol=0.02)  # bfloat16


@pytest.mark.parametrize(("kind", "rank"), [("shared", None), ("mlp_bias", 2)])
def test_4_gates_score_in_the_model_as_they_were_fitted(kind, rank, run_of):
    """Where no expert has changed the input, in the first layer, x is the dense model's."""
    run = run_of(kind)
    x, model = mlp_inputs(load(run.model), 0, [some_tokens()[0]]), load(run.moe)
    assert (model.config.gate_network, model.config.gate_rank, model.config.gate_bias) == ("linear", rank, True)
    state = torch.load(run.select_folder / GATE.format(0), weights_only=True)
    weight = state["weight"] if rank is None else state["output_weight"] @ state["input_weight"]
    with torch.no_grad():
        scores = model(some_tokens()[:1], output_router_logits=True).router_logits[0]
    torch.testing.assert_close(scores, x @ weight.T + state["bias"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "shared"])
def test_5_quality_is_recall_and_mass_recall_on_held_out_tokens(kind, run_of):
    """As the manifest has them, against sets of experts token by token; and the gate beats the best constant choice."""
    run = run_of(kind)
    model = load(run.moe)
    k, routed = model.config.num_experts_per_tok, model.config.num_experts
    for layer in range(3):
        reported = json.loads((run.select_folder / "manifest.json").read_text())["metrics"][GATE.format(layer)]
        labels, x, mlp = labels_of(run, layer), run.recorded(layer), mlp_of(run, layer)
        if kind == "plain":  # sums of squared gate activations
            squares = run.recorded(layer, "hidden_gate_outputs").square()
            truth = torch.stack([squares[:, labels == expert].sum(1) for expert in range(routed)], dim=1)
        else:  # norms of outputs
            hidden, down = activations(mlp, x), mlp["down_proj.weight"]
            outputs = [hidden[:, labels == expert] @ down[:, labels == expert].T for expert in range(routed)]
            truth = torch.stack([output.norm(dim=1) for output in outputs], dim=1)
        with torch.no_grad():
            guess = model.model.layers[layer].mlp.gate.score(x)
        constant = truth[: reported["train_tokens"]].mean(dim=0).expand_as(truth)
        quality = {"recall": guess, "constant_recall": constant}
        for name, scores in quality.items():
            recall = mass = 0.0
            held_out = range(reported["train_tokens"], len(x))
            assert len(held_out) == reported["valid_tokens"] == round(0.1 * len(x))
            for token in held_out:
                best, chosen = (set(s[token].topk(k).indices.tolist()) for s in (truth, scores))
                recall += len(best & chosen) / k / len(held_out)
                mass += (sum(truth[token, [*chosen]]) / sum(truth[token, [*best]])).item() / len(held_out)
            assert reported[name] == pytest.approx(recall, abs=0.011)  # one token may be torn between two experts
            assert reported[name.replace("recall", "mass_recall")] == pytest.approx(mass, rel=1e-3)
        assert reported["mass_recall"] > reported["constant_mass_recall"]


STAGES = ("split", "features", "select", "convert", "calibrate")


def test_6_the_same_bytes_interrupted_or_not(shared_run, tmp_path):
    """Each stage undisturbed, and killed half-way and run again."""
    runs = [shared_pipeline(shared_run.model, shared_run.text, tmp_path / name) for name in ("whole", "killed")]
    for stage in STAGES:
        undisturbed, killed = (getattr(run, stage) for run in runs)
        with renames() as names:
            assert undisturbed() == 0
        assert len(names) > 3
        with renames(fatal=len(names) // 2 + 1), pytest.raises(Killed):
            killed()
        assert killed() == 0
    whole, killed = (contents(run.save) for run in runs)
    assert killed == whole
    for name, content in contents(shared_run.save).items():
        assert whole[name] == content, name


def test_6_any_number_of_processes_records_the_same_batches(plain_run, tmp_path, monkeypatch):
    run = Pipeline(plain_run.model, plain_run.text, tmp_path)
    for rank, size in ((1, 3), (0, 1)):  # the second of three does its share, and one process the rest
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        assert run.features() == 0
        assert (run.features_folder / "manifest.json").exists() == (size == 1)
    # Gates cannot tell how many processes recorded what they learn from.
    (tmp_path / plain_run.split_folder.name).symlink_to(plain_run.split_folder)
    assert run.select() == 0
    for layer in range(3):
        assert torch.equal(run.recorded(layer), plain_run.recorded(layer))
        gates = [folder / GATE.format(layer) for folder in (run.select_folder, plain_run.select_folder)]
        assert gates[0].read_bytes() == gates[1].read_bytes()


@pytest.mark.parametrize("kind", ["shared", "mlp_bias, threshold", "bfloat16, tied"])
def test_7_thresholds(kind, run_of, tmp_path):
    """Minus infinity is the dense model; the right quantile meets the budget on the text that it came from."""
    run = run_of(kind)
    dense, model = logits(load(run.model)), load(run.moe)
    num_shared, num_routed = model.config.num_shared_experts, model.config.num_experts
    recorded = [run.recorded(layer) for layer in range(3)]

    @torch.no_grad()
    def run_on_average(converted) -> list[float]:
        gates = [layer.mlp.gate for layer in converted.model.layers]
        shares = [(g.score(x) >= g.threshold).float().mean().item() for g, x in zip(gates, recorded, strict=True)]
        return [num_shared + num_routed * share for share in shares]

    for num_selects in (num_shared + 1, 4, 7):
        moe = run.converted(tmp_path / str(num_selects), "--routing", "threshold", num_selects=num_selects)
        assert run_on_average(load(moe)) == pytest.approx([num_selects] * 3, rel=0.02)
        model.set_active_fraction(num_selects / 8)
        assert run_on_average(model) == pytest.approx([num_selects] * 3, rel=0.02)
    for threshold in (-float("inf"), -1e30):
        for layer in model.model.layers:
            layer.mlp.gate.threshold.fill_(threshold)
        assert (dense - logits(model)).abs().max() < DENSE_TOLERANCE


@pytest.mark.parametrize("fields", [{"seed": 1}, {"intermediate_size": 128}, {"num_hidden_layers": 2}])
def test_8_artifacts_of_another_model_are_refused(fields, plain_run, tmp_path, refuses):
    """Of other weights, another shape or fewer layers: in one line, and nothing is written."""
    other = Pipeline(make_llama(tmp_path / plain_run.model.name, **fields), plain_run.text, tmp_path / "out")
    assert [other.split(), other.features(), other.select()] == [0, 0, 0]
    for stage, wrong, right in [
        ("select", "split_folder", ["features_folder"]),
        ("select", "features_folder", ["split_folder"]),
        ("convert", "split_folder", ["select_folder"]),
        ("convert", "select_folder", ["split_folder"]),
    ]:
        run = Pipeline(other.model, other.text, tmp_path / f"{stage} with {wrong}")
        run.save.mkdir()
        getattr(run, wrong).symlink_to(getattr(plain_run, wrong))
        for name in right:
            getattr(run, name).symlink_to(getattr(other, name))
        before = {path: path.is_symlink() for path in run.save.iterdir()}
        refuses(getattr(run, stage), "was made from another model")
        assert {path: path.is_symlink() for path in run.save.iterdir()} == before


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_9_the_tokenizer_gives_the_sources_ids(text, tokenizers):
    source, converted = tokenizers
    assert converted(text)["input_ids"] == source(text)["input_ids"]


@pytest.fixture(scope="module")
def tokenizers(plain_run) -> list:
    """Those of the dense model and of the converted one."""
    return [AutoTokenizer.from_pretrained(folder) for folder in (plain_run.model, plain_run.moe)]


def test_9_models_are_compared_on_the_same_tokens_or_not_at_all(plain_run, tmp_path, run_script):
    other = Path(shutil.copytree(plain_run.model, tmp_path / "other"))
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.save_pretrained(other)
    arguments = ["--text_path", plain_run.text / "c4.jsonl", "--model_path", plain_run.moe, other]
    assert_refused(run_script(llama_evaluate.main, *arguments), "read other tokens of")


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("kind", ["plain", "shared", "mlp_bias", "mlp_bias, threshold"])
def test_10_fast_paths_equal_the_reference(kind, dtype, tolerance, device, run_of):
    """Every implementation of the experts, on one token, some, and many."""
    model = AutoModelForCausalLM.from_pretrained(run_of(kind).moe, dtype=dtype).eval().to(device)
    for num_tokens in (1, 24, 300):
        x = torch.randn(1, num_tokens, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        results = {}
        for name in ("eager", "llama_moe", "grouped_mm", "batched_mm"):
            model.set_experts_implementation(name)
            with torch.no_grad():
                results[name] = torch.cat([layer.mlp(x) for layer in model.model.layers])
        reference = results.pop("eager")
        for name, result in results.items():
            assert (result - reference).abs().max() <= tolerance * reference.abs().max(), (name, num_tokens)
