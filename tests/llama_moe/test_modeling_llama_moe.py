"""The model package as a transformers citizen, and as a checkpoint that carries its code."""

import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TINY
from huggingface_hub.errors import StrictDataclassFieldValidationError
from pipeline import make_moe, some_tokens, with_thresholds
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llama_moe import (
    LlamaMoEConfig,
    LlamaMoEForCausalLM,
    LlamaMoEForSequenceClassification,
    LlamaMoEModel,
    record_routing,
)
from llama_moe.expert_kernels import EXPERTS_FUNCTIONS

MOE = TINY | {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
CLASSES = {
    LlamaMoEModel: AutoModel,
    LlamaMoEForCausalLM: AutoModelForCausalLM,
    LlamaMoEForSequenceClassification: AutoModelForSequenceClassification,
}
# One of each kind of routing that a model can have.
ROUTINGS = [
    {},
    {"gate_network": "linear", "gate_rank": 2, "multiply_gate_scores": True, "score_scale_factor": 1.5},
    {"num_experts": 6, "num_shared_experts": 2, "output_bias": True},
    {"routing": "threshold", "gate_network": "linear", "gate_bias": True},
    {"routing": "threshold", "num_experts": 8, "min_experts_per_tok": 1, "max_experts_per_tok": 5},
]
# float32 sums of the same terms in another order or batch shape.
TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def first(output):
    return output.logits if "logits" in output else output.last_hidden_state


def realigned(model):
    """The same tensors in memory of their own: a file's lie where its header ends, and kernels that find them there
    sum in another order, which can show in the last bit."""
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    model.tie_weights()
    return model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"intermediate_size": 0}, "moe_intermediate_size is 0"),
        ({"num_experts": 5}, "num_experts (5) times moe_intermediate_size (12) must give intermediate_size (64)"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5; it must be 1 to num_experts (4)"),
        ({"num_experts_per_tok": -1, "routing": "threshold"}, "num_experts_per_tok is -1; it must be 0 to 4"),
        ({"num_shared_experts": -1}, "num_shared_experts is -1"),
        ({"num_shared_experts": 1}, "num_experts (4) plus num_shared_experts (1) times moe_intermediate_size (12)"),
        ({"layer_num_experts_per_tok": [2, 2]}, "layer_num_experts_per_tok is [2, 2]; it must be 3 numbers"),
        ({"layer_num_experts_per_tok": [2, 5, 2]}, "layer_num_experts_per_tok is [2, 5, 2]"),
        ({"layer_num_experts_per_tok": [1, 1, 1]}, "the largest num_experts_per_tok"),
        ({"layer_num_experts_per_tok": [2, 1, 5], "routing": "threshold"}, "numbers of 0 to num_experts (4)"),
        ({"gate_network": "conv"}, "gate_network is 'conv'; it must be one of mlp, linear"),
        ({"gate_rank": 2}, 'gate_rank is 2; it must be None unless gate_network is "linear"'),
        ({"gate_rank": 5, "gate_network": "linear"}, "gate_rank is 5; it must be 1 to 4"),
        ({"gate_bias": True}, 'gate_bias is True; it must be False unless gate_network is "linear"'),
        ({"gate_noise": -0.5}, "gate_noise is -0.5"),
        ({"routing": "best"}, "routing is 'best'; it must be one of top_k, threshold"),
        ({"routing": "threshold", "max_experts_per_tok": 5}, "max_experts_per_tok is 5"),
        ({"routing": "threshold", "max_experts_per_tok": 2, "min_experts_per_tok": 3}, "min_experts_per_tok is 3"),
        ({"routing": "threshold", "max_experts_per_tok": 1}, "num_experts_per_tok is 2; it must be 0 to 1, the bounds"),
        ({"min_experts_per_tok": 1}, 'are for routing "threshold"'),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef is nan"),
        ({"score_scale_factor": float("inf")}, "score_scale_factor is inf; it must be a finite number"),
        ({"size_experts": [16] * 4}, "LLaMA-MoE v1"),
        ({"num_selects": 2}, "LLaMA-MoE v1"),
        # Of the wrong type.
        ({"num_experts_per_tok": 2.0}, "'num_experts_per_tok'"),
        ({"multiply_gate_scores": "no"}, "'multiply_gate_scores'"),
        ({"routing": None}, "'routing'"),
    ],
)
def test_bad_config_values_are_refused_by_name(change, words):
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=re.escape(words)):
        LlamaMoEConfig(**(MOE | change))


def test_fields_can_be_given_while_loading(tmp_path):
    make_moe().save_pretrained(tmp_path)
    assert LlamaMoEForCausalLM.from_pretrained(tmp_path, num_selects=3).config.num_experts_per_tok == 3
    for field, value in {"num_experts_per_tok": 5, "num_experts": 8, "gate_network": "conv"}.items():
        with pytest.raises(ValueError, match=field):
            LlamaMoEForCausalLM.from_pretrained(tmp_path, **{field: value})
    make_moe(routing="threshold").save_pretrained(tmp_path / "threshold")
    with pytest.raises(ValueError, match="thresholds hold the budget: use model"):
        LlamaMoEForCausalLM.from_pretrained(tmp_path / "threshold", num_selects=3)


def test_config_round_trip(tmp_path):
    fields = {"gate_network": "linear", "gate_rank": 3, "score_scale_factor": 2, "layer_num_experts_per_tok": [1, 2, 2]}
    config = LlamaMoEConfig(**MOE | fields)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, LlamaMoEConfig)
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert (again.num_selects, again.moe_intermediate_size) == (2, 16)
    assert set(again.auto_map) == {"AutoConfig", *(auto.__name__ for auto in CLASSES.values())}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [(LlamaMoEForCausalLM, config) for config in ({"mlp_bias": True}, {"tie_word_embeddings": True}, *ROUTINGS)]
    + [(LlamaMoEModel, {}), (LlamaMoEForSequenceClassification, {"num_shared_experts": 4})],
)
def test_save_and_load_through_auto_classes(model_class, config, tmp_path):
    model = make_moe(model_class, **config)
    if model_class is LlamaMoEForCausalLM:
        with_thresholds(model)
    model.save_pretrained(tmp_path)
    loaded, report = CLASSES[model_class].from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    if model.config.tie_word_embeddings:
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(first(model(some_tokens())), first(realigned(loaded)(some_tokens())))


def assert_initialised(parameters):
    """Biases are 0, and all else is drawn with a standard deviation of 0.3, which n draws meet within 1 / sqrt(2 n)."""
    for name, parameter in parameters.items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" not in name:
            error = 4 / (2 * parameter.numel()) ** 0.5
            assert parameter.std().item() == pytest.approx(0.3, rel=error), name


@pytest.mark.parametrize("config", [{"mlp_bias": True}, {"output_bias": True, "num_shared_experts": 2}])
def test_every_parameter_is_initialised(config):
    assert_initialised(dict(make_moe(initializer_range=0.3, num_experts=2, **config).named_parameters()))


def test_gates_missing_from_a_checkpoint_are_initialised(tmp_path):
    """Models are built on the meta device while loading: what the file lacks holds no numbers until initialised."""
    make_moe(initializer_range=0.3).save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    gates = {name: kept.pop(name) for name in [*kept] if ".gate." in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = LlamaMoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(gates)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert_initialised({name: state[name] for name in gates})


@pytest.mark.parametrize("config", ROUTINGS)
def test_generation_is_the_same_with_and_without_cache(config):
    model = with_thresholds(make_moe(**config, eos_token_id=None))
    mask = torch.ones_like(some_tokens())
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    with_cache, without = (model.generate(some_tokens(), **options, use_cache=use) for use in (True, False))
    beams = [model.generate(some_tokens(), **options, num_beams=3, use_cache=use) for use in (True, False)]
    static = model.generate(some_tokens(), **options, cache_implementation="static")
    assisted = model.generate(some_tokens(1), max_new_tokens=8, do_sample=False, assistant_model=make_moe())
    assert torch.equal(*beams)
    assert torch.equal(static, with_cache)
    assert torch.equal(assisted, with_cache[:1])
    tokens = some_tokens()
    with torch.no_grad():
        for _ in range(8):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(with_cache, tokens)
    assert torch.equal(without, tokens)


@pytest.mark.parametrize("config", ROUTINGS)
def test_left_padded_prompts_are_continued_as_if_alone(config):
    model, (long, short) = with_thresholds(make_moe(**config, eos_token_id=None)), some_tokens(2)
    short = short[:6]
    batch = torch.stack([long, F.pad(short, (4, 0), value=0)])
    options = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    together = torch.stack(model.generate(batch, attention_mask=(batch != 0).long(), **options).logits, dim=1)
    for prompt, logits in ((long, together[0]), (short, together[1])):
        alone = torch.cat(model.generate(prompt[None], **options).logits)
        torch.testing.assert_close(logits, alone, **TOLERANCE)


def test_forward_understands_what_llamas_does():
    model, tokens = make_moe(), some_tokens()
    model.set_attn_implementation("eager")
    labels = tokens.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        output = model(tokens, labels=labels, output_hidden_states=True, output_attentions=True)
        log_probabilities = output.logits.log_softmax(-1)
        losses = -log_probabilities[:, :-1].gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
        torch.testing.assert_close(output.loss, losses[labels[:, 1:] != -100].mean())
        assert [state.shape for state in output.hidden_states] == [(2, 10, 32)] * 4
        assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
        assert [attention.shape for attention in output.attentions] == [(2, 4, 10, 10)] * 3
        embedded = model.get_input_embeddings()(tokens)
        loss, logits, *_ = model(inputs_embeds=embedded, labels=labels, return_dict=False)
        assert torch.equal(loss, output.loss)
        assert torch.equal(logits, output.logits)
        for keep, kept in ((1, [9]), (3, [7, 8, 9]), (torch.tensor([0, 5]), [0, 5])):
            torch.testing.assert_close(model(tokens, logits_to_keep=keep).logits, logits[:, kept], **TOLERANCE)


@pytest.mark.parametrize("routing", [{}, {"routing": "threshold"}, {"multiply_gate_scores": True}])
def test_gates_are_trained_where_there_is_a_choice(routing):
    """Selected experts weigh 1, which alone would leave gates without gradient; with all experts on nothing is chosen
    and the gradients of the rest are the dense model's."""
    model = with_thresholds(make_moe(**routing))
    model(some_tokens(), labels=some_tokens()).loss.backward()
    gates = [layer.mlp.gate for layer in model.model.layers]
    assert all(parameter.grad.any() for gate in gates for parameter in gate.parameters())
    if "multiply_gate_scores" not in routing:
        model.zero_grad()
        model.set_num_experts_per_tok(4)
        model(some_tokens(), labels=some_tokens()).loss.backward()
        assert not any(p.grad is not None and p.grad.any() for gate in gates for p in gate.parameters())


@pytest.mark.parametrize("config", ROUTINGS)
def test_gradient_checkpointing_gives_the_same_gradients(config):
    gradients = []
    for checkpointing in (False, True):
        model = with_thresholds(make_moe(**config)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(some_tokens(), labels=some_tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()  # it counts recompilations over all models of a process


@pytest.fixture
def calls(monkeypatch):
    """How often each of transformers' experts functions has run ("eager" is none of them)."""
    counts = Counter()

    def counting(name, real):
        return lambda *args, **kwargs: counts.update([name]) or real(*args, **kwargs)

    for name in ("grouped_mm", "batched_mm"):
        monkeypatch.setitem(EXPERTS_FUNCTIONS, name, counting(name, EXPERTS_FUNCTIONS[name]))
    return counts


@pytest.mark.parametrize("model_class", CLASSES)
def test_the_implementation_asked_for_runs(model_class, calls, tmp_path):
    LlamaForCausalLM(LlamaConfig(**TINY))  # transformers caches its answer on this class, which ours inherit from
    make_moe(model_class).save_pretrained(tmp_path)
    for name in (None, "eager", "grouped_mm", "batched_mm"):
        model = CLASSES[model_class].from_pretrained(tmp_path, experts_implementation=name)
        assert model.config._experts_implementation == (name or "llama_moe")
        calls.clear()
        model(some_tokens())
        assert dict(calls) == ({} if name in (None, "eager") else {name: 3})
    model.set_experts_implementation("grouped_mm")
    model(some_tokens())
    assert dict(calls) == {"batched_mm": 3, "grouped_mm": 3}


# The compiler itself needs a C++ compiler; the other stops at its graph.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", [*ROUTINGS, {"num_experts": 64}])
def test_compiled_forward_is_one_graph(config, backend):
    model = with_thresholds(make_moe(**config, num_hidden_layers=1))
    with torch.no_grad():
        expected = model(some_tokens()).logits
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(some_tokens()).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("config", [ROUTINGS[1], ROUTINGS[-1]])
def test_compiled_training_gives_the_same_gradients(config):
    model = with_thresholds(make_moe(**config, num_hidden_layers=1)).train()
    torch.compile(model, backend="aot_eager")(some_tokens(), labels=some_tokens()).loss.backward()
    compiled_gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(some_tokens(), labels=some_tokens()).loss.backward()
    for parameter, compiled in zip(model.parameters(), compiled_gradients, strict=True):
        torch.testing.assert_close(compiled, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", [ROUTINGS[0], ROUTINGS[-1]])
def test_compiled_decoding_with_a_static_cache_gives_the_same_text(config):
    model, tokens = with_thresholds(make_moe(**config, num_hidden_layers=1, eos_token_id=None)), some_tokens()
    options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False)
    expected = model.generate(tokens, **options)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(model.generate(tokens, **options, cache_implementation="static"), expected)


def experts_per_tok(model, tokens):
    """What runs on average, by layer."""
    with record_routing(model) as statistics, torch.no_grad():
        model(tokens)
    return [layer.experts_per_tok for layer in statistics]


def test_the_budget_can_be_changed_in_place_and_by_layer(tmp_path):
    model, tokens = make_moe(), some_tokens()
    for budget in (1, np.int64(3), [1, 4, 3]):
        model.set_num_experts_per_tok(budget)
        by_layer = budget if isinstance(budget, list) else [budget] * 3
        assert experts_per_tok(model, tokens) == by_layer
        assert model.config.num_selects == max(by_layer)
        model.save_pretrained(tmp_path)
        loaded = realigned(LlamaMoEForCausalLM.from_pretrained(tmp_path))
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="layer_num_experts_per_tok"):  # which of the two is meant?
        LlamaMoEForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=2)
    for shared in (0, 4):
        model = make_moe(num_shared_experts=shared, layer_num_experts_per_tok=[1, 2, 2])
        model.set_active_fraction(0.75)
        assert model.config.num_selects == 0.75 * (4 + shared)
        assert model.config.layer_num_experts_per_tok is None


COUNT, FRACTION = "set_num_experts_per_tok", "set_active_fraction"
BY_LAYER = {"num_experts_per_tok": 4, "layer_num_experts_per_tok": [1, 4, 3]}
THRESHOLD = {"routing": "threshold"}
BOUNDED = THRESHOLD | {"num_experts": 8, "min_experts_per_tok": 1, "max_experts_per_tok": 5}


@pytest.mark.parametrize(
    ("config", "dial", "wrong", "words"),
    [
        (BY_LAYER, COUNT, [[1, 2], "2", torch.tensor(2)], r"\d budgets given for 3 layers|num_experts_per_tok is"),
        (BY_LAYER, COUNT, [[1, 2, 5], [0, 1, 1], [1.0, 2, 2], [True, 1, 1]], "num_experts_per_tok is"),
        (BY_LAYER, COUNT, [0, 5, 2.0, True, None], "num_experts_per_tok is"),
        (BOUNDED, COUNT, [6], "num_experts_per_tok is 6; it must be 1 to 5"),
        ({}, FRACTION, [0.8, 0, -1, 1.25], "active fraction"),
        ({"num_shared_experts": 4}, FRACTION, [0.8, 0, -1, 1.25, 0.5], "active fraction"),
        (THRESHOLD, FRACTION, [0.5], "no score quantiles"),
        (THRESHOLD, FRACTION, [0, 1.1, "0.5", None], r"is outside of|is not a number"),
        (BOUNDED, FRACTION, [0.1, 0.7, 1.0], "outside of 0.125 to 0.625"),
    ],
)
def test_a_refused_budget_changes_no_layer(config, dial, wrong, words):
    model = make_moe(**config)
    if model.config.routing == "threshold":  # which could be set in the first layer alone
        model.model.layers[0].mlp.gate.store_score_quantiles(torch.randn(20, model.config.num_experts))
    before = model.config.to_dict(), experts_per_tok(model, some_tokens())
    for value in wrong:
        with pytest.raises(ValueError, match=words):
            getattr(model, dial)(value)
    assert (model.config.to_dict(), experts_per_tok(model, some_tokens())) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_budget(dtype, tmp_path):
    model = with_thresholds(make_moe(routing="threshold", num_experts=8, gate_network="linear"))
    tokens = some_tokens(8, 40)
    model.save_pretrained(tmp_path)
    loaded = LlamaMoEForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    loaded.set_active_fraction(0.5)
    for layer in loaded.model.layers:  # else all scores that round to the threshold would reach it
        assert layer.mlp.gate.threshold.dtype == layer.mlp.gate.score_quantiles.dtype == torch.float32
    # Scores keep 8 bits in bfloat16: pairs within 0.4 % of the threshold may change sides.
    assert experts_per_tok(loaded, tokens) == pytest.approx(experts_per_tok(model, tokens), rel=0.02)
    with torch.no_grad():
        assert loaded(tokens).logits.dtype == dtype
        assert loaded(tokens).logits.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 3), (2, 100)])
def test_without_any_expert_the_gradients_are_zero_not_missing(shape):
    model = with_thresholds(make_moe(routing="threshold", num_experts=8))
    for layer in model.model.layers:
        layer.mlp.gate.set_active_share(0.0)
    model(some_tokens(*shape), labels=some_tokens(*shape)).loss.backward()
    for layer in model.model.layers:
        assert all(not parameter.grad.any() for parameter in layer.mlp.parameters())


@pytest.mark.parametrize("config", ROUTINGS)
def test_shapes_can_be_had_without_numbers(config):
    with torch.device("meta"):
        model = LlamaMoEForCausalLM(LlamaMoEConfig(**(MOE | config)))
        assert model(torch.ones(2, 10, dtype=torch.long)).logits.shape == (2, 10, 300)


def test_no_and_every_routed_expert_are_budgets_under_a_threshold_and_need_no_quantiles(tmp_path):
    model = make_moe(routing="threshold", num_shared_experts=4)
    for budget, fraction in ((0, 0.5), (4, 1.0)):  # the same, said otherwise
        model.set_num_experts_per_tok(budget)
        model.save_pretrained(tmp_path)
        loaded = LlamaMoEForCausalLM.from_pretrained(tmp_path)
        assert (loaded.config.num_experts_per_tok, loaded.config.num_selects) == (budget, 4 + budget)
        assert experts_per_tok(loaded, some_tokens()) == [budget] * 3
        model.set_active_fraction(fraction)
        assert model.config.num_experts_per_tok == budget


def test_layers_averages_count_while_their_mean_is_the_budget():
    """As checkpoints with budgets of their own by layer have them; a new budget is one for all layers."""
    fields = MOE | {"routing": "threshold", "layer_num_experts_per_tok": [1.5, 3.5, 1.0]}
    config = LlamaMoEConfig(**fields)
    assert [config.experts_per_tok_of(layer) for layer in range(3)] == [1.5, 3.5, 1.0]
    rebudgeted = LlamaMoEConfig(**fields | {"num_experts_per_tok": 3})
    assert [rebudgeted.experts_per_tok_of(layer) for layer in range(3)] == [3, 3, 3]
    model = with_thresholds(make_moe(**fields), fraction=0.75)
    assert (model.config.num_experts_per_tok, model.config.layer_num_experts_per_tok) == (3, None)


def test_aux_loss_is_mixtrals_and_off_by_default():
    model, tokens = make_moe(), some_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    with torch.no_grad():
        plain = model(tokens, attention_mask=mask, labels=tokens)
        assert plain.aux_loss is None
    asked = model(tokens, attention_mask=mask, labels=tokens, output_router_logits=True)
    expected = load_balancing_loss_func(asked.router_logits, 4, 2, mask)
    gates = [layer.mlp.gate.output_weight for layer in model.model.layers]
    gradients = [torch.autograd.grad(loss, gates, retain_graph=True) for loss in (asked.aux_loss, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(asked.aux_loss, expected)
    with torch.no_grad():
        assert torch.equal(asked.loss, plain.loss)
        model.config.router_aux_loss_coef = 0.5
        assert torch.equal(model(tokens, attention_mask=mask, labels=tokens).loss, plain.loss)
        model.train()
        balanced = model(tokens, attention_mask=mask, labels=tokens)
        assert balanced.router_logits is None
        torch.testing.assert_close(balanced.loss, plain.loss + 0.5 * expected)
        assert model(tokens, labels=None).loss is None
        assert model(tokens, attention_mask=torch.zeros_like(mask), output_router_logits=True).aux_loss == 0


def test_batches_of_an_accumulated_step_share_the_aux_loss():
    model, tokens = make_moe(router_aux_loss_coef=1.0).train(), some_tokens(1).repeat(4, 1)  # equal rows, equal loads
    with torch.no_grad():
        whole = model(tokens, labels=tokens, num_items_in_batch=4 * 9).loss
        parts = sum(model(row[None], labels=row[None], num_items_in_batch=4 * 9).loss for row in tokens)
    torch.testing.assert_close(parts, whole)


def test_router_logits_can_stay_on_while_generating():
    model, tokens = make_moe(), some_tokens()
    options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
    expected = model.generate(tokens, **options)
    model.config.output_router_logits = True
    assert torch.equal(model.generate(tokens, **options), expected)
    assert len(model(tokens).router_logits) == len(model.model(tokens).router_logits) == 3


FRESH_PROCESS = """
import json, sys
sys.modules["llama_moe"] = None  # as if it were not installed
import torch, transformers
tokens = torch.tensor([[5, 6, 7, 8]])

def run(auto, folder):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        return model, model(tokens)[0].tolist()

result = {}
for auto, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    classes = {name: type(run(name, folder)[0]).__name__ for name in config.auto_map if name != "AutoConfig"}
    model, output = run(auto, folder)
    model.save_pretrained(folder + "-again")
    result[auto] = {
        "classes": classes | {"AutoConfig": type(config).__name__},
        "hidden": run("AutoModel", folder)[1],
        "output": output,
        "again": run(auto, folder + "-again")[1],
    }
print(json.dumps(result))
"""


def test_checkpoints_load_and_save_without_the_package(tmp_path, monkeypatch):
    """Whichever class saved the folder, every Auto class finds its code there, and none of it is this process's."""
    for name in ("HF_HOME", "HF_MODULES_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    models = {auto.__name__: make_moe(model_class) for model_class, auto in CLASSES.items()}
    arguments = []
    for auto, model in models.items():
        model.save_pretrained(tmp_path / auto)
        arguments += [auto, tmp_path / auto]
    command = [sys.executable, "-c", FRESH_PROCESS, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    result, tokens = json.loads(process.stdout), torch.tensor([[5, 6, 7, 8]])
    classes = {auto.__name__: model_class.__name__ for model_class, auto in CLASSES.items()}
    for auto, model in models.items():
        assert result[auto]["classes"] == classes | {"AutoConfig": "LlamaMoEConfig"}
        with torch.no_grad():
            expected, hidden = first(model(tokens)), model.base_model(tokens).last_hidden_state
        torch.testing.assert_close(torch.tensor(result[auto]["hidden"]), hidden, **TOLERANCE)
        torch.testing.assert_close(torch.tensor(result[auto]["output"]), expected, **TOLERANCE)
        assert result[auto]["again"] == result[auto]["output"]
