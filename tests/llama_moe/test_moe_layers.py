"""Gates, experts and the block against straight-line computations."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from llama_moe import LlamaMoEConfig
from llama_moe.moe_layers import GATE_CLASSES, BiasedExperts, Experts, LinearGate, MLPGate, MoEBlock

# float32 sums of the same terms in another order.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)
# Of the largest output: float32 as above; bf16 keeps 8 bits, and a handful of roundings add up.
RELATIVE_TO_LARGEST = {torch.float32: 1e-6, torch.bfloat16: 4 * 2**-8}
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
# experts, width, tokens, experts per token; grouped_mm takes widths of whole 16 bytes only.
SHAPES = [(1, 8, 3, 1), (4, 8, 1, 2), (4, 16, 9, 4), (8, 8, 40, 3)]
NARROW = [(1, 1, 1, 1), (6, 1, 5, 2), (3, 5, 7, 3)]


def random_experts(num_experts, width, hidden, *, biased=False, implementation="eager", dtype=torch.float32):
    """An experts module alone, with the few config fields it reads, and random parameters."""
    config = SimpleNamespace(
        num_experts=num_experts,
        moe_intermediate_size=width,
        hidden_size=hidden,
        hidden_act="silu",
        _experts_implementation=implementation,
    )
    experts = (BiasedExperts if biased else Experts)(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return experts.to(dtype)


def random_routing(tokens, num_experts, k, dtype=torch.float32):
    """Hidden-state-free routing: K different experts a token, and weights other than 1."""
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(tokens, num_experts, generator=generator).argsort(dim=-1)[:, :k]
    return index, torch.rand(tokens, k, generator=generator).add(0.5).to(dtype)


def naive_experts(experts, hidden_states, index, weights):
    """Token by token, selected expert by selected expert."""
    rows = []
    for x, chosen, weight in zip(hidden_states, index, weights, strict=True):
        total = torch.zeros_like(x)
        for e, w in zip(chosen, weight, strict=True):
            gate_up = experts.gate_up_proj[e] @ x
            if isinstance(experts, BiasedExperts):
                gate_up = gate_up + experts.gate_up_proj_bias[e]
            gate, up = gate_up.chunk(2)
            total = total + w * (experts.down_proj[e] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("implementation", "shape"),
    [(name, shape) for name in IMPLEMENTATIONS for shape in SHAPES + (NARROW if name != "grouped_mm" else [])],
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", RELATIVE_TO_LARGEST)
def test_experts_equal_the_naive_loop(implementation, biased, dtype, shape):
    experts, width, tokens, k = shape
    module = random_experts(experts, width, 16, biased=biased, implementation=implementation, dtype=dtype)
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    routing = random_routing(tokens, experts, k, dtype)
    before = [tensor.clone() for tensor in (x, *routing)]
    with torch.no_grad():
        output = module(x, *routing)
        assert torch.equal(output, module(x, *routing))
        expected = naive_experts(module.float(), x.float(), routing[0], routing[1].float())
    assert output.dtype == dtype
    assert expected.any()
    assert (output.float() - expected).abs().max() < RELATIVE_TO_LARGEST[dtype] * expected.abs().max()
    assert all(torch.equal(*pair) for pair in zip((x, *routing), before, strict=True)), "an input was modified"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 12), st.booleans(), st.data())
def test_any_shape_equals_the_naive_loop(num_experts, width, tokens, biased, data):
    k = data.draw(st.integers(1, num_experts))
    module = random_experts(num_experts, width, 6, biased=biased)
    x = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(2))
    routing = random_routing(tokens, num_experts, k)
    torch.testing.assert_close(module(x, *routing), naive_experts(module, x, *routing), **TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_equal_the_naive_loops(implementation, biased):
    module = random_experts(4, 8, 16, biased=biased, implementation=implementation)
    index, weights = random_routing(10, 4, 2)
    gradients = []
    for forward in (module, lambda *inputs: naive_experts(module, *inputs)):
        module.zero_grad()
        x = torch.randn(10, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
        w = weights.clone().requires_grad_()
        forward(x, index, w).square().sum().backward()
        gradients.append([x.grad, w.grad, *(p.grad.clone() for p in module.parameters())])
    for ours, naive in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)  # sums of squares are larger


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_no_tokens_give_no_rows(implementation, biased):
    module = random_experts(4, 8, 16, biased=biased, implementation=implementation)
    output = module(torch.empty(0, 16), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert output.shape == (0, 16)


# ---------------------------------------------------------------------------------------------------- gates


def random_gate(gate_class, **routing):
    gate = gate_class(16, 6, **routing)
    for parameter in gate.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    return gate


@pytest.mark.parametrize("gate_class", [MLPGate, LinearGate])
@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("multiply", [False, True])
def test_gate_selects_the_true_top_k(gate_class, k, multiply):
    gate = random_gate(gate_class, num_experts_per_tok=k, multiply_gate_scores=multiply)
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(4))
    scores, weights, index = gate(x)
    for token in range(20):
        if gate_class is LinearGate:
            expected = torch.stack([row @ x[token] for row in gate.weight])
        else:
            hidden = torch.stack([torch.tanh(row @ x[token]) for row in gate.input_weight])
            expected = torch.stack([row @ hidden for row in gate.output_weight])
        torch.testing.assert_close(scores[token], expected, **TOLERANCE)
        best = sorted(range(6), key=lambda e: -expected[e])[:k]
        assert set(index[token].tolist()) == set(best)
        if multiply:
            exponentials = expected[index[token]].exp()
            torch.testing.assert_close(weights[token], exponentials / exponentials.sum(), rtol=1e-4, atol=1e-6)
        else:
            assert weights[token].tolist() == [1.0] * k


def test_gate_sees_x_unnormalised():
    gate = random_gate(LinearGate, num_experts_per_tok=2)
    x = torch.randn(5, 16)
    torch.testing.assert_close(gate.score(4 * x), 4 * gate.score(x))


@pytest.mark.parametrize("gate_class", [MLPGate, LinearGate])
def test_bf16_weights_are_a_float32_softmax_rounded_once(gate_class):
    gate = random_gate(gate_class, num_experts_per_tok=4, multiply_gate_scores=True).bfloat16()
    scores, weights, index = gate(torch.randn(50, 16, generator=torch.Generator().manual_seed(4)).bfloat16())
    exponentials = scores.gather(1, index).double().exp()
    assert weights.dtype == torch.bfloat16
    # Rounding to bf16's 8 bits moves a number by at most 2**-8 of its size; the float32 softmax is far closer.
    torch.testing.assert_close(
        weights.double(), exponentials / exponentials.sum(dim=-1, keepdim=True), rtol=1.01 * 2**-8, atol=0
    )


@pytest.mark.parametrize("gate_class", [MLPGate, LinearGate])
def test_gates_hold_raw_parameters_only(gate_class):
    gate = random_gate(gate_class, num_experts_per_tok=2)
    assert not list(gate.children())
    assert all(type(parameter) is nn.Parameter for parameter in gate.parameters())


# ---------------------------------------------------------------------------------------------------- the block


def block_of(mlp_bias, num_selects, implementation="eager", **fields):
    config = LlamaMoEConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=num_selects,
        mlp_bias=mlp_bias,
        **fields,
    )
    config._experts_implementation_internal = implementation
    block = MoEBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(5))
    return block


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_all_experts_are_the_dense_swiglu(mlp_bias, implementation):
    block = block_of(mlp_bias, 4, implementation)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(6))
    gate, up = (part.reshape(32, 16) for part in block.experts.gate_up_proj.chunk(2, dim=1))
    down = block.experts.down_proj.permute(1, 0, 2).reshape(16, 32)
    gate_bias = up_bias = output_bias = None
    if mlp_bias:
        gate_bias, up_bias = (part.reshape(32) for part in block.experts.gate_up_proj_bias.chunk(2, dim=1))
        output_bias = block.output_bias
    dense = F.linear(F.silu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias), down, output_bias)
    output = block(x)
    assert isinstance(output, torch.Tensor)
    torch.testing.assert_close(output, dense, **TOLERANCE)


@pytest.mark.parametrize(
    "fields", [{"gate_network": gate, "multiply_gate_scores": m} for gate in GATE_CLASSES for m in (False, True)]
)
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_block_is_gate_then_experts(mlp_bias, fields):
    block = block_of(mlp_bias, 2, **fields)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(6))
    _, weights, index = block.gate(x.reshape(10, 16))
    expected = naive_experts(block.experts, x.reshape(10, 16), index, weights)
    if mlp_bias:
        expected = expected + block.output_bias
    torch.testing.assert_close(block(x), expected.reshape(2, 5, 16), **TOLERANCE)


def test_output_bias_is_added_once_whatever_the_budget():
    block, x = block_of(True, 2), torch.randn(1, 5, 16)
    with torch.no_grad():
        with_bias, bias = block(x), block.output_bias.clone()
        block.output_bias.zero_()
        torch.testing.assert_close(with_bias - block(x), bias.expand(1, 5, 16), **TOLERANCE)


def test_block_runs_only_the_selected_experts():
    block, x = block_of(False, 2), torch.randn(1, 1, 16)
    used = set(block.gate(x[0])[2].flatten().tolist())
    changed = copy.deepcopy(block)
    with torch.no_grad():
        for unused in set(range(4)) - used:
            changed.experts.gate_up_proj[unused] = float("nan")
            changed.experts.down_proj[unused] = float("nan")
    assert torch.equal(block(x), changed(x))


def test_experts_child_is_what_engines_look_for():
    block = block_of(False, 2)
    assert {name for name, _ in block.named_children()} == {"gate", "experts"}
    assert {name: parameter.ndim for name, parameter in block.experts.named_parameters()} == {
        "gate_up_proj": 3,
        "down_proj": 3,
    }
