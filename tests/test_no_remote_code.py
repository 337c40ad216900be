"""Nothing in this project loads a model or tokenizer by a call that might run the code of a checkpoint."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("run_moefication", "llama_moe", "llama_download", "llama_data", "scripts")


def test_every_auto_class_is_told_to_run_no_code():
    calls = 0
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                owner = node.func.value
                if node.func.attr != "from_pretrained" or not isinstance(owner, ast.Name):
                    continue
                if owner.id.startswith("Auto"):
                    trust = {keyword.arg: keyword.value for keyword in node.keywords}.get("trust_remote_code")
                    assert isinstance(trust, ast.Constant), f"{path}:{node.lineno}"
                    assert trust.value is False, f"{path}:{node.lineno}"
                    calls += 1
    assert calls >= 6
