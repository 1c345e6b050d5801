"""Text that comes with Python: three domains, no document in two of them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
from itertools import combinations
from pathlib import Path

import pytest

from flextron_mcore.data import builtin

SIZES = {"code": (4e6, 8e6), "docs": (1e6, 3e6), "tables": (0.4e6, 1.5e6)}  # bytes


@pytest.fixture(scope="module")
def texts() -> dict[str, tuple[str, ...]]:
    return {name: builtin.documents(source) for name, (source,) in builtin.builtin_inputs().items()}


def test_three_domains_of_sensible_size(texts: dict) -> None:
    assert set(texts) == set(SIZES)
    for name, (least, most) in SIZES.items():
        assert least < sum(len(text.encode()) for text in texts[name]) < most
        assert len(texts[name]) >= 20
        assert all(text.strip() for text in texts[name])


def test_no_document_is_in_two_domains(texts: dict) -> None:
    for a, b in combinations(texts, 2):
        assert not set(texts[a]) & set(texts[b])
    code = "\n".join(texts["code"])
    assert "decoding_table" not in code
    assert "name2codepoint = {" not in code  # html.entities is a table, so not in `code`
    opened = ['"""' + text.splitlines()[0] for text in texts["docs"][::15]]
    assert not [line for line in opened if len(line) > 30 and line in code]


def test_domains_are_what_they_say(texts: dict) -> None:
    assert sum("def " in text for text in texts["code"]) > 0.6 * len(texts["code"])
    assert any(text.startswith("JSON (JavaScript Object Notation)") for text in texts["docs"])
    assert any("The try statement" in text or 'The "try" statement' in text for text in texts["docs"])
    assert all("def test_" not in text for text in texts["tables"])


def test_docstrings_move_from_code_to_docs() -> None:
    docstring = "What it does. " + "x" * builtin._SHORTEST_DOCSTRING
    source = f'"""{docstring}"""\nX = 1\n\ndef f():\n    """Short."""\n    return "kept"\n\ndef g(): "same line"\n'
    rest, docs = builtin._separate(source)
    assert rest == 'X = 1\n\ndef f():\n    return "kept"\n\ndef g(): "same line"\n'
    assert docs == [docstring]


def test_broken_source_is_left_out() -> None:
    assert builtin._separate("def (:\n") == ("", [])


def test_order_is_the_same_in_another_process(texts: dict) -> None:
    code = (
        "import hashlib; from flextron_mcore.data import builtin as b;"
        "print(hashlib.sha256(repr([b.documents(s) for (s,) in b.builtin_inputs().values()]).encode()).hexdigest())"
    )
    root = str(Path(builtin.__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == hashlib.sha256(repr(list(texts.values())).encode()).hexdigest()


@pytest.mark.parametrize("name", builtin.DOMAINS)
def test_a_python_without_sources_is_refused(monkeypatch, tmp_path: Path, fails, name: str) -> None:
    """With a zipped or compiled standard library, the refusal names the directory without sources."""
    (tmp_path / "os.pyc").write_bytes(b"x")
    monkeypatch.setattr(sysconfig, "get_path", lambda key: str(tmp_path))
    fails(lambda: builtin.documents(f"builtin:{name}"), tmp_path, name, "no library sources in", "set input=")


def test_a_python_without_the_topics_of_pydoc_gives_its_docstrings(monkeypatch, tmp_path: Path) -> None:
    docstring = " ".join(["A long docstring."] * 10)
    (tmp_path / "a.py").write_text(f'"""{docstring}"""\nx = 1\n')
    monkeypatch.setattr(sysconfig, "get_path", lambda key: str(tmp_path))
    assert builtin.documents("builtin:docs") == (docstring,)
    assert builtin.documents("builtin:code") == ("x = 1\n",)


def test_an_unknown_name_is_refused(fails) -> None:
    fails(lambda: builtin.documents("builtin:cod"), "'cod'", "did you mean 'code'?")
