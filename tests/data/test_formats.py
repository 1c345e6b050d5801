"""Every format of text is found by content, read whole, and refused in one line where it is damaged."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import sys
from pathlib import Path

import pytest

from flextron_mcore.data.corpus import open_corpus
from flextron_mcore.data.formats import inner_suffix, stem
from flextron_mcore.data.prepare import parse_inputs

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TEXTS = ["one", "two\nlines", "é 中 \U0001f600", "x" * 200_000]
ROWS = [{"text": text, "id": number, "big": 10**20} for number, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PRETTY = json.dumps(ROWS, indent=2).encode()
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def read(*paths: Path, **options: object) -> list[str]:
    return list(open_corpus("d", paths, **options))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.txt", "part-0001", "A.JSON"])
def test_json_lines_under_every_name_and_compression(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(COMPRESS[suffix](LINES))
    corpus = open_corpus("d", [path])
    assert list(corpus) == list(corpus) == TEXTS
    assert corpus.summary() == "read 1 file(s) (1 JSON lines)"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compression_is_found_by_content(tmp_path: Path, suffix: str) -> None:
    """Compression is recognised whatever the name ends with, because downloads lose or gain a suffix."""
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        (tmp_path / name).write_bytes(COMPRESS[suffix](LINES))
    assert read(tmp_path) == TEXTS * 3


@pytest.mark.parametrize("data", [PRETTY, json.dumps(ROWS).encode()])
def test_list_of_objects(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    corpus = open_corpus("d", [tmp_path])
    assert list(corpus) == TEXTS and corpus.read == {"JSON": 1}


def test_one_object_of_several_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "body", "id": 1}, indent=1))
    assert read(tmp_path) == ["body"]


@pytest.mark.parametrize(
    "text", ['{"name": "x", "version": "1"}', '{\n "name": "x"\n}', "[1, 2]", "[\n]\n", "{not json\n{}\n", '"text"']
)
def test_other_json_is_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert read(tmp_path / "a.json") == [text]


def test_lines_without_the_key_are_no_text(tmp_path: Path, fails) -> None:
    (tmp_path / "a.json").write_text('{"content": "a"}\n{"content": "b"}\n')
    fails(lambda: read(tmp_path), f"{tmp_path / 'a.json'}, line 1", "has no key 'text'", "set text_key")
    assert read(tmp_path, text_key="content") == ["a", "b"]


@pytest.mark.parametrize("text", ['[{"content": "a"}, {"content": "b"}]', '{\n "content": "a"\n}'])
def test_json_without_the_key_is_counted_by_itself(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "b.json").write_text("[1, 2]")
    corpus = open_corpus("d", [tmp_path])
    assert list(corpus) == [text, "[1, 2]"]
    assert corpus.summary() == "read 2 file(s) (1 JSON without 'text', as text, 1 text)"


def test_huge_numbers_in_other_fields_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": ' + "9" * 5000 + ', "text": "fine"}\n')
    assert read(tmp_path) == ["fine"]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet(tmp_path: Path, kind: str) -> None:
    column = pyarrow.array(TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "text": column}), tmp_path / "a.parquet", row_group_size=3)
    corpus = open_corpus("d", [tmp_path])
    assert list(corpus) == list(corpus) == TEXTS and corpus.read == {"Parquet": 1}
    (tmp_path / "a.parquet").rename(tmp_path / "b")
    assert read(tmp_path / "b") == TEXTS


def test_parquet_that_cannot_be_read(tmp_path: Path, fails) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"texts": TEXTS, "n": [1, 2, 3, 4]}), path)
    fails(lambda: read(path), path, "no column 'text' (did you mean 'texts'?)", "texts, n", "set text_key")
    fails(lambda: read(path, text_key="n"), f"{path}, row 1", "not a string but a number")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([b"ok", b"\xff"])}), path)
    fails(lambda: read(path), f"{path}, row 1", "not a string but binary data")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())}), path)
    fails(lambda: read(path), f"{path}, row 2", "byte 0xff at offset 0 of the row")
    assert read(path, skip_bad=True) == ["ok"]


def test_damaged_files_of_every_format(tmp_path: Path, fails) -> None:
    """Files cut or changed at 40 places are refused in one line. Where a format has no checksum for a place, they may be read."""
    noise = random.Random(0).randbytes(50_000).hex()
    lines = "".join(json.dumps({"text": noise[i : i + 1000]}) + "\n" for i in range(0, len(noise), 1000)).encode()
    parquet.write_table(pyarrow.table({"text": [noise[i : i + 1000] for i in range(0, len(noise), 1000)]}), tmp_path / "p")
    whole = {f"a.jsonl{suffix}": pack(lines) for suffix, pack in COMPRESS.items() if suffix}
    whole["a.parquet"] = (tmp_path / "p").read_bytes()
    for name, data in whole.items():
        path = tmp_path / name
        for place in range(12, len(data) - 1, len(data) // 40):
            path.write_bytes(data[:place])
            message = fails(lambda path=path: read(path), path)
            assert "broken" in message or "cannot be read" in message, message
            assert open_corpus("d", [path], skip_bad=True) and isinstance(read(path, skip_bad=True), list)


def test_zstandard_of_several_frames(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    data = skippable + b"".join(zstandard.compress(LINES[i : i + 5000]) for i in range(0, len(LINES), 5000))
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize(
    ("name", "data", "package"), [("a.parquet", b"PAR1", "pyarrow"), ("a.zst", b"\x28\xb5\x2f\xfd", "zstandard")]
)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_missing_package(tmp_path: Path, fails, monkeypatch, name: str, data: bytes, package: str, skip_bad: bool) -> None:
    (tmp_path / name).write_bytes(data)
    monkeypatch.setitem(sys.modules, package, None)
    fails(lambda: read(tmp_path, skip_bad=skip_bad), tmp_path / name, f"needs the package {package}: pip install {package}")


# ---- empty texts, links, other entries of directories ----


def test_empty_texts_are_counted(tmp_path: Path) -> None:
    rows = ["", " \n\t", None, "body", ""]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").touch()
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbf\n")
    (tmp_path / "e.jsonl").write_text("\n\n")
    corpus = open_corpus("d", [tmp_path])
    assert list(corpus) == list(corpus) == ["body", "body"]
    assert corpus.empty == 11 and not corpus.skipped
    assert "11 empty text(s) skipped" in corpus.summary()


def test_linked_directories_are_read_once(tmp_path: Path) -> None:
    for name in ("in/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "second").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "elsewhere" / "deep" / "loop").symlink_to(tmp_path / "in")
    corpus = open_corpus("d", [tmp_path / "in"])
    assert sorted(corpus) == ["elsewhere/b.txt", "elsewhere/deep/c.txt", "in/a.txt"]
    assert corpus.left_out == {"linked again": 2}


def test_summary_names_what_is_left_out(tmp_path: Path) -> None:
    for number, suffix in enumerate("png png png jpg bin so a b c d".split()):
        (tmp_path / f"{number}.{suffix}").write_bytes(b"x")
    (tmp_path / "Makefile").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    os.mkfifo(tmp_path / "pipe.txt")
    summary = open_corpus("d", [tmp_path]).summary()
    assert "left out 3 .png, " in summary and summary.endswith(" others")


def test_pipe_is_refused(tmp_path: Path, fails) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    fails(lambda: read(tmp_path / "pipe.txt"), tmp_path / "pipe.txt", "is a pipe or device")


@pytest.mark.parametrize(
    ("name", "inner", "short"),
    [
        ("wiki.jsonl.gz", ".jsonl", "wiki"),
        ("a.b.parquet", ".parquet", "a.b"),
        ("x.zst", "", "x"),
        ("X.TXT", ".txt", "X"),
        ("m.tar.gz", ".tar", "m"),
    ],
)
def test_names(name: str, inner: str, short: str) -> None:
    assert (inner_suffix(name), stem(name)) == (inner, short)
    assert parse_inputs([name]) == {short: [name]}
