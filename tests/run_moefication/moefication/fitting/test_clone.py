"""The clone loss: what is compared, and how tokens are weighed."""

import pytest
import torch
from conftest import TINY
from pipeline import make_moe, some_tokens
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from run_moefication.moefication.fitting.clone import LayerOutputs, clone_loss, recorded_layers


def dense() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval()


def layers_by_hand(model: PreTrainedModel, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each layer's MLP gives, and the stream after it, one statement after the other."""
    body, outputs = model.model, []
    stream = body.embed_tokens(tokens)
    rotary = body.rotary_emb(stream, torch.arange(tokens.shape[1])[None])
    for layer in body.layers:
        attended = layer.self_attn(layer.input_layernorm(stream), position_embeddings=rotary, attention_mask=None)[0]
        stream = stream + attended
        mlp = layer.mlp(layer.post_attention_layernorm(stream))
        stream = stream + mlp
        outputs.append((mlp, stream))
    return outputs


@torch.no_grad()
def test_it_is_what_straight_lines_compute():
    student, teacher, tokens = make_moe(), dense(), some_tokens(2, 12)
    kept = torch.arange(12) < torch.tensor([[12], [7]])
    with recorded_layers(student) as found, recorded_layers(teacher) as expected:
        student(tokens)
        teacher(tokens)
    total = 0.0
    pairs = list(zip(layers_by_hand(student, tokens), layers_by_hand(teacher, tokens), strict=True))
    for (mlp, stream), (mlp_target, target) in pairs:
        weights = 1 / torch.maximum(stream[kept].norm(dim=1), target[kept].norm(dim=1)) ** 2
        weights = weights.clamp(max=4 * weights.median())[:, None]
        for one, other in ((mlp, mlp_target), (stream, target)):
            total += (weights * (one - other)[kept] ** 2).sum() / (weights * other[kept] ** 2).sum()
    assert clone_loss(found, expected, kept).item() == pytest.approx(total.item() / len(pairs), rel=1e-4)
    assert total > 0.1


def test_massive_activations_do_not_own_it():
    """Nor the sum over MLP outputs, in the layer that makes them."""
    torch.manual_seed(0)
    mlp, stream = torch.randn(2, 1, 50, 8)
    mlp[0, 7], stream[0, 7] = 1000 * mlp[0, 7], 1000 * stream[0, 7]
    teacher, student = LayerOutputs([mlp], [stream]), LayerOutputs([1.1 * mlp], [1.1 * stream])
    student.mlps[0][0, 7], student.streams[0][0, 7] = 2 * mlp[0, 7], 2 * stream[0, 7]
    loss = clone_loss(student, teacher, torch.ones(1, 50, dtype=torch.bool))
    assert 0.02 < loss < 0.1  # 2 if only the one token counted, 0.02 without it


def test_an_mlp_that_adds_nothing_asks_for_nothing():
    torch.manual_seed(0)
    stream, kept = torch.randn(1, 50, 8), torch.ones(1, 50, dtype=torch.bool)
    student = LayerOutputs([torch.randn(1, 50, 8, requires_grad=True)], [stream])
    loss = clone_loss(student, LayerOutputs([torch.zeros(1, 50, 8)], [stream]), kept)
    loss.backward()
    assert loss == 0
    assert not student.mlps[0].grad.any()


def test_it_is_float32_under_autocast():
    torch.manual_seed(0)
    student, teacher = (LayerOutputs([torch.randn(1, 300, 64)], [torch.randn(1, 300, 64)]) for _ in range(2))
    kept = torch.ones(1, 300, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        loss = clone_loss(student, teacher, kept)
    assert torch.equal(loss, clone_loss(student, teacher, kept))


def test_a_model_is_recorded_only_within_the_context():
    model = dense()
    with recorded_layers(model) as outputs:
        model(some_tokens())
    model(some_tokens())
    assert len(outputs.mlps) == len(outputs.streams) == TINY["num_hidden_layers"]
