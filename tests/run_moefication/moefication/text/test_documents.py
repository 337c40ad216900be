"""Files to documents: whatever holds them, in whatever shape, and nothing else."""

import gzip
import json
import os
import tempfile
import zipfile
from pathlib import Path

import pytest
from conftest import SENTENCES, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.text import documents, text_files
from run_moefication.moefication.text.documents import DocumentReader, zstd
from run_moefication.moefication.text.text_files import TextFile, find_text_files


def read(path: Path, skip_bad_lines: bool = False) -> list[str]:
    return texts_of(DocumentReader(find_text_files(path), skip_bad_lines))


def texts_of(reader: DocumentReader) -> list[str]:
    return [document.text for document in reader]


def write_zip(path: Path, members: dict[str, bytes | str], **options) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b'\xef\xbb\xbf\r\n{"text": "a"}\n', ["a"]),  # byte order mark
        (b"\xef\xbb\xbf", []),
        ('{"text": "a\u2028b\x85c"}\n'.encode(), ["a\u2028b\x85c"]),  # line separators of Unicode are text
        (b'{"text": "a\\u0000b", "text": "c\\ud83d\\ude00"}\n', ["c\U0001f600"]),  # the last of two keys; a pair
        (b"", []),
    ],
)
def test_documents_of_a_jsonl(content, texts, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert read(tmp_path / "a.jsonl") == texts


# Text as files hold it: anything but lone surrogates, which UTF-8 cannot hold.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(TEXTS, max_size=6),
    st.booleans(),
    st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]),
    st.booleans(),
    st.booleans(),
)
def test_any_text_comes_back_from_every_kind_of_file(texts, escaped, line_end, bom, final_line_end):
    lines = [json.dumps({"text": text}, ensure_ascii=escaped) for text in texts]
    content = (line_end.join(lines) + line_end * final_line_end).encode("utf-8-sig" if bom else "utf-8")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        (folder / "a.jsonl").write_bytes(content)
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(content))
        (folder / "a.jsonl.zst").write_bytes(zstd.compress(content[:20]) + zstd.compress(content[20:]))  # two frames
        write_zip(folder / "a.zip", {"a.jsonl": content, "README.md": "not text"})
        write_zip(folder / "stored.zip", {"deep/er/a.jsonl": content}, strict_timestamps=False)
        for path in sorted(folder.iterdir()):
            reader = DocumentReader(find_text_files(path))
            assert texts_of(reader) == [text for text in texts if text.strip()]
            assert reader.position == reader.total_bytes > 0 or not content


BROKEN = {
    "not valid JSON": [
        *(b'{"text": "cut', b'{"text": "a"} {"text": "b"}', b"[" * 100_000, b'{"n": ' + b"1" * 5000 + b"}"),
        b'{"text": "a"}\r{"text": "b"}',  # lone CR does not end a line
    ],
    'not a JSON object with a string "text"': [b"3", b'["text"]', b'"text"', b"null", b'{"text": null}'],
    'no "text" field': [b'{"content": "a"}'],
    "not UTF-8": [b'{"text": "\xff"}', b'{"text": "\\ud800"}', '{"text": "a"}'.encode("utf-16")],
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_line_is_named_or_skipped_and_counted(words, tmp_path):
    path = tmp_path / "a.jsonl"
    for line in BROKEN[words]:
        path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "b"}\n' + line)
        with pytest.raises(MoEficationError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}:3: {words}")
        reader = DocumentReader([TextFile(path)], skip_bad_lines=True)
        assert texts_of(reader) == ["fine", "b"]
        assert reader.skipped == 2


def test_a_line_beyond_the_limit_is_named_or_skipped_however_long(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 100)
    lines = [b'{"text": "a"}', b"x" * 101, b'{"text": "b"}', b"x" * 5000, b"x" * 99, b'{"text": "c"}', b"x" * 200]
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(b"\n".join(lines))
        with pytest.raises(MoEficationError, match=f"{name}:2: line longer than"):
            read(tmp_path / name)
    reader = DocumentReader([TextFile(tmp_path / "a.jsonl")], skip_bad_lines=True)
    assert (texts_of(reader), reader.skipped) == (["a", "b", "c"], 4)


def test_other_files_are_one_document_cut_at_line_ends_where_it_is_long(tmp_path, monkeypatch):
    (tmp_path / "b.txt").write_bytes(b"one\n\ntwo\xff")
    with pytest.raises(MoEficationError, match=r"b.txt:3: not UTF-8 text"):
        read(tmp_path / "b.txt")
    text = "\ufeff" + "".join(f"line {i} Zürich\r\n" * (i % 3) + "\n" for i in range(500))
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(tmp_path / "a.txt") == [text[1:].replace("\r\n", "\n")]
    monkeypatch.setattr(documents, "PLAIN_TEXT_BYTES", 1000)
    parts = read(tmp_path / "a.txt")
    assert "".join(parts) == text[1:].replace("\r\n", "\n")
    assert len(parts) > 5
    assert all(part.endswith("\n") and 800 <= len(part.encode()) < 1100 for part in parts[:-1])


COMPRESSIONS = {
    "A.JSONL": bytes,
    "a.json": bytes,
    "c4-train.00000-of-01024.json.gz": gzip.compress,
    "a.JSONL.ZST": zstd.compress,
    "a.ndjson.zstd": zstd.compress,
}


@pytest.mark.parametrize(("name", "compress"), COMPRESSIONS.items())
def test_json_lines_are_known_by_any_of_their_names(name, compress, tmp_path):
    """Alone, in a folder, and in a zip."""
    content = b'{"text": "a"}\n{"text": "b"}\n'
    (tmp_path / name).write_bytes(compress(content))
    (tmp_path / "manifest.json").write_text("{}")
    assert read(tmp_path / name) == read(tmp_path) == ["a", "b"]
    write_zip(tmp_path / "other.ZIP", {name: compress(content), "dataset_info.json": "{}"})
    assert read(tmp_path / "other.ZIP") == ["a", "b"]
    assert read(tmp_path) == ["a", "b"]


def test_what_is_unpacked_goes_before_what_is_not_and_lines_before_parquet(tmp_path):
    """In any combination of the five, each document is read once."""
    write_parquet(tmp_path / "a.parquet", text=["a.parquet"])
    assert read(tmp_path) == ["a.parquet"]
    (tmp_path / "a.parquet").rename(tmp_path / "b.parquet")
    for name in ("a.zip", "a.jsonl.zst", "a.jsonl.gz"):
        pack(tmp_path / name, json.dumps({"text": name}).encode())
        assert read(tmp_path) == [name, "a.parquet"]
    (tmp_path / "b.parquet").rename(tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", ["plain"])
    assert read(tmp_path) == ["plain"]


def test_a_zip_half_unpacked_is_read_in_its_rest_but_for_what_is_held_out(tmp_path):
    """Compressed plain text included."""
    lines = {f"{name}.jsonl": json.dumps({"text": f"zipped {name}"}) for name in "ab"}
    unread = {"heldout/a.jsonl": '{"text": "held out"}', "__MACOSX/._a.jsonl": b"\0\5"}
    write_zip(tmp_path / "all.zip", lines | unread | {"c.txt": "zipped c\n"})
    write_jsonl(tmp_path / "b.jsonl", ["unpacked b"])
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"one\ntwo"))
    assert read(tmp_path) == ["zipped a", "unpacked b", "zipped c\n", "one\ntwo"]


def test_names_that_are_not_utf_8_are_refused(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jsonl", "wb") as file:
        file.write(b'{"text": "a"}\n')
    with pytest.raises(MoEficationError, match=r"caf\\xe9.jsonl' has a name that is not UTF-8; rename it"):
        read(tmp_path)


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]


LONG = "".join(json.dumps({"text": f"{i} {SENTENCES[i % 6]} {i * i}"}) + "\n" for i in range(2000)).encode()


def pack(path: Path, content: bytes) -> Path:
    """A .gz, .zst (with a checksum, as its command-line tool writes) or .zip file of a.jsonl."""
    if path.suffix == ".zip":
        return write_zip(path, {"a.jsonl": content})
    checksum = {zstd.CompressionParameter.checksum_flag: 1}
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else zstd.compress(content, options=checksum))
    return path


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "zip"])
def test_damaged_files_are_named(kind, tmp_path):
    whole = pack(tmp_path / f"a.{kind}", LONG).read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], flip(whole, len(whole) // 2)):
        (tmp_path / f"a.{kind}").write_bytes(damaged)
        with pytest.raises(MoEficationError, match=f"a.{kind}.* again"):
            read(tmp_path, skip_bad_lines=True)  # which does not mean damage


@pytest.mark.parametrize(("kind", "line"), [("zip", b'{"text": "' + b"a" * 1000 + b'"}\n'), ("jsonl.zst", b" ")])
def test_what_expands_beyond_reason_is_refused(kind, line, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "FREE_EXPANSION_BYTES", 1 << 16)
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1 << 16)
    pack(tmp_path / f"a.{kind}", line * ((4 << 20) // len(line)))
    with pytest.raises(MoEficationError, match="as no text does"):
        read(tmp_path, skip_bad_lines=True)


LINK = zipfile.ZipInfo("a.jsonl")
LINK.external_attr = 0o120777 << 16


REFUSED = {
    "leads out of its place": ("../a.jsonl", "/a.jsonl", "x/../../a.jsonl", "C:/a.jsonl", "x\\a.jsonl"),
    "a link; refused": (LINK,),
    "'FINE.jsonl' twice; refused": ("FINE.jsonl",),
}


@pytest.mark.parametrize("words", REFUSED)
def test_zips_with_unsafe_names_are_refused(words, tmp_path):
    for member in REFUSED[words]:
        write_zip(tmp_path / "a.zip", {"fine.jsonl": '{"text": "a"}', member: '{"text": "b"}'})
        with pytest.raises(MoEficationError, match=words):
            read(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_encrypted_zips_are_refused(tmp_path):
    content = bytearray(write_zip(tmp_path / "a.zip", {"a.jsonl": '{"text": "a"}'}).read_bytes())
    central = content.index(b"PK\x01\x02")
    content[6] |= 1
    content[central + 8] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(MoEficationError, match="is encrypted"):
        read(tmp_path)


def test_what_is_no_zip_or_holds_no_text_is_refused(tmp_path):
    write_zip(tmp_path / "a.zip", {"a.png": b"\x89PNG"})
    with pytest.raises(MoEficationError, match=r"holds no .jsonl or .txt file"):
        read(tmp_path)
    for content in (b"", b"<html>404</html>"):
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(MoEficationError, match="is not a whole zip file"):
            read(tmp_path)


def test_a_long_window_of_zstd_is_read(tmp_path):
    """What `zstd --long=31` writes."""
    options = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.enable_long_distance_matching: 1}
    compressor = zstd.ZstdCompressor(options=options)
    content = b'{"text": "a"}\n' * 50
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(content) + compressor.flush())
    assert read(tmp_path) == ["a"] * 50


def write_parquet(path: Path, **columns: list) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def test_rows_of_parquet_are_documents(tmp_path):
    texts = [*SENTENCES, "", "雪"]
    file = write_parquet(tmp_path / "a.parquet", id=list(range(8)), text=texts)
    reader = DocumentReader(find_text_files(tmp_path))
    assert [(document.text, document.place) for document in reader] == [
        (text, f"{file}:{row}") for row, text in enumerate(texts, start=1) if text
    ]
    assert reader.position == reader.total_bytes == file.stat().st_size


def test_what_is_wrong_with_a_parquet_file_is_said(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    with pytest.raises(MoEficationError, match=r"a.parquet has no column text, but content, id"):
        read(write_parquet(tmp_path / "a.parquet", content=["x"], id=[1]))
    file = write_parquet(tmp_path / "b.parquet", text=["a", None, "b"])
    with pytest.raises(MoEficationError, match=r"b.parquet:2: its text is no string; skip_bad_lines"):
        read(file)
    assert read(file, skip_bad_lines=True) == ["a", "b"]
    binary = pyarrow.array(["雪".encode(), b"\xff"], pyarrow.binary())
    with pytest.raises(MoEficationError, match=r"c.parquet:2: not UTF-8 text; skip_bad_lines"):
        read(write_parquet(tmp_path / "c.parquet", text=binary))
    assert read(tmp_path / "c.parquet", skip_bad_lines=True) == ["雪"]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(MoEficationError, match=r"b.parquet is damaged or cut short"):
        read(file)


@pytest.mark.parametrize("content", ['[{"text": "a"}, {"text": "b"}]', '[\n  {"text": "a"}\n]'])
def test_one_json_array_is_told_from_broken_lines(content, tmp_path):
    (tmp_path / "c4.json").write_text(content)
    with pytest.raises(MoEficationError, match=r"c4.json is one JSON array; .* in a line: jq -c"):
        read(tmp_path, skip_bad_lines=True)


def test_a_parquet_file_that_no_package_reads_names_the_cure(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setattr(text_files, "reads_parquet", lambda: False)
    with pytest.raises(MoEficationError, match=r"a.parquet is not read: pip install datasets"):
        find_text_files(tmp_path / "a.parquet")
    assert find_text_files(tmp_path) == []
