"""Real text without a download: what the running Python installation has on disk, in three domains.

`code` is the standard library without its docstrings, `docs` the docstrings and the language reference of `pydoc`, `tables` the
codec tables. No text is in two domains, so that what validation measures in one was not trained on in another.
"""

from __future__ import annotations

import ast
import os
import sysconfig
from functools import cache
from pathlib import Path

from ..config import FlextronError, nearest

DOMAINS = ("code", "docs", "tables")
_PREFIX = "builtin:"
# Tests, other people's packages, build leftovers, programs rather than library, and what the other two domains are made of.
_NOT_CODE = {
    *("__pycache__", "__phello__", "site-packages", "dist-packages", "lib-dynload", "ensurepip", "test", "tests", "distutils"),
    *("idlelib", "lib2to3", "tkinter", "turtledemo", "encodings", "pydoc_data"),
}
_SHORTEST_DOCSTRING = 80  # characters


def builtin_inputs() -> dict[str, list[str]]:
    """The inputs of `prepare` that mean the built-in text: domain -> [`builtin:DOMAIN`]."""
    return {name: [_PREFIX + name] for name in DOMAINS}


def is_builtin(source: object) -> bool:
    """True if a source names built-in text rather than a path."""
    return isinstance(source, str) and source.startswith(_PREFIX)


def documents(source: str) -> tuple[str, ...]:
    """The documents of `builtin:DOMAIN`, in an order that depends on nothing but the Python installation (a few MB).

    Raises FlextronError when the name is unknown or when this Python has no source files (zipped or compiled only).
    """
    name = source.removeprefix(_PREFIX)
    if name not in DOMAINS:
        raise FlextronError(f"no built-in text '{name}'{nearest(name, DOMAINS)}: use one of {', '.join(DOMAINS)}")
    root = Path(sysconfig.get_path("stdlib"))
    found = _tables(root) if name == "tables" else _code_and_docs(root)[name == "docs"]
    if not found:
        raise FlextronError(
            f"no built-in text '{name}': this Python has no library sources in {root}; set input= to your own text"
        )
    return found


@cache
def _code_and_docs(root: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    code: list[str] = []
    docs: dict[str, None] = dict.fromkeys(_topics(root))  # a dict, for methods that repeat the docstring of another
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _NOT_CODE and not name.startswith("config-"))
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and path != _entities(root):
                rest, docstrings = _separate(_read(path))
                if rest.strip():
                    code.append(rest)
                docs.update(dict.fromkeys(docstrings))
    return tuple(code), tuple(docs)


def _separate(source: str) -> tuple[str, list[str]]:
    """A module without its docstrings, and those docstrings that are long enough to be a document."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return "", []
    lines = source.split("\n")
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is None:
                continue
            place = node.body[0]
            alone = not lines[place.lineno - 1][: place.col_offset].strip() and lines[place.end_lineno - 1].rstrip()[-1] in "\"'"
            if alone:
                lines[place.lineno - 1 : place.end_lineno] = [None] * (place.end_lineno - place.lineno + 1)
                if len(text) >= _SHORTEST_DOCSTRING:
                    docstrings.append(text)
    return "\n".join(line for line in lines if line is not None), docstrings


def _topics(root: Path) -> list[str]:
    """The texts behind `help('...')`; none where a distribution leaves them out of its library."""
    try:
        tree = ast.parse(_read(root / "pydoc_data" / "topics.py"))
        table = next(node.value for node in tree.body if isinstance(node, ast.Assign))
        return [text for _, text in sorted(ast.literal_eval(table).items())]
    except (SyntaxError, ValueError, StopIteration):
        return []


@cache
def _tables(root: Path) -> tuple[str, ...]:
    """Character tables. The DOS code pages are left out: each holds the same table three times."""
    texts = [_read(path) for path in sorted((root / "encodings").glob("*.py"))]
    tables = [text for text in texts if "decoding_table" in text and "encoding_map" not in text]
    return tuple(text for text in [*tables, _read(_entities(root))] if text)


def _entities(root: Path) -> Path:
    return root / "html" / "entities.py"


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ""
