"""An MoE block seen as one MLP does what the block does."""

import pytest
import torch
from torch import nn

from llama_moe import LlamaMoEConfig
from llama_moe.moe_layers import MoEBlock
from run_moefication.moefication.layers.mlp import PackedMLP

HIDDEN, WIDTH, TOKENS = 16, 5, 40
TOLERANCE = dict(rtol=1e-4, atol=1e-5)
ROUTINGS = {
    "top_k": {"num_experts_per_tok": 2},
    "threshold": {"routing": "threshold"},
    "bounded": {"routing": "threshold", "min_experts_per_tok": 1, "max_experts_per_tok": 3},
}
GATES = {
    "mlp": {"gate_network": "mlp"},
    "linear": {"gate_network": "linear", "gate_bias": True},
    "rank": {"gate_network": "linear", "gate_rank": 2},
}


def make_block(num_shared=0, dtype=torch.float32, seed=0, **fields) -> tuple[LlamaMoEConfig, MoEBlock]:
    """A block of 6 routed experts with random parameters."""
    config = LlamaMoEConfig(
        hidden_size=HIDDEN,
        intermediate_size=(6 + num_shared) * WIDTH,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_experts=6,
        num_shared_experts=num_shared,
        **fields,
    )
    block = MoEBlock(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    if config.routing == "threshold":
        block.gate.threshold.fill_(0.3)
    return config, block.to(dtype)


def pack(config: LlamaMoEConfig, block: MoEBlock) -> PackedMLP:
    return PackedMLP(config, 0, block.state_dict().__getitem__, "cpu")


def inputs() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(packed: PackedMLP, x: torch.Tensor) -> torch.Tensor:
    selected = packed.gate.mask(packed.gate.score(x))
    hidden = packed.mask_(packed.activations(x), selected)
    output = hidden @ packed.down
    return output if packed.bias is None else output + packed.bias


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize("biases", [[], ["mlp_bias"], ["output_bias"], ["mlp_bias", "output_bias"]])
@pytest.mark.parametrize("gate", GATES)
def test_it_does_what_the_block_does(routing, num_shared, biases, gate):
    config, block = make_block(num_shared, **ROUTINGS[routing], **dict.fromkeys(biases, True), **GATES[gate])
    packed = pack(config, block)
    with torch.no_grad():
        expected = block(inputs()[None])[0]
        share = packed.gate.mask(packed.gate.score(inputs())).float().mean()
    assert 0 < share < 1
    assert (packed.bias is not None) == bool(biases)
    torch.testing.assert_close(run(packed, inputs()), expected, **TOLERANCE)
    # And the routing matters: with every expert on, the output is another.
    everything = packed.activations(inputs()) @ packed.down + (0 if packed.bias is None else packed.bias)
    assert (everything - expected).abs().max() > 0.1


@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_down_tensors_are_those_it_was_made_of(num_shared, dtype):
    config, block = make_block(num_shared, dtype)
    packed = pack(config, block)
    assert packed.down.dtype == torch.float32
    state, tensors = block.state_dict(), packed.down_tensors()
    assert set(tensors) == {name for name in state if "down_proj" in name}
    for name, tensor in tensors.items():
        assert torch.equal(tensor.to(dtype), state[name])


def test_a_fitted_down_proj_goes_to_its_neurons_places():
    """Written back into the block, another `down` gives what the packed MLP gives with it."""
    config, block = make_block(2, **ROUTINGS["threshold"], output_bias=True)
    packed = pack(config, block)
    generator = torch.Generator().manual_seed(2)
    packed.down = torch.randn(packed.down.shape, generator=generator)
    block.load_state_dict(block.state_dict() | packed.down_tensors())
    with torch.no_grad():
        torch.testing.assert_close(run(packed, inputs()), block(inputs()[None])[0], rtol=1e-4, atol=1e-4)


def test_routed_neurons_are_the_places_of_each_expert():
    config, block = make_block(2)
    packed = pack(config, block)
    x = inputs()
    with torch.no_grad():
        activations = packed.activations(x)
        for expert, neurons in enumerate(packed.routed_neurons):
            assert len(neurons) == WIDTH
            gate, up = (block.experts.gate_up_proj[expert] @ x.T).chunk(2)
            alone = block.experts.down_proj[expert] @ (nn.functional.silu(gate) * up)
            torch.testing.assert_close(activations[:, neurons] @ packed.down[neurons], alone.T, **TOLERANCE)


def test_the_layers_own_budget_is_kept():
    config, block = make_block(num_experts_per_tok=3, layer_num_experts_per_tok=[1, 3])
    for layer, budget in enumerate([1, 3]):
        packed = PackedMLP(config, layer, block.state_dict().__getitem__, "cpu")
        assert packed.gate.mask(packed.gate.score(inputs())).sum(1).tolist() == [budget] * TOKENS
