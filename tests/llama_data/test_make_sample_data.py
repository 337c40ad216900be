"""The sample text, as scripts/test.sh makes it: real documents, each on one side of the split."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from pipeline import contents

SCRIPT = Path(__file__).parents[2] / "llama_data" / "make_sample_data.py"


def make(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, "--output_dir", folder], capture_output=True, text=True)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_bytes().decode().split("\n") if line]


def test_no_document_is_in_both_halves_or_twice(sample_data):
    for domain in ("c4", "github", "wikipedia"):
        train, heldout = texts(sample_data / f"{domain}.jsonl"), texts(sample_data / "heldout" / f"{domain}.jsonl")
        assert len(set(train + heldout)) == len(train) + len(heldout)
        assert 0.1 < len(heldout) / len(train + heldout) < 0.3
        assert sum(map(len, train)) > 500_000


def test_manifest_holds_the_files_sums(sample_data):
    manifest = (sample_data / "manifest.json").read_text()
    for path in sample_data.rglob("*.jsonl"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in manifest


def test_made_again_it_is_the_same(sample_data, tmp_path):
    assert make(tmp_path / "again").returncode == 0
    assert contents(tmp_path / "again") == contents(sample_data)
    result = make(tmp_path / "again")
    assert (result.returncode, "nothing to do" in result.stdout) == (0, True)


def test_foreign_files_are_refused_and_kept(sample_data, tmp_path):
    (tmp_path / "c4.jsonl").write_text("mine")
    result = make(tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert contents(tmp_path) == {"c4.jsonl": b"mine"}
