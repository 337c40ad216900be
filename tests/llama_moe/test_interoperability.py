"""The package in the hands of other tools: PEFT, Trainer, device_map, FSDP and tensor parallelism, vLLM and SGLang."""

import inspect
import json
import subprocess
import sys

import pytest
import torch
from conftest import TINY
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from pipeline import make_moe, some_tokens, with_thresholds
from transformers import AutoModelForCausalLM, TorchAoConfig, Trainer, TrainingArguments

from llama_moe import LlamaMoEForCausalLM, LlamaMoEForSequenceClassification
from llama_moe.gates import Gate

TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def check_adapter(adapted, folder, shared=0):
    """It trains, and gives the same logits reloaded, merged, and loaded after that."""
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = adapted(some_tokens(), labels=some_tokens()).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    adapted.eval()
    with torch.no_grad():
        expected = adapted(some_tokens()).logits
        adapted.save_pretrained(folder / "adapter")
        again = PeftModel.from_pretrained(make_moe(num_shared_experts=shared), folder / "adapter").eval()
        torch.testing.assert_close(again(some_tokens()).logits, expected, **TOLERANCE)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(some_tokens()).logits, expected, **TOLERANCE)
        merged.save_pretrained(folder / "merged")
        loaded = AutoModelForCausalLM.from_pretrained(folder / "merged")
        torch.testing.assert_close(loaded(some_tokens()).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("shared", [0, 4])
def test_peft_all_linear_leaves_gates_and_experts_alone(shared, tmp_path):
    """As would quantisers such as bitsandbytes and torchao, which replace each `nn.Linear` that they find."""
    model = make_moe(num_shared_experts=shared)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    touched = {name.split(".lora_A")[0] for name, _ in adapted.named_modules() if name.endswith(".lora_A")}
    mlp = {"gate_proj", "up_proj", "down_proj"} if shared else set()
    assert {name.rsplit(".", 1)[1] for name in touched} == {"q_proj", "k_proj", "v_proj", "o_proj"} | mlp
    assert not any(".gate." in name or ".experts." in name for name in touched)
    check_adapter(adapted, tmp_path, shared)


@pytest.mark.parametrize("routing", ["top_k", "threshold"])
def test_torchao_quantises_what_it_is_told_and_leaves_gates_alone(routing, tmp_path):
    """Eight bits: linear layers by default, experts by their names."""
    torchao = pytest.importorskip("torchao.quantization")
    model = with_thresholds(make_moe(num_shared_experts=4, routing=routing, gate_network="linear"), 0.75)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(some_tokens()).logits
    eight_bits = torchao.Int8WeightOnlyConfig()
    of_experts = {r"re:.*\.mlp\.experts\.(gate_up|down)_proj": eight_bits}
    for config, has_linear, has_experts in [
        (eight_bits, True, False),
        (torchao.FqnToConfig(of_experts), False, True),
        (torchao.FqnToConfig({"re:.*_proj": eight_bits}), True, True),
    ]:
        config = TorchAoConfig(config)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=config)
        quantised = {n for n, p in loaded.named_parameters() if type(p.data).__module__.startswith("torchao")}
        assert any(".mlp.experts." in name for name in quantised) == has_experts
        assert any("q_proj" in name or ".shared_experts." in name for name in quantised) == has_linear
        assert not any(".gate." in name for name in quantised)
        with torch.no_grad():
            found = loaded(some_tokens()).logits
            loaded.generate(some_tokens(), max_new_tokens=3)
        assert 0 < (found - expected).square().mean() < 0.1 * expected.var()


@pytest.mark.parametrize(
    ("implementation", "checkpointing"),
    [("llama_moe", True), ("eager", False), ("grouped_mm", False), ("batched_mm", True)],
)
def test_peft_adapts_the_experts(implementation, checkpointing, tmp_path):
    model = make_moe()
    model.set_experts_implementation(implementation)
    if checkpointing:
        model.gradient_checkpointing_enable()
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_parameters=names, task_type="CAUSAL_LM"))
    check_adapter(adapted, tmp_path)
    assert all(p.grad.any() for name, p in adapted.named_parameters() if "lora_B" in name and p.requires_grad)


def test_peft_prefixes_generate():
    prefixed = get_peft_model(make_moe(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert prefixed.generate(input_ids=some_tokens(), max_new_tokens=3).shape == (2, 13)


def test_gates_that_peft_wraps_keep_their_budget_and_are_found():
    copied = get_peft_model(make_moe(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"]))
    copied.base_model.model.set_num_experts_per_tok(1)
    gates = [module for module in copied.modules() if isinstance(module, Gate)]
    assert [gate.num_experts_per_tok for gate in gates] == [1] * 2 * TINY["num_hidden_layers"]
    model = make_moe(gate_network="linear")
    expected = model(some_tokens(), output_router_logits=True).aux_loss
    adapted = get_peft_model(model, LoraConfig(r=2, target_parameters=["mlp.gate.weight"]))
    torch.testing.assert_close(adapted(some_tokens(), output_router_logits=True).aux_loss, expected)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (LlamaMoEForCausalLM, {"output_router_logits": True, "router_aux_loss_coef": 0.01}),
        (LlamaMoEForSequenceClassification, {}),
    ],
)
def test_trainer_trains_evaluates_and_predicts(model_class, config, tmp_path):
    causal = model_class is LlamaMoEForCausalLM
    labels = some_tokens(8) if causal else torch.arange(8) % 2
    data = [{"input_ids": row, "labels": label} for row, label in zip(some_tokens(8), labels, strict=True)]
    model = make_moe(model_class, num_labels=2, **config)
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=4,
        num_train_epochs=4,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    predictions = trainer.predict(data).predictions
    assert predictions.shape == ((8, 10, TINY["vocab_size"]) if causal else (8, 2))
    trainer.save_model(tmp_path / "saved")
    loaded = model_class.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(some_tokens(8)).logits, torch.tensor(predictions), rtol=1e-3, atol=1e-4)


def test_weights_can_be_left_on_disk(tmp_path):
    model = make_moe(num_shared_experts=4, output_bias=True)
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    with torch.no_grad():
        expected = model(some_tokens()).logits
        device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
        options = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
        offloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
        assert offloaded.model.layers[2].mlp.experts.gate_up_proj.is_meta
        torch.testing.assert_close(offloaded(some_tokens()).logits, expected, **TOLERANCE)
        automatic = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
        torch.testing.assert_close(automatic(some_tokens()).logits.cpu(), expected, **TOLERANCE)


DISTRIBUTED = """
import gc
import sys
import torch
from transformers import AutoModelForCausalLM
import llama_moe


def compute(kind, folder):
    tokens = torch.load(folder + "/tokens.pt")
    if kind == "tensor_parallel":
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
        experts = model.model.layers[0].mlp.experts
        local = experts.down_proj.to_local() if hasattr(experts.down_proj, "to_local") else experts.down_proj
        assert local.shape[-1] == model.config.moe_intermediate_size // 2, local.shape  # really split
    else:
        from torch.distributed.fsdp import fully_shard
        model = AutoModelForCausalLM.from_pretrained(folder)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert model.model.layers[0].mlp.experts.down_proj.to_local().shape[0] == model.config.num_experts // 2
    output = model(tokens, labels=tokens)
    output.loss.backward()
    logits = output.logits.full_tensor() if hasattr(output.logits, "full_tensor") else output.logits
    if torch.distributed.get_rank() == 0:
        torch.save({"logits": logits.detach(), "loss": output.loss.detach()}, f"{folder}/{kind}.pt")


torch.distributed.init_process_group("gloo")
for kind in ("fully_sharded", "tensor_parallel"):
    compute(kind, sys.argv[1])
torch.distributed.barrier()
gc.collect()  # a model left over keeps gloo's threads, which may abort the process at its end (pytorch/pytorch#179291)
torch.distributed.destroy_process_group()
"""


def test_two_processes_compute_what_one_does(tmp_path):
    tokens = some_tokens()
    model = with_thresholds(make_moe(num_shared_experts=4, routing="threshold", gate_network="linear"), 0.7)
    model.save_pretrained(tmp_path)
    torch.save(tokens, tmp_path / "tokens.pt")
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    process = subprocess.run([*command, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    with torch.no_grad():
        expected = model(tokens, labels=tokens)
    for kind in ("fully_sharded", "tensor_parallel"):
        output = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        torch.testing.assert_close(output["logits"], expected.logits, **TOLERANCE)
        torch.testing.assert_close(output["loss"], expected.loss, **TOLERANCE)


@pytest.mark.parametrize(
    "config", [{}, {"gate_network": "linear"}, {"num_shared_experts": 4}, {"routing": "threshold"}]
)
def test_vllms_and_sglangs_transformers_backends_find_what_they_look_for(config, tmp_path):
    """The structural demands of vLLM's `model_executor/models/transformers/moe.py` and SGLang's
    `models/transformers/moe.py`, one by one."""
    model = make_moe(**config)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    block = model.model.layers[0].mlp

    assert set(fields["auto_map"]) >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for code in ("moe_layers.py", "expert_kernels.py", "gates.py"):
        assert (tmp_path / code).is_file()
    assert fields["num_experts"] == len(block.experts.down_proj) > 0
    assert 0 < fields["num_experts_per_tok"] <= fields["num_experts"]
    assert fields["moe_intermediate_size"] == block.experts.down_proj.shape[2] != fields["intermediate_size"]
    assert fields["hidden_size"] == block.experts.down_proj.shape[1]
    assert fields["hidden_act"] == "silu"

    parameters = dict(block.experts.named_parameters())
    assert set(parameters) == {"gate_up_proj", "down_proj"}
    assert all(parameter.ndim == 3 for parameter in parameters.values())
    signature = inspect.signature(type(block.experts).forward)
    assert list(signature.parameters) == ["self", "hidden_states", "top_k_index", "top_k_weights"]
    assert isinstance(block(torch.randn(1, 3, 32)), torch.Tensor)
    shared = [name for name, _ in model.named_parameters() if "shared_expert" in name]
    assert bool(shared) == bool(fields["num_shared_experts"])

    # Gates that vLLM recognises as softmax-then-top-k it would replace by its own weighting. It does so where the
    # gate's only tensor is `weight` and a softmax or sigmoid lies between it and top-k.
    _, weights, _ = block.gate(torch.randn(5, 32))
    assert weights.unique().tolist() in ([1.0], [0.0, 1.0])
    # Only the base model's own attention interface lets an engine put in its own.
    assert model._supports_attention_backend
    assert model.config.base_model_tp_plan
