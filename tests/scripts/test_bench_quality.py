"""The quality bench: its baselines are what they claim, and its table follows from its numbers."""

import math
import re
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import bench_quality
import pytest
import quality_methods
import quality_table
import torch
from conftest import SENTENCES, assert_refused, make_llama, write_jsonl
from quality_baselines import cats, cmoe, masked, oracle, quantize_mlps, quantized_share, teal
from quality_table import compared, ratios, read_rows
from transformers import LlamaForCausalLM

from run_moefication.moefication.stages.evaluate import evaluate_model
from run_moefication.settings import CALIBRATED, ENGINE, PLAIN

RESULTS = Path(bench_quality.__file__).parent / "results"
QUALITY_ROWS = sorted(set(RESULTS.glob("*.jsonl")) - set(RESULTS.glob("*-choice.jsonl")))  # of bench_choice.py
BLOCKS = 3
FEW_BITS = (", 8 bits", ", 4 bits")
STATIC = ("", ", refitted", ", refitted, distilled")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = make_llama(tmp_path_factory.mktemp("model") / "llama", intermediate_size=128)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def blocks():
    return list(torch.randint(3, 300, (BLOCKS, 40), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("make", [lambda m, b, f: oracle(f, m), lambda m, b, f: cmoe(b, f, m)])
def test_masks_run_their_budget_and_all_neurons_are_the_dense_model(make, dense, blocks):
    def losses() -> list[float]:
        return evaluate_model(dense, "", blocks).block_losses

    whole = losses()
    with masked(dense, make(dense, blocks, 1.0)) as unread:
        assert losses() == pytest.approx(whole, rel=1e-6)
    assert torch.cat(unread).tolist() == [0.0] * BLOCKS * 40 * dense.config.num_hidden_layers
    with masked(dense, make(dense, blocks, 0.5)) as unread:
        assert losses() != pytest.approx(whole, rel=1e-3)
    assert torch.cat(unread).tolist() == pytest.approx([0.5] * BLOCKS * 40 * dense.config.num_hidden_layers)
    assert losses() == whole  # the hooks are gone


@torch.no_grad()
@pytest.mark.parametrize("method", ["TEAL", "WINA", "CATS"])
def test_sparse_activations_keep_the_largest_that_the_budget_has_room_for(method, dense, blocks):
    """In the first layer, whose inputs no mask has changed, against a straight computation."""
    seen, mlp, tokens = [], dense.model.layers[0].mlp, torch.stack(blocks)
    gate, up, down = (part.weight for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    with mlp.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output))):
        dense.model(tokens)
        inputs = seen.pop()[0]
        make = {"TEAL": teal, "WINA": lambda *given: teal(*given, weighed=True), "CATS": cats}[method]
        with masked(dense, make(blocks, 0.5, dense)) as unread:
            dense.model(tokens)
    of_neurons, of_inputs = (down.norm(dim=0), torch.cat([gate, up]).norm(dim=0)) if method == "WINA" else (1, 1)
    activated = torch.nn.functional.silu(inputs @ gate.T)
    if method == "CATS":
        masks = [activated.abs() >= activated.abs().quantile(0.75)]
        hidden, shares = activated * masks[0] * (inputs @ up.T), [2 / 3]
    else:
        sizes = (activated * (inputs @ up.T)).abs() * of_neurons
        least = sizes.flatten().sort().values[sizes.numel() // 2]  # of the dense model's activations
        masks = [inputs.abs() * of_inputs >= (inputs.abs() * of_inputs).quantile(0.5)]
        inputs = inputs * masks[0]
        hidden, shares = torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T), [2 / 3, 1 / 3]
        masks.append(hidden.abs() * of_neurons >= least)
        hidden = hidden * masks[1]
    torch.testing.assert_close(seen[-1][1], hidden @ down.T)
    of_layer = zip(unread, masks, shares, strict=False)
    assert all(
        part.tolist() == pytest.approx((share * (~mask).float().mean(-1)).flatten().tolist())
        for part, mask, share in of_layer
    )


@pytest.mark.parametrize("quantizer", ["", " by HQQ"])
def test_weights_of_few_bits_are_near_and_take_few_values(quantizer, dense):
    if quantizer:
        pytest.importorskip("torchao")
    model, before = LlamaForCausalLM(dense.config), deepcopy(dense.state_dict())
    model.load_state_dict(dense.state_dict(), assign=True)  # the very tensors
    quantize_mlps(model, 4, quantizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    old, new = (m.model.layers[1].mlp.up_proj.weight.detach() for m in (dense, model))
    groups, rounded = old.unflatten(1, (-1, 32)), new.unflatten(1, (-1, 32))
    step = groups.abs().amax(2, keepdim=True) / 7
    # To the nearest of 15 values, nothing is off by more than half a step; a better scale may cut off the largest.
    assert ((groups - rounded).abs() <= (2 if quantizer else 0.501) * step).all()
    assert max(len(group.unique()) for group in rounded.flatten(0, 1)) <= 16
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".mlp." in name}
    assert quantized_share(4) == 4.5 / 16  # a scale of 16 bits for 32 weights


def test_the_oracle_loses_less_of_each_output_than_any_other_choice(dense):
    hidden = torch.randn(9, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        chosen = oracle(0.25, dense)[0].choose(hidden)
        added = hidden.abs() * dense.model.layers[0].mlp.down_proj.weight.norm(dim=0)
    assert (chosen.sum(dim=1) == 32).all()
    assert (added.masked_fill(~chosen, math.inf).amin(1) >= added.masked_fill(chosen, 0).amax(1)).all()


def test_ratios_are_geometric_means_with_an_interval_around_them():
    dense = {"a": {"losses": [1.0, 2.0, 3.0]}, "b": {"losses": [2.0, 2.0]}}
    other = {"a": {"losses": [1.3, 2.1, 3.2]}, "b": {"losses": [2.4, 2.4]}}
    rows = compared({"file": {"dense at 1": dense, "other": other, "same": dense}})
    ratio, low, high = ratios(rows["other"], ["a", "b"], seed=0)
    assert ratio == pytest.approx(math.exp((0.2 + 0.4) / 2))
    assert math.exp((0.1 + 0.4) / 2) <= low < ratio < high <= math.exp((0.3 + 0.4) / 2)
    assert ratios(rows["same"], ["a", "b"], seed=0) == (1.0, 1.0, 1.0)


def test_rows_of_several_files_are_compared_with_their_own_dense_model():
    files = {
        "first": {"dense at 1": {"a": {"losses": [1.0, 2.0]}}, "x at 0.5": {"a": {"losses": [1.5, 2.25]}}},
        "second": {"dense at 1": {"a": {"losses": [1.25, 2.5]}}, "y at 0.5": {"a": {"losses": [2.0, 3.5]}}},
        "third": {"dense at 1": {"a": {"losses": [0.0, 0.0]}}, "x at 0.5": {"a": {"losses": [9.0, 9.0]}}},
    }
    rows = compared(files)
    assert {key: (row["file"], row["a"]["excess"]) for key, row in rows.items()} == {
        "x at 0.5": ("first", [0.5, 0.25]),
        "y at 0.5": ("second", [0.75, 1.0]),
    }


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The bench with all its rows at two budgets, on a tiny model: its folder, its options, its rows."""
    folder = tmp_path_factory.mktemp("bench")
    model = make_llama(folder / "llama", intermediate_size=128)
    for name in ("text", "text/heldout"):
        write_jsonl(folder / name / "c4.jsonl", [f"{name} {i} {SENTENCES[i % 6]}" for i in range(60)])
    (folder / "wiki.txt").write_text(" ".join(SENTENCES) * 3)
    options = {
        "--model_path": model,
        "--train_data_path": folder / "text",
        "--heldout_path": folder / "text/heldout",
        "--wikitext_path": folder / "wiki.txt",
        "--work": folder / "work",
        "--calibration_tokens": 512,
        "--heldout_tokens": 128,
        "--wikitext_tokens": 128,
        "--experts": 16,
        "--block_size": 32,
        "--distillation_tokens": 512,
        "--json": folder / "quality.jsonl",
    }
    methods = [method for method in bench_quality.RECIPES + bench_quality.OTHERS if method != "hqq"]
    arguments = [str(item) for pair in options.items() for item in pair]
    arguments += ["--distill", "--budgets", "0.75", "0.5", "--methods", *methods]
    assert bench_quality.main(arguments) == 0
    return SimpleNamespace(folder=folder, arguments=arguments, rows=read_rows(folder / "quality.jsonl"))


def test_the_bench_measures_every_method(bench):
    assert [numbers["method"] for numbers in bench.rows.values() if numbers["budget"] != 0.75] == [
        "dense",
        *(f"dense{bits}" for bits in FEW_BITS),
        "plain recipe",
        "CMoE's recipe",
        "TEAL",
        "WINA",
        "CATS",
        "static mask",
        "static mask, refitted",
        "static mask, refitted, distilled",
        *(f"step: {step}" for step in quality_methods.STEPS),
        "calibrated, 16 experts, top_k",
        "calibrated, 16 experts, top_k, distilled",
        "engine recipe, 16 experts",
        "engine recipe, 16 experts, distilled",
        "calibrated, 16 experts",
        "calibrated, 16 experts, distilled",
        *(f"calibrated, 16 experts{bits}" for bits in FEW_BITS),
        "calibrated, 16 experts, made for 75%",
        "calibrated, 16 experts, distilled for all",
        "neuron oracle",
    ]
    assert len([*(bench.folder / "work").rglob("*-Hidden-Features")]) == 2  # the models of a recipe share one


def test_our_rows_are_the_products_recipes(bench, run_script):
    row = bench.rows["calibrated, 16 experts at 0.5"]
    recipe = replace(CALIBRATED, experts=16, calibration_tokens=512)  # whose budget is a half
    assert row["settings"]["recipe"] == quality_methods.as_data(recipe)
    counts = [row[count] for count in ("num_selects", "num_shared_experts", "gate_rank")]
    assert counts == [8, recipe.num_shared_experts(16, 8), recipe.rank(16)]
    plain = bench.rows["plain recipe at 0.75"]
    assert (plain["settings"]["recipe"], plain["num_selects"]) == (quality_methods.as_data(PLAIN.at(0.75)), 6)
    text = " ".join(run_script(bench_quality.main, "--help")[1].split())
    assert f"the same for every method (default: {CALIBRATED.calibration_tokens})" in text


@pytest.mark.parametrize("path", QUALITY_ROWS, ids=lambda path: path.stem)
def test_rows_say_how_they_were_made(path):
    for row in read_rows(path).values():
        assert {"minutes", "machine", "settings"} <= row.keys()
        ours = re.fullmatch(r"(calibrated|engine recipe), (\d+) experts(, distilled)?", row["method"])
        if ours:
            tokens = row["settings"]["calibration_tokens"]
            recipe = (CALIBRATED if ours[1] == "calibrated" else ENGINE).at(row["budget"])
            recipe = replace(recipe, experts=int(ours[2]), calibration_tokens=tokens)
            assert row["settings"]["recipe"] == quality_methods.as_data(recipe)


def test_budgets_count_experts_and_active_shares_gates_and_biases_too(bench):
    # A static mask has no gate to count.
    shares = [bench.rows[f"static mask{kind} at 0.5"]["c4"]["active"] for kind in STATIC]
    assert shares == [1 / 2, *[pytest.approx(1 / 2 + 1 / (3 * 128))] * 2]
    ours = bench.rows["calibrated, 16 experts, top_k at 0.5"]["c4"]
    assert ours["neurons"] == 0.5 < ours["active"]
    fewer = bench.rows["calibrated, 16 experts, 4 bits at 0.5"]["c4"]
    whole = bench.rows["calibrated, 16 experts at 0.5"]["c4"]
    assert whole["active"] - fewer["active"] == pytest.approx(
        whole["neurons"] * (1 - 4.5 / 16), abs=0.01
    )  # gates stay as they are
    assert bench.rows["dense, 4 bits at 1"]["c4"]["active"] == 4.5 / 16
    dialled, own = (bench.rows[f"calibrated, 16 experts{row}"]["c4"] for row in (", made for 75% at 0.5", " at 0.75"))
    assert dialled["neurons"] < own["neurons"]


def test_one_model_is_distilled_for_all_budgets(bench):
    whole, three_quarters = (bench.rows[f"calibrated, 16 experts, distilled for all at {at}"] for at in (0.5, 0.75))
    assert whole["settings"] == three_quarters["settings"]
    assert whole["settings"]["distillation"]["nested_selects"] == [12]
    neurons = [row["c4"]["neurons"] for row in (whole, three_quarters)]
    assert neurons == [pytest.approx(0.5, abs=0.1), pytest.approx(0.75, abs=0.1)]


def test_every_step_is_another_model(bench):
    """Those without a threshold cost the same on every text; those not calibrated have no bias to count."""
    steps = [bench.rows[f"step: {step} at 0.5"]["c4"] for step in quality_methods.STEPS]
    assert len({tuple(step["losses"]) for step in steps}) == len(steps)
    assert [step["neurons"] == 0.5 for step in steps[:6]] == [True] * 5 + [False]
    assert len({step["active"] for step in steps[:4]}) == 1


def test_the_rows_of_a_file_make_a_table_and_a_plot(bench, tmp_path, run_script):
    options = ("--methods", "neuron oracle=best", "--budgets", 0.5, "--plot", tmp_path / "plot.png")
    _, out, _ = run_script(quality_table.main, bench.folder / "quality.jsonl", *options)
    head, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines())
    assert head == ["budget", "method", "active", "neurons", "held-out", "active", "neurons", "WikiText-2", "minutes"]
    dense, oracle = (bench.rows[name]["c4"]["losses"] for name in ("dense at 1", "neuron oracle at 0.5"))
    assert row[:4] == ["50 %", "best", "50.0 %", "50.0 %"]
    assert float(row[4].split()[0]) == pytest.approx(math.exp(mean(oracle) - mean(dense)), rel=1e-3)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ('{"method": "x", "budget": 0.5}\n', (), "a file without the dense model's row"),
        ('{"method": "x", "budget": 0.5}\n{"method": "y"}\n', (), "rows.jsonl: line 2 is not a row; give files of"),
        (
            None,
            ("--methods", "ours"),
            "--methods 'ours': there are dense, 8 bits, dense, 4 bits, plain recipe",
        ),
        (None, ("--budgets", 0.6), "--budgets 0.6: there are 1.0, 0.75, 0.5"),
    ],
)
def test_what_makes_no_table_is_refused(rows, options, words, bench, tmp_path, run_script):
    path = bench.folder / "quality.jsonl" if rows is None else tmp_path / "rows.jsonl"
    if rows is not None:
        path.write_text(rows)
    assert_refused(run_script(quality_table.main, path, *options), words)


def test_rows_lie_one_a_line_and_none_is_measured_twice(bench, run_script):
    path = bench.folder / "quality.jsonl"
    written = path.read_text()
    assert len(written.splitlines()) == len(bench.rows)
    row = bench.rows["static mask at 0.5"]
    assert list(row)[:6] == ["method", "budget", "minutes", "machine", "date", "settings"]
    assert row["c4"]["losses"] == [round(loss, 5) for loss in row["c4"]["losses"]]
    status, out, _ = run_script(bench_quality.main, *bench.arguments)
    assert (status, len(out.splitlines())) == (0, 1 + 2 + len(bench.rows) - 1)  # a caption, the head, and the rows
    assert path.read_text() == written  # with the minutes of the first time


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--budgets", "nan", "--budgets nan: shares from 0.05 to below 1 are measured"),
        ("--json", "nowhere/rows.jsonl", "--json nowhere/rows.jsonl: there is no folder nowhere"),
    ],
)
def test_wrong_input_is_refused_before_any_work(option, value, words, bench, run_script):
    """Before the folder of --work, which is a new one here, is made."""
    new = bench.folder / "new"
    assert_refused(run_script(bench_quality.main, *bench.arguments, "--work", new, option, value), words)
    assert not new.exists()


def test_a_missing_package_is_named_before_any_work(bench, run_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymetis", None)  # as if it were not installed
    new = bench.folder / "new"
    result = run_script(bench_quality.main, *bench.arguments, "--work", new, "--methods", "graph")
    assert_refused(result, "--methods graph needs the package pymetis: pip install -e '.[graph]'")
    assert not new.exists()
