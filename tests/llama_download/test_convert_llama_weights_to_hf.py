"""Meta's checkpoints become transformers checkpoints: the same logits bit for bit, or one line and nothing written."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Bomb, assert_refused, change_config
from meta_format import meta_logits, small_llama, write_meta
from pipeline import contents
from safetensors import safe_open
from tiny_tokenizers import write_sentencepiece, write_tiktoken
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llama_download import checkpoint_folder
from llama_download import convert_llama_weights_to_hf as script

TOKENS = torch.arange(1, 97).view(2, 48)
ROPE3 = {"rope_theta": 500_000.0, "rope_type": "default"}


def scaled(factor: float) -> dict:
    return ROPE3 | {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model")


@pytest.fixture
def write_in(tmp_path, tokenizer_file) -> Callable[..., Path]:
    """`write_in(model, num_shards)` is `write_meta` into a folder of the test, with a tokenizer beside it."""

    def write(model: LlamaForCausalLM, num_shards: int = 1, **options) -> Path:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
        return write_meta(model, tmp_path / "in", num_shards, **options)

    return write


@pytest.fixture
def meta_folder(tmp_path, tokenizer_file) -> Path:
    """A whole checkpoint in two shards, its tokenizer in the folder above."""
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    return write_meta(small_llama(), tmp_path / "meta" / "tiny", 2)


@pytest.fixture
def convert(run_script):
    def run(folder: Path, output: Path, *options, model_size: str = "auto"):
        arguments = ["--input_dir", folder, "--model_size", model_size, "--output_dir", output, *options]
        return run_script(script.main, *arguments)

    return run


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def assert_same_logits(folder: Path, model: LlamaForCausalLM) -> LlamaForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    return loaded


@pytest.mark.parametrize(
    ("num_shards", "kv_heads", "embedding_axis"),
    [(1, 16, 1), (2, 8, 0), (4, 16, 0), (4, 8, 1), (8, 8, 0), (8, 16, 1)],
)
def test_logits_are_equal_bit_for_bit(convert, tmp_path, write_in, num_shards, kv_heads, embedding_axis):
    model = small_llama(num_key_value_heads=kv_heads)
    kv = None if kv_heads == 16 else kv_heads  # LLaMA 1 does not mention them
    folder = write_in(model, num_shards, embedding_axis=embedding_axis, n_kv_heads=kv)
    assert convert(folder, tmp_path / "out")[0] == 0
    assert_same_logits(tmp_path / "out", model)


def test_logits_are_those_of_metas_own_computation(convert, meta_folder, tmp_path):
    """Independent of how the test's files were made: the shards, put together, run as the paper has it."""
    assert convert(meta_folder, tmp_path / "out")[0] == 0
    shards = [torch.load(meta_folder / f"consolidated.0{i}.pth", weights_only=True) for i in range(2)]
    params = json.loads((meta_folder / "params.json").read_text())
    state = {}
    for name, part in shards[0].items():
        axis = 1 if name.startswith("tok_") or "wo." in name or "w2." in name else 0
        state[name] = part if part.ndim == 1 else torch.cat([part, shards[1][name]], axis)
    expected = torch.stack([meta_logits(state, params, row) for row in TOKENS])
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("family", "config", "params", "positions"),
    [
        ("LLaMA 1", {"rms_norm_eps": 1e-6, "num_key_value_heads": 16}, {"n_kv_heads": None}, 2048),
        ("Llama 2", {"num_key_value_heads": 16}, {"n_kv_heads": None, "vocab_size": 512}, 4096),
        ("Llama 3", {"rope_parameters": ROPE3}, {"rope_theta": 500000.0}, 8192),
        ("Llama 3.1", {"rope_parameters": scaled(8.0)}, {"rope_theta": 500000.0, "use_scaled_rope": True}, 131072),
        (
            "Llama 3.2",
            {"rope_parameters": scaled(32.0), "tie_word_embeddings": True},
            {"rope_theta": 500000.0, "use_scaled_rope": True},
            131072,
        ),
        ("Llama 2", {"intermediate_size": 256, "num_key_value_heads": 16}, {"ffn_dim_multiplier": 1.3}, 4096),
    ],
)
def test_every_generation_is_known_by_its_parameters(convert, tmp_path, family, config, params, positions):
    model = small_llama(**config)
    folder = write_meta(model, tmp_path / "in", embedding_axis=0, **params)
    if family.startswith("Llama 3"):
        write_tiktoken(folder / "tokenizer.model")
        model.resize_token_embeddings(600)
        write_meta(model, folder, embedding_axis=0, **params)
    else:
        write_sentencepiece(folder / "tokenizer.model")
    status, out, _ = convert(folder, tmp_path / "out")
    assert (status, family in out) == (0, True)
    loaded = assert_same_logits(tmp_path / "out", model)
    assert loaded.config.max_position_embeddings == positions
    assert loaded.config.rope_parameters == model.config.rope_parameters
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.model_max_length == positions


@pytest.mark.parametrize("ships_output", [True, False])
def test_tied_embeddings_are_written_once(convert, tmp_path, write_in, ships_output):
    model = small_llama(tie_word_embeddings=True)
    folder = write_in(model, embedding_axis=0)
    if not ships_output:
        shard = torch.load(folder / "consolidated.00.pth", weights_only=True)
        del shard["output.weight"]
        torch.save(shard, folder / "consolidated.00.pth")
    assert convert(folder, tmp_path / "out")[0] == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (not a dict)
    assert assert_same_logits(tmp_path / "out", model).config.tie_word_embeddings


def test_output_shards_are_as_small_as_asked_for(convert, meta_folder, tmp_path):
    assert convert(meta_folder, tmp_path / "out", "--max_shard_size", "100KB")[0] == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {tmp_path / "out" / name for name in index["weight_map"].values()}
    assert len(files) > 3
    largest_tensor = 512 * 64 * 4
    assert all(file.stat().st_size < largest_tensor + 2_000 for file in files)
    assert_same_logits(tmp_path / "out", small_llama())
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in files} == {(tmp_path / "new").stat().st_mode}


def test_dtype_is_that_of_the_source_unless_told_otherwise(convert, tmp_path, write_in):
    model = small_llama().to(torch.bfloat16)
    folder = write_in(model)
    assert convert(folder, tmp_path / "same")[0] == convert(folder, tmp_path / "wide", "--dtype", "float32")[0] == 0
    same, wide = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("same", "wide"))
    assert (same.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor)
        assert torch.equal(wide.state_dict()[name], tensor.float())


@pytest.mark.parametrize("given", ["llama", "llama/7B"])
def test_the_layout_of_the_download_is_found(convert, tmp_path, tokenizer_file, monkeypatch, given):
    """TARGET_FOLDER or the folder of the size below it, the tokenizer beside the sizes."""
    write_meta(small_llama(), tmp_path / "llama" / "7B")
    (tmp_path / "llama" / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    result = convert(Path(given), Path("out"), model_size="7B")
    assert_refused(result, "give --input_dir llama/7B --model_size auto")  # found, and seen not to be a 7B
    assert (convert(Path(given), Path("out"))[0] == 0) == (given == "llama/7B")


def test_it_runs_as_a_script_from_anywhere(meta_folder, tmp_path):
    command = [sys.executable, script.__file__, "--input_dir", meta_folder, "--model_size", "auto", "--output_dir"]
    result = subprocess.run([*command, "out/of/here"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0
    assert "next: MODEL_PATH=out/of/here bash run_moefication/1_split.sh" in result.stdout
    assert_same_logits(tmp_path / "out/of/here", small_llama())


def test_a_finished_checkpoint_is_left_alone_and_others_are_refused(convert, meta_folder, tmp_path):
    output = tmp_path / "out"
    assert convert(meta_folder, output)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    status, out, _ = convert(meta_folder, output)
    assert (status, "already finished" in out) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before

    assert_refused(convert(meta_folder, output, "--dtype", "bfloat16"), "--overwrite")
    assert convert(meta_folder, output, "--dtype", "bfloat16", "--overwrite")[0] == 0
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16

    write_meta(small_llama(seed=1), meta_folder, 2)  # the same shapes and sizes, other weights
    assert convert(meta_folder, output, "--dtype", "bfloat16")[0] == 2

    (output / "notes.txt").write_text("mine")
    before = contents(output)
    assert_refused(convert(meta_folder, output, "--overwrite"), "notes.txt")
    assert contents(output) == before


def test_an_incomplete_checkpoint_is_not_taken_for_finished(convert, meta_folder, tmp_path):
    assert convert(meta_folder, tmp_path / "out")[0] == 0
    (tmp_path / "out" / "model.safetensors").unlink()
    assert_refused(convert(meta_folder, tmp_path / "out"), "has lost or changed files: --overwrite")
    assert convert(meta_folder, tmp_path / "out", "--overwrite")[0] == 0
    assert_same_logits(tmp_path / "out", small_llama())


def edit_shard(folder: Path, rank: int, change) -> None:
    path = folder / f"consolidated.{rank:02d}.pth"
    shard = torch.load(path, weights_only=True)
    change(shard)
    torch.save(shard, path)


DAMAGES = {
    "first shard missing": (lambda f: (f / "consolidated.00.pth").unlink(), "consolidated.00.pth is missing"),
    "last shard missing": (lambda f: (f / "consolidated.01.pth").unlink(), "shards are missing, too many"),
    "a rank twice": (
        lambda f: (f / "consolidated.1.pth").write_bytes((f / "consolidated.01.pth").read_bytes()),
        "consolidated.02.pth is missing; the folder has consolidated.00.pth, consolidated.01.pth, consolidated.1.pth",
    ),
    "heads cut in two": (lambda f: change_config(f, "params.json", n_heads=1, n_kv_heads=1), "attention.w"),
    "a tensor without values": (
        lambda f: edit_shard(f, 0, lambda shard: shard.update(extra=torch.empty(2, device="meta"))),
        "not a dict of tensors",
    ),
    "shard cut short": (
        lambda f: os.truncate(f / "consolidated.01.pth", 9000),
        "consolidated.01.pth is not a whole file",
    ),
    "shard runs code": (
        lambda f: torch.save(Bomb(f / "exploded"), f / "consolidated.00.pth"),
        "consolidated.00.pth is not a whole",
    ),
    "tensor missing": (
        lambda f: edit_shard(f, 1, lambda shard: shard.pop("layers.1.ffn_norm.weight")),
        "lacks layers.1.ffn_norm.weight",
    ),
    "norms differ": (
        lambda f: edit_shard(f, 1, lambda shard: shard["norm.weight"].add_(1)),
        "hold norm.weight as",
    ),
    "integer weights": (
        lambda f: [edit_shard(f, i, lambda s: s.update({n: t.int() for n, t in s.items()})) for i in (0, 1)],
        "is torch.int32",
    ),
    "no params.json": (lambda f: (f / "params.json").unlink(), "has no params.json"),
    "params.json is HTML": (lambda f: (f / "params.json").write_text("<html>"), "params.json is not JSON"),
    "dim is text": (lambda f: change_config(f, "params.json", dim="64"), "dim is '64'"),
    "dim is true": (lambda f: change_config(f, "params.json", dim=True), "dim is True"),
    "heads that do not divide": (lambda f: change_config(f, "params.json", n_heads=7), "do not divide evenly"),
    "other width": (lambda f: change_config(f, "params.json", multiple_of=256), "feed_forward.w1.weight"),
    "other number of layers": (lambda f: change_config(f, "params.json", n_layers=1), "holds layers.1."),
    "a billion layers": (lambda f: change_config(f, "params.json", n_layers=10**9), "has no layers.999999999."),
    "other vocabulary": (lambda f: change_config(f, "params.json", vocab_size=513), "tok_embeddings.weight"),
    "norm_eps is NaN": (lambda f: change_config(f, "params.json", norm_eps=float("nan")), "norm_eps is nan"),
    "no tokenizer": (lambda f: (f.parent / "tokenizer.model").unlink(), "has no tokenizer.model"),
    "tokenizer is HTML": (lambda f: (f.parent / "tokenizer.model").write_text("<html>"), "neither a sentencepiece"),
    "tokenizer is empty": (lambda f: (f.parent / "tokenizer.model").write_text(""), "is not a BPE model"),
    "tokenizer of a smaller model": (
        lambda f: (write_meta(small_llama(vocab_size=2048), f, 2), change_config(f, "params.json", vocab_size=2048)),
        "put the model's own tokenizer.model into its folder",
    ),
    "tokenizer is too large": (lambda f: write_tiktoken(f / "tokenizer.model"), "the embedding of"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_nothing_written(convert, meta_folder, tmp_path, damage):
    spoil, message = DAMAGES[damage]
    spoil(meta_folder)
    before = contents(tmp_path)
    assert_refused(convert(meta_folder, tmp_path / "out"), message)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("size", ["7B", "70B", "1B"])
def test_another_size_than_the_files_is_refused(convert, meta_folder, tmp_path, size):
    result = convert(meta_folder, tmp_path / "out", model_size=size)
    assert_refused(result, f"--model_size {size} has", f"{meta_folder} --model_size auto")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [["--max_shard_size", "0GB"], ["--max_shard_size", "5"], ["--dtype", "int8"], ["--model_size", "6B"]]
)
def test_wrong_options_are_refused(convert, meta_folder, tmp_path, options):
    assert_refused(convert(meta_folder, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_values_beyond_the_new_dtype_are_refused(convert, meta_folder, tmp_path):
    edit_shard(meta_folder, 1, lambda shard: shard["output.weight"].mul_(1e6))
    before = contents(tmp_path)
    status, _, err = convert(meta_folder, tmp_path / "out", "--dtype", "float16")
    assert (status, "output.weight has values beyond float16" in err) == (2, True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_checkpoint_and_the_next_one_none_of_its_remains(convert, tmp_path, write_in, kind):
    folder = write_in(small_llama(num_hidden_layers=60))
    (results := tmp_path / "results").mkdir()
    arguments = ["--input_dir", folder, "--model_size", "auto", "--output_dir", results / "out"]
    command = [sys.executable, script.__file__, *arguments, "--max_shard_size", "1KB"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not list(results.glob(".out.partial/model-*")):
        time.sleep(0.01)
    process.send_signal(kind)
    process.communicate()
    assert process.returncode == (143 if kind == signal.SIGTERM else -kind)
    left = {path.name for path in results.iterdir()}
    assert left == ({".out.partial", ".out.lock"} if kind == signal.SIGKILL else set())
    assert convert(folder, results / "out")[0] == 0
    assert [path.name for path in results.iterdir()] == ["out"]
    assert_same_logits(results / "out", small_llama(num_hidden_layers=60))


def test_two_runs_do_not_write_one_folder(tmp_path):
    with (
        checkpoint_folder.new_folder(tmp_path / "out", {"made": "first"}) as partial,
        pytest.raises(ValueError, match="another run is writing"),
        checkpoint_folder.new_folder(tmp_path / "out", {"made": "second"}),
    ):
        raise AssertionError("entered twice")
    assert not partial.exists()


ANONYMOUS_PEAK = """
import sys, threading, time
from llama_download import meta_checkpoint
from llama_download.convert_llama_weights_to_hf import main
def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
before = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
assert main(sys.argv[1:]) == 0
print("more memory:", peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_model_is_converted_in_the_memory_of_a_shard(tmp_path, write_in):
    """A model of 410 MB, in shards of 41 MB."""
    model = small_llama(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_key_value_heads=16)
    folder = write_in(model, 2, n_kv_heads=None, multiple_of=256)
    arguments = ["--input_dir", folder, "--model_size", "auto", "--output_dir", tmp_path / "out"]
    command = [sys.executable, "-c", ANONYMOUS_PEAK, *arguments, "--max_shard_size", "41MB"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split("more memory:")[1]) < 150e6  # libraries that are loaded late take a part of it
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) > 400e6
