"""The model package as a transformers citizen, and as a checkpoint that carries its code."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import TINY
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llama_moe import LlamaMoEConfig, LlamaMoEForCausalLM, LlamaMoEForSequenceClassification, LlamaMoEModel

MOE = TINY | {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
CLASSES = {
    LlamaMoEModel: AutoModel,
    LlamaMoEForCausalLM: AutoModelForCausalLM,
    LlamaMoEForSequenceClassification: AutoModelForSequenceClassification,
}
# float32 sums of the same terms in another order or batch shape.
TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def make(model_class=LlamaMoEForCausalLM, **config):
    torch.manual_seed(0)
    return model_class(LlamaMoEConfig(**(MOE | config))).eval()


def some_tokens(batch=2, length=10):
    return torch.randint(3, TINY["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


def first(output):
    return output.logits if "logits" in output else output.last_hidden_state


# ---------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": -2}, "num_experts is -2"),
        ({"num_experts": 5}, "num_experts (5) times moe_intermediate_size (12) must give intermediate_size (64)"),
        ({"moe_intermediate_size": 8}, "moe_intermediate_size (8)"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5; it must be 1 to num_experts (4)"),
        ({"gate_network": "conv"}, "gate_network is 'conv'; it must be one of mlp, linear"),
        ({"size_experts": [16] * 4}, "LLaMA-MoE v1"),
        ({"num_selects": 2}, "LLaMA-MoE v1"),
    ],
)
def test_bad_config_values_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        LlamaMoEConfig(**(MOE | change))


def test_config_round_trip(tmp_path):
    config = LlamaMoEConfig(**MOE, gate_network="linear", multiply_gate_scores=True)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, LlamaMoEConfig)
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert again.num_selects == again.num_experts_per_tok == 2
    assert again.moe_intermediate_size == 16
    assert set(again.auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
    }


# ---------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("config", [{}, {"mlp_bias": True}, {"tie_word_embeddings": True}, {"gate_network": "linear"}])
def test_save_and_load_through_auto_classes(model_class, config, tmp_path):
    model = make(model_class, **config)
    model.save_pretrained(tmp_path)
    loaded, report = CLASSES[model_class].from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(first(model(some_tokens())), first(loaded(some_tokens())))


def test_every_parameter_is_initialised():
    model = make(mlp_bias=True, initializer_range=0.3, num_experts=2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" not in name:
            # The standard deviation of n normal draws is off by about 1 / sqrt(2 n).
            error = 4 / (2 * parameter.numel()) ** 0.5
            assert parameter.std().item() == pytest.approx(0.3, rel=error), name


def test_generation_is_the_same_with_and_without_cache():
    model = make()
    with_cache, without = (
        model.generate(some_tokens(), max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert with_cache.shape == (2, 18)
    assert torch.equal(with_cache, without)


def test_left_padding_changes_nothing():
    model, tokens = make(), some_tokens(1)
    padded = F.pad(tokens, (4, 0), value=0)
    mask = (torch.arange(14) >= 4)[None].long()
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
        torch.testing.assert_close(output, model(tokens).logits, **TOLERANCE)


def test_loss_is_the_cross_entropy_of_the_next_token():
    model, tokens = make(), some_tokens()
    with torch.no_grad():
        output = model(tokens, labels=tokens)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("logits_to_keep", [1, 3, torch.tensor([0, 5])])
def test_logits_to_keep(logits_to_keep):
    model, tokens = make(), some_tokens()
    with torch.no_grad():
        all_logits, some = model(tokens).logits, model(tokens, logits_to_keep=logits_to_keep).logits
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    torch.testing.assert_close(some, all_logits[:, kept], **TOLERANCE)


@pytest.mark.parametrize("model_class", [LlamaMoEModel, LlamaMoEForCausalLM])
@pytest.mark.parametrize("by_config", [False, True])
def test_router_logits_are_the_gates_scores(model_class, by_config):
    model = make(model_class, output_router_logits=by_config)
    base = model if model_class is LlamaMoEModel else model.model
    seen = []
    hooks = [layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in base.layers]
    with torch.no_grad():
        output = model(some_tokens(), **({} if by_config else {"output_router_logits": True}))
        assert len(output.router_logits) == len(hooks) == 3
        for scores, layer, hidden in zip(output.router_logits, base.layers, seen, strict=True):
            assert scores.shape == (20, 4)
            torch.testing.assert_close(scores, layer.mlp.gate.score(hidden.reshape(20, -1)), **TOLERANCE)
        assert ("router_logits" in model(some_tokens())) == by_config


def test_hidden_states_and_attentions():
    model = make()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(some_tokens(), output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(2, 10, 32)] * 4
    assert [attention.shape for attention in output.attentions] == [(2, 4, 10, 10)] * 3


def test_budget_can_be_changed_in_place(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for k in (1, 3, 4):
            model.set_num_experts_per_tok(k)
            loaded = LlamaMoEForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=k)
            assert model.config.num_selects == k
            assert torch.equal(model(some_tokens()).logits, loaded(some_tokens()).logits)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"num_experts_per_tok is {k}; it must be 1 to num_experts"):
            model.set_num_experts_per_tok(k)


def test_gates_learn_only_when_their_scores_weigh():
    for multiply in (False, True):
        model = make(multiply_gate_scores=multiply)
        model(some_tokens(), labels=some_tokens()).loss.backward()
        gate = model.model.layers[1].mlp.gate
        assert all((parameter.grad is not None) == multiply for parameter in gate.parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(some_tokens(), labels=some_tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_resized_embeddings_keep_the_old_rows():
    model = make(tie_word_embeddings=True)
    before = model.model.embed_tokens.weight[:300].clone()
    model.resize_token_embeddings(310)
    assert model(some_tokens()).logits.shape[-1] == 310
    assert torch.equal(model.model.embed_tokens.weight[:300], before)


# ---------------------------------------------------------------------------------------------------- experts


def test_implementations_agree_and_really_run(tmp_path):
    make().save_pretrained(tmp_path)
    logits = {}
    for name in ("eager", "grouped_mm", "batched_mm"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=name).eval()
        calls, real = [], ALL_EXPERTS_FUNCTIONS.get(name)
        if real is not None:
            ALL_EXPERTS_FUNCTIONS.register(name, lambda *args, r=real, c=calls: c.append(1) or r(*args))
        try:
            with torch.no_grad():
                logits[name] = model(some_tokens()).logits
        finally:
            if real is not None:
                ALL_EXPERTS_FUNCTIONS.register(name, real)
        assert len(calls) == (0 if name == "eager" else 3)
    for name in ("grouped_mm", "batched_mm"):
        torch.testing.assert_close(logits[name], logits["eager"], **TOLERANCE)


def test_a_dense_llama_built_before_changes_nothing(tmp_path):
    LlamaForCausalLM(LlamaConfig(**TINY))  # transformers caches its answer on this class, which ours inherit from
    make().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("num_experts", [16, 32, 64])  # widths 4, 2, 1
def test_widths_that_grouped_mm_refuses_run_eager(num_experts, tmp_path):
    make(num_experts=num_experts).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config._experts_implementation == "eager"
    assert model(some_tokens()).logits.isfinite().all()


# ---------------------------------------------------------------------------------------------------- carried code

FRESH_PROCESS = """
import importlib.abc, json, sys

class NoPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llama_moe":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoPackage())
import torch, transformers
folder, again = sys.argv[1:]
tokens = torch.tensor([[5, 6, 7, 8]])
result = {"config": type(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__}
for auto in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    result[auto] = type(model).__name__
    if auto == "AutoModelForCausalLM":
        with torch.no_grad():
            result["logits"] = model(tokens).logits.tolist()
        model.save_pretrained(again)
        model = transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
        with torch.no_grad():
            result["again"] = model(tokens).logits.tolist()
print(json.dumps(result))
"""


def test_checkpoint_loads_without_the_package(tmp_path, monkeypatch):
    model = make()
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [sys.executable, "-c", FRESH_PROCESS, tmp_path / "model", tmp_path / "again"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["config"] == "LlamaMoEConfig"
    assert result["AutoModel"] == "LlamaMoEModel"
    assert result["AutoModelForCausalLM"] == "LlamaMoEForCausalLM"
    assert result["AutoModelForSequenceClassification"] == "LlamaMoEForSequenceClassification"
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7, 8]])).logits
    for logits in (result["logits"], result["again"]):
        torch.testing.assert_close(torch.tensor(logits), expected, **TOLERANCE)


def test_checkpoint_without_trust_asks_for_it(tmp_path):
    make().save_pretrained(tmp_path)
    code = FRESH_PROCESS.replace(", trust_remote_code=True", ", trust_remote_code=False")
    process = subprocess.run([sys.executable, "-c", code, tmp_path, "x"], capture_output=True, text=True)
    assert process.returncode != 0
    assert "trust_remote_code=True" in process.stderr
