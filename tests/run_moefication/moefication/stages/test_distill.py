"""Distillation: what is trained and by which gradient, the budget, resuming, and what the stage refuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_refused, make_llama
from pipeline import (
    Killed,
    Pipeline,
    contents,
    corpus_of,
    divergence,
    limited_files,
    load,
    make_moe,
    renames,
    shared_pipeline,
    shares_on,
    some_tokens,
    with_thresholds,
)
from safetensors.torch import load_file

from llama_moe import LlamaMoEForCausalLM
from run_moefication import llama_distill
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.checkpoints.moe import MoECheckpoint
from run_moefication.moefication.errors import SettingError
from run_moefication.moefication.fitting.losses import TeacherKL
from run_moefication.moefication.layers.straight_through import (
    TEMPERATURE,
    THRESHOLD_STEP,
    recalibrate_thresholds,
    set_budget,
    settle_thresholds,
    straight_through,
    update_thresholds,
)
from run_moefication.moefication.stages import distill_trainer
from run_moefication.moefication.stages.distill import distill, require_memory
from run_moefication.moefication.stages.distill_trainer import drawn_budget
from run_moefication.settings import DistillSettings

ALIKE = 1e-5  # float32 sums of the same terms in another order


def make_pipeline(model: Path, text: Path, save: Path, **options: object) -> Pipeline:
    """A converted model of 8 experts, one of them shared, of which 4 run."""
    return shared_pipeline(model, text, save, num_shared=1, **options).run()


@pytest.fixture(scope="module")
def finished(tiny_llama, text_folder, tmp_path_factory) -> Pipeline:
    """Threshold routing; read-only."""
    return make_pipeline(tiny_llama, text_folder, tmp_path_factory.mktemp("finished"))


def arguments_of(pipeline: Pipeline, save: Path, **changes: object) -> list[str]:
    options = {
        "model_path": pipeline.model,
        "moe_path": pipeline.moe,
        "save_path": save,
        "train_data_path": pipeline.text,
        "train_data_cache_path": pipeline.save / "cache",
        "block_size": 32,
        "lr": 1e-3,
    } | changes
    return [part for name, value in options.items() for part in (f"--{name}", *str(value).split())]


def distilled_to(folder: Path, pipeline: Pipeline, *flags: str, **changes: object) -> Path:
    """The folder of a finished run."""
    assert llama_distill.main([*arguments_of(pipeline, folder, **changes), *flags]) == 0
    return folder


SHORT = {"max_tokens": 1200, "save_steps": 5}  # 38 blocks, 3 held out: 18 steps


@pytest.fixture(scope="module")
def short(finished, tmp_path_factory) -> Path:
    """A few steps, all parameters trained."""
    return distilled_to(tmp_path_factory.mktemp("short") / "moe", finished, **SHORT)


NESTED = SHORT | {"nested_selects": "6 3", "lr": 3e-4, "epochs": 2}  # two passes: 36 steps


@pytest.fixture(scope="module")
def nested(finished, tmp_path_factory) -> Path:
    """The same with steps at other budgets."""
    return distilled_to(tmp_path_factory.mktemp("nested") / "moe", finished, **NESTED)


def test_few_steps_are_warned_of(finished, short, tmp_path, caplog):
    distilled_to(tmp_path / "moe", finished, **SHORT | {"gradient_accumulation_steps": 3})
    assert "6 training steps gain little (35 blocks, 6 of them a step)" in caplog.text
    assert metrics_of(short)["steps"] == 18


def test_a_gpu_that_is_too_small_is_refused(finished, monkeypatch):
    moe = MoECheckpoint(finished.moe, DenseCheckpoint(str(finished.model)))
    model = load(finished.moe)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = sum(size for name, size in sizes.items() if ".mlp." in name)
    needed = 6 * sum(sizes.values()) + 12 * trained
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - 1, 2 * needed))
    with pytest.raises(SettingError, match="train gates needs less"):
        require_memory(moe, DistillSettings(), gpu)
    require_memory(moe, DistillSettings(train="gates"), gpu)


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["metrics"]["distillation"]


def blocks_of(pipeline: Pipeline, **options: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The blocks that a run with these options trains on, and the sixteenth that it holds out."""
    corpus = corpus_of(DenseCheckpoint(str(pipeline.model)), pipeline.text, None, block_size=32, **options)
    blocks = corpus.blocks
    num_trained_on = len(blocks) * 15 // 16
    return blocks[:num_trained_on], blocks[num_trained_on:]


KINDS = {
    "top_k": {"num_experts_per_tok": 3},
    "threshold": {"routing": "threshold"},
    "bounded": {"routing": "threshold", "min_experts_per_tok": 1, "max_experts_per_tok": 4},
    "no_shared": {"routing": "threshold", "num_experts": 8, "num_shared_experts": 0},
    "output_bias": {"routing": "threshold", "output_bias": True, "gate_rank": 2},
    "mlp_bias": {"routing": "threshold", "mlp_bias": True},
    "mlp_gate": {"gate_network": "mlp", "gate_bias": False},
}


def random_moe(**fields) -> LlamaMoEForCausalLM:
    """A random model with every bias random too; thresholds such that some experts run and some do not."""
    moe = {"num_experts": 6, "num_shared_experts": 2, "gate_network": "linear", "gate_bias": True}
    model = make_moe(**(moe | fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return with_thresholds(model, 5 / 8)


@pytest.mark.parametrize("kind", KINDS)
def test_training_computes_what_the_model_computes(kind):
    model, tokens = random_moe(**KINDS[kind]), some_tokens(2, 40)
    with torch.no_grad():
        expected = model(tokens).logits
    assert all(0.1 < share < 0.9 for share in shares_on(model, list(tokens)))  # the choice matters
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with straight_through(model, [[0.5]] * 3):
        model.train()
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
        logits = model(tokens).logits
    assert expected.std() > 0.1
    assert logits.requires_grad
    assert (logits - expected).abs().max() < ALIKE * expected.abs().max()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)  # the model's own blocks are back


@pytest.mark.parametrize("kind", ["top_k", "mlp_bias"])
def test_gates_hear_of_every_expert(kind):
    """The gradient of a gate's bias is what an expert would give beyond what those near the boundary, which it would
    push out, give on average."""
    model = random_moe(**KINDS[kind])
    block, hidden = model.model.layers[1].mlp, TINY["hidden_size"]
    x, direction = torch.randn(1, 9, hidden), torch.randn(hidden)
    with straight_through(model, [[0.5]] * 3) as soft:
        soft[1].train()
        (soft[1](x) @ direction).sum().backward()
    experts, gate = block.experts, block.gate
    with torch.no_grad():
        scores = gate.score(x[0])  # [tokens, experts]
        both = torch.einsum("eih,th->tei", experts.gate_up_proj, x[0])
        both = both + experts.gate_up_proj_bias if kind == "mlp_bias" else both
        of_gate, of_up = both.chunk(2, dim=-1)
        outputs = torch.einsum("ehi,tei->teh", experts.down_proj, torch.nn.functional.silu(of_gate) * of_up)
        boundary = gate.threshold if gate.routing == "threshold" else scores.sort(dim=1).values[:, -3, None]
        width = TEMPERATURE * scores.std()
        choice = torch.sigmoid((scores - boundary) / width)
        slopes, gains, idle = choice * (1 - choice) / width, outputs @ direction, scores < boundary
    rivals = [(slopes[t], gains[t]) for t in range(9)] if kind == "top_k" else [(slopes, gains)] * 9
    others = torch.stack([(slope * gain).sum() / slope.sum() for slope, gain in rivals])[:, None]
    gradients = slopes * (gains - others)
    assert ((gradients * idle).sum(dim=0) != 0).all()
    torch.testing.assert_close(gate.bias.grad, gradients.sum(dim=0), rtol=1e-4, atol=1e-5)
    # A shift of all scores changes nothing.
    assert gate.bias.grad.sum().abs() < 1e-4 * gate.bias.grad.abs().max()


def test_padding_counts_neither_for_thresholds_nor_for_gradients():
    whole, cut = some_tokens(1, 30), some_tokens(1, 30)[:, :11]
    results = []
    for tokens, kept in [(cut, None), (whole, torch.arange(30)[None] < 11)]:
        model = random_moe(**KINDS["threshold"])
        with straight_through(model, [[0.3]] * 3) as soft:
            for block in soft:
                block.kept = kept
            model.train()
            model(tokens).logits[:, :11].square().sum().backward()
            wanted = torch.cat([block.wanted_threshold() for block in soft])
        results.append((wanted, model.model.layers[0].mlp.gate.weight.grad))
    (wanted, gradient), (of_padded, gradient_of_padded) = results
    torch.testing.assert_close(of_padded, wanted, rtol=ALIKE, atol=ALIKE)
    torch.testing.assert_close(gradient_of_padded, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def test_thresholds_follow_the_text_of_each_step():
    model, batches = random_moe(**KINDS["threshold"]), some_tokens(4, 40).split(2)
    gate = model.model.layers[0].mlp.gate
    before, seen = gate.threshold.item(), []
    with straight_through(model, [[0.25]] * 3) as soft:
        hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, x: seen.append(gate.score(x[0])))
        model.train()
        for batch in batches:  # two batches a step, as with gradient accumulation
            model(batch)
        hook.remove()
        update_thresholds(soft)
    wanted = torch.stack([scores.flatten().quantile(0.75) for scores in seen]).mean().item()
    assert abs(wanted - before) > 0.05  # the budget was another one
    assert gate.threshold.item() == pytest.approx(
        before + THRESHOLD_STEP * (wanted - before), abs=0.01 * abs(wanted - before)
    )


def test_the_text_of_a_step_knows_the_bounds_of_a_token():
    model = random_moe(**KINDS["threshold"] | {"min_experts_per_tok": 1, "max_experts_per_tok": 3})
    gate, seen = model.model.layers[0].mlp.gate, []
    with straight_through(model, [[0.4]] * 3) as soft:
        hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, x: seen.append(gate.score(x[0])))
        model.train()
        model(some_tokens(4, 120))
        hook.remove()
        gate.threshold.copy_(soft[0].wanted_threshold())
    ran = gate.mask(seen[0].detach().flatten(0, 1))
    assert ran.float().mean().item() == pytest.approx(0.4, abs=0.001)
    assert set(ran.sum(dim=1).tolist()) == {1, 2, 3}


def test_each_budget_has_a_threshold_of_its_own():
    model, gate_shares = random_moe(**KINDS["threshold"]), [0.5, 0.25, 0.75]
    gate = model.model.layers[0].mlp.gate
    with straight_through(model, [gate_shares] * 3) as soft:
        model.train()
        starts = soft[0].thresholds.tolist()
        assert starts[1:] == [gate.quantile_threshold(gate.score_quantiles, share) for share in gate_shares[1:]]
        set_budget(soft, 2)
        assert gate.threshold.item() == starts[2]
        model(some_tokens(2, 40).flip(1))
        wanted = soft[0]._wanted[0].item()
        update_thresholds(soft)
        set_budget(soft, 0)
        assert gate.threshold.item() == starts[0]
        moved = starts[2] + THRESHOLD_STEP * (wanted - starts[2])
        assert soft[0].thresholds.tolist() == pytest.approx([*starts[:2], moved], abs=1e-6)
        assert moved != pytest.approx(starts[2], abs=1e-4)


def test_settled_quantiles_serve_every_budget():
    """Although what a layer sees depends on the budget of those before it; those of one budget alone do not."""
    blocks, shares = list(some_tokens(30, 32).int()), [0.5, 0.25, 0.75]

    def missed(trained_for: list[float]) -> float:
        model = random_moe(**KINDS["no_shared"] | {"initializer_range": 0.5})
        settle_thresholds(model, blocks, [trained_for] * 3, 4, torch.device("cpu"))
        at_own = shares_on(model, blocks)
        assert at_own == pytest.approx([0.5] * 3, abs=0.002)
        ran = []
        for share in shares:
            model.set_active_fraction(share)
            ran.append(shares_on(model, blocks))
        return (torch.tensor(ran) - torch.tensor(shares)[:, None]).abs().max().item()

    assert missed(shares) < 0.005
    assert missed(shares[:1]) > 0.02


def test_settled_thresholds_meet_the_budget_in_the_whole_model():
    model = random_moe(**KINDS["threshold"] | {"min_experts_per_tok": 1, "max_experts_per_tok": 5})
    blocks = [*some_tokens(30, 32).int(), some_tokens(1, 7)[0].int()]
    active = recalibrate_thresholds(model, blocks, [0.7] * 3, 4, torch.device("cpu"))
    assert shares_on(model, blocks) == pytest.approx(active, abs=1e-3)
    assert active == pytest.approx([0.7] * 3, rel=0.01)


def test_a_text_too_large_to_hold_is_read_in_part(monkeypatch):
    model, blocks = random_moe(**KINDS["threshold"]), list(some_tokens(8, 32).int())
    recalibrate_thresholds(model, blocks[:3], [0.4] * 3, 4, torch.device("cpu"))
    expected = [layer.mlp.gate.threshold.item() for layer in model.model.layers]
    monkeypatch.setattr("run_moefication.moefication.layers.straight_through.MOST_TOKENS", 3 * 32 + 31)
    recalibrate_thresholds(model, blocks, [0.4] * 3, 4, torch.device("cpu"))
    assert [layer.mlp.gate.threshold.item() for layer in model.model.layers] == expected


def kl(pipeline: Pipeline, folder: Path, blocks: list[torch.Tensor]) -> float:
    """Of a checkpoint to the dense model."""
    return divergence(load(folder), load(pipeline.model), blocks)


def test_predictions_come_nearer_to_the_dense_model(finished, short):
    metrics, held_out = metrics_of(short), blocks_of(finished, max_tokens=SHORT["max_tokens"])[1]
    before, after = kl(finished, finished.moe, held_out), kl(finished, short, held_out)
    assert (metrics["loss_before"], metrics["loss_after"]) == pytest.approx((before, after), rel=1e-4)
    assert after < 0.95 * before


def test_every_nested_budget_comes_nearer_to_the_dense_model(finished, nested):
    held_out, dense = blocks_of(finished, max_tokens=SHORT["max_tokens"])[1], load(finished.model)
    metrics = metrics_of(nested)
    rows = {row["num_selects"]: row for row in metrics["nested"]} | {4: metrics}
    assert list(rows) == [6, 3, 4]
    for num_selects, row in rows.items():
        models = [load(folder, num_selects - 1) for folder in (finished.moe, nested)]  # one expert is shared
        before, after = (divergence(model, dense, held_out) for model in models)
        assert (row["loss_before"], row["loss_after"]) == pytest.approx((before, after), rel=1e-3)
        assert after < before


def test_a_nested_model_can_be_set_to_each_budget(finished, nested):
    model, blocks = load(nested), blocks_of(finished, max_tokens=SHORT["max_tokens"])[0]
    assert model.config.num_selects == 4
    assert shares_on(model, blocks) == pytest.approx([3 / 7] * 3, rel=0.01)
    for num_selects in (3, 4, 6):
        model.set_active_fraction(num_selects / 8)
        assert shares_on(model, blocks) == pytest.approx([(num_selects - 1) / 7] * 3, rel=0.02)


def test_budgets_are_drawn_equally_often():
    draws = [drawn_budget(7, step, 3) for step in range(300)]
    assert {tuple(sorted(draws[start : start + 3])) for start in range(0, 300, 3)} == {(0, 1, 2)}
    assert len({tuple(draws[start : start + 3]) for start in range(0, 300, 3)}) == 6  # in every order
    assert draws != [drawn_budget(8, step, 3) for step in range(300)]


@pytest.mark.parametrize("num_selects", [None, 6])
def test_the_distilled_model_is_on_budget(num_selects, finished, short, tmp_path):
    share = ((num_selects or 4) - 1) / 7
    folder = short if not num_selects else distilled_to(tmp_path / "moe", finished, num_selects=num_selects, **SHORT)
    blocks, _ = blocks_of(finished, max_tokens=SHORT["max_tokens"])
    model = load(folder)
    ran = shares_on(model, blocks)
    assert model.config.num_selects == (num_selects or 4)
    assert ran == pytest.approx([share] * 3, rel=0.01)
    assert metrics_of(folder)["active_share"] == pytest.approx(ran, abs=1e-3)
    model.set_num_experts_per_tok(2)  # quantiles are those of the trained gates
    assert shares_on(model, blocks)[0] == pytest.approx(2 / 7, rel=0.01)


def test_a_model_that_runs_its_shared_experts_only_goes_on_doing_so(finished, tmp_path):
    options = ["--block_size", 32, "--max_tokens", 1200, "--num_selects", 1]
    run = replace(finished, calibrated=tmp_path / "calibrated", calibrate_options=options)
    assert run.calibrate() == 0
    # An eighth of a random model can come nearer to its predictions, but not to its layers as well.
    folder = distilled_to(tmp_path / "moe", finished, moe_path=run.calibrated, clone_weight=0, **SHORT)
    metrics = metrics_of(folder)
    assert metrics["active_share"] == [0.0] * 3
    assert metrics["loss_after"] < metrics["loss_before"]
    before, after = (load(moe).model.layers[1].mlp for moe in (run.calibrated, folder))
    assert after.gate.threshold == before.gate.threshold == -after.gate.LOWEST_THRESHOLD
    assert torch.equal(after.experts.down_proj, before.experts.down_proj)  # they have no part in what is predicted


@pytest.mark.parametrize("train", ["gates", "experts", "all"])
def test_only_what_was_asked_for_changes(train, finished, short, tmp_path):
    folder = short if train == "all" else distilled_to(tmp_path / "moe", finished, train=train, **SHORT)
    before, after = (load_file(moe / "model.safetensors") for moe in (finished.moe, folder))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        of_gate, of_expert = ".mlp.gate." in name, ".experts." in name or ".shared_experts." in name
        changes = (of_gate and train != "experts") or (of_expert and train != "gates")
        changes |= name.endswith(("threshold", "score_quantiles"))  # set again whatever was trained
        assert torch.equal(tensor, after[name]) != changes, name


@pytest.mark.parametrize("fields", [{"mlp_bias": True}, {"tie_word_embeddings": True, "dtype": torch.bfloat16}])
def test_other_models_are_distilled_too(fields, text_folder, tmp_path):
    model = make_llama(tmp_path / "llama", **fields)
    pipeline = make_pipeline(model, text_folder, tmp_path / "out", convert_options=[])
    folder = distilled_to(tmp_path / "moe", pipeline, **SHORT)
    before, after = (load_file(moe / "model.safetensors") for moe in (pipeline.moe, folder))
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp." in name}
    metrics = metrics_of(folder)
    assert metrics["active_share"] == [3 / 7] * 3
    assert metrics["loss_after"] < metrics["loss_before"]
    stored = kl(pipeline, folder, blocks_of(pipeline, max_tokens=SHORT["max_tokens"])[1])
    assert metrics["loss_after"] == pytest.approx(stored, rel=1e-5)  # of the rounded weights


def test_top_k_models_have_nested_budgets_too(tiny_llama, text_folder, tmp_path):
    pipeline = make_pipeline(tiny_llama, text_folder, tmp_path / "out", convert_options=[])
    folder = distilled_to(tmp_path / "moe", pipeline, **NESTED)
    metrics = metrics_of(folder)
    assert load(folder).config.num_experts_per_tok == 3
    assert metrics["active_share"] == [3 / 7] * 3
    held_out, dense = blocks_of(pipeline, max_tokens=SHORT["max_tokens"])[1], load(pipeline.model)
    for row in (metrics | {"num_selects": 4}, *metrics["nested"]):
        found = divergence(load(folder, row["num_selects"] - 1), dense, held_out)
        assert row["loss_after"] == pytest.approx(found, rel=1e-4)
        assert row["loss_after"] < row["loss_before"]


def test_bfloat16_training_keeps_float32_weights(finished, short, tmp_path, monkeypatch):
    heads = []

    class Recorded(TeacherKL):
        def __init__(self, states, head):
            super().__init__(states, head)
            heads.append(head.dtype)

    monkeypatch.setattr(distill_trainer, "TeacherKL", Recorded)
    folder = distilled_to(tmp_path / "moe", finished, "--bf16", **SHORT)
    assert {*heads} == {torch.bfloat16, torch.float32}  # of the training, and of what is measured before and after
    in_float32, in_bfloat16 = (load_file(moe / "model.safetensors") for moe in (short, folder))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert not torch.equal(in_bfloat16[name], in_float32[name])
    assert not torch.equal(in_bfloat16[name], in_bfloat16[name].bfloat16().float())
    torch.testing.assert_close(metrics_of(folder)["loss_after"], metrics_of(short)["loss_after"], rtol=0.05, atol=0)


def test_the_summary_says_what_was_gained(finished, short, run_script):
    status, out, err = run_script(llama_distill.main, *arguments_of(finished, short, **SHORT))
    metrics = metrics_of(short)
    assert (status, err) == (0, "")
    assert f"held out: {metrics['loss_before']:.4f} before, {metrics['loss_after']:.4f} after" in out
    assert "already finished" in out
    assert f"{metrics['loss_after']:.4f} after it" in (short / "README.md").read_text()


def test_summary_and_card_name_the_nested_budgets(finished, nested, run_script):
    _, out, _ = run_script(llama_distill.main, *arguments_of(finished, nested, **NESTED))
    card = (nested / "README.md").read_text()
    for row in metrics_of(nested)["nested"]:
        losses = f"{row['loss_before']:.4f} before, {row['loss_after']:.4f} after"
        assert f"with {row['num_selects']} experts per token instead: {losses}" in out
        assert f"| {row['num_selects']} | {row['loss_before']:.4f} | {row['loss_after']:.4f} |" in card


def test_progress_counts_the_steps(finished, short, tmp_path, capsys, monkeypatch):
    checkpoint = DenseCheckpoint(str(finished.model))
    corpus = corpus_of(checkpoint, finished.text, None, block_size=32, max_tokens=SHORT["max_tokens"])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert distill(checkpoint, finished.moe, corpus, tmp_path / "moe", DistillSettings(lr=1e-3)).finished
    steps = metrics_of(short)["steps"]
    assert re.search(rf"distill: 100%.* {steps}/{steps} .*loss=\d", capsys.readouterr().err)
    assert contents(tmp_path / "moe") == contents(short)


@contextmanager
def training_steps(fatal: int | None = None) -> Iterator[list[int]]:
    """The steps that training takes while it lasts; the process ends instead of the step of this number."""
    steps, real = [], torch.optim.AdamW.step

    def step(*args, **kwargs):
        steps.append(len(steps) + 1)
        if len(steps) == fatal:
            raise Killed
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        yield steps


def interrupted(pipeline: Pipeline, folder: Path, step: int, **options: object) -> Path:
    """Training killed at a step; returns the newest of the saved ones."""
    with training_steps(fatal=step), pytest.raises(Killed):
        llama_distill.main(arguments_of(pipeline, folder, **(SHORT | options)))
    (saved,) = folder.parent.rglob("checkpoint-*")  # older ones are gone
    return saved


def test_an_interrupted_training_goes_on_to_the_same_bytes(finished, short, tmp_path):
    """And another seed gives other ones."""
    folder = tmp_path / "moe"
    saved = interrupted(finished, folder, 13)
    assert saved.name == "checkpoint-10"
    half_written = Path(shutil.copytree(saved, saved.with_name("checkpoint-12")))
    (half_written / "whole.json").unlink()
    (half_written / "optimizer.pt").write_bytes(b"cut")
    with training_steps() as steps:
        distilled_to(folder, finished, **SHORT)
    assert len(steps) == metrics_of(short)["steps"] - 10
    assert contents(folder) == contents(short)
    other = distilled_to(tmp_path / "other", finished, seed=1, **SHORT)
    assert (other / "model.safetensors").read_bytes() != (short / "model.safetensors").read_bytes()


def test_an_interrupted_nested_training_goes_on_to_the_same_bytes(finished, nested, tmp_path):
    """It draws the budgets it would have drawn, and the thresholds of those that wait are saved, too."""
    folder = tmp_path / "moe"
    interrupted(finished, folder, 13, **NESTED)
    with training_steps() as steps:
        distilled_to(folder, finished, **NESTED)
    assert len(steps) == metrics_of(nested)["steps"] - 10
    assert contents(folder) == contents(nested)


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_saved_step_is_not_gone_on_from(harm, finished, short, tmp_path, caplog):
    folder = tmp_path / "moe"
    state = interrupted(finished, folder, 8) / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-1])
    if harm == "gone":
        state.unlink()
    with training_steps() as steps:
        distilled_to(folder, finished, **SHORT)
    assert "checkpoint-5: files are missing or cut short; the training begins anew" in caplog.text
    assert len(steps) == metrics_of(short)["steps"]
    assert contents(folder) == contents(short)


def test_a_step_that_cannot_be_saved_is_one_line(finished, short, tmp_path, run_script):
    """A full disk, as far as files larger than 20 kB go; with room again, it goes on to the same bytes."""
    folder = tmp_path / "moe"
    with limited_files(20_000):
        status, _, err = run_script(llama_distill.main, *arguments_of(finished, folder, **SHORT))
    assert status == 2
    assert "/checkpoint-5 cannot be saved (" in err.splitlines()[-1]
    assert contents(distilled_to(folder, finished, **SHORT)) == contents(short)


def test_killed_while_the_checkpoint_is_written(finished, short, tmp_path):
    folder = tmp_path / "moe"
    with renames(fatal="manifest.json"), pytest.raises(Killed):
        llama_distill.main(arguments_of(finished, folder, **SHORT))
    with training_steps() as steps:
        distilled_to(folder, finished, **SHORT)
    assert steps == []  # the training was over
    assert contents(folder) == contents(short)


def test_overwrite_begins_anew_and_spares_foreign_files(finished, short, tmp_path):
    folder = tmp_path / "moe"
    interrupted(finished, folder, 8)
    for _ in range(2):  # over what is unfinished, and over what is finished
        with training_steps() as steps:
            distilled_to(folder, finished, "--overwrite", **SHORT)
        assert len(steps) == metrics_of(short)["steps"]
        (folder / "notes.txt").write_text("mine")
    assert contents(folder) == contents(short) | {"notes.txt": b"mine"}


# Processes hang now and then as they part, unless DDP goes first.
PARTING = """
import gc
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
from run_moefication import llama_distill

def checked(*arguments):
    assert not any(type(thing) is DistributedDataParallel for thing in gc.get_objects())
    destroy(*arguments)
    print("parted")

destroy, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, checked
sys.exit(llama_distill.main())
"""


def test_two_processes_share_the_work(finished, short, tmp_path):
    folder, script = tmp_path / "moe", tmp_path / "distill.py"
    script.write_text(PARTING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    result = subprocess.run(
        [*launch, *arguments_of(finished, folder, device="cpu", **NESTED | {"epochs": 4})],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("parted") == 2
    assert result.stdout.count("written: ") == 1
    metrics = metrics_of(folder)
    assert metrics["steps"] == 4 * -(-metrics_of(short)["steps"] // 2)  # four passes
    assert all(row["loss_after"] < row["loss_before"] for row in (metrics, *metrics["nested"]))
    assert metrics["active_share"] == pytest.approx([3 / 7] * 3, rel=0.01)
    assert contents(folder).keys() == contents(short).keys()


WRONG = [
    ({"moe_path": "{save}/nowhere"}, "nowhere is not a folder; run llama_convert.py first"),
    ({"moe_path": "{model}"}, "has no manifest.json: not a folder written by llama_convert.py"),
    ({"moe_path": "{base}"}, "is a LlamaMoEModel; only a LlamaMoEForCausalLM can be distilled"),
    ({"model_path": "{other}"}, "was made from another model (tiny-llama) than other-llama"),
    ({"train": "attention"}, "argument --train: invalid choice"),
    ({"lr": "nan"}, "--lr nan must be a positive number"),
    ({"epochs": 0}, "--epochs 0"),
    ({"batch_size": 0}, "--batch_size 0 must be at least 1"),
    ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0 must be at least 1"),
    ({"save_steps": 0}, "--save_steps 0 must be at least 1"),
    ({"num_selects": 1}, "--num_selects 1 is outside of 2 to 8, the model's experts (shared ones, which always run: 1"),
    ({"nested_selects": "4 9"}, "--nested_selects 9 is outside of 2 to 8, the model's experts"),
    ({"clone_weight": -1}, "--clone_weight -1.0 must be a number, 0 or more"),
    ({"max_tokens": 1}, "the corpus is a single block, and one is held out"),
    ({"save_path": "{model}"}, "is one of the source checkpoints; choose another folder"),
    ({"save_path": "{text}"}, "holds files but no manifest.json: not ours to fill"),
    ({"save_path": "{base}"}, "was written by llama_convert.py; choose another --save_path"),
    ({"save_path": "{short}"}, "was made with --lr 0.001, this run asks for 0.002"),
]


@pytest.fixture(scope="module")
def places(finished, short, tmp_path_factory) -> dict[str, Path]:
    """What the table may name in braces."""
    root = tmp_path_factory.mktemp("places")
    base = finished.converted(root / "base", "--convert_type", "LlamaMoEModel")
    other = make_llama(root / "other-llama", seed=1)
    named = {"model": finished.model, "moe": finished.moe, "text": finished.text, "short": short}
    return named | {"base": base, "other": other, "save": root / "save"}


@pytest.mark.parametrize(("changes", "words"), WRONG)
def test_wrong_input_is_refused(changes, words, finished, places, run_script):
    if changes.get("save_path") == "{short}":
        changes = changes | SHORT | {"lr": 2e-3}
    changes = {name: str(value).format(**places) for name, value in changes.items()}
    before = {name: contents(path) for name, path in places.items()}
    assert_refused(run_script(llama_distill.main, *arguments_of(finished, places["save"], **changes)), words)
    assert {name: contents(path) for name, path in places.items()} == before


def test_thresholds_without_quantiles_have_no_nested_budgets(finished, tmp_path, run_script, monkeypatch):
    def unset(self, *arguments):
        model = real(self, *arguments)
        for layer in model.model.layers:
            layer.mlp.gate.score_quantiles.zero_()
        return model

    real = MoECheckpoint.load
    monkeypatch.setattr(MoECheckpoint, "load", unset)
    result = run_script(llama_distill.main, *arguments_of(finished, tmp_path / "moe", **NESTED))
    assert_refused(result, "cannot run --nested_selects [6, 3]: no score quantiles are stored")
    assert not any(tmp_path.iterdir())


def test_a_training_that_diverges_is_refused(finished, tmp_path, run_script):
    arguments = arguments_of(finished, tmp_path / "moe", **(SHORT | {"lr": 1e30}))
    status, _, err = run_script(llama_distill.main, *arguments)
    assert status == 2
    assert "is not finite; use a smaller --lr, and --overwrite to begin anew" in err
    assert not (tmp_path / "moe" / "model.safetensors").exists()
