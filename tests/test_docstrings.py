"""Docstrings of the package: every public name has one, it stands alone in an editor, and it names the parameters.

A test cannot tell if a docstring is true and plain; a reader must. Code of exported directories is left out.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flextron_mcore"
EXPORTED = ("code", "flextron_trtllm")
# First words that refer to another text.
RIDDLES = (
    "That|Those|The same|The one|What|Of|Whether|Which|Where|How|Likewise|As|It|They|This|These|Such|Its|Their|Ditto|And|Also|Who"
    "|Why"
)
RIDDLE = re.compile(rf"(?:{RIDDLES})\b(?!-)")
Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Name:
    """A module, class, function or method. path: from the file, names of classes and functions joined by dots."""

    file: Path
    path: str
    node: Node
    owner: ast.ClassDef | None

    def __str__(self) -> str:
        line = getattr(self.node, "lineno", 1)
        return f"{self.file.relative_to(PACKAGE.parent)}:{line} {self.path}"

    @property
    def docstring(self) -> str | None:
        """Docstring without its indentation, None without one."""
        return ast.get_docstring(self.node)

    @property
    def public(self) -> bool:
        """True outside of functions if no part of the path begins with an underscore, except that constructors are public."""
        parts = self.path.removesuffix(".__init__").split(".")
        return "<locals>" not in parts and not any(part.startswith("_") for part in parts)

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters, without self and cls."""
        arguments = self.node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        return [name for name in names if name not in ("self", "cls")]


@cache
def names(file: Path) -> list[Name]:
    """All modules, classes, functions and methods of a file."""
    tree = ast.parse(file.read_text())
    return [Name(file, "", tree, None), *_inside(file, tree, "", None)]


def _inside(file: Path, parent: ast.AST, prefix: str, owner: ast.ClassDef | None) -> Iterator[Name]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            yield Name(file, prefix + node.name, node, owner)
            yield from _inside(file, node, f"{prefix}{node.name}.", node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Name(file, prefix + node.name, node, owner)
            yield from _inside(file, node, f"{prefix}{node.name}.<locals>.", None)
        else:
            yield from _inside(file, node, prefix, owner)


def files(room: str) -> list[Path]:
    """Files of a folder of the package, or a file at its top."""
    path = PACKAGE / room
    found = [path] if path.is_file() else sorted(path.rglob("*.py"))
    return [file for file in found if not set(EXPORTED) & set(file.parts)]


ROOMS = sorted(p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file())
rooms = pytest.mark.parametrize("room", ROOMS)


def bases(name: Name) -> list[type]:
    """Base classes of a method's class, nearest first; none where an optional dependency of its file is not installed."""
    if name.owner is None or not name.owner.bases:
        return []
    try:
        owner = importlib.import_module(".".join(name.file.relative_to(PACKAGE.parent).with_suffix("").parts))
    except ImportError:
        return []
    for part in name.path.split(".")[:-1]:
        owner = getattr(owner, part)
    return [base for base in owner.__mro__[1:] if base is not object]


def inherits_docstring(name: Name) -> bool:
    """True for a method that overrides a documented one, whose docstring an editor shows."""
    return any(getattr(vars(base).get(name.path.rpartition(".")[2]), "__doc__", None) for base in bases(name))


def of_bases(name: Name) -> set[str]:
    """Parameters that a constructor shares with a base class's constructor; empty for other names."""
    constructors = [vars(base)["__init__"] for base in bases(name) if "__init__" in vars(base)]
    return {parameter for constructor in constructors for parameter in inspect.signature(constructor).parameters}


def unnamed(name: Name) -> list[str]:
    """Parameters of a public function with more than two that no `Args:` section names.

    A class's docstring may name those of its constructor. An overriding method and constructor leave out what a base explains.
    """
    if not isinstance(name.node, ast.FunctionDef | ast.AsyncFunctionDef) or len(name.parameters) < 3:
        return []
    if name.path.endswith(".__init__"):
        found = documented(name.docstring or "") | documented(ast.get_docstring(name.owner) or "")
        missing = [parameter for parameter in name.parameters if parameter not in found]
        return missing and [parameter for parameter in missing if parameter not in of_bases(name)]
    missing = [parameter for parameter in name.parameters if parameter not in documented(name.docstring or "")]
    return [] if missing and inherits_docstring(name) else missing


def stale(name: Name) -> set[str]:
    """Names in the sections `Args:` and `Attributes:` that the function or class does not have."""
    if isinstance(name.node, ast.Module):
        return set()
    text = name.docstring or ""
    if not isinstance(name.node, ast.ClassDef):
        arguments = name.node.args
        return documented(text) - {a.arg for a in (arguments.vararg, arguments.kwarg) if a} - set(name.parameters)
    inside = {node.name: node for node in ast.walk(name.node) if isinstance(node, ast.FunctionDef)}
    constructors = [Name(name.file, "", inside["__init__"], None)] if "__init__" in inside else []
    parameters = {n for c in constructors for n in (*c.parameters, getattr(c.node.args.kwarg, "arg", ""))}
    assigned = {node.attr for node in ast.walk(name.node) if isinstance(node, ast.Attribute)}
    fields = {node.target.id for node in name.node.body if isinstance(node, ast.AnnAssign)} | assigned | set(inside)
    return documented(text) - parameters - (fields if not constructors else set()) | documented(text, "Attributes:") - fields


def documented(docstring: str, section: str = "Args:") -> set[str]:
    """Names in a section of a docstring: `name: text`, or `one, other: text`."""
    lines = docstring.splitlines()
    if section not in lines:
        return set()
    found: set[str] = set()
    for line in lines[lines.index(section) + 1 :]:
        if line and not line.startswith(" "):
            break
        if entry := re.match(r"    ([*\w]+(?:, [*\w]+)*): \S", line):
            found |= {name.lstrip("*") for name in entry[1].split(", ")}
    return found


@rooms
def test_a_docstring_stands_alone(room):
    found = [n for f in files(room) for n in names(f) if n.docstring and RIDDLE.match(n.docstring)]
    faults = [f"{n}: {n.docstring.splitlines()[0]}" for n in found]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("folder", ["tests", "examples", "benchmarks", "scripts"])
def test_a_docstring_outside_of_the_package_stands_alone(folder):
    found = [
        n for f in sorted((PACKAGE.parent / folder).rglob("*.py")) for n in names(f) if n.docstring and RIDDLE.match(n.docstring)
    ]
    faults = [f"{n}: {n.docstring.splitlines()[0]}" for n in found]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "file", sorted((PACKAGE.parent / "tests").rglob("*.py")), ids=lambda file: f"{file.parent.name}/{file.name}"
)
def test_every_file_of_tests_says_what_it_tests(file):
    assert not file.read_text().strip() or names(file)[0].docstring


@rooms
def test_every_public_name_has_a_docstring(room):
    missing = [n for f in files(room) for n in names(f) if n.public and not n.docstring and not n.path.endswith("__init__")]
    missing = [str(n) for n in missing if not inherits_docstring(n)]
    assert not missing, "\n".join(missing)


@rooms
def test_docstrings_name_the_parameters(room):
    faults = [(n, unnamed(n)) for f in files(room) for n in names(f) if n.public]
    faults = [f"{n}: {', '.join(missing)}" for n, missing in faults if missing]
    assert not faults, "\n".join(faults)


@rooms
def test_docstrings_name_no_parameter_that_is_gone(room):
    faults = [(n, stale(n)) for f in files(room) for n in names(f)]
    faults = [f"{n}: {', '.join(sorted(gone))}" for n, gone in faults if gone]
    assert not faults, "\n".join(faults)


def test_the_rules_see_what_they_are_for(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    file = tmp_path / "module.py"
    file.write_text(
        'def one(a, b, c):\n    """That of two.\n\n    Args:\n        a, b: numbers.\n    """\n'
        "class Two:\n    def three(self): ...\n    def _four(self): ...\n"
        'class Five:\n    """Record.\n\n    Attributes:\n        six: number.\n        gone: number.\n    """\n    six: int\n'
    )
    found = {name.path: name for name in names(file)}
    assert [path for path, name in found.items() if name.public and not name.docstring] == ["", "Two", "Two.three"]
    assert RIDDLE.match(found["one"].docstring) and unnamed(found["one"]) == ["c"]
    assert stale(found["Five"]) == {"gone"} and not stale(found["one"])
