"""Single files: whole or absent, and never executed."""

import hashlib
import os
import re
import stat

import pytest
import torch
from pipeline import contents, limited_files

from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.storage.files import write_atomically
from run_moefication.moefication.storage.tensors import load_tensors


def test_file_appears_whole_with_true_size_sum_and_rights(tmp_path):
    previous = os.umask(0o027)
    try:
        entry = write_atomically(tmp_path / "a" / "file", lambda file: [file.write(b"ab"), file.write(b"c")])
    finally:
        os.umask(previous)
    path = tmp_path / "a" / "file"
    assert path.read_bytes() == b"abc"
    assert entry == {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt("mine"), RuntimeError("mine")])
@pytest.mark.parametrize("place", ["write", "fsync", "replace"])
def test_failed_write_leaves_what_was_there(place, error, tmp_path, monkeypatch):
    def fail(*args):
        raise error

    (tmp_path / "file").write_bytes(b"old")
    if place != "write":
        monkeypatch.setattr(os, place, fail)
    for name in ("file", "new"):
        with pytest.raises(type(error), match=re.escape(str(error))):
            write_atomically(tmp_path / name, lambda file: [file.write(b"half"), place == "write" and fail()])
    assert contents(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_full_disk_is_said_as_such_and_leaves_what_was_there(size, tmp_path):
    """torch.save hides it behind an error of its own."""
    (tmp_path / "file").write_bytes(b"old")
    with limited_files(size), pytest.raises(OSError, match="File too large"):
        write_atomically(tmp_path / "file", lambda file: torch.save({0: torch.zeros(10_000)}, file))
    assert contents(tmp_path) == {"file": b"old"}


def test_bytes_do_not_depend_on_the_name(tmp_path):
    for name in ("a", "a-much-longer-name"):
        write_atomically(tmp_path / name, lambda file: torch.save({0: torch.ones(3)}, file))
    first, second = contents(tmp_path).values()
    assert first == second


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(100)])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(MoEficationError, match="refused"):
        load_tensors(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    for other in (tmp_path, tmp_path / "fifo", tmp_path / "absent"):
        with pytest.raises(MoEficationError, match="is not a file"):
            load_tensors(other)
