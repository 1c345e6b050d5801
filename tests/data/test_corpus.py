"""Reading documents from files and directories; bad input is named by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from flextron_mcore.data.corpus import Corpus, open_corpus


def read(*paths: object, **options: object) -> list[str]:
    return list(open_corpus("d", [str(p) for p in paths], **options))


def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    text = "one\r\n\ttwo\n\n\x0c é 中 \x00 \U0001f600 end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(tmp_path / "a.txt") == [text]


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hi"}\n')
    assert read(tmp_path / "a.md", tmp_path / "b.jsonl") == ["hello", "hi"]


def test_directory_in_sorted_order_without_unknown_hidden_and_empty_files(tmp_path: Path) -> None:
    for name in ("b/z.py", "b/a.rs", "a/k.TXT", "top.md", "photo.jpg", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "__init__.py").touch()
    corpus = open_corpus("d", [tmp_path])
    assert list(corpus) == ["top.md", "a/k.TXT", "b/a.rs", "b/z.py"]
    assert corpus.left_out == {".jpg": 1, "hidden": 2} and corpus.empty == 1  # the empty file is __init__.py
    assert list(corpus) == list(corpus)


def test_named_file_of_unknown_suffix_is_text(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("read me")
    assert read(tmp_path / "README") == ["read me"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL.GZ"])
def test_jsonl_gives_its_texts(tmp_path: Path, name: str) -> None:
    rows = [{"text": "one"}, {"text": "two\nlines", "id": 3}, {"text": "é"}]
    data = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / name).write_bytes(gzip.compress(data.encode()) if name.lower().endswith("gz") else data.encode())
    assert read(tmp_path / name) == ["one", "two\nlines", "é"]


def test_text_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "no", "content": "yes"}')
    assert read(tmp_path / "a.jsonl", text_key="content") == ["yes"]


whole_gzip = gzip.compress(b'{"text": "good"}\n' + b"".join(b'{"text": "%d"}\n' % (n * n) for n in range(5000)))
BAD_FILES = {
    "latin-1": ("a.txt", "café".encode("latin-1"), "byte 0xe9 at offset 3"),
    "cut gzip": ("a.jsonl.gz", whole_gzip[: len(whole_gzip) // 2], "broken compressed file"),
    "damaged gzip": ("a.jsonl.gz", whole_gzip[:200] + bytes(50) + whole_gzip[250:], "broken compressed file"),
}
BAD_LINES = {
    "invalid JSON": (b'{"text": "x"', "not valid JSON"),
    "deep JSON": (b"[" * 100_000, "not valid JSON"),
    "not an object": (b'["text"]', "not a JSON object but a list"),
    "missing key": (b'{"texts": "x"}', "no key 'text' (did you mean 'texts'?)"),
    "not a string": (b'{"text": 3}', "not a string but a number"),
    "huge integer": (b'{"text": ' + b"7" * 5000 + b"}", "not a string but a number"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', "surrogate"),
    "not UTF-8": (b'{"text": "\xff"}', "byte 0xff"),
}


@pytest.mark.parametrize(("name", "data", "reason"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named(tmp_path: Path, fails, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "b.txt").write_text("good")
    fails(lambda: read(tmp_path / name), tmp_path / name, reason, "skip_bad=true skips such input")
    corpus = open_corpus("d", [tmp_path / name, tmp_path / "b.txt"], skip_bad=True)
    assert list(corpus)[-1] == list(corpus)[-1] == "good"
    assert list(corpus.skipped) == [str(tmp_path / name)]
    assert reason in corpus.skipped[str(tmp_path / name)]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, fails, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    fails(lambda: read(path), f"{path}, line 2", reason)
    corpus = open_corpus("d", [path], skip_bad=True)
    assert list(corpus) == list(corpus) == ["one", "three"]
    assert list(corpus.skipped) == [f"{path}, line 2"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_unreadable_file_is_named(tmp_path: Path, fails, monkeypatch, name: str) -> None:
    def denied(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / name).write_text('{"text": "x"}')
    monkeypatch.setattr("flextron_mcore.files.os.open", denied)
    fails(lambda: read(tmp_path / name), tmp_path / name, "Permission denied")


def test_a_dangling_link_is_named(tmp_path: Path, fails) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    fails(lambda: read(tmp_path), tmp_path / "a.txt", "No such file")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_missing_path_is_named(tmp_path: Path, fails, skip_bad: bool) -> None:
    fails(lambda: read(tmp_path / "nope", skip_bad=skip_bad), tmp_path / "nope", "no such file", "'d'")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_directory_without_a_file_to_read_is_refused(tmp_path: Path, fails, skip_bad: bool) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / ".a.txt").touch()
    fails(lambda: read(tmp_path, skip_bad=skip_bad), tmp_path, "no file to read", "1 .bin", "1 hidden")


def test_files_are_read_when_needed(tmp_path: Path) -> None:
    """Files are read lazily: the second is not opened before the first is used up."""
    (tmp_path / "a.txt").write_text("first")
    documents = iter(Corpus("d", [tmp_path / "a.txt", tmp_path / "b.txt"]))
    assert next(documents) == "first"
    (tmp_path / "b.txt").write_text("made later")
    assert next(documents) == "made later"
