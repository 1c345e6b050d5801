"""Schemas: dataclasses whose fields say what a key may be. No torch import.

A field declared with `setting` or `path` carries a key's help, unit and range. `keys` lists them, `parse` reads what a user
typed, `checked` validates and expands the paths of a whole instance.
"""

from __future__ import annotations

import functools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import yaml

from flextron_mcore.config import FlextronError

MISSING = "???"  # OmegaConf's mark of a key that must be given
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "a mapping"}


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    length: int | None = None,
    form: str = "",
    accepts: Sequence[type] = (),
    is_path: bool = False,
) -> Any:
    """Declare a field of a schema. Bounds, choices and form (a regular expression) hold for each item of a list.

    length: of a list. accepts: the types of a field annotated `Any`, because OmegaConf has no unions of containers.
    """
    limits = Limits(help, unit, at_least, above, at_most, below, tuple(choices), length, form, tuple(accepts), is_path)
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"limits": limits})
    return field(default=default, metadata={"limits": limits})


def path(default: Any, help: str, **options: Any) -> Any:
    """Declare a field that holds a path, or paths in a list or mapping. `~` is expanded."""
    return setting(default, help, is_path=True, **options)


def section(kind: type, **defaults: Any) -> Any:
    """Declare a nested section with defaults of its own."""
    return field(default_factory=functools.partial(kind, **defaults))


@dataclass(frozen=True)
class Limits:
    """Limits of a key's value, and its help text."""

    help: str
    unit: str
    at_least: float | None
    above: float | None
    at_most: float | None
    below: float | None
    choices: tuple[str, ...]
    length: int | None
    form: str
    accepts: tuple[type, ...]
    is_path: bool

    @property
    def range(self) -> str:
        """Words for the bounds, such as `at least 1`; the empty string where there are none."""
        if self.at_least is not None and self.at_most is not None:
            return f"within {self.at_least:g}..{self.at_most:g}"
        bounds = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below))
        return " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None)

    def holds(self, number: float) -> bool:
        """True if a number is finite and within the bounds."""
        return (
            math.isfinite(number)
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )


@dataclass(frozen=True)
class Key:
    """A leaf of a schema: its dotted name, type and limits. item: the type of a list's or mapping's items."""

    name: str
    type: type
    item: Any
    optional: bool
    limits: Limits

    @property
    def kind(self) -> str:
        """Words for the type, such as `a whole number`."""
        if self.limits.accepts:
            return " or ".join(_KINDS[kind] for kind in self.limits.accepts)
        if self.type is list:
            number = next((_KINDS[kind].removeprefix("a ") for kind in (float, int) if kind in _alternatives(self.item)), "text")
            many = "texts" if number == "text" else f"{number}s"
            return f"a list of {self.limits.length or ''} {many}".replace("  ", " ")
        return "a path" if self.limits.is_path and self.type is str else _KINDS[self.type]

    @property
    def allowed(self) -> str:
        """Words for type and range, such as `a whole number of at least 1`."""
        words, bounds = self.kind, self.limits.range
        if not bounds:
            return words
        return f"{words}, each {bounds}" if self.type in (list, dict) else f"{words}{' of' * bounds.startswith('at')} {bounds}"

    @property
    def literal(self) -> bool:
        """True if the value is the text as typed: no list, number or mapping is read from it."""
        return self.type is str


@functools.cache
def keys(schema: type, prefix: str = "") -> dict[str, Key]:
    """All keys of a schema by dotted name, those of its sections included."""
    found: dict[str, Key] = {}
    hints = typing.get_type_hints(schema)
    for each in fields(schema):
        hint = hints[each.name]
        if is_dataclass(hint):
            found |= keys(hint, f"{prefix}{each.name}.")
            continue
        if "limits" not in each.metadata:  # not for users
            continue
        kinds = _alternatives(hint)
        (kind,) = kinds - {type(None)} or {Any}
        origin = typing.get_origin(kind) or kind
        items = typing.get_args(kind)
        name = prefix + each.name
        optional = type(None) in kinds or (kind is Any and each.default is not MISSING)
        found[name] = Key(name, origin, items[-1] if items else None, optional, each.metadata["limits"])
    return found


def _alternatives(hint: Any) -> set[Any]:
    """The members of a union, or the one type."""
    return set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}


def parse(key: Key, text: str) -> Any:
    """Value of a key as the user typed it. A text is taken literally, but for one pair of quotes around the whole.

    A list is `[a, b]`, or one item without brackets. Raises FlextronError where a list or mapping cannot be read.
    """
    if text == "null" and key.optional:
        return None
    if key.literal:
        return _unquoted(text)
    if key.type is list and str in _alternatives(key.item) and not {int, float} & _alternatives(key.item):
        return [_unquoted(item) for item in _items(text)]
    if key.type in (int, float, bool):
        return text
    if text[:1] + text[-1:] in ("[]", "{}"):
        return _collection(key, text)
    value = _unquoted(text) if text != _unquoted(text) else _scalar(text)
    return [value] if key.type is list else value


def _unquoted(text: str) -> str:
    """Text without the quotes around the whole of it, if it has some; within them a backslash escapes a quote."""
    quote = text[:1]
    if quote in ("'", '"') and re.fullmatch(rf"{quote}(?:[^{quote}\\]|\\.)*{quote}", text, re.S):
        return text[1:-1].replace(f"\\{quote}", quote)
    return text


def _items(text: str) -> list[str]:
    """Items of `[a, "b, c"]`, split at commas outside of quotes; any other text is one item."""
    if text[:1] + text[-1:] != "[]":
        return [text]
    inner = text[1:-1]
    found = re.findall(r"""\s*("(?:[^"\\]|\\.)*"(?=\s*(?:,|$))|'(?:[^'\\]|\\.)*'(?=\s*(?:,|$))|[^,]*)\s*(?:,|$)""", inner, re.S)
    found = [item.strip() for item in found[:-1] or found]  # the last match is the empty one at the end
    return [] if found == [""] else found


def _collection(key: Key, text: str) -> Any:
    """A list or mapping in Hydra's grammar, else in YAML's, else text where the key takes text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # slow, and rarely needed
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        if str in key.limits.accepts:
            return text
        raise FlextronError(f"{key.name}={text}: cannot be read as {key.kind}") from None


def _scalar(text: str) -> Any:
    """A number where the text is one; else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def checked(settings: Any, where: str) -> Any:
    """`settings`, a filled instance of a schema, with `~` expanded in its paths.

    Raises FlextronError, one line that begins with `where`, for a value outside its limits. A missing value passes.
    """
    for key in keys(type(settings)).values():
        *sections, name = key.name.split(".")
        owner = functools.reduce(getattr, sections, settings)
        value = getattr(owner, name)
        if value is None or value == MISSING:
            continue
        check_value(key, value, where)
        if key.limits.is_path:
            setattr(owner, name, _each(value, os.path.expanduser))
    return settings


def check_value(key: Key, value: Any, where: str) -> None:
    """Raise FlextronError unless `value`, of the key's type, is within the key's limits."""
    limits = key.limits
    shown = f"{where}: {key.name}={show(value)}"
    accepts = (*limits.accepts, int) if float in limits.accepts else limits.accepts
    if accepts and (not isinstance(value, accepts) or isinstance(value, bool)):
        raise FlextronError(f"{shown} must be {key.kind}")
    if limits.length is not None and len(value) != limits.length:
        raise FlextronError(f"{shown} must be {key.allowed}")
    for item in value if isinstance(value, list) else value.values() if isinstance(value, Mapping) else [value]:
        if isinstance(item, int | float) and not isinstance(item, bool) and not limits.holds(item):
            raise FlextronError(f"{shown} must be {key.allowed if item is not value else limits.range or 'finite'}")
        if limits.choices and item not in limits.choices:
            raise FlextronError(f"{where}: {key.name}={item!r} is not known: use one of {', '.join(limits.choices)}")
        if limits.form and not re.fullmatch(limits.form, str(item)):
            raise FlextronError(f"{shown}: write it as {limits.unit}")


def show(value: Any) -> str:
    """A value as a user types it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {show(each)}" for name, each in value.items()) + "}"
    return str(value)


def _each(value: Any, function: Callable[[str], str]) -> Any:
    """`value` with the function of every text in it."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [_each(item, function) for item in value]
    return {name: _each(item, function) for name, item in value.items()} if isinstance(value, Mapping) else value
