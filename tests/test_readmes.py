"""The READMEs say what is there: tables are what their commands print, links and paths lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = "scripts|run_moefication|llama_moe|llama_download|llama_data|tests"
READMES = ["README.md", *(f"{name}/README.md" for name in FOLDERS.split("|") if (ROOT / name / "README.md").is_file())]
FENCED = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"<!-- python (?P<command>scripts/\S+\.py .*?) -->\n(?P<table>(?:\|[^\n]*\n)*)", re.DOTALL)
LINK = re.compile(r"\]\((?P<file>[^)#:\s]*)(?:#(?P<section>[^)\s]+))?\)")


def text(name: str) -> str:
    return (ROOT / name).read_text()


def commands() -> list:
    return [
        pytest.param(match["command"], match["table"], id=f"{name}-{number}")
        for name in READMES
        for number, match in enumerate(COMMAND.finditer(text(name)))
    ]


@pytest.mark.parametrize(("command", "table"), commands())
def test_a_table_is_what_its_command_prints(command, table, run_script, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *options = shlex.split(command)
    status, out, err = run_script(importlib.import_module(Path(script).stem).main, *options)
    assert (status, err) == (0, "")
    assert out == table


def test_every_comment_with_a_command_is_tested():
    assert len(commands()) >= 6
    assert sum(text(name).count("<!-- python ") for name in READMES) == len(commands())


def test_the_first_readme_is_short():
    assert len(text("README.md").splitlines()) <= 200


@pytest.mark.parametrize("name", READMES)
def test_links_lead_to_files_and_sections(name):
    for match in LINK.finditer(FENCED.sub("", text(name))):
        target = (ROOT / name).parent / match["file"] if match["file"] else ROOT / name
        assert target.exists(), match[0]
        if match["section"]:
            headings = re.findall(r"^#+ (.*)$", FENCED.sub("", target.read_text()), re.MULTILINE)
            assert match["section"] in [anchor(heading) for heading in headings], match[0]


def anchor(heading: str) -> str:
    """What a link to a section is called: its words in lower case, joined by hyphens, without punctuation."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", READMES)
def test_files_of_this_project_in_code_exist(name):
    code = "\n".join(FENCED.findall(text(name)) + re.findall(r"`([^`\n]+)`", FENCED.sub("", text(name))))
    paths = re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]+\.(?:py|sh|md|jsonl|png)\b", code)
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    folders = re.findall(rf"(?<![\w./-])((?:{FOLDERS})(?:/\w+)*)/(?![\w.*-])", code)
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


def test_the_tree_names_folders_that_exist_and_every_package():
    tree = FENCED.findall(text("README.md").split("## The folders\n")[1])[0]
    folders, parents = [], []
    for indentation, folder in re.findall(r"^( *)(\w+)/ ", tree, re.MULTILINE):
        parents = [*parents[: len(indentation) // 2], folder]
        folders.append("/".join(parents))
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []
    packages = [path.parent for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("__init__.py")]
    assert {path.relative_to(ROOT).as_posix() for path in packages} <= set(folders)
