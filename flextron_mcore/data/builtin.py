"""Real text without a download: files of the running Python installation, in three domains.

Domain `code` is the standard library without docstrings. `docs` is the library's docstrings and the language reference that
`pydoc` shows. `tables` is the character tables of codecs. The domains share no text, so that one domain's validation text is not
training text of another.
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
# Directories that `code` and `docs` leave out: tests, installed packages, build files, applications, and the text of `tables`.
_NOT_CODE = {
    *("__pycache__", "__phello__", "site-packages", "dist-packages", "lib-dynload", "ensurepip", "test", "tests", "distutils"),
    *("idlelib", "lib2to3", "tkinter", "turtledemo", "encodings", "pydoc_data"),
}
_SHORTEST_DOCSTRING = 80  # characters


def builtin_inputs() -> dict[str, list[str]]:
    """Inputs of `prepare` for the built-in text, {domain: [`builtin:DOMAIN`]}."""
    return {name: [_PREFIX + name] for name in DOMAINS}


def is_builtin(source: object) -> bool:
    """True if a source is `builtin:DOMAIN`, False if it is a path."""
    return isinstance(source, str) and source.startswith(_PREFIX)


def documents(source: str) -> tuple[str, ...]:
    """Documents of `builtin:DOMAIN`, a few MB, in an order that depends on the Python installation only.

    Raises FlextronError if the domain is unknown, or if this Python has no source files (zipped or compiled only).
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
    """(source files without docstrings, docstrings and help topics) of the standard library in `root`."""
    code: list[str] = []
    docs: dict[str, None] = dict.fromkeys(_topics(root))  # a dict removes duplicates and keeps the order
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
    """(source of a module without docstrings, its docstrings of at least _SHORTEST_DOCSTRING characters).

    A docstring that shares a line with code stays in the source. Returns ("", []) for a source that cannot be parsed.
    """
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
    """Texts that `help('TOPIC')` prints, sorted by topic; [] for a Python distributed without pydoc_data.

    root: directory of the standard library.
    """
    try:
        tree = ast.parse(_read(root / "pydoc_data" / "topics.py"))
        table = next(node.value for node in tree.body if isinstance(node, ast.Assign))
        return [text for _, text in sorted(ast.literal_eval(table).items())]
    except (SyntaxError, ValueError, StopIteration):
        return []


@cache
def _tables(root: Path) -> tuple[str, ...]:
    """Character tables of codecs and HTML entities, without the DOS code pages, each of which repeats one table three times."""
    texts = [_read(path) for path in sorted((root / "encodings").glob("*.py"))]
    tables = [text for text in texts if "decoding_table" in text and "encoding_map" not in text]
    return tuple(text for text in [*tables, _read(_entities(root))] if text)


def _entities(root: Path) -> Path:
    return root / "html" / "entities.py"


def _read(path: Path) -> str:
    """Text of a UTF-8 file; "" if it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ""
