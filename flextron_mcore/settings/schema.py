"""Schemas of settings: dataclasses whose fields are the keys of a stage, with help, unit and limits. No torch import.

`setting` and `path` declare a key, `section` declares a nested schema. `keys` lists the keys of a schema, `parse` converts the
text that a user typed for a key, and `checked` validates an instance and expands its paths.
"""

from __future__ import annotations

import functools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from flextron_mcore.config import FlextronError
from flextron_mcore.files import parse_yaml

MISSING = "???"  # OmegaConf's mark of a key that must be given
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, on Linux
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
    ceiling: int | None = None,
    choices: Sequence[str] = (),
    names: Mapping[str, str] = types.MappingProxyType({}),
    length: int | None = None,
    filled: bool = False,
    form: str = "",
    accepts: Sequence[type] = (),
    role: str = "",
    only: str = "",
) -> Any:
    """Declare a key: a dataclass field with help and limits. Limits of a list or mapping hold for each item.

    Args:
        default: default value; MISSING for a required key.
        help: meaning of the key, for `--help` and docs/keys.md.
        unit: unit of the value, or a description of its notation.
        at_least: smallest allowed number.
        above: number that the value must exceed.
        at_most: largest allowed number.
        below: number that the value must stay under.
        ceiling: number above which the value would only fill memory or overflow; not part of the help.
        choices: allowed texts; empty: all texts.
        names: {other name of a choice: choice}, such as that of another program.
        length: required number of items of a list; None: any.
        filled: True refuses an empty list.
        form: regular expression that the whole text must match; empty: any text.
        accepts: allowed types of a field annotated `Any`, for unions that OmegaConf does not support.
        role: kind of path (input, collection or output, see `path`); empty for values that are not paths.
        only: `KEY=VALUE` of the same stage, KEY a dotted name, without which this key has no effect. Any value but the default is
            then refused, so that nothing that a user typed is ignored. For a KEY that holds a list, VALUE is one of its items.
    """
    limits = Limits(
        help,
        unit,
        at_least,
        above,
        at_most,
        below,
        ceiling,
        tuple(choices),
        names,
        length,
        filled,
        form,
        tuple(accepts),
        role,
        only,
    )
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"limits": limits})
    return field(default=default, metadata={"limits": limits})


def path(default: Any, help: str, *, role: str = "input", **options: Any) -> Any:
    """Declare a key that holds a path, or a list or mapping of paths; `~` is expanded.

    Args:
        default: default value; MISSING for a required key.
        help: text of `--help` and docs/keys.md.
        role: `input` for a path that is read and that a command refuses to write to; `collection` for a directory that holds the
            outputs of several stages, in which a command may write its own output; `output` for a path that is written.
        options: further arguments of `setting`.
    """
    return setting(default, help, role=role, **options)


def section(kind: type, **defaults: Any) -> Any:
    """Declare a nested section, an instance of the schema `kind` in which `defaults` replace its fields' defaults."""
    return field(default_factory=functools.partial(kind, **defaults))


@dataclass(frozen=True)
class Limits:
    """Limits of a key's value and its help text; each field has the meaning of the argument of `setting` with its name."""

    help: str
    unit: str
    at_least: float | None
    above: float | None
    at_most: float | None
    below: float | None
    ceiling: int | None
    choices: tuple[str, ...]
    names: Mapping[str, str]
    length: int | None
    filled: bool
    form: str
    accepts: tuple[type, ...]
    role: str
    only: str

    @property
    def is_path(self) -> bool:
        """True if the value is a path, or a list or mapping of paths."""
        return bool(self.role)

    @property
    def range(self) -> str:
        """Bounds of a number in words, such as `at least 1`; "" without bounds."""
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
    """One key of a schema.

    Attributes:
        name: dotted name, such as `model.optim.lr`.
        type: type of the value; list and dict without their item types.
        item: type of the items of a list or of the values of a mapping; None for other types.
        optional: True if null (None) is allowed.
        limits: limits of the value and its help text.
    """

    name: str
    type: type
    item: Any
    optional: bool
    limits: Limits

    @property
    def kind(self) -> str:
        """Type in words, such as `a whole number`."""
        if self.limits.accepts:
            return " or ".join(_KINDS[kind] for kind in self.limits.accepts)
        if self.type is list:
            number = next((_KINDS[kind].removeprefix("a ") for kind in (float, int) if kind in _alternatives(self.item)), "text")
            many = f"{number}s"
            if self.limits.is_path:
                many = "paths"
            elif self.item is Any:
                many = "numbers or texts"
            return f"a list of {self.limits.length or ''} {many}".replace("  ", " ")
        return "a path" if self.limits.is_path and self.type is str else _KINDS[self.type]

    @property
    def allowed(self) -> str:
        """Type and bounds in words, such as `a whole number of at least 1`."""
        words, bounds = self.kind, self.limits.range
        if not bounds:
            return words
        return f"{words}, each {bounds}" if self.type in (list, dict) else f"{words}{' of' * bounds.startswith('at')} {bounds}"

    @property
    def literal(self) -> bool:
        """True if the key's value is the typed text itself: a key of type str."""
        return self.type is str

    @property
    def of_texts(self) -> bool:
        """True if the key's value is a mapping to texts, each of which is the typed text itself."""
        return self.type is dict and str in _alternatives(self.item)


@functools.cache
def keys(schema: type, prefix: str = "") -> dict[str, Key]:
    """{dotted name: Key} of all keys of a schema and its sections. prefix: beginning of every name, such as `model.`."""
    found: dict[str, Key] = {}
    hints = typing.get_type_hints(schema)
    for each in fields(schema):
        hint = hints[each.name]
        if is_dataclass(hint):
            found |= keys(hint, f"{prefix}{each.name}.")
            continue
        if "limits" not in each.metadata:  # not declared with `setting` or `path`: users cannot set this field
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
    """Set of the types in a union annotation; a set of one for any other annotation."""
    return set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}


def parse(key: Key, text: str) -> Any:
    """Value of a key from the text that a user typed.

    For a key of type str the text is the value, after removal of one pair of quotes around it. A list is written `[a, b]`, or as
    one item without brackets. Numbers and booleans are returned as text, because OmegaConf converts and checks them. Raises
    FlextronError for a list or mapping that cannot be parsed.
    """
    if text == "null" and key.optional:
        return None
    if key.literal:
        return _unquoted(text)
    if key.type is list and str in _alternatives(key.item) and not {int, float} & _alternatives(key.item):
        return [_unquoted(item) for item in _items(text)]
    if key.type in (int, float, bool):
        return text
    if key.of_texts and text[:1] + text[-1:] == "{}" and (found := _texts_in(text)) is not None:
        return found
    if text[:1] + text[-1:] in ("[]", "{}"):
        return _collection(key, text)
    value = _unquoted(text) if text != _unquoted(text) else _scalar(text)
    return [value] if key.type is list else value


def _unquoted(text: str) -> str:
    """Text without the quotes around it, if the whole text is quoted.

    In quoted text, a backslash escapes a quote, and also a backslash in front of a quote or at the end.
    """
    quote = text[:1]
    if quote in ("'", '"') and re.fullmatch(rf"{quote}(?:[^{quote}\\]|\\.)*{quote}", text, re.S):
        return re.sub(rf"(\\+)({quote}|\Z)", lambda found: found[1][: len(found[1]) // 2] + found[2], text[1:-1])
    return text


def _items(text: str) -> list[str]:
    """Items of a list written `[a, "b, c"]`, split at commas outside of quotes; a text without brackets is one item."""
    if text[:1] + text[-1:] != "[]":
        return [text]
    inner = text[1:-1]
    found = re.findall(r"""\s*("(?:[^"\\]|\\.)*"(?=\s*(?:,|$))|'(?:[^'\\]|\\.)*'(?=\s*(?:,|$))|[^,]*)\s*(?:,|$)""", inner, re.S)
    found = [item.strip() for item in found[:-1] or found]  # the last match is the empty one at the end
    return [] if found == [""] else found


def _collection(key: Key, text: str) -> Any:
    """List or mapping that a text spells in Hydra's grammar or in YAML; else the text itself, if the key accepts text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # imported here: slow and rarely needed
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        pass
    try:
        return parse_yaml(text)
    except ValueError:
        if str in key.limits.accepts:
            return text
        how = "{name: value, ...}" if key.type is dict else "[a, b, ...]"
        raise FlextronError(f"{key.name}={text}: cannot be read as {key.kind}: write it as {how}") from None


def _texts_in(text: str) -> dict[str, str | None] | None:
    """{name: typed text, None for null} of a YAML mapping in one line; None for anything else, such as Hydra's `{a:b}`."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    pairs = node.value if isinstance(node, yaml.MappingNode) else [(node, node)]
    if not all(isinstance(each, yaml.ScalarNode) for pair in pairs for each in pair):
        return None
    if any(":" in name.value for name, _ in pairs):
        return None
    return {
        name.value: None if value.style is None and value.value in ("null", "~", "") else value.value for name, value in pairs
    }


def _scalar(text: str) -> Any:
    """Value of `text` as an int or float if the text spells a number, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def checked(settings: Any, where: str) -> Any:
    """Validate `settings`, an instance of a schema, and return it. Null and MISSING are not checked.

    Expands `~` in paths, and replaces other names of a value (`bf16-mixed` for `bf16`), both in place. Raises
    FlextronError, one line that begins with `where` (the stage), for a value outside of its limits, and for a key that has no
    effect beside the others.
    """
    for key in keys(type(settings)).values():
        owner, name = _owner(settings, key)
        value = getattr(owner, name)
        if value is None or value == MISSING:
            continue
        if key.limits.names:
            value = key.limits.names.get(value, value)
            setattr(owner, name, value)
        check_value(key, value, where)
        if key.limits.only:
            _check_effect(key, value, settings, where)
        if key.limits.is_path:
            setattr(owner, name, _each(value, os.path.expanduser))
    return settings


def make_paths_absolute(settings: Any) -> None:
    """Make the paths in `settings`, an instance of a schema, absolute, in place: a job starts in another directory."""
    for key in keys(type(settings)).values():
        if key.limits.is_path and (value := value_of(settings, key)) not in (None, MISSING, "builtin"):
            owner, name = _owner(settings, key)
            setattr(owner, name, _each(value, lambda text: os.path.abspath(text) if isinstance(_scalar(text), str) else text))


def _check_effect(key: Key, value: Any, settings: Any, where: str) -> None:
    """Raise FlextronError for a value other than the default of a key that has no effect beside the other `settings`."""
    name, _, wanted = key.limits.only.partition("=")
    found = value_of(settings, keys(type(settings))[name])
    given = map(show, found) if isinstance(found, list) else [show(found)]
    if wanted not in given and value != value_of(type(settings)(), key):
        raise FlextronError(
            f"{where}: {key.name}={show(value)} has an effect with {key.limits.only} only: set that too, or leave {key.name} out"
        )


def value_of(settings: Any, key: Key) -> Any:
    """Value of a key in an instance of its schema, also if the key is in a section."""
    return getattr(*_owner(settings, key))


def _owner(settings: Any, key: Key) -> tuple[Any, str]:
    """(section of `settings` that holds a key, the key's name in this section)."""
    *sections, name = key.name.split(".")
    return functools.reduce(getattr, sections, settings), name


def check_value(key: Key, value: Any, where: str) -> None:
    """Raise FlextronError unless a value is within the limits of its key.

    Args:
        key: key of a schema.
        value: value of the key, already of the key's type.
        where: beginning of the message, such as the name of the stage.
    """
    limits = key.limits
    shown = f"{where}: {key.name}={show(value)}"
    accepts = (*limits.accepts, int) if float in limits.accepts else limits.accepts
    if accepts and (not isinstance(value, accepts) or isinstance(value, bool)):
        raise FlextronError(f"{shown} must be {key.kind}")
    for text in texts(value):
        _check_text(key, text, where)
    if limits.length is not None and len(value) != limits.length:
        raise FlextronError(f"{shown} must be {key.allowed}")
    if limits.filled and value == []:
        raise FlextronError(f"{shown} must have at least one item")
    if limits.choices and isinstance(value, list) and len(set(value)) < len(value):
        raise FlextronError(f"{shown} has one twice: name each once")
    for item in value if isinstance(value, list) else value.values() if isinstance(value, Mapping) else [value]:
        if isinstance(item, float) and not math.isfinite(item):
            raise FlextronError(f"{shown} must be finite")
        if isinstance(item, int | float) and not isinstance(item, bool) and not limits.holds(item):
            raise FlextronError(f"{shown} must be {key.allowed if item is not value else limits.range}")
        if limits.ceiling is not None and item > limits.ceiling:
            raise FlextronError(f"{shown} must be at most {limits.ceiling}")
        if limits.choices and item not in limits.choices and item not in limits.names:
            raise FlextronError(f"{where}: {key.name}={item!r} is not known: use one of {', '.join(limits.choices)}")
        if limits.form and not re.fullmatch(limits.form, str(item)):
            raise FlextronError(f"{shown}: write it as {limits.unit}")


def _check_text(key: Key, text: str, where: str) -> None:
    """Raise FlextronError for a text that no file can hold, and for a path that no file system takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FlextronError(f"{where}: {key.name}: is not UTF-8: type it in UTF-8") from None
    if not key.limits.is_path:
        return
    if not text:
        raise FlextronError(f"{where}: {key.name}= is empty: give a path")
    if "\0" in text:
        raise FlextronError(f"{where}: {key.name}: has a NUL character, which no path can have")
    if len(text.encode()) > _LONGEST_PATH or any(len(part.encode()) > _LONGEST_NAME for part in text.split("/")):
        raise FlextronError(
            f"{where}: {key.name}={text[:40]}...: is too long: a name may have {_LONGEST_NAME} bytes, a path {_LONGEST_PATH}"
        )


def texts(value: Any) -> Iterator[str]:
    """All texts of a text, a list or a mapping to them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from texts(item)


def show(value: Any) -> str:
    """Text of a value in the notation in which users type values: `null`, `true`, `[a,b]`, `{a: 1}`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {show(each)}" for name, each in value.items()) + "}"
    return str(value)


def _each(value: Any, function: Callable[[str], str]) -> Any:
    """Copy of a text, list or mapping with `function` applied to every text in it."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [_each(item, function) for item in value]
    return {name: _each(item, function) for name, item in value.items()} if isinstance(value, Mapping) else value
