"""Layers share a budget by how much the loss depends on them."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import Pipeline, load_dense, load_moe

from llama_moe.configuration_llama_moe import shift_to_mean
from run_moefication import llama_calibrate
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.checkpoints.moe import MoECheckpoint
from run_moefication.moefication.progress import no_progress
from run_moefication.moefication.stages.layer_budgets import DECAY, allocate, measure_sensitivity

EXPERTS, SHARED, SELECTS = 16, 2, 9


@pytest.fixture(scope="module")
def converted(tiny_llama, text_folder, tmp_path_factory) -> Pipeline:
    """Sixteen experts, two of them shared, routed by a threshold."""
    activations = ["--cluster_on", "activations", "--num_shared_experts", SHARED, "--train_data_path", text_folder]
    return Pipeline(
        tiny_llama,
        text_folder,
        tmp_path_factory.mktemp("out"),
        num_experts=EXPERTS,
        num_selects=SELECTS,
        split_options=[*activations, "--block_size", 32],
        select_options=["--gate_network", "linear", "--select_criterion", "output_norm"],
        convert_options=["--routing", "threshold"],
    ).run()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0, 1), st.floats(0, 1))
def test_shifted_values_meet_their_mean_within_their_bounds(values, bound, place):
    least, most = min(bound, 0.9), 1.0
    mean = least + place * (most - least)
    shifted = shift_to_mean(values, mean, least, most)
    assert sum(shifted) / len(shifted) == pytest.approx(mean, abs=1e-9)
    assert all(least <= value <= most for value in shifted)
    inside = [(a, b) for a, b in zip(values, shifted, strict=True) if least < b < most]
    assert len({round(b - a, 6) for a, b in inside}) <= 1


def test_budgets_make_the_total_rise_least():
    sensitivities, fraction, least = [0.4, 0.05, 0.02, 0.01], 0.4, 0.1

    def total(budgets):
        return sum(c * math.exp(-DECAY * b) for c, b in zip(sensitivities, budgets, strict=True))

    budgets = allocate(sensitivities, fraction, least)
    assert sum(budgets) / 4 == pytest.approx(fraction)
    assert budgets == sorted(budgets, reverse=True)
    for giver in range(4):
        for taker in range(4):
            moved = list(budgets)
            moved[giver] -= 0.01
            moved[taker] += 0.01
            if least <= moved[giver] and moved[taker] <= 1:
                assert total(moved) >= total(budgets) - 1e-12
    assert allocate([0.1] * 3, 0.5, 0.1) == pytest.approx([0.5] * 3)


def test_a_layers_sensitivity_is_the_rise_of_the_loss_when_it_alone_is_cut(converted, tiny_llama):
    checkpoint = DenseCheckpoint(str(tiny_llama))
    moe = MoECheckpoint(converted.moe, checkpoint)
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randint(3, 300, (length,), generator=generator) for length in (40, 40, 17)]
    share = (SELECTS - SHARED) / (EXPERTS - SHARED)
    measured = measure_sensitivity(checkpoint, moe, moe.config, blocks, share, "cpu", no_progress)

    dense, cut = load_dense(tiny_llama), load_moe(converted.moe, SELECTS - SHARED)

    @torch.no_grad()
    def loss() -> float:
        losses = [dense(block[None], labels=block[None]).loss.item() * (len(block) - 1) for block in blocks]
        return sum(losses) / sum(len(block) - 1 for block in blocks)

    whole = loss()
    for layer, rise in enumerate(measured):
        kept = dense.model.layers[layer].mlp
        dense.model.layers[layer].mlp = cut.model.layers[layer].mlp
        assert loss() - whole == pytest.approx(rise, abs=2e-5)
        assert abs(rise) > 1e-4
        dense.model.layers[layer].mlp = kept


@pytest.mark.parametrize("routing", ["top_k", "threshold"])
def test_calibration_by_sensitivity_spends_the_same_budget_unevenly(routing, converted, text_folder, tmp_path):
    converted.moe = tmp_path / "moe"
    converted.convert_options = ["--routing", routing]
    assert converted.convert() == 0
    paths = ["--model_path", converted.model, "--moe_path", converted.moe, "--save_path", tmp_path / "calibrated"]
    options = ["--train_data_path", text_folder, "--block_size", 32, "--refit_gates", "--layer_budgets", "sensitivity"]
    assert llama_calibrate.main([*map(str, [*paths, *options])]) == 0
    manifest = json.loads((tmp_path / "calibrated" / "manifest.json").read_text())
    budgets = manifest["metrics"]["budgets"]["experts_per_tok"]
    assert len(set(budgets)) > 1
    assert sum(budgets) / 3 <= SELECTS - SHARED + 1e-3
    assert sum(budgets) / 3 == pytest.approx(SELECTS - SHARED, abs=1e-3 if routing == "threshold" else 1)
    layers = [metrics for metrics in manifest["metrics"].values() if "active_share" in metrics]
    for budget, metrics in zip(budgets, layers, strict=True):
        assert metrics["active_share"] == pytest.approx(budget / (EXPERTS - SHARED), abs=0.01)
    config = json.loads((tmp_path / "calibrated" / "config.json").read_text())
    assert config["layer_num_experts_per_tok"] == budgets
    assert config["num_experts_per_tok"] == (max(budgets) if routing == "top_k" else SELECTS - SHARED)


def test_layers_keep_their_differences_at_another_budget(converted):
    model = load_moe(converted.moe, SELECTS - SHARED)
    model.set_num_experts_per_tok([3, 7, 11])
    thresholds = [layer.mlp.gate.threshold.item() for layer in model.model.layers]
    gates = [layer.mlp.gate for layer in model.model.layers]
    model.set_active_fraction((SHARED + 8) / EXPERTS)
    for gate, budget in zip(gates, [4, 8, 12], strict=True):
        assert gate.threshold.item() == pytest.approx(gate.threshold_of_share(budget / (EXPERTS - SHARED)))
    model.set_active_fraction(1)
    assert [gate.threshold.item() for gate in gates] == pytest.approx([gates[0].LOWEST_THRESHOLD] * 3)
    model.set_num_experts_per_tok(7)  # as far apart as before they were all alike
    assert [gate.threshold.item() for gate in gates] == pytest.approx(thresholds)
    assert model.config.num_experts_per_tok == 7
    assert [model.config.experts_per_tok_of(layer) for layer in range(3)] == pytest.approx([3, 7, 11])
    model.config.num_experts_per_tok = 8
    assert [model.config.experts_per_tok_of(layer) for layer in range(3)] == pytest.approx([4, 8, 12])
