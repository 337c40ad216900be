"""Scores per expert against plain loops, activations against transformers' own MLP."""

import pytest
import torch
from conftest import make_llama
from transformers import LlamaForCausalLM

from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.layers.mlp import GatedMLP
from run_moefication.moefication.layers.scores import ExpertScorer, OutputNorms

# float32 sums in another order.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)
FORMULAS = {
    "plain": lambda values: abs(sum(values)),
    "positive": lambda values: sum(max(value, 0.0) for value in values),
    "l2_norm": lambda values: sum(value * value for value in values),
}


@pytest.mark.parametrize("criterion", FORMULAS)
@pytest.mark.parametrize(("experts", "width"), [(1, 6), (3, 4), (6, 1)])
@pytest.mark.parametrize("shared", [0, 4])  # neurons of no expert among these
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_the_formulas(criterion, experts, width, dtype, shared):
    generator = torch.Generator().manual_seed(0)
    neurons = torch.randperm(experts * width + shared, generator=generator)[: experts * width].view(experts, width)
    activations = torch.randn(7, experts * width + shared, generator=generator).to(dtype)
    scores = ExpertScorer(neurons, criterion)(activations)
    assert scores.dtype == torch.float32
    for token in range(7):
        values = activations[token].float().tolist()
        expected = [FORMULAS[criterion]([values[neuron] for neuron in members]) for members in neurons.tolist()]
        torch.testing.assert_close(scores[token], torch.tensor(expected), **TOLERANCE)


@pytest.mark.parametrize(
    ("criterion", "scores"), [("plain", [2.0, 6.0]), ("positive", [1.0, 6.0]), ("l2_norm", [10.0, 20.0])]
)
def test_scores_by_hand(criterion, scores):
    scorer = ExpertScorer(torch.tensor([[0, 2], [1, 3]]), criterion)
    assert scorer(torch.tensor([[1.0, 2.0, -3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])).tolist() == [scores, [0.0, 0.0]]


@pytest.mark.parametrize("criterion", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_are_summed_in_float32(criterion, dtype):
    # 1 + 3000 ones: in bfloat16 such a sum stops at 256, in float16 at 2048.
    assert ExpertScorer(torch.arange(3001)[None], criterion)(torch.ones(1, 3001, dtype=dtype)).tolist() == [[3001.0]]


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj"])
@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_the_models(projection, mlp_bias, dtype, tmp_path):
    folder = make_llama(tmp_path / "llama", mlp_bias=mlp_bias, dtype=dtype)
    mlp = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).model.layers[1].mlp
    inputs = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    found = GatedMLP.of_dense(DenseCheckpoint(str(folder)), 1, "cpu")
    recompute = found.activations if projection == "up_proj" else found.gate_activations
    with torch.no_grad():
        expected = mlp.act_fn(mlp.gate_proj(inputs))
        if projection == "up_proj":
            expected = expected * mlp.up_proj(inputs)
    torch.testing.assert_close(recompute(inputs), expected, **TOLERANCE)
    # Doubled inputs do not double SiLU: nothing is normalised on the way.
    assert not torch.allclose(recompute(2 * inputs), 2 * recompute(inputs), rtol=0.01)


@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("experts", [1, 4, 64])
def test_output_norms_are_those_of_the_models_mlp_cut_to_an_expert(experts, mlp_bias, tmp_path):
    """The bias of down_proj belongs to no expert."""
    folder = make_llama(tmp_path / "llama", mlp_bias=mlp_bias)
    mlp = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).model.layers[1].mlp
    generator = torch.Generator().manual_seed(0)
    inputs, neurons = torch.randn(9, 32, generator=generator), torch.randperm(64, generator=generator)
    neurons = neurons.view(experts, -1)
    with torch.no_grad():
        hidden = mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
        norms = OutputNorms(mlp.down_proj.weight.T, neurons)(hidden)
        for expert, members in enumerate(neurons):
            output = hidden[:, members] @ mlp.down_proj.weight[:, members].T
            torch.testing.assert_close(norms[:, expert], output.norm(dim=1), rtol=1e-4, atol=1e-5)
