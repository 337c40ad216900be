"""Perplexity against a straight computation, and the expert load against the gates' own choices."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, VOCABULARY, assert_refused, change_config, make_tokenizer, write_jsonl
from pipeline import load, make_moe, with_thresholds
from transformers import BloomConfig, BloomForCausalLM

from llama_moe import LlamaMoEForCausalLM
from run_moefication import llama_evaluate
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.stages.evaluate import evaluate

# float32 sums over other batches.
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(SENTENCES * 3))
    return path


def naive_perplexity(model, token_ids, block_size) -> float:
    """exp of the mean loss over every token but the first of each block, one block at a time."""
    loss, count = 0.0, 0
    for start in range(0, len(token_ids), block_size):
        block = torch.tensor([token_ids[start : start + block_size]])
        if block.shape[1] > 1:
            with torch.no_grad():
                loss += model(block, labels=block).loss.item() * (block.shape[1] - 1)
            count += block.shape[1] - 1
    return math.exp(loss / count)


@pytest.mark.parametrize(("block_size", "batch_size"), [(16, 1), (16, 5), (50, 2), (128, 4)])
def test_perplexity_is_the_straight_computation(block_size, batch_size, tiny_llama, text):
    ids = make_tokenizer()(text.read_text())["input_ids"]
    (row,) = evaluate([str(tiny_llama)], text, block_size=block_size, batch_size=batch_size)
    assert row.perplexity == pytest.approx(naive_perplexity(load(tiny_llama), ids, block_size), rel=RELATIVE)
    assert row.predicted_tokens == len(ids) - math.ceil(len(ids) / block_size)
    counts = [len(ids[start : start + block_size]) - 1 for start in range(0, len(ids) - 1, block_size)]
    losses = sum(loss * count for loss, count in zip(row.block_losses, counts, strict=True))
    assert math.exp(losses / sum(counts)) == pytest.approx(row.perplexity)
    assert row.expert_load is None


def test_budgets_of_one_checkpoint(tiny_llama, plain_run, text):
    moe = plain_run.moe
    dense, *budgets = evaluate([str(tiny_llama), str(moe)], text, num_selects=[4, 1, 2], block_size=32)
    ids = make_tokenizer()(text.read_text())["input_ids"]
    assert [row.num_selects for row in budgets] == [4, 1, 2]
    assert budgets[0].perplexity == pytest.approx(dense.perplexity, rel=RELATIVE)
    for row in budgets:
        assert row.perplexity == pytest.approx(naive_perplexity(load(moe, row.num_selects), ids, 32), rel=RELATIVE)
        assert len(row.expert_load) == 3
        assert all(sum(load) == pytest.approx(row.num_selects) for load in row.expert_load)
    assert budgets[1].perplexity != pytest.approx(dense.perplexity, rel=0.01)


@torch.no_grad()
def naive_best_tokens(model, token_ids, block_size) -> list[int]:
    """The most likely token at the place of every token but the first of each block, one block at a time."""
    blocks = [token_ids[start : start + block_size] for start in range(0, len(token_ids), block_size)]
    return [token for block in blocks for token in model(torch.tensor([block])).logits[0, :-1].argmax(-1).tolist()]


def test_agreement_is_with_the_first_model_on_the_same_tokens(tiny_llama, plain_run, text):
    dense, everything, half = evaluate([tiny_llama, plain_run.moe], text, num_selects=[4, 2], block_size=32)
    ids = make_tokenizer()(text.read_text())["input_ids"]
    first, second = (naive_best_tokens(model, ids, 32) for model in (load(tiny_llama), load(plain_run.moe, 2)))
    assert half.best_tokens.tolist() == second
    expected = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    assert half.agreement == pytest.approx(expected)
    assert 0.05 < expected < 0.95
    assert dense.agreement == 1 == pytest.approx(everything.agreement, abs=0.01)
    (alone,) = evaluate([plain_run.moe], text, num_selects=[2], block_size=32)
    assert alone.agreement == 1


def saved(model: LlamaMoEForCausalLM, folder: Path) -> str:
    """A model with a tokenizer, in a folder."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("routing", ["top_k", "threshold"])
def test_shared_experts_and_thresholds(routing, text, tmp_path):
    fields = dict(num_experts=6, num_shared_experts=2, routing=routing, gate_network="linear")
    model = with_thresholds(make_moe(**fields))
    path = saved(model, tmp_path / "moe")
    ids = make_tokenizer()(text.read_text())["input_ids"]
    own, more = evaluate([path], text, num_selects=[4, 7], block_size=32)
    assert (own.num_experts, own.num_selects, own.label) == (8, 4, "moe, 4 of 8")
    assert own.perplexity == pytest.approx(naive_perplexity(model, ids, 32), rel=RELATIVE)
    model.set_num_experts_per_tok(5)
    assert more.perplexity == pytest.approx(naive_perplexity(model, ids, 32), rel=RELATIVE)
    for wrong in (2, 9):
        with pytest.raises(MoEficationError, match=f"num_selects {wrong} is outside of 3 to 8"):
            evaluate([path], text, num_selects=[wrong])


def test_a_budget_asked_for_replaces_those_of_single_layers(text, tmp_path):
    model = make_moe()
    model.set_num_experts_per_tok([1, 4, 3])
    path = saved(model, tmp_path / "moe")
    for num_selects, by_layer in ((None, [1, 4, 3]), ([4], [4, 4, 4])):
        (row,) = evaluate([path], text, num_selects=num_selects, block_size=32)
        assert [sum(load) for load in row.expert_load] == pytest.approx(by_layer)


def test_thresholds_without_quantiles_have_no_other_budget(text, tmp_path):
    path = saved(make_moe(routing="threshold"), tmp_path / "moe")
    with pytest.raises(MoEficationError, match="cannot run num_selects 3: no score quantiles are stored"):
        evaluate([path], text, num_selects=[3], block_size=32)


def test_documents_of_a_jsonl_are_joined_with_eos(tiny_llama, tmp_path):
    path = write_jsonl(tmp_path / "text.jsonl", SENTENCES)
    tokenizer = make_tokenizer()
    ids = [i for sentence in SENTENCES for i in [*tokenizer(sentence)["input_ids"], tokenizer.eos_token_id]][:-1]
    (row,) = evaluate([str(tiny_llama)], path, block_size=64)
    assert row.perplexity == pytest.approx(naive_perplexity(load(tiny_llama), ids, 64), rel=RELATIVE)


def test_table_and_json(tiny_llama, plain_run, text, run_script, tmp_path):
    arguments = ["--model_path", tiny_llama, plain_run.moe, "--num_selects", 4, 2, "--text_path", text]
    arguments += ["--block_size", 32]
    status, out, _ = run_script(llama_evaluate.main, *arguments, "--json", tmp_path / "rows.json")
    assert status == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    made = [("tiny-llama", None), ("tiny-llama-MoE", 4), ("tiny-llama-MoE", 2)]
    assert [(row["model"], row["num_selects"]) for row in rows] == made
    *table, took = out.splitlines()[-4:]
    labels = ["tiny-llama", "tiny-llama-MoE, 4 of 4", "tiny-llama-MoE, 2 of 4"]
    assert [line.rsplit(maxsplit=5)[0] for line in table] == labels
    assert took.startswith("evaluated in ")
    for row, line in zip(rows, table, strict=True):
        ratio = row["perplexity"] / rows[0]["perplexity"]
        assert line.split()[-4:-1] == [f"{row['perplexity']:.3f}", f"{ratio:.4f}", f"{row['agreement']:.1%}"]
    (tmp_path / "mine.json").write_text("{}")
    refused = run_script(llama_evaluate.main, *arguments, "--json", tmp_path / "mine.json")
    assert_refused(refused, "mine.json is in the way, and no evaluation: name another file")
    assert run_script(llama_evaluate.main, *arguments, "--json", tmp_path / "rows.json")[0] == 0  # its own, again
    _, out, _ = run_script(llama_evaluate.main, *arguments, "--json")
    assert all(row.pop("seconds") > 0 for row in rows)
    assert [{**row, "seconds": None} for row in json.loads(out)] == [{**row, "seconds": None} for row in rows]


def test_a_model_without_a_longest_text(text, tmp_path):
    BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (row,) = evaluate([tmp_path], text, max_tokens=200)
    assert 1 < row.perplexity < math.inf


@pytest.mark.parametrize("wrong", [{"sliding_window": "x"}, {"sliding_window": 8, "max_position_embeddings": "x"}])
def test_a_window_that_is_no_number(wrong, tiny_llama, text, tmp_path):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    change_config(folder, model_type="mistral", **wrong)
    with pytest.raises(MoEficationError, match=r"config\.json: "):
        evaluate([folder], text)
