"""The rules of the house: which part may import which, and that no code of a checkpoint is run."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLKIT = "run_moefication.moefication"
WINGS = ("storage", "checkpoints", "text", "layers", "fitting", "artifacts", "stages")  # from the ground up
# A report evaluates as the evaluation does. Else a stage imports its own modules alone, which begin with its name.
PAIRS = {("report", "evaluate"), ("report_measure", "evaluate")}


def imports(folder: str) -> Iterator[tuple[Path, str]]:
    """Each module below a folder, and the full name of each module that it imports."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        package = path.relative_to(ROOT).parent.parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                start = package[: len(package) - node.level + 1] if node.level else ()
                names = [node.module] if node.module else [alias.name for alias in node.names]
                yield from ((path, ".".join((*start, name))) for name in names)


def test_a_wing_uses_only_those_below_it():
    used = set()
    for path, name in imports("run_moefication/moefication"):
        wing, target = path.parent.name, name.removeprefix(f"{TOOLKIT}.").split(".")[0]
        if name.startswith(TOOLKIT) and wing in WINGS and target in WINGS:
            used.add((wing, target))
            assert WINGS.index(target) <= WINGS.index(wing), f"{path} imports {name}"
    assert ("stages", "storage") in used  # imports are found


def test_stages_know_one_another_only_by_their_artifacts():
    for path, name in imports("run_moefication/moefication/stages"):
        if name.startswith(f"{TOOLKIT}.stages.") and path.stem != "moefy":
            target = name.split(".")[-1]
            is_own = path.stem.split("_")[0] == target.split("_")[0]
            assert is_own or (path.stem, target) in PAIRS, f"{path} imports {name}"


def test_the_package_stands_alone():
    assert all(not name.startswith(("run_moefication", "scripts")) for _, name in imports("llama_moe"))


def test_every_auto_class_is_told_to_run_no_code():
    calls = 0
    for folder in ("run_moefication", "llama_moe", "llama_download", "llama_data", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and re.match(r"Auto\w+\.from_pretrained$", ast.unparse(node.func)):
                    trust = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert trust.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
                    calls += 1
    assert calls >= 6
