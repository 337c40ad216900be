"""The model package as a transformers citizen, and as a checkpoint that carries its code."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import TINY, VARIANTS
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llama_moe import LlamaMoEConfig, LlamaMoEForCausalLM, LlamaMoEForSequenceClassification, LlamaMoEModel

MOE = TINY | {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
CLASSES = {
    LlamaMoEModel: AutoModel,
    LlamaMoEForCausalLM: AutoModelForCausalLM,
    LlamaMoEForSequenceClassification: AutoModelForSequenceClassification,
}
DENSE = {
    LlamaMoEModel: LlamaModel,
    LlamaMoEForCausalLM: LlamaForCausalLM,
    LlamaMoEForSequenceClassification: LlamaForSequenceClassification,
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


def realigned(model):
    """The same tensors in memory of their own: a file's lie where its header ends, and kernels that find them there
    sum in another order, which can show in the last bit."""
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    model.tie_weights()
    return model


def base_of(model):
    return model if isinstance(model, LlamaMoEModel) else model.model


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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_experts", "4"),
        ("num_experts", None),
        ("num_experts_per_tok", 2.0),
        ("moe_intermediate_size", 16.0),
        ("gate_network", None),
        ("multiply_gate_scores", "no"),
        ("output_router_logits", 1),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{field}'"):
        LlamaMoEConfig(**(MOE | {field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_experts_per_tok", 0), ("num_experts_per_tok", 5), ("num_experts", 8), ("gate_network", "conv")],
)
@pytest.mark.parametrize("model_class", CLASSES)
def test_bad_values_given_while_loading_are_refused_by_name(model_class, field, value, tmp_path):
    make(model_class).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=field):
        model_class.from_pretrained(tmp_path, **{field: value})


def test_config_defaults():
    """As the class's docstring gives them; a LLaMA's own fields stay a LLaMA's."""
    config, llama = LlamaMoEConfig(), LlamaConfig()
    assert config.num_experts * config.moe_intermediate_size == config.intermediate_size == llama.intermediate_size
    assert (config.num_experts, config.num_experts_per_tok, config.num_selects) == (8, 2, 2)
    assert (config.gate_network, config.multiply_gate_scores, config.output_router_logits) == ("mlp", False, False)


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
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(first(model(some_tokens())), first(realigned(loaded)(some_tokens())))


@pytest.mark.parametrize(
    ("model_class", "config"),
    [(LlamaMoEForCausalLM, config) for config in VARIANTS.values()]
    + [(LlamaMoEModel, {}), (LlamaMoEForSequenceClassification, {"num_labels": 3})],
)
def test_all_experts_are_the_dense_llama(model_class, config):
    model = make(model_class, num_experts_per_tok=4, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    dense = DENSE[model_class](LlamaConfig(**(TINY | {"pad_token_id": 0} | config))).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if ".mlp." not in name}
    for name, tensor in model.state_dict().items():
        layer, _, rest = name.partition("mlp.")
        if rest.startswith("experts.gate_up_proj"):  # [E, 2W, H], or [E, 2W] for the biases
            kind = "bias" if rest.endswith("bias") else "weight"
            gate, up = tensor.chunk(2, dim=1)
            state |= {
                f"{layer}mlp.gate_proj.{kind}": gate.flatten(0, 1),
                f"{layer}mlp.up_proj.{kind}": up.flatten(0, 1),
            }
        elif rest == "experts.down_proj":  # [E, H, W]
            state[f"{layer}mlp.down_proj.weight"] = torch.cat(list(tensor), dim=1)
        elif rest == "output_bias":
            state[f"{layer}mlp.down_proj.bias"] = tensor
    dense.load_state_dict(state)
    with torch.no_grad():
        output, expected = first(model(some_tokens())), first(dense(some_tokens()))
    assert expected.std() > 0.1
    assert (output - expected).abs().max() < 1e-4  # the design's invariant 1


def test_gates_missing_from_a_checkpoint_are_initialised(tmp_path):
    """Models are built on the meta device while loading: what the file lacks holds no numbers until initialised."""
    model = make(initializer_range=0.3)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".gate." not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = LlamaMoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(tensors) - set(kept)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    draws = torch.cat([state[name].flatten() for name in report["missing_keys"]])
    # As above: the standard deviation of n normal draws is off by about 1 / sqrt(2 n).
    assert draws.std().item() == pytest.approx(0.3, rel=4 / (2 * draws.numel()) ** 0.5)


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
    tokens = some_tokens()
    with torch.no_grad():
        for _ in range(8):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(with_cache, tokens)
    assert torch.equal(without, tokens)


def test_left_padding_changes_nothing():
    model, tokens = make(), some_tokens(1)
    padded = F.pad(tokens, (4, 0), value=0)
    mask = (torch.arange(14) >= 4)[None].long()
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
        torch.testing.assert_close(output, model(tokens).logits, **TOLERANCE)


def test_left_padded_prompts_are_continued_as_if_alone():
    model, (long, short) = make(), some_tokens(2)
    short = short[:6]
    batch = torch.stack([long, F.pad(short, (4, 0), value=0)])
    together = model.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=6, do_sample=False)
    for prompt, answer in ((long, together[0]), (short, together[1])):
        alone = model.generate(prompt[None], max_new_tokens=6, do_sample=False)[0]
        assert answer[10:].tolist() == alone[len(prompt) :].tolist()


def test_loss_is_the_cross_entropy_of_the_next_token():
    model, tokens = make(), some_tokens()
    labels = tokens.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        output = model(tokens, labels=labels)
        log_probabilities = output.logits.log_softmax(-1)
    losses = [
        -log_probabilities[row, position, labels[row, position + 1]]
        for row in range(2)
        for position in range(9)
        if labels[row, position + 1] != -100
    ]
    assert len(losses) == 15
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


def test_returned_cache_continues_the_text():
    model, tokens = make(), some_tokens()
    with torch.no_grad():
        cache = model(tokens[:, :6], use_cache=True).past_key_values
        rest = model(tokens[:, 6:], past_key_values=cache).logits
        torch.testing.assert_close(rest, model(tokens).logits[:, 6:], **TOLERANCE)


def test_positions_reach_the_attention():
    model, tokens, spread = make(), some_tokens(), 3 * torch.arange(10)[None]
    with torch.no_grad():
        logits = model(tokens, position_ids=spread).logits
        assert torch.equal(logits, model.lm_head(model.model(tokens, position_ids=spread).last_hidden_state))
        assert not torch.allclose(logits, model(tokens).logits, **TOLERANCE)


def test_embeddings_in_and_tuples_out():
    model, tokens = make(), some_tokens()
    with torch.no_grad():
        expected = model(tokens, labels=tokens)
        loss, logits, *_ = model(inputs_embeds=model.get_input_embeddings()(tokens), labels=tokens, return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)


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
    base = base_of(model)
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
        states, attentions = output.hidden_states, output.attentions
        assert [state.shape for state in states] == [(2, 10, 32)] * 4
        assert torch.equal(states[0], model.model.embed_tokens(some_tokens()))
        assert torch.equal(model.lm_head(states[-1]), output.logits)
    assert [attention.shape for attention in attentions] == [(2, 4, 10, 10)] * 3
    for attention in attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 10))
        assert torch.equal(attention, attention.tril())


def test_num_selects_names_the_budget_when_loading(tmp_path):
    make().save_pretrained(tmp_path)
    assert LlamaMoEForCausalLM.from_pretrained(tmp_path, num_selects=3).config.num_experts_per_tok == 3
    with pytest.raises(ValueError, match="num_experts_per_tok is 5"):
        LlamaMoEForCausalLM.from_pretrained(tmp_path, num_selects=5)


def test_budget_can_be_changed_in_place(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    outputs = []
    with torch.no_grad():
        for k in (1, 3, 4):
            model.set_num_experts_per_tok(k)
            loaded = realigned(LlamaMoEForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=k))
            assert model.config.num_selects == k
            outputs.append(model(some_tokens()).logits)
            assert torch.equal(outputs[-1], loaded(some_tokens()).logits)
            assert not any(torch.allclose(outputs[-1], other) for other in outputs[:-1])
        for k in (0, 5):
            with pytest.raises(ValueError, match=f"num_experts_per_tok is {k}; it must be 1 to num_experts"):
                model.set_num_experts_per_tok(k)
        assert torch.equal(model(some_tokens()).logits, outputs[-1])


def test_gates_learn_only_when_their_scores_weigh():
    for multiply in (False, True):
        model = make(multiply_gate_scores=multiply)
        model(some_tokens(), labels=some_tokens()).loss.backward()
        for layer in model.model.layers:
            for parameter in layer.mlp.gate.parameters():
                assert (parameter.grad is not None and parameter.grad.any().item()) == multiply


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


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_keep_the_old_logits(tied):
    model = make(tie_word_embeddings=tied)
    with torch.no_grad():
        before = model(some_tokens()).logits
        model.resize_token_embeddings(310)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        after = model(torch.cat([some_tokens(), torch.full((2, 1), 309)], dim=1)).logits
    assert after.shape == (2, 11, 310)
    torch.testing.assert_close(after[:, :10, :300], before, **TOLERANCE)


def test_tied_embeddings_stay_one_tensor_on_disk_and_in_memory(tmp_path):
    make(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = LlamaMoEForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


# ---------------------------------------------------------------------------------------------------- experts


@pytest.fixture
def calls(monkeypatch):
    """How often each of transformers' experts functions has run ("eager" is none of them)."""
    counts = Counter()

    def counting(name, real):
        return lambda *args, **kwargs: counts.update([name]) or real(*args, **kwargs)

    for name in ("grouped_mm", "batched_mm"):
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, name, counting(name, ALL_EXPERTS_FUNCTIONS[name]))
    return counts


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_implementations_agree_and_really_run(model_class, mlp_bias, calls, tmp_path):
    make(model_class, mlp_bias=mlp_bias).save_pretrained(tmp_path)
    outputs = {}
    for name in ("eager", "grouped_mm", "batched_mm"):
        model = CLASSES[model_class].from_pretrained(tmp_path, experts_implementation=name).eval()
        calls.clear()
        with torch.no_grad():
            outputs[name] = first(model(some_tokens()))
        assert dict(calls) == ({} if name == "eager" else {name: 3})
    for name in ("grouped_mm", "batched_mm"):
        torch.testing.assert_close(outputs[name], outputs["eager"], **TOLERANCE)


def test_a_dense_llama_built_before_changes_nothing(calls, tmp_path):
    LlamaForCausalLM(LlamaConfig(**TINY))  # transformers caches its answer on this class, which ours inherit from
    make().save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)(some_tokens())
    assert dict(calls) == {"grouped_mm": 3}


@pytest.mark.parametrize("num_experts", [16, 32, 64])  # widths 4, 2, 1
def test_widths_that_grouped_mm_refuses_run_eager_unless_asked_otherwise(num_experts, calls, tmp_path):
    make(num_experts=num_experts).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config._experts_implementation == "eager"
    assert model(some_tokens()).logits.isfinite().all()
    assert not calls
    AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="batched_mm")(some_tokens())
    assert dict(calls) == {"batched_mm": 3}


# ---------------------------------------------------------------------------------------------------- carried code

FRESH_PROCESS = """
import importlib.abc, json, sys

class NoPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llama_moe":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoPackage())
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
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    models = {auto.__name__: make(model_class) for model_class, auto in CLASSES.items()}
    arguments = []
    for auto, model in models.items():
        model.save_pretrained(tmp_path / auto)
        arguments += [auto, tmp_path / auto]
    process = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    result, tokens = json.loads(process.stdout), torch.tensor([[5, 6, 7, 8]])
    for auto, model in models.items():
        assert result[auto]["classes"] == {
            "AutoConfig": "LlamaMoEConfig",
            "AutoModel": "LlamaMoEModel",
            "AutoModelForCausalLM": "LlamaMoEForCausalLM",
            "AutoModelForSequenceClassification": "LlamaMoEForSequenceClassification",
        }
        with torch.no_grad():
            expected, hidden = first(model(tokens)), base_of(model)(tokens).last_hidden_state
        torch.testing.assert_close(torch.tensor(result[auto]["hidden"]), hidden, **TOLERANCE)
        torch.testing.assert_close(torch.tensor(result[auto]["output"]), expected, **TOLERANCE)
        assert result[auto]["again"] == result[auto]["output"]


def test_checkpoint_without_trust_asks_for_it(tmp_path):
    make().save_pretrained(tmp_path)
    code = FRESH_PROCESS.replace(", trust_remote_code=True", ", trust_remote_code=False")
    command = [sys.executable, "-c", code, "AutoModelForCausalLM", tmp_path]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode != 0
    assert "trust_remote_code=True" in process.stderr
