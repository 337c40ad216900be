"""Gates, experts and the block against straight-line computations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llama_moe import LlamaMoEConfig
from llama_moe.expert_kernels import (
    FEW_PAIRS,
    FEW_TOKENS,
    FINE_WIDTH,
    LONG_ROW,
    MANY_EXPERTS,
    MOST_GROUPED_TOKENS,
    TOKENS_PER_CHUNK,
    PackedExperts,
    choose_kernel,
    grouped,
    masked_dense,
    one_by_one,
    one_token,
)
from llama_moe.gates import LinearGate, MLPGate
from llama_moe.moe_layers import BiasedExperts, Experts, MoEBlock, record_routing

# float32 sums of the same terms in another order.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)
# Relative to the largest output: float32 as above; bf16 keeps 8 bits, float16 11, and a handful of roundings add up.
RELATIVE_TO_LARGEST = {torch.float32: 1e-6, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}
IMPLEMENTATIONS = ["eager", "llama_moe", "grouped_mm", "batched_mm"]
KERNELS = [one_by_one, masked_dense, grouped, one_token]
# Experts, width and tokens: in between, odd, and beyond the sizes at which a kernel changes its products.
SIZES = {
    one_by_one: [(5, 6, 1), (4, 16, 70), (3, 43, 5)],
    masked_dense: [(5, 6, 1), (4, 16, 5), (5, 6, 13), (4, 16, 70), (3, 5, TOKENS_PER_CHUNK + 9)],
    grouped: [(4, 16, 1), (4, 8, 70), (4, 8, MOST_GROUPED_TOKENS + 9)],  # widths of whole 16 bytes only
    one_token: [(5, 6, 1), (4, 16, 1), (3 * MANY_EXPERTS, 6, 1), (3 * MANY_EXPERTS, LONG_ROW, 1)],
}


def fill(module, std):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return module


def config_of(num_experts, width, hidden=16, implementation="eager", **fields):
    fields = {"num_experts": num_experts, "num_experts_per_tok": 1, "num_attention_heads": 1} | fields
    size = (num_experts + fields.get("num_shared_experts", 0)) * width
    config = LlamaMoEConfig(hidden_size=hidden, intermediate_size=size, **fields)
    config._experts_implementation = implementation
    return config


def random_experts(num_experts, width, hidden, *, biased=False, implementation="eager", dtype=torch.float32):
    """An experts module alone, with random parameters."""
    experts = (BiasedExperts if biased else Experts)(config_of(num_experts, width, hidden, implementation))
    return fill(experts, 0.5).to(dtype)


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


def hidden_states(tokens, hidden=16, dtype=torch.float32):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(2)).to(dtype)


def require_naive(output, module, x, index, weights, dtype):
    with torch.no_grad():
        expected = naive_experts(module.float(), x.float(), index, weights.float())
    assert output.dtype == dtype
    assert expected.any()
    assert (output.float() - expected).abs().max() < 2 * RELATIVE_TO_LARGEST[dtype] * expected.abs().max()


@pytest.mark.parametrize(("kernel", "size"), [(kernel, size) for kernel in KERNELS for size in SIZES[kernel]])
@pytest.mark.parametrize(("biased", "dtype"), [(False, torch.float32), (True, torch.bfloat16), (True, torch.float32)])
def test_every_kernel_equals_the_naive_loop(kernel, biased, dtype, size):
    """Half of the slots are unused, and weigh 0."""
    experts, width, tokens = size
    module, x = random_experts(experts, width, 24, biased=biased, dtype=dtype), hidden_states(tokens, 24, dtype)
    index, weights = random_routing(tokens, experts, experts, dtype)
    weights = weights * (torch.rand(weights.shape, generator=torch.Generator().manual_seed(3)) < 0.5)
    with torch.no_grad():
        output = kernel(PackedExperts.of(module), x, index, weights)
    require_naive(output, module, x, index, weights, dtype)


@pytest.mark.parametrize(
    ("sizes", "dtype", "kernel"),  # experts, width, hidden, tokens, experts per token
    [
        ((4, FINE_WIDTH - 8, 16, 1, 2), torch.float32, masked_dense),
        ((4, 16, 16, 1, 2), torch.float32, one_token),
        ((4, 16, 16, 1, 2), torch.bfloat16, masked_dense),
        ((4, 16, 16, 30, 2), torch.bfloat16, grouped),
        ((4, 17, 16, 30, 2), torch.float32, one_by_one),
        ((4, 16, 16, FEW_PAIRS // 2 + 1, 2), torch.float32, one_by_one),
        ((2, 1024, 2048, 2, 1), torch.bfloat16, grouped),
        ((2, 1024, 2048, 2, 1), torch.float32, one_by_one),
        ((4, 16, 16, 30, 2), torch.float64, one_by_one),
    ],
)
def test_what_runs_on_a_cpu(sizes, dtype, kernel):
    experts, width, hidden, tokens, k = sizes
    module = random_experts(experts, width, hidden, dtype=dtype)
    weights = random_routing(tokens, experts, k, dtype)[1]
    with torch.no_grad():
        chosen = choose_kernel(PackedExperts.of(module), hidden_states(tokens, hidden, dtype), weights, "top_k")
    assert chosen is kernel


@pytest.mark.parametrize(
    ("capability", "width", "tokens", "routing", "kernel"),
    [
        ((9, 0), 8, FEW_TOKENS + 1, "top_k", None),  # transformers' own
        ((9, 0), 8, FEW_TOKENS + 1, "threshold", grouped),
        ((9, 0), 8, FEW_TOKENS, "threshold", masked_dense),
        ((9, 0), 6, FEW_TOKENS + 1, "top_k", masked_dense),
        ((7, 5), 8, FEW_TOKENS + 1, "top_k", masked_dense),
    ],
)
def test_what_runs_on_a_gpu(capability, width, tokens, routing, kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    packed = PackedExperts.of(random_experts(4, width, 16))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(tokens, 16, device="cuda")
        assert choose_kernel(packed, x, torch.ones(tokens, 4), routing) is kernel


@pytest.mark.parametrize(("width", "routing"), [(6, "top_k"), (8, "threshold")])
def test_an_exported_layer_takes_any_number_of_tokens(width, routing):
    module = random_experts(4, width, 16, implementation="llama_moe")
    module.config.routing = routing
    tokens = torch.export.Dim("tokens")
    inputs = {count: (hidden_states(count), *random_routing(count, 4, 4)) for count in (40, 2, 23, 24, 600)}
    exported = torch.export.export(module, inputs[40], dynamic_shapes=({0: tokens},) * 3).module()
    for each in inputs.values():
        torch.testing.assert_close(exported(*each), module(*each), **TOLERANCE)


@pytest.mark.parametrize(("kernel", "tokens"), [(one_by_one, 70), (grouped, 70), (one_token, 1)])
def test_what_no_token_uses_is_never_read(kernel, tokens):
    module, x = random_experts(6, 16, 32), hidden_states(tokens, 32)
    index, weights = random_routing(tokens, 6, 6)
    weights[(index == 2) | (index == 5)] = 0
    with torch.no_grad():
        expected = kernel(PackedExperts.of(module), x, index, weights)
        for unused in (2, 5):
            module.gate_up_proj[unused] = module.down_proj[unused] = float("nan")
        assert expected.any()
        assert torch.equal(kernel(PackedExperts.of(module), x, index, weights), expected)


@pytest.mark.parametrize("run", [Experts.__call__, *KERNELS])
def test_slots_of_another_process_are_skipped(run):
    """Expert parallelism marks them with an index beyond the local experts and weight 0."""
    module, tokens = random_experts(4, 16, 32), 1 if run is one_token else 9
    index, weights = random_routing(tokens, 4, 4)
    x, elsewhere = hidden_states(tokens, 32), torch.arange(4) % 2 == 0
    experts, weights = module if run is Experts.__call__ else PackedExperts.of(module), weights * ~elsewhere
    with torch.no_grad():
        output = run(experts, x, index.masked_fill(elsewhere, 4), weights)
        torch.testing.assert_close(output, naive_experts(module, x, index, weights), **TOLERANCE)


@pytest.mark.parametrize("run", [*IMPLEMENTATIONS, *KERNELS])
def test_gradients_equal_the_naive_loops(run):
    single = run in ("grouped_mm", grouped)  # which know no float64
    dtype, bound = (torch.float32, 5e-6) if single else (torch.float64, 1e-13)
    module = random_experts(4, 8, 16, biased=True, implementation=run if isinstance(run, str) else "", dtype=dtype)
    tokens = 1 if run is one_token else 10
    index, weights = random_routing(tokens, 4, 4 if run is one_token else 2, dtype)
    ours = module if isinstance(run, str) else lambda *inputs: run(PackedExperts.of(module), *inputs)
    gradients = []
    for forward in (ours, lambda *inputs: naive_experts(module, *inputs)):
        module.zero_grad()
        x, w = hidden_states(tokens, dtype=dtype).requires_grad_(), weights.clone().requires_grad_()
        forward(x, index, w).square().sum().backward()
        gradients.append([x.grad, w.grad, *(p.grad.clone() for p in module.parameters())])
    for own, naive in zip(*gradients, strict=True):
        assert (own - naive).abs().max() < bound * naive.abs().max()


def test_the_code_of_another_checkpoint_changes_nothing():
    """A checkpoint's own copy of the package, of another version, registers its kernels with transformers."""
    ALL_EXPERTS_FUNCTIONS.register("llama_moe", lambda *_: pytest.fail("the other copy's kernels ran"))
    module = random_experts(4, 8, 16, implementation="llama_moe")
    assert module(hidden_states(3), *random_routing(3, 4, 2)).any()


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(IMPLEMENTATIONS), st.integers(1, 6), st.integers(1, 20), st.integers(1, 12), st.data())
@torch.no_grad()
def test_any_shape_equals_the_naive_loop(implementation, num_experts, width, tokens, data):
    k, biased = data.draw(st.integers(1, num_experts)), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    width = 8 * width if implementation == "grouped_mm" else width  # whole 16 bytes only
    module = random_experts(num_experts, width, 16, biased=biased, implementation=implementation, dtype=dtype)
    x, routing = hidden_states(tokens, dtype=dtype), random_routing(tokens, num_experts, k, dtype)
    before = [tensor.clone() for tensor in (x, *routing)]
    output = module(x, *routing)
    assert all(torch.equal(*pair) for pair in zip((x, *routing), before, strict=True)), "an input was modified"
    require_naive(output, module, x, *routing, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens_give_no_rows(implementation):
    module = random_experts(4, 8, 16, biased=True, implementation=implementation)
    output = module(torch.empty(0, 16), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert output.shape == (0, 16)


def random_gate(gate_class=LinearGate, num_experts_per_tok=1, **routing):
    return fill(gate_class(16, 6, num_experts_per_tok=num_experts_per_tok, **routing), 1)


@pytest.mark.parametrize("gate_class", [MLPGate, LinearGate])
@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("multiply", [False, True])
def test_gate_selects_the_true_top_k(gate_class, k, multiply):
    gate = random_gate(gate_class, num_experts_per_tok=k, multiply_gate_scores=multiply)
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(4))
    scores, weights, index = gate(x)
    if gate_class is LinearGate:
        expected = x @ gate.weight.T
    else:
        expected = torch.tanh(x @ gate.input_weight.T) @ gate.output_weight.T
    torch.testing.assert_close(scores, expected, **TOLERANCE)
    for token in range(20):
        best = sorted(range(6), key=lambda e: -expected[token, e])[:k]
        assert set(index[token].tolist()) == set(best)
        if multiply:
            exponentials = expected[token, index[token]].exp()
            torch.testing.assert_close(weights[token], exponentials / exponentials.sum(), rtol=1e-4, atol=1e-6)
        else:
            assert weights[token].tolist() == [1.0] * k


@pytest.mark.parametrize("gate_class", [MLPGate, LinearGate])
def test_bf16_weights_are_a_float32_softmax_rounded_once(gate_class):
    gate = random_gate(gate_class, num_experts_per_tok=4, multiply_gate_scores=True).bfloat16()
    scores, weights, index = gate(torch.randn(50, 16, generator=torch.Generator().manual_seed(4)).bfloat16())
    exponentials = scores.gather(1, index).double().exp()
    assert weights.dtype == torch.bfloat16
    expected = exponentials / exponentials.sum(dim=-1, keepdim=True)
    # Rounding to bf16's 8 bits moves a number by at most 2**-8 of its size; the float32 softmax is far closer.
    torch.testing.assert_close(weights.double(), expected, rtol=1.01 * 2**-8, atol=0)


def test_noise_is_added_while_training_only():
    gate = random_gate(num_experts_per_tok=3, noise=0.5)
    x = torch.zeros(4000, 16)  # scores without noise are 0
    assert not gate.eval()(x)[0].any()
    noise = gate.train()(x)[0]
    # 24,000 normal draws: their standard deviation is off by about 1 / sqrt(48,000).
    assert noise.std().item() == pytest.approx(0.5, rel=4 / 48000**0.5)
    assert noise.mean().item() == pytest.approx(0, abs=4 * 0.5 / 24000**0.5)


@pytest.mark.parametrize("multiply", [False, True])
@pytest.mark.parametrize("routing", [{}, {"routing": "threshold"}])
def test_score_scale_factor_multiplies_the_weights(multiply, routing):
    x = torch.randn(7, 16)
    options = {"num_experts_per_tok": 3, "multiply_gate_scores": multiply} | routing
    plain, scaled = (random_gate(**options, score_scale_factor=factor)(x)[1] for factor in (1.0, 2.5))
    torch.testing.assert_close(scaled, 2.5 * plain)


@settings(max_examples=60, deadline=None)
@given(st.floats(-3, 3), st.integers(0, 6), st.integers(1, 6), st.booleans(), st.integers(0, 100))
def test_threshold_routing_runs_what_reaches_it_within_the_bounds(threshold, least, most, multiply, seed):
    least = min(least, most)
    bounds = dict(min_experts_per_tok=least, max_experts_per_tok=most)
    gate = random_gate(routing="threshold", multiply_gate_scores=multiply, **bounds)
    gate.threshold.fill_(threshold)
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        scores, weights, index = gate(x)
    mask = gate.mask(scores)
    for token in range(12):
        ranked = sorted(range(6), key=lambda e: -scores[token, e])
        reached = [e for e in ranked if scores[token, e] >= threshold]
        expected = set(ranked[:least]) | set(reached[:most])
        used = {int(e): float(w) for e, w in zip(index[token], weights[token], strict=True) if w != 0}
        assert set(used) == expected == set(mask[token].nonzero().flatten().tolist())
        if not multiply:
            assert set(used.values()) <= {1.0}
        elif expected:
            chosen = sorted(expected)
            torch.testing.assert_close(torch.tensor([used[e] for e in chosen]), scores[token, chosen].softmax(0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.integers(0, 6), st.floats(0.02, 0.98), st.integers(0, 100))
def test_quantiles_know_the_bounds_of_a_token(one, other, share, seed):
    least, most = min(one, other), max(one, other, 1)
    bounds = dict(min_experts_per_tok=least, max_experts_per_tok=most)
    gate = random_gate(routing="threshold", **bounds)
    scores = torch.randn(2000, 6, generator=torch.Generator().manual_seed(seed)) ** 3
    gate.store_score_quantiles(scores)
    gate.set_active_share(share)
    possible = min(max(share, least / 6), most / 6)
    assert gate.mask(scores).float().mean().item() == pytest.approx(possible, abs=1 / 1024 + 1 / 12000)


def test_quantiles_are_of_finite_scores_and_for_thresholds():
    gate = random_gate(routing="threshold")
    for wrong in (torch.empty(0, 6), torch.tensor([[1.0, float("nan")]])):
        with pytest.raises(ValueError, match="all of them finite"):
            gate.store_score_quantiles(wrong)
    for act in (lambda g: g.store_score_quantiles(torch.randn(5, 6)), lambda g: g.set_active_share(0.5)):
        with pytest.raises(ValueError, match="only threshold routing has score quantiles"):
            act(random_gate())


def test_the_ends_of_the_shares_are_all_and_none():
    gate = random_gate(routing="threshold")
    gate.store_score_quantiles(torch.randn(50, 6))
    for share, every in ((1.0, True), (0.0, False)):
        gate.set_active_share(share)
        assert gate.mask(torch.randn(50, 6) * 1e6).all().item() == every
        assert gate.mask(torch.randn(50, 6) * 1e6).any().item() == every


@pytest.mark.parametrize("routing", [{}, {"routing": "threshold"}])
def test_weights_of_one_carry_the_gradient_of_a_sigmoid_around_the_boundary(routing):
    gate = random_gate(num_experts_per_tok=2, **routing)
    if routing:
        gate.threshold.fill_(0.2)
    x = torch.randn(9, 16)
    scores, weights, index = gate(x)
    assert set(weights.unique().tolist()) <= {0.0, 1.0}
    upstream = torch.randn(weights.shape)
    (weights * upstream).sum().backward()
    gradient = torch.zeros_like(scores)  # with respect to the scores, straight from the definition
    for token in range(9):
        for slot, expert in enumerate(index[token]):
            if weights[token, slot] != 0:
                boundary = 0.2 if routing else scores[token, index[token]].min()
                soft = torch.sigmoid(scores[token, expert] - boundary)
                gradient[token, expert] = upstream[token, slot] * soft * (1 - soft)
    torch.testing.assert_close(gate.weight.grad, (gradient.T @ x).detach(), rtol=1e-4, atol=1e-5)


def test_statistics_count_what_ran():
    block = fill(MoEBlock(config_of(8, 4, routing="threshold", gate_network="linear")), 0.5)
    block.gate.threshold.fill_(0.5)
    batches = [torch.randn(2, 5, 16), torch.randn(1, 7, 16)]
    block(batches[0])
    with record_routing(block) as (counted,):
        for x in batches:
            block(x)
    block(batches[1])
    assert not block.gate._forward_hooks
    scores = torch.cat([block.gate.score(x.reshape(-1, 16)) for x in batches])
    mask = scores >= 0.5
    assert counted.num_tokens == 17
    assert counted.runs.tolist() == mask.sum(0).tolist()
    assert counted.tokens_by_cost.tolist() == [int((mask.sum(1) == cost).sum()) for cost in range(9)]
    assert counted.experts_per_tok == pytest.approx(mask.sum().item() / 17)
    torch.testing.assert_close(counted.expert_load, mask.double().mean(0))
    torch.testing.assert_close(counted.score_sum, scores.double().sum(0), rtol=1e-5, atol=1e-5)


def test_the_block_weighs_its_experts_by_its_gate():
    block = fill(MoEBlock(config_of(3, 8, num_experts_per_tok=2, multiply_gate_scores=True)), 0.5)
    x = hidden_states(10)
    _, weights, index = block.gate(x)
    torch.testing.assert_close(block(x[None])[0], naive_experts(block.experts, x, index, weights), **TOLERANCE)
