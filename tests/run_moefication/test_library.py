"""The library does what the scripts do, takes and returns handles, and imports nothing heavy before it is used."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SENTENCES, make_llama, write_jsonl

import run_moefication as rm

ROOT = Path(__file__).parents[2]


def test_importing_it_and_its_settings_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    code = f"import sys, run_moefication as rm; rm.CALIBRATED, dir(rm); sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_all_that_is_public_is_there():
    for name in rm._MODULES:
        assert getattr(rm, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'moeify'"):
        _ = rm.moeify


def test_errors_speak_of_fields():
    with pytest.raises(rm.SettingError, match=r"^num_selects 9 is outside of 1 to num_experts 8$"):
        rm.ConvertSettings(num_experts=8, num_selects=9)
    with pytest.raises(rm.SettingError, match=r"^batch_size 0 must be at least 1$"):
        rm.CalibrateSettings(batch_size=0)


def test_the_lines_of_the_readme_run(tmp_path, monkeypatch):
    (lines,) = re.findall(r"## As a library\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(lines.splitlines()) <= 12
    sizes = dict(hidden_size=64, intermediate_size=688, num_hidden_layers=1, num_key_value_heads=4)
    make_llama(tmp_path / "models" / "llama_7B", **sizes)
    for name in ("llama_data/c4.jsonl", "heldout.txt"):
        write_jsonl(tmp_path / name, [f"{i}. {SENTENCES[i % 6]}" for i in range(60)])
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(lines, names)
    assert [row.num_selects for row in names["rows"]] == [None, 32, 21, 11]
    assert names["experts"].num_shared_experts == 10
    assert type(names["model"]).__name__ == "LlamaMoEForCausalLM"
