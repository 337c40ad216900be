"""The choice bench: tasks are what their text says, accuracies and equal tokens those of a straight computation."""

import json
import math
import random
import re

import bench_choice
import choice_table
import make_eval_tasks
import pytest
import torch
import yaml
from conftest import SENTENCES, assert_refused, make_llama, make_tokenizer, write_jsonl
from make_eval_tasks import DESCRIPTIONS, make_tasks
from pipeline import load, make_moe

TASKS = ("continuation", "cloze")
WORDS = sorted({word for sentence in SENTENCES for word in sentence.split() if word.isalpha() and word.islower()})


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """Two domains of a few documents, of words at random."""
    folder, generator = tmp_path_factory.mktemp("heldout"), random.Random(0)
    for domain in ("books", "c4"):
        sentences = [" ".join(generator.choices(WORDS, k=9)) + "." for _ in range(150)]
        write_jsonl(folder / f"{domain}.jsonl", ["\n".join(sentences[i : i + 30]) for i in range(0, 150, 30)])
    return folder


@pytest.fixture(scope="module")
def models(tiny_llama, plain_run):
    return load(tiny_llama), load(plain_run.moe, 2)


def written(folder, heldout, run_script):
    options = ("--heldout_path", heldout, "--output_dir", folder, "--examples", 5)
    status, _, err = run_script(make_eval_tasks.main, *options)
    assert status == 0, err
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in TASKS}


def test_tasks_are_the_text_with_wrong_answers_of_the_same_domain(heldout, tmp_path, run_script):
    tasks = written(tmp_path / "a", heldout, run_script)
    assert tasks == written(tmp_path / "b", heldout, run_script) == make_tasks(heldout, 5)
    for name, examples in tasks.items():
        assert [example["domain"] for example in examples] == ["books"] * 5 + ["c4"] * 5
        assert {example["label"] for example in examples} == {0, 1, 2, 3}
        assert (tmp_path / f"a/{name}.jsonl").read_bytes() == (tmp_path / f"b/{name}.jsonl").read_bytes()
        for example in examples:
            texts = [json.loads(line)["text"] for line in (heldout / f"{example['domain']}.jsonl").open()]
            context, choices, right = example["context"], example["choices"], example["choices"][example["label"]]
            assert len(set(choices)) == 4
            assert len(context.split()) == 48
            assert any(context + right in text for text in texts)
            assert all(any(choice in text for text in texts) for choice in choices)
            if name == "continuation":
                assert {len(choice.split()) for choice in choices} == {16}
            else:
                assert any(f"{context}{right}." in text for text in texts)


def test_wrong_words_are_about_as_frequent():
    words = [letter * 3 for letter in "abcdefghijklmnopqrstuvwxyz"]  # the nth is there n times
    document = [f" {word}" for count, word in enumerate(words) for _ in range(count)]
    questions, order = make_eval_tasks.cloze([[*document, *(f" {word}." for word in words)]])
    assert order == [f" {word}" for word in words]
    assert questions[0] == ("".join(document[-48:]).lstrip(), " aaa")
    first, *_ = make_eval_tasks.choose(questions, order, 26)
    assert {*first["choices"]} <= {*order[: make_eval_tasks.NEIGHBOURS + 1]}


@pytest.mark.parametrize("name", TASKS)
def test_descriptions_name_what_the_harness_finds(name, heldout, tmp_path, run_script):
    datasets = pytest.importorskip("datasets")
    examples = written(tmp_path / "tasks", heldout, run_script)[name]
    task = yaml.safe_load((tmp_path / f"tasks/{name}.yaml").read_text())
    data = datasets.load_dataset(task["dataset_path"], **task["dataset_kwargs"], cache_dir=str(tmp_path / "cache"))
    fields = [task[field] for field in ("doc_to_text", "doc_to_choice", "doc_to_target")]
    assert [[row[field] for field in fields] for row in data[task["test_split"]]] == [
        [example["context"], example["choices"], example["label"]] for example in examples
    ]
    template = yaml.safe_load((DESCRIPTIONS / f"{name}.yaml").read_text())
    assert template | {"dataset_kwargs": None} == task | {"dataset_kwargs": None}
    assert (task["task"], task["target_delimiter"]) == (f"heldout_{name}", "")


@torch.no_grad()
def straight_score(model, context: str, choice: str) -> float:
    """Log-likelihood of a choice's tokens over its length in characters, as lm-evaluation-harness computes acc_norm."""
    tokenizer = make_tokenizer()
    whole, start = tokenizer(context + choice)["input_ids"], len(tokenizer(context)["input_ids"])
    log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(log_p[i - 1, whole[i]].item() for i in range(start, len(whole))) / len(choice)


def test_choices_are_made_by_the_straight_computation(models, heldout):
    tokenizer, places = make_tokenizer(), []
    for model in models:
        for example in [example for examples in make_tasks(heldout, 6).values() for example in examples]:
            expected = [straight_score(model, example["context"], choice) for choice in example["choices"]]
            tokens = bench_choice.encode(example, tokenizer, "cpu")
            scores = bench_choice.log_likelihoods(model, tokens[0], tokens[1:])
            scores = [score / len(choice) for score, choice in zip(scores, example["choices"], strict=True)]
            assert scores == pytest.approx(expected, rel=1e-4)
            places.append(bench_choice.chosen(model, example, tokens))
            assert places[-1] == max(range(4), key=expected.__getitem__)
    assert set(places) == {0, 1, 2, 3}


def test_the_harness_makes_the_same_choices(heldout, tmp_path, run_script):
    """EleutherAI's, on the tasks that it reads from the folder, and its perplexity of documents."""
    pytest.importorskip("lm_eval")
    import harness

    long = {"max_position_embeddings": 256}  # so that no context is cut
    make_llama(tmp_path / "dense", **long)
    make_moe(**long).save_pretrained(tmp_path / "moe")
    make_tokenizer().save_pretrained(tmp_path / "moe")
    paths = [tmp_path / "dense", tmp_path / "moe"]
    tasks = written(tmp_path / "tasks", heldout, run_script)
    options = ["--tasks", "heldout_perplexity,heldout_continuation,heldout_cloze", "--include_path", tmp_path / "tasks"]
    options += ["--model_path", *paths, "--json", tmp_path / "found.json", "--device", "cpu"]
    status, out, err = run_script(harness.main, *options)
    assert status == 0, err
    found = json.loads((tmp_path / "found.json").read_text())
    documents = [json.loads(line)["text"] for line in (tmp_path / "tasks/perplexity.jsonl").open()]
    assert len(documents) == 10
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    for path, row in zip(paths, table[2:], strict=True):
        model = load(path)
        expected = [f"{document_perplexity(model, documents):.4g}"]
        for name in TASKS:
            scores = [[straight_score(model, e["context"], choice) for choice in e["choices"]] for e in tasks[name]]
            labels = [example["label"] for example in tasks[name]]
            right = [max(range(4), key=of.__getitem__) == label for of, label in zip(scores, labels, strict=True)]
            assert found[str(path)][f"heldout_{name}"]["acc_norm,none"] == sum(right) / len(right)
            expected.append(f"{sum(right) / len(right):.4g}")
        assert [row[0], row[1], row[3], row[5]] == [path.name, *expected]


@torch.no_grad()
def document_perplexity(model, documents: list[str]) -> float:
    """Of words, as the harness counts them: documents are read after BOS, in windows of the model's length."""
    tokenizer, length, loss = make_tokenizer(), model.config.max_position_embeddings, 0.0
    for text in documents:
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), length):
            end = min(start + length, len(ids))
            whole = [tokenizer.bos_token_id, *ids][max(0, end - length) : end]  # the last window is a full one, too
            log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            targets = ids[start:end]
            loss -= log_p[-len(targets) :].gather(1, torch.tensor(targets)[:, None]).sum().item()
    return math.exp(loss / sum(len(re.split(r"\s+", text)) for text in documents))


def test_equal_tokens_are_those_before_generation_first_differs(tiny_llama, plain_run):
    models = load(tiny_llama), load(plain_run.moe, 3)
    prompts = torch.randint(3, 300, (32, 20), generator=torch.Generator().manual_seed(0))
    for model in models:
        model.generation_config.eos_token_id = None  # nothing stops early
    said = [model.generate(prompts, do_sample=False, max_new_tokens=bench_choice.NEW)[:, 20:] for model in models]
    spoken = bench_choice.greedy(models[0], prompts)
    assert torch.equal(spoken, said[0])
    pairs = zip(*(one.tolist() for one in said), strict=True)
    expected = [next((i for i in range(len(a)) if a[i] != b[i]), len(a)) for a, b in pairs]
    assert bench_choice.equal_tokens(models[1], prompts, spoken) == expected
    assert bench_choice.equal_tokens(models[0], prompts, spoken) == [bench_choice.NEW] * 32
    assert len(set(expected)) > 3


@pytest.fixture
def arguments(tiny_llama, plain_run, heldout):
    paths = ["--model_path", tiny_llama, "--moe_path", plain_run.moe, "--heldout_path", heldout]
    return [*paths, "--heldout_tokens", 1024, "--examples", 5]


def test_rows_and_table(arguments, heldout, run_script, tmp_path):
    path = tmp_path / "rows.jsonl"
    status, out, err = run_script(bench_choice.main, *arguments, "--num_selects", 4, 2, "--json", path)
    assert status == 0, err
    dense, everything, half = (json.loads(line) for line in path.open())
    for row in (dense, everything):
        assert set(row["equal_tokens"]) == {bench_choice.NEW}
        assert row["agreement"] == pytest.approx(1, abs=0.01)
        assert [row[task] for task in TASKS] == [dense[task] for task in TASKS]
    assert len(half["equal_tokens"]) == 4  # blocks of 512 tokens
    assert all(len(half[task]) == 10 and {*half[task]} <= {0, 1} for task in TASKS)
    assert half["agreement"] < 0.95
    assert half["settings"].items() >= {"heldout_tokens": 1024, "examples": 5}.items()
    assert run_script(choice_table.main, path)[1] == out
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines())
    assert head == ["model", "active", "perplexity", "agreement", "equal tokens", *TASKS]
    assert [line[0] for line in lines] == ["tiny-llama", "tiny-llama-MoE, 4 of 4", "tiny-llama-MoE, 2 of 4"]
    assert lines[2][2] == f"{half['perplexity'] / dense['perplexity']:.3f}"
    assert lines[2][5].startswith(f"{sum(half['continuation']) * 10}.0 % (")
    assert lines[0][5] == f"{sum(dense['continuation']) * 10}.0 %"
    assert lines[1][6].endswith("(+0.0 to +0.0)")


def test_intervals_hold_the_mean_and_narrow_with_more_examples():
    few, many = ([0, 1, 1] * count for count in (4, 400))
    (low, high), (lower, higher) = choice_table.interval(few), choice_table.interval(many)
    assert low < lower < 2 / 3 < higher < high
    # 1.96 standard errors
    assert higher - lower == pytest.approx(2 * 1.96 * (2 / 9 / 1200) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--num_selects", 5), "--num_selects 5 is outside of 1 to 4"),
        (("--heldout_path", "nowhere"), "--heldout_path nowhere holds no .jsonl file"),
        (("--heldout_path", "{short}"), "holds too little prose for the task continuation"),
        (("--heldout_tokens", 100), "no file holds 512 tokens"),
    ],
)
def test_wrong_input_is_refused(options, words, arguments, run_script, tmp_path):
    write_jsonl(tmp_path / "c4.jsonl", ["Too short."])
    options = [str(option).format(short=tmp_path) for option in options]
    assert_refused(run_script(bench_choice.main, *arguments, *options), words)


def test_other_files_make_no_table(run_script, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"method": "x"}\n')
    for name in ("other.jsonl", "nowhere.jsonl"):
        result = run_script(choice_table.main, tmp_path / name)
        assert_refused(result, f"{name} is not a file of bench_choice.py --json")
