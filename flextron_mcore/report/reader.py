"""Read what the stages of a run wrote: metrics.json and log.jsonl, with checks. No torch import.

Every problem in a file is a FlextronError of one line that names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import SubNetwork

STAGES = (  # in the order of a run
    *("prepare", "pretrain", "import", "importance", "elastic", "router", "joint", "gumbel"),
    *("sensitivity", "evaluate", "compare", "family", "export"),
)
PLAIN: dict[type, tuple[str, Callable[[Any], bool]]] = {  # types that are read as they are: their name in a message, and a check
    str: ("a text", lambda value: isinstance(value, str)),
    int: ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    dict: ("an object", lambda value: isinstance(value, Mapping)),
    list: ("a list", lambda value: isinstance(value, list)),
}
D = TypeVar("D")
_hints = cache(get_type_hints)


@dataclass(frozen=True)
class Reader:
    """A JSON object together with the place it came from, so that a wrong value can be named. model: of the networks in it."""

    values: Mapping[str, Any]
    where: str
    model: ModelConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise FlextronError(f"{self.where}: expected a JSON object, not {_shown(self.values)}")

    def has(self, key: str) -> bool:
        """True if `key` is there and not null."""
        return self.values.get(key) is not None

    def read(self, key: str, hint: Any) -> Any:
        """The value of `key` as `hint`: a key of PLAIN, a Literal, a dataclass, lists or dictionaries of these, or one | None.

        NaN and infinity, which a diverged network gives, are numbers. Null and a missing key are None.
        """
        origin, arguments = get_origin(hint), get_args(hint)
        if origin is UnionType:
            return self.read(key, arguments[0]) if self.has(key) else None
        if origin is Literal:
            return self._get(key, f"one of {', '.join(arguments)}", lambda value: value in arguments)
        if hint in PLAIN:
            value = self._get(key, *PLAIN[hint])
            return float(value) if hint is float else value
        if origin in (list, tuple) and arguments[0] in PLAIN:
            word, good = PLAIN[arguments[0]]
            size = len(arguments) if origin is tuple else None
            wanted = f"a list of {f'{size} ' if size else ''}{word.removeprefix('a ')}s"
            fits = lambda value: isinstance(value, list) and all(map(good, value)) and size in (None, len(value))  # noqa: E731
            return origin(self._get(key, wanted, fits))
        if origin is list:
            return [row.into(arguments[0]) for row in self.rows(key)]
        if origin is dict:
            inner = self.inner(key)
            return {name: inner.read(name, arguments[1]) for name in inner.values}
        if hint is SubNetwork:
            return self._subnetwork(key)
        return self.inner(key).into(hint)

    def into(self, hint: type[D], /, **given: Any) -> D:
        """A `hint` (dataclass) whose fields are the keys of the same names, each read by its type, but for those `given`."""
        if hint is ModelConfig:
            try:
                return ModelConfig.from_dict(self.values)
            except FlextronError as error:
                raise FlextronError(f"{self.where}: {error}") from None
        reader = self.with_model() if _hints(hint).get("model") is ModelConfig else self
        return hint(**given, **{name: reader.read(name, type_) for name, type_ in _hints(hint).items() if name not in given})

    def with_model(self) -> Reader:
        """This object, whose networks are checked against its `model`."""
        return replace(self, model=self.read("model", ModelConfig))

    def inner(self, key: str) -> Reader:
        """The object of `key`."""
        return replace(self, values=self.read(key, dict), where=f"{self.where}: {key}")

    def rows(self, key: str) -> list[Reader]:
        """The objects of the list of `key`."""
        return [replace(self, values=row, where=f"{self.where}: {key}[{i}]") for i, row in enumerate(self.read(key, list))]

    def refuse_empty(self, key: str) -> None:
        """Raise FlextronError if the list of `key` is empty."""
        if not self.read(key, list):
            raise FlextronError(f"{self.where}: '{key}' is empty")

    def _get(self, key: str, wanted: str, good: Callable[[Any], bool]) -> Any:
        if key not in self.values:
            raise FlextronError(f"{self.where}: lacks '{key}'")
        value = self.values[key]
        if not good(value):
            raise FlextronError(f"{self.where}: '{key}' must be {wanted}, not {_shown(value)}")
        return value

    def _subnetwork(self, key: str) -> SubNetwork:
        inner = self.inner(key)
        found = SubNetwork.from_dict(inner.values, inner.where)
        if self.model and len(found.layers) != self.model.num_layers:
            raise FlextronError(f"{self.where}: {len(found.layers)} layers, but the model has {self.model.num_layers}")
        return found


@dataclass(frozen=True)
class Settings:
    """Model config and elastic space as a stage wrote them; None for those it did not write."""

    model: dict | None = None
    space: dict | None = None


@dataclass(frozen=True)
class StageOutput:
    """One stage directory of the directory `run`. kind: the stage; metrics: the content of metrics.json."""

    run: Path
    directory: Path
    kind: str
    metrics: Reader

    @property
    def label(self) -> str:
        """The name of the directory."""
        return self.directory.resolve().name

    def into(self, hint: type[D], /, **given: Any) -> D:
        """`hint` from metrics.json; its fields `label`, `kind` and `settings`, if it has them, are those of the directory."""
        own = {"label": self.label, "kind": self.kind, "settings": self.metrics.into(Settings)}
        return self.metrics.into(hint, **{name: value for name, value in own.items() if name in _hints(hint)}, **given)

    def log(self, event: str) -> list[Reader]:
        """Rows of one event in the order of their steps. A resumed run writes some steps again: the later row counts."""
        rows = {row.read("step", int): row for row in self._log if row.values.get("event") == event}
        return [rows[step] for step in sorted(rows)]

    @cached_property
    def _log(self) -> list[Reader]:
        path = self.directory / "log.jsonl"
        return list(_read_lines(path)) if path.is_file() else []


def collect(run: Path) -> list[StageOutput]:
    """The stage directories of `run`, itself and its direct children that hold a metrics.json, in the order of STAGES.

    A later command's directory is passed over. Raises FlextronError naming the file and key of anything that cannot be read, and
    saying what was looked for when there is no stage at all.
    """
    if not run.is_dir():
        raise FlextronError(f"{run}: no such directory; report needs a directory of stage outputs")
    found, known = [], ", ".join(STAGES)
    for directory in (run, *(child for child in run.iterdir() if child.is_dir() and not child.name.startswith("."))):
        path = directory / "metrics.json"
        if path.is_file():
            metrics = Reader(_parse(_read_text(path), str(path)), str(path))
            found.append(StageOutput(run, directory, metrics.read("stage", str), metrics))
    found = [output for output in found if output.kind in STAGES]
    if not found:
        looked = f"looked for metrics.json of a stage ({known}) here and one directory below"
        raise FlextronError(f"{run}: no stage output found: {looked}")
    return sorted(found, key=lambda output: (STAGES.index(output.kind), output.label))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise FlextronError(f"{path}: not readable: {error}") from None


def _read_lines(path: Path) -> Iterator[Reader]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield Reader(_parse(line, f"{path}: line {number}", " is"), f"{path}: line {number}")


def _parse(text: str, where: str, verb: str = ":") -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise FlextronError(f"{where}{verb} not valid JSON: {error}") from None


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
