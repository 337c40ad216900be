"""A report's numbers against plain loops, its page against its numbers, and what it refuses or leaves out."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES, assert_refused, make_llama, make_tokenizer, write_jsonl
from pipeline import Pipeline, contents, limited_files, load, make_moe

import run_moefication as rm
from run_moefication import llama_evaluate, llama_report
from run_moefication.moefication.stages import report as stage
from run_moefication.moefication.stages import report_numbers, report_page
from run_moefication.moefication.stages.evaluate import evaluate
from run_moefication.moefication.stages.report_html import Numbers

BLOCK = 32
PROMPTS = ["<script>alert(1)</script>", "The cat sat on the"]
QUICK = dict(block_size=BLOCK, rounds=2, new_tokens=4, passage_tokens=20, prompts=PROMPTS)
# float32 sums over other batches.
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[Path]:
    """Two texts, of other lengths."""
    folder = tmp_path_factory.mktemp("heldout")
    prose = write_jsonl(folder / "prose.jsonl", [f"{i}. {SENTENCES[i % 6]} \u00e9\u4e2d" for i in range(12)])
    return [
        prose,
        write_jsonl(folder / "code.jsonl", [f"{SENTENCES[1]}# {i} <script>alert({i})</script>" for i in range(9)]),
    ]


@pytest.fixture(scope="module")
def calibrated(shared_run, tmp_path_factory) -> Pipeline:
    """2 of 8 experts shared, thresholds for 4 of 8, calibrated; and a split at random beside the other."""
    folder = tmp_path_factory.mktemp("calibrated")
    options = [*shared_run.calibrate_options, "--refit_gates", "--output_bias"]
    run = replace(shared_run, calibrated=folder / "calibrated", calibrate_options=options)
    assert run.calibrate() == 0
    random = replace(run, save=folder, split_method="Random", split_options=["--num_shared_experts", 2])
    assert random.split() == 0
    return replace(run, save=random.split_folder)  # where the tests look for it


@pytest.fixture(scope="module")
def made(calibrated, shared_run, texts, tmp_path_factory) -> stage.Report:
    """A report with all that it can have; read-only."""
    return rm.report(
        calibrated.calibrated,
        texts,
        tmp_path_factory.mktemp("report") / "report.html",
        rm.ReportSettings(**QUICK),
        dense_path=calibrated.model,
        split_paths=[shared_run.split_folder, calibrated.save],
    )


@pytest.fixture
def arguments(calibrated, texts, tmp_path) -> dict[str, list]:
    """Options of a quick report without a dense model, by name."""
    return {
        "model_path": [calibrated.calibrated],
        "text_path": texts,
        "save_path": [tmp_path / "new" / "report.html"],
        "device": ["cpu"],
    } | {name: value if isinstance(value, list) else [value] for name, value in QUICK.items()}


@pytest.fixture
def report(run_script, arguments) -> Callable[..., tuple[int, str, str]]:
    """`report(layer=[2])` runs the script, with other options than `arguments`; None takes one away."""

    def run(**changes: list | None) -> tuple[int, str, str]:
        options = {name: values for name, values in (arguments | changes).items() if values is not None}
        return run_script(
            llama_report.main, *[word for name, values in options.items() for word in (f"--{name}", *values)]
        )

    return run


# ---------------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """What a page shows: its numbers, where it points to, and its text outside of numbers, by the tags around it."""

    def __init__(self, html: str):
        super().__init__()
        self.numbers: list[dict[str, str]] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.cells: list[str] = []  # of table bodies, without numbers
        self.text = ""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)
        if tag == "data":
            self.numbers.append(dict(attributes) | {"shown": ""})
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data
        if "data" in self._open:
            self.numbers[-1]["shown"] += data
        elif "td" in self._open:
            self.cells[-1] += data


def at(numbers: Any, place: str) -> Any:
    for step in place.split("/"):
        numbers = numbers[int(step) if isinstance(numbers, list) else step]
    return numbers


def test_every_number_on_the_page_is_the_one_in_the_json(made):
    page, numbers = Page(made.page.read_text()), json.loads(made.json.read_text())
    assert len(page.numbers) > 80
    for shown in page.numbers:
        value = at(numbers, shown["data-of"])
        assert float(shown["value"]) == value
        assert shown["shown"] == format(value, shown["data-as"])
    # Tables hold no others, but for the numbers of layers and of stages.
    assert [cell for cell in page.cells if re.search(r"\d", cell) and not re.fullmatch(r"\d|\d [a-z ]+", cell)] == []
    assert numbers == made.numbers


def test_the_page_needs_nothing_else(made):
    html = made.page.read_text()
    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert {"svg", "image", "data", "details"} <= tags
    assert not tags & {"script", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], tag
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len({*ids}) == len(ids)
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', html)
    assert used
    assert {*used} <= {*ids}
    assert "<script>alert(" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_every_figure_says_what_to_see_and_what_is_a_bad_sign(made):
    figures = re.findall(r"<figure>(.*?)</figure>", made.page.read_text(), re.DOTALL)
    names = [re.search(r'aria-label="([^"]+)"', figure)[1] for figure in figures]
    assert len({*names}) == len(names) == 9
    for figure in figures:
        caption = re.search(r"<figcaption>(.*)</figcaption>", figure)[1]
        see, bad = re.sub("<[^>]*>", "", caption).split(" A bad sign: ")
        assert min(len(see), len(bad)) > 30


def test_figures_have_the_colours_of_the_page(made):
    for svg in re.findall(r"<svg .*?</svg>", made.page.read_text(), re.DOTALL):
        colours = {*re.findall(r"(?:fill|stroke): ?([^;\"]+)", svg)} - {"none"}
        assert all(colour.startswith(("var(--", "url(")) for colour in colours), colours


# ---------------------------------------------------------------------------------------------------- numbers


@pytest.fixture(scope="module")
def plain(calibrated, texts) -> list[SimpleNamespace]:
    """For each text its tokens, and which routed experts ran, a nested list: token, layer, expert. By plain passes."""
    model, tokenizer = load(calibrated.calibrated), make_tokenizer()
    found = []
    for path in texts:
        documents = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        ids = [i for text in documents for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]][:-1]
        blocks = [ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK)]
        ran = []
        for block in (block for block in blocks if len(block) > 1):
            with torch.no_grad():
                scores = model(torch.tensor([block]), output_router_logits=True).router_logits
            masks = [layer.mlp.gate.mask(s).tolist() for layer, s in zip(model.model.layers, scores, strict=True)]
            ran += [[mask[token] for mask in masks] for token in range(len(block))]
        found.append(SimpleNamespace(ids=ids, ran=ran))
    return found


def test_loads_and_costs_are_those_of_a_plain_loop(made, plain):
    experts, ran = made.numbers["experts"], [token for text in plain for token in text.ran]
    assert experts["tokens"] == len(ran)
    load = [[sum(token[layer][e] for token in ran) / len(ran) for e in range(6)] for layer in range(3)]
    assert np.allclose(experts["load"], load, atol=1e-4)
    assert experts["never"] == sum(share == 0 for layer in load for share in layer)
    layer = experts["layer"]
    for text, shares in zip(plain, experts["load_by_text"], strict=True):
        assert np.allclose(shares, [sum(t[layer][e] for t in text.ran) / len(text.ran) for e in range(6)], atol=1e-4)
    # 2 of 8 experts always run.
    costs = [[(2 * 3 + sum(map(sum, token))) / (8 * 3) for token in text.ran] for text in plain]
    flat = [cost for text in costs for cost in text]
    assert experts["neurons_by_text"] == pytest.approx([sum(cost) / len(cost) for cost in costs])
    assert (experts["least_neurons"], experts["most_neurons"]) == pytest.approx((min(flat), max(flat)))
    assert len({*flat}) > 3
    counts = [0] * 50
    for cost in flat:
        counts[min(49, math.floor(50 * cost + 1e-9))] += 1
    assert experts["tokens_by_cost"] == counts
    by_layer = [sum((2 + sum(token[layer])) / 8 for token in ran) / len(ran) for layer in range(3)]
    assert experts["ran_by_layer"] == pytest.approx(by_layer)


def test_the_layer_is_the_one_whose_loads_differ_most_between_texts(made, plain):
    spreads = []
    for layer in range(3):
        loads = [[sum(t[layer][e] for t in text.ran) / len(text.ran) for e in range(6)] for text in plain]
        spreads.append(np.std(loads, axis=0).mean())
    assert made.numbers["experts"]["layer"] == np.argmax(spreads)


def test_co_selection_is_that_of_a_plain_loop(made, plain):
    experts, ran = made.numbers["experts"], [token for text in plain for token in text.ran]
    columns = [[float(token[experts["layer"]][e]) for token in ran] for e in range(6)]
    found = np.array(experts["correlation"])
    for a, b in combinations(range(6), 2):
        varies = min(np.std(columns[a]), np.std(columns[b])) > 0
        expected = np.corrcoef(columns[a], columns[b])[0, 1] if varies else 0
        assert found[a, b] == found[b, a] == pytest.approx(expected, abs=1e-4)
    assert sorted(experts["order"]) == [*range(6)]


def test_neighbours_run_together():
    """Experts 0 and 2 run for the same tokens, 1 and 3 for the others."""
    ran = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]])
    correlation, order = report_numbers.correlated(ran.T @ ran, 4)
    assert correlation.tolist() == [[1, -1, 1, -1], [-1, 1, -1, 1]] * 2
    assert {*order[:2]} in ({0, 2}, {1, 3})
    always = torch.ones(3, 2, dtype=torch.long)
    assert report_numbers.correlated(always.T @ always, 3)[0].tolist() == [[1, 0], [0, 1]]


def test_a_passage_is_the_text_with_what_its_tokens_cost(made, plain, texts):
    tokenizer = make_tokenizer()
    for one, text in zip(made.numbers["passages"]["texts"], plain, strict=True):
        ids = text.ids[: QUICK["passage_tokens"]]
        assert "".join(piece for piece, _ in one["pieces"]) == tokenizer.decode(ids)
        costs = [(6 + sum(map(sum, token))) / 24 for token in text.ran[: len(ids)]]
        # Tokens that are no whole characters share a piece.
        ends = [
            end
            for end in range(1, len(ids) + 1)
            if end == len(ids) or not tokenizer.decode(ids[:end]).endswith("\ufffd")
        ]
        expected = [np.mean(costs[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        assert [cost for _, cost in one["pieces"]] == pytest.approx(expected, abs=1e-4)
    pieces = Page(made.page.read_text()).elements
    titles = [attributes["title"] for tag, attributes in pieces if tag == "span" and "title" in attributes]
    assert titles == [f"{cost:.1%}" for one in made.numbers["passages"]["texts"] for _, cost in one["pieces"]]


def test_characters_of_several_tokens_are_one_piece():
    tokenizer = make_tokenizer()
    ids = tokenizer("a\u4e2db")["input_ids"]
    assert len(ids) == 5
    assert report_numbers.passage(tokenizer, ids, [0.1, 0.2, 0.3, 0.4, 0.5]) == [
        ["a", 0.1],
        ["\u4e2d", 0.3],
        ["b", 0.5],
    ]


def test_the_overlap_of_splits_is_that_of_a_plain_loop(made, shared_run, calibrated):
    overlap = made.numbers["overlap"]
    for layer, share in enumerate(overlap["together"]):
        name = f"layers.{layer}.mlp.gate_proj.weight"
        first, second = (
            torch.load(f / name, weights_only=True).tolist() for f in (shared_run.split_folder, calibrated.save)
        )
        pairs = [(a, b) for a, b in combinations(range(64), 2) if first[a] == first[b]]
        assert share == sum(second[a] == second[b] for a, b in pairs) / len(pairs)
    assert overlap["at_random"] == 7 / 63
    assert overlap["splits"] == [shared_run.split_folder.name, calibrated.save.name]


def test_rows_are_those_of_the_evaluation(made, calibrated, texts):
    for path, text in zip(texts, made.numbers["texts"], strict=True):
        budgets = [row["num_selects"] for row in text["rows"]]
        assert sorted(budgets) == [4, 6, 8]  # a quarter would be the shared experts alone
        dense, *rows = evaluate([calibrated.model, calibrated.calibrated], path, num_selects=budgets, block_size=BLOCK)
        assert (text["name"], text["tokens"]) == (path.stem, dense.predicted_tokens)
        assert text["dense_perplexity"] == pytest.approx(dense.perplexity, rel=RELATIVE)
        for row, expected in zip(text["rows"], rows, strict=True):
            for name in ("perplexity", "active", "agreement"):
                assert row[name] == pytest.approx(getattr(expected, name), rel=RELATIVE)
            assert row["ratio"] == pytest.approx(expected.perplexity / dense.perplexity)
        assert text["rows"][text["own"]]["num_selects"] == 4


def test_what_an_evaluation_has_read_is_not_evaluated_again(report, arguments, calibrated, texts, run_script, tmp_path):
    """Its numbers are the page's, however much of the text it has read."""
    file, both = tmp_path / "rows.json", ["--model_path", calibrated.model, calibrated.calibrated]
    rest = ["--block_size", BLOCK, "--max_tokens", 100, "--num_selects", 4, 7, "--json", file, "--device", "cpu"]
    assert run_script(llama_evaluate.main, *both, "--text_path", texts[1], *rest)[0] == 0
    rows = json.loads(file.read_text())
    rows[1]["perplexity"] = 1234.5
    file.write_text(json.dumps(rows))
    status, _, err = report(dense_path=[calibrated.model], evaluation_path=[file], max_tokens=[64])
    assert status == 0, err
    numbers = json.loads(arguments["save_path"][0].with_suffix(".json").read_text())
    prose, code = numbers["texts"]
    assert [row["num_selects"] for row in code["rows"]] == [4, 7]
    assert code["rows"][0]["perplexity"] == 1234.5
    assert code["rows"][0]["ratio"] == 1234.5 / rows[0]["perplexity"]
    assert code["tokens"] == rows[0]["predicted_tokens"] > 64
    assert [row["num_selects"] for row in prose["rows"]] == [4, 6, 8]
    assert numbers["experts"]["tokens"] == 2 * 64
    assert "1,234.500" not in (page := arguments["save_path"][0].read_text())
    assert "1234.500" in page


def test_an_evaluation_of_other_models_is_refused(report, calibrated, texts, run_script, tmp_path):
    file, other = tmp_path / "rows.json", ["--model_path", calibrated.model, calibrated.moe]
    options = ["--block_size", BLOCK, "--max_tokens", 100, "--json", file, "--device", "cpu"]
    assert run_script(llama_evaluate.main, *other, "--text_path", texts[1], *options)[0] == 0
    words = f"rows.json has no rows of {calibrated.calibrated.name} at 4 experts, after the dense model, on these texts"
    assert_refused(report(dense_path=[calibrated.model], evaluation_path=[file]), words)


def test_what_the_models_say_is_what_generate_says(made, calibrated):
    tokenizer = make_tokenizer()
    for row in made.numbers["spoken"]:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        for which, folder in (("dense", calibrated.model), ("moe", calibrated.calibrated)):
            output = load(folder).generate(ids, max_new_tokens=QUICK["new_tokens"], do_sample=False, pad_token_id=0)
            assert row[which] == tokenizer.decode(output[0], skip_special_tokens=True).removeprefix(row["prompt"])


def test_manifests_tell_of_all_stages(made, shared_run, calibrated):
    history = made.numbers["stages"]
    assert [stage["stage"] for stage in history] == ["split", "hidden_features", "select", "convert", "calibrate"]
    for stage_numbers in history:
        assert stage_numbers["minutes"] > 0
    assert [stage_numbers["tokens"] for stage_numbers in history] == [512, 512, None, None, 512]
    manifests = {
        folder: json.loads((folder / "manifest.json").read_text())
        for folder in (shared_run.split_folder, shared_run.features_folder, shared_run.select_folder, shared_run.moe)
    }
    told = json.loads((calibrated.calibrated / "manifest.json").read_text())["earlier"]
    for one, manifest in zip(told, manifests.values(), strict=True):
        assert one == {name: manifest[name] for name in one}
        assert {"stage", "options", "environment", "facts", "metrics", "seconds"} == one.keys()
    own = json.loads((calibrated.calibrated / "manifest.json").read_text())["metrics"]
    assert [row["error_after"] for row in made.numbers["errors"]] == [m["error_after"] for m in [*own.values()][:3]]
    gates = manifests[shared_run.select_folder]["metrics"]
    assert [row["mass_recall"] for row in made.numbers["gates"]] == [m["mass_recall"] for m in gates.values()]


def test_metrics_stand_in_the_order_of_layers():
    metrics = {f"layers.{i}.mlp": {"a": i, "b": 1} for i in sorted(range(12), key=str)}
    history = [{"stage": "select", "metrics": metrics}, {"stage": "convert", "metrics": {}}]
    found = report_numbers.metrics_by_layer(history, "select", ["a"], 12)
    assert [layer["a"] for layer in found] == [*range(12)]
    assert report_numbers.metrics_by_layer(history, "select", ["a"], 13) == []
    assert report_numbers.metrics_by_layer(history, "select", ["c"], 12) == []
    assert report_numbers.metrics_by_layer(history, "calibrate", ["a"], 12) == []
    metrics["layers.3.mlp"]["a"] = "three"
    assert report_numbers.metrics_by_layer(history, "select", ["a"], 12) == []


@pytest.mark.parametrize(
    ("least", "most", "big", "words"),
    [
        (0.9, 1.1, "nothing", "it buys nothing (0.90 to 1.10 times"),
        (1.1, 1.3, "\u00d71.20 speed", "faster, 1.20 times the dense model's speed (1.10 to 1.30)"),
        (0.7, 0.9, "\u00d70.80 speed", "slower, 0.80 times the dense model's speed (0.70 to 0.90)"),
    ],
)
def test_time_is_gained_only_where_every_round_says_so(least, most, big, words):
    times = {"least_speedup": least, "most_speedup": most, "speedup": (least + most) / 2, "rounds": 5, "tokens": 9}
    times |= {"dense_seconds": 1.0, "moe_seconds": 1 / times["speedup"]}
    tile = Page(report_page.buys(Numbers({"time": {"read": times, "write": times}}))).text
    assert f"What it buys in time{big}" in tile
    assert words in tile


def test_what_a_foreign_manifest_tells_is_not_trusted():
    told = {"stage": "<b>", "seconds": "long", "facts": {"tokens": [1]}, "options": 3, "environment": {"torch": "2"}}
    (row,) = report_numbers.stage_numbers([told])
    assert row == {"stage": "<b>", "minutes": None, "tokens": None, "options": {}, "environment": {"torch": "2"}}
    assert report_numbers.stage_numbers([{"stage": "split", "facts": None, "seconds": math.inf}])[0]["minutes"] is None


# ---------------------------------------------------------------------------------------------------- left out


def test_what_is_missing_is_left_out_and_said(report, arguments, calibrated, texts, tmp_path):
    moe = shutil.copytree(calibrated.calibrated, tmp_path / "own")
    (moe / "manifest.json").unlink()
    status, out, err = report(model_path=[moe], text_path=texts[:1])
    assert status == 0, err
    html = arguments["save_path"][0].read_text()
    numbers, text = json.loads(arguments["save_path"][0].with_suffix(".json").read_text()), Page(html).text
    assert numbers["left_out"].keys() == {"dense", "domains", "errors", "gates", "stages", "overlap"}
    for section, why in numbers["left_out"].items():
        assert f"left out: {section}: {why}" in out
        assert why in text
    assert "no dense model was given (--dense_path)" in text
    assert html.count("<figure>") == 5  # the dial, what ran, load, together, cost
    assert (numbers["time"], numbers["overlap"], numbers["errors"], numbers["stages"]) == (None, None, [], [])
    assert "dense" not in numbers["spoken"][0]
    assert numbers["experts"]["layer"] == 1  # the middle one of three
    assert numbers["texts"][0]["rows"][0]["ratio"] is None


def test_a_fixed_number_of_experts_has_no_costs_to_show(report, arguments, plain_run):
    """And a checkpoint that is not calibrated has no errors."""
    status, _, err = report(model_path=[plain_run.moe])
    assert status == 0, err
    text = Page(arguments["save_path"][0].read_text()).text
    for what in ("Tokens by cost are left out", "Left out"):
        assert f"{what}: every token runs as many neurons as any other." in text
    assert "The error of each layer is left out: the checkpoint was not calibrated." in text


def test_thresholds_without_quantiles_have_no_dial(report, arguments, tmp_path):
    """And of a checkpoint without a manifest, other weights are noticed."""
    model = make_moe(routing="threshold", gate_network="linear")
    model.save_pretrained(tmp_path / "moe")
    make_tokenizer().save_pretrained(tmp_path / "moe")
    status, _, err = report(model_path=[tmp_path / "moe"])
    assert status == 0, err
    with torch.no_grad():
        model.model.embed_tokens.weight.neg_()
    model.save_pretrained(tmp_path / "moe")
    assert_refused(
        report(model_path=[tmp_path / "moe"]), "was made of other models, texts or settings: add --overwrite"
    )
    text = Page(arguments["save_path"][0].read_text()).text
    assert "Other budgets are left out:" in text
    assert "no score quantiles are stored" in text


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"save_path": ["{tmp}/report.htm"]}, ["--save_path", "report.htm is to be the name of a page"]),
        ({"save_path": ["{tmp}/file/report.html"]}, ["file is no folder to write to"]),
        ({"save_path": ["{tmp}/mine.html"]}, ["mine.html is in the way, and no report of ours"]),
        ({"save_path": ["{tmp}/beside.html"]}, ["beside.json is in the way, and no report of ours"]),
        ({"save_path": ["{tmp}/folder.html"]}, ["folder.html is in the way"]),
        ({"model_path": ["{dense}"]}, ["--model_path", "is a llama model, not a LlamaMoE"]),
        ({"model_path": ["{tmp}/nowhere"]}, ["is no folder here"]),
        ({"dense_path": ["{other}"]}, ["was made from another model"]),
        ({"text_path": ["{tmp}/no.txt"]}, ["--text_path", "no.txt is not a file"]),
        ({"text_path": ["{tmp}/empty.txt"]}, ["empty.txt"]),
        ({"text_path": ["{text}", "{text}"]}, ["--text_path names two texts prose"]),
        ({"split_file_path": ["{split}", "{split}"]}, ["--split_file_path needs --dense_path"]),
        ({"split_file_path": ["{split}"]}, ["split_file_path", "expected 2 arguments"]),
        ({"split_file_path": ["{split}", "{tmp}"], "dense_path": ["{dense}"]}, ["has no manifest.json"]),
        ({"evaluation_path": ["{tmp}/no.json"]}, ["no.json is not a file; give a file of llama_evaluate.py --json"]),
        ({"evaluation_path": ["{tmp}/file"]}, ["file holds no rows of an evaluation"]),
        ({"evaluation_path": ["{tmp}/rows.json"]}, ["rows.json holds no rows of an evaluation"]),
        ({"layer": [3]}, ["--layer 3 is outside of 0 to 2"]),
        ({"num_selects": [9]}, ["--num_selects 9 is outside of 3 to 8"]),
        ({"prompts": [" "]}, ["--prompts: there is nothing to continue"]),
        ({"max_tokens": [1]}, ["--max_tokens 1 must be at least 2"]),
        ({"rounds": [0]}, ["--rounds 0 must be at least 1"]),
    ],
)
def test_bad_input_is_refused_and_nothing_written(changes, words, report, calibrated, texts, shared_run, tmp_path):
    (tmp_path / "file").write_text("[1]")
    row = dict.fromkeys(("model", "num_experts", "num_selects", "tokens_sha256", "block_losses", "perplexity"), "")
    (tmp_path / "rows.json").write_text(json.dumps([row | {"predicted_tokens": 1, "agreement": 1, "active": 1}]))
    (tmp_path / "mine.html").write_text("<p>my own page</p>")
    (tmp_path / "beside.json").write_text("{}")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "empty.txt").touch()
    places = {"tmp": tmp_path, "dense": calibrated.model, "text": texts[0], "split": shared_run.split_folder}
    if "{other}" in str(changes):
        places["other"] = make_llama(tmp_path / "other", seed=1)
    filled = {name: [str(value).format(**places) for value in values] for name, values in changes.items()}
    before = contents(tmp_path)
    assert_refused(report(**filled), *words)
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_without_matplotlib_nothing_begins(report, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_refused(
        report(), "the report needs the package matplotlib: pip install -e '.[quickstart]' -c constraints.txt"
    )


def test_importing_a_report_does_not_need_matplotlib():
    code = "import sys, run_moefication as rm; rm.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_page_is_made_once_and_anew_only_when_asked(report, arguments):
    page = arguments["save_path"][0]
    assert report()[0] == 0
    first = page.read_bytes()
    status, out, _ = report()
    assert (status, page.read_bytes()) == (0, first)
    assert "already finished" in out
    assert_refused(report(new_tokens=[5]), "was made of other models, texts or settings: add --overwrite to redo it")
    assert page.read_bytes() == first
    with limited_files(len(first) // 2):
        assert report(new_tokens=[5], overwrite=[])[0] == 2
    status, out, err = report(new_tokens=[5])  # the old page does not pass for the new one
    assert status == 0, err
    assert out.splitlines()[-1].startswith(f"written: {page} (")
    assert json.loads(page.with_suffix(".json").read_text())["made_from"]["settings"]["new_tokens"] == 5


def test_a_page_has_its_name_only_when_it_is_whole(report, arguments, monkeypatch):
    def fail(numbers):
        raise KeyboardInterrupt

    monkeypatch.setattr(report_page, "page_of", fail)
    assert report()[0] == 130
    assert not arguments["save_path"][0].parent.exists()


# ---------------------------------------------------------------------------------------------------- sizes


def test_a_page_of_a_large_model_is_small(made):
    """32 layers of 256 experts, and all seven domains: under 6 MB (the issue), beside 1 MB of numbers."""
    generator = np.random.default_rng(0)
    numbers = json.loads(made.json.read_text())
    domains, layers, experts = 7, 32, 256
    numbers["texts"] = [made.numbers["texts"][0] | {"name": f"domain {i}"} for i in range(domains)]
    numbers["experts"] |= {
        "load": np.round(generator.random((layers, experts)), 4).tolist(),
        "load_by_text": np.round(generator.random((domains, experts)), 4).tolist(),
        "correlation": np.round(generator.uniform(-1, 1, (experts, experts)), 4).tolist(),
        "order": generator.permutation(experts).tolist(),
        "ran_by_layer": generator.random(layers).tolist(),
        "neurons_by_text": generator.random(domains).tolist(),
    }
    numbers["errors"], numbers["gates"] = ([group[0]] * layers for group in (numbers["errors"], numbers["gates"]))
    numbers["model"]["layers"] = layers
    pieces = [[" word", float(cost)] for cost in generator.random(160)]
    numbers["passages"] |= {"texts": [{"text": f"domain {i}", "pieces": pieces} for i in range(domains)]}
    assert len(report_page.page_of(numbers).encode()) < 1_500_000
    assert len(json.dumps(numbers)) < 2_000_000
    assert len(made.page.read_bytes()) < 400_000
