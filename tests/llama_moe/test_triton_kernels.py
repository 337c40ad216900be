"""The GPU's kernels, run by Triton's interpreter on the CPU, against straight-line computations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_modeling_llama_moe import make_moe, some_tokens, with_thresholds
from test_moe_layers import hidden_states, naive_experts, random_experts, random_routing, require_naive
from transformers.dynamic_module_utils import get_imports

from llama_moe import triton_kernels
from llama_moe.expert_kernels import PackedExperts
from llama_moe.triton_kernels import FEW_TOKENS, TRITON_IMPLEMENTATION, run_triton_kernels

MANY = FEW_TOKENS + 1
TOLERANCE = dict(rtol=1e-5, atol=1e-5)
HIDDEN = 40  # not a whole number of tiles


def run(module, x, index, weights):
    with torch.no_grad():
        packed = PackedExperts.of(module)
        return run_triton_kernels(x, index, weights, packed.gate_up, packed.down, packed.gate_up_bias)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6),
    st.sampled_from([16, 43, 48, 80]),
    st.one_of(st.integers(1, 20), st.integers(MANY, MANY + 20)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.data(),
)
def test_any_shape_equals_the_naive_loop(experts, width, tokens, dtype, biased, used, data):
    k = data.draw(st.integers(1, experts))
    module, x = random_experts(experts, width, HIDDEN, biased=biased, dtype=dtype), hidden_states(tokens, HIDDEN, dtype)
    index, weights = random_routing(tokens, experts, k, dtype)
    weights = weights * (torch.rand(weights.shape, generator=torch.Generator().manual_seed(3)) < used)
    output = run(module, x, index, weights)
    if used:
        require_naive(output, module, x, index, weights, dtype)
    else:
        assert not output.any()


@pytest.mark.parametrize("tokens", [3, MANY])
def test_one_expert_takes_all_and_the_others_are_never_read(tokens):
    module, x = random_experts(4, 16, HIDDEN), hidden_states(tokens, HIDDEN)
    index, weights = torch.arange(4).expand(tokens, 4), torch.tensor([0.0, 0, 1, 0]).expand(tokens, 4)
    with torch.no_grad():
        expected = naive_experts(module, x, index, weights)
        for unused in (0, 1, 3):
            module.gate_up_proj[unused] = module.down_proj[unused] = float("nan")
    torch.testing.assert_close(run(module, x, index, weights), expected, **TOLERANCE)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_an_unused_pair_may_overflow():
    """Few tokens are computed for every expert that one of them uses."""
    module, x = random_experts(2, 16, HIDDEN), hidden_states(2, HIDDEN)
    index, weights = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with torch.no_grad():
        module.gate_up_proj[1, 0] = x[0] * 1e38  # infinite for the first token, which does not run this expert
        module.down_proj[1, :, 0] = 0
        module.gate_up_proj[1, 16] = 0
        expected = naive_experts(module, x, index[:, :1], weights[:, :1])[:1]
    torch.testing.assert_close(run(module, x, index, weights)[:1], expected, **TOLERANCE)


@pytest.mark.parametrize("tokens", [3, MANY])
def test_slots_of_another_process_are_skipped(tokens):
    """Expert parallelism marks them with an index beyond the local experts and weight 0."""
    module, x, elsewhere = random_experts(4, 16, HIDDEN), hidden_states(tokens, HIDDEN), torch.arange(4) % 2 == 0
    index, weights = random_routing(tokens, 4, 4)
    weights = weights * ~elsewhere
    output = run(module, x, index.masked_fill(elsewhere, 4), weights)
    torch.testing.assert_close(output, naive_experts(module, x, index, weights).detach(), **TOLERANCE)


def test_tokens_and_columns_come_in_chunks(monkeypatch):
    """Each of what fits a part of the memory, the last ones smaller."""
    monkeypatch.setattr(triton_kernels, "TOKENS_PER_CHUNK", MANY + 3)
    monkeypatch.setattr(triton_kernels, "FEWEST_COLUMNS", 16)
    monkeypatch.setattr(triton_kernels, "OUTPUT_BYTES", 0)
    module, x = random_experts(3, 16, HIDDEN), hidden_states(2 * MANY + 8, HIDDEN)
    index, weights = random_routing(len(x), 3, 2)
    require_naive(run(module, x, index, weights), module, x, index, weights, torch.float32)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_the_reference_ones(frozen):
    index, weights = random_routing(7, 5, 5)
    weights = weights * (torch.rand(weights.shape, generator=torch.Generator().manual_seed(3)) < 0.5)
    gradients = []
    for implementation in ("eager", TRITON_IMPLEMENTATION):
        module = random_experts(5, 16, 24, biased=True, implementation=implementation).requires_grad_(not frozen)
        x, w = hidden_states(7, 24).requires_grad_(), weights.clone().requires_grad_()
        module(x, index, w).square().sum().backward()
        gradients.append([x.grad, w.grad, *(p.grad for p in module.parameters() if not frozen)])
    for expected, ours in zip(*gradients, strict=True):
        assert (ours - expected).abs().max() < 5e-6 * expected.abs().max()


@pytest.mark.parametrize("routing", [{}, {"routing": "threshold"}])
def test_compiled_decoding_with_a_static_cache_is_one_graph(routing, monkeypatch):
    """Prompt and tokens by the kernels, with the text that the reference gives."""
    ran, few_tokens = [], triton_kernels._few_tokens
    monkeypatch.setattr(triton_kernels, "_few_tokens", lambda *a: ran.append(len(a[0])) or few_tokens(*a))
    model = with_thresholds(make_moe(**routing, num_hidden_layers=1, eos_token_id=None))
    tokens = some_tokens()
    options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False)
    model.set_experts_implementation("eager")
    expected = model.generate(tokens, **options)
    model.set_experts_implementation(TRITON_IMPLEMENTATION)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(model.generate(tokens, **options, cache_implementation="static"), expected)
    assert ran == [tokens.numel(), len(tokens), len(tokens)]


def test_a_saved_model_asks_for_the_kernels_by_name(tmp_path):
    make_moe().save_pretrained(tmp_path)
    model = type(make_moe()).from_pretrained(tmp_path, experts_implementation=TRITON_IMPLEMENTATION)
    assert model.config._experts_implementation == TRITON_IMPLEMENTATION


COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from llama_moe import triton_kernels

FLOATS = ("x", "gate_up", "bias", "weights", "hidden", "down", "out", "outputs")
KERNELS = "_list_experts _map_slots _list_slots _few_gate_up _few_down _gate_up _down _sum_slots".split()
INTEGERS = {"index": "*i64", "by_expert": "*i32", "used": "*i32", "slots": "*i32", "counts": "*i32"}
for name in KERNELS:
    kernel = getattr(triton_kernels, name)
    tile = getattr(kernel, "configs", None)
    kernel = kernel.fn if tile else kernel
    sizes = {"TOKENS": 16, "EXPERTS": 64, "BLOCK": 512, "HAS_BIAS": True} | (tile[0].kwargs if tile else {})
    constants = {n: sizes[n] for n in kernel.arg_names if n in sizes}
    types = {n: "*" + sys.argv[1] for n in FLOATS} | INTEGERS | dict.fromkeys(constants, "constexpr")
    signature = {n: types.get(n, "i32") for n in kernel.arg_names}
    compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", int(sys.argv[2]), 32))
"""


@pytest.mark.parametrize(("dtype", "capability"), [("bf16", 90), pytest.param("fp32", 80, marks=pytest.mark.slow)])
def test_the_kernels_compile_for_gpus(dtype, capability, tmp_path):
    """As far as machine code, which needs no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, dtype, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_needs_triton():
    """Neither to load a checkpoint nor to run it: the default's kernels take over."""
    assert not {"triton", "triton.language"} & set(get_imports(triton_kernels.__file__))
    code = """
import sys
sys.modules["triton"] = None
import torch
from test_moe_layers import hidden_states, naive_experts, random_experts, random_routing
module, x = random_experts(4, 16, 32, implementation="llama_moe_triton"), hidden_states(3, 32)
routing = random_routing(3, 4, 2)
torch.testing.assert_close(module(x, *routing), naive_experts(module, x, *routing))
"""
    paths = [Path(__file__).parent, Path(triton_kernels.__file__).parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
