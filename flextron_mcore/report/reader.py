"""Read what the stages of a run wrote: metrics.json and log.jsonl, with checks. No torch import.

Every problem in a file is a FlextronError of one line that names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import SubNetwork

STAGES = (  # in the order of a run
    *("prepare", "pretrain", "import", "importance", "elastic", "router", "joint", "gumbel"),
    *("sensitivity", "evaluate", "compare", "family", "export"),
)
D = TypeVar("D")


class Reader:
    """A JSON object together with the place it came from, so that a wrong value can be named."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise FlextronError(f"{where}: expected a JSON object, not {_kind(values)}")
        self.values, self.where = values, where

    def _get(self, key: str, wanted: str, good: Callable[[Any], bool]) -> Any:
        if key not in self.values:
            raise FlextronError(f"{self.where}: lacks '{key}'")
        value = self.values[key]
        if not good(value):
            raise FlextronError(f"{self.where}: '{key}' must be {wanted}, not {_kind(value)}")
        return value

    def text(self, key: str) -> str:
        """A string."""
        return self._get(key, "a text", lambda v: isinstance(v, str))

    def whole(self, key: str) -> int:
        """A whole number."""
        return self._get(key, "a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool))

    def number(self, key: str) -> float:
        """A number; NaN and infinity, which a diverged network gives, are numbers."""
        return float(self._get(key, "a number", is_number))

    def numbers(self, key: str) -> dict[str, float]:
        """An object whose values are all numbers."""
        inner = self.inner(key)
        return {name: inner.number(name) for name in inner.values}

    def inner(self, key: str) -> Reader:
        """An object."""
        return Reader(self._get(key, "an object", lambda v: isinstance(v, Mapping)), f"{self.where}: {key}")

    def rows(self, key: str) -> list[Reader]:
        """A list of objects."""
        rows = self._get(key, "a list", lambda v: isinstance(v, list))
        return [Reader(row, f"{self.where}: {key}[{i}]") for i, row in enumerate(rows)]

    def flag(self, key: str) -> bool:
        """True or false."""
        return self._get(key, "true or false", lambda v: isinstance(v, bool))

    def choice(self, key: str, known: Sequence[str]) -> str:
        """A text that is one of `known`."""
        return self._get(key, f"one of {', '.join(known)}", lambda v: v in known)

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        return self._get(key, "a list of texts", lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v))

    def number_list(self, key: str, length: int | None = None) -> list[float]:
        """A list of numbers, of this `length` if it is given."""
        good = lambda v: isinstance(v, list) and all(map(is_number, v)) and length in (None, len(v))  # noqa: E731
        return [float(x) for x in self._get(key, f"a list of {f'{length} ' if length else ''}numbers", good)]

    def has(self, key: str) -> bool:
        """True if `key` is there and not null."""
        return self.values.get(key) is not None

    def maybe(self, key: str) -> float | None:
        """A number; None if it is null or missing."""
        return self.number(key) if self.has(key) else None

    def into(self, type_: type[D], /, **given: Any) -> D:
        """A `type_` (dataclass) whose fields are the keys of the same names, each read by its type, but for those `given`."""
        by_type: dict[str, Callable[[str], Any]] = {
            **{"str": self.text, "int": self.whole, "float": self.number, "bool": self.flag, "float | None": self.maybe},
            **{"dict[str, float]": self.numbers, "list[str]": self.texts, "list[float]": self.number_list},
        }
        read = {field.name: by_type[field.type](field.name) for field in fields(type_) if field.name not in given}
        return type_(**given, **read)


@dataclass(frozen=True)
class StageOutput:
    """One stage directory of the directory `run`. label: its name; kind: the stage; metrics: the content of metrics.json."""

    run: Path
    directory: Path
    kind: str
    metrics: Reader

    @property
    def label(self) -> str:
        """The name of the directory."""
        return self.directory.resolve().name

    def log(self, event: str) -> list[Reader]:
        """Rows of one event in the order of their steps. A resumed run writes some steps again: the later row counts."""
        return [
            row for _, row in sorted({row.whole("step"): row for row in self._log if row.values.get("event") == event}.items())
        ]

    @cached_property
    def _log(self) -> list[Reader]:
        path = self.directory / "log.jsonl"
        return list(read_lines(path)) if path.is_file() else []


def collect(run: Path) -> list[StageOutput]:
    """The stage directories of `run`, itself and its direct children that hold a metrics.json, in the order of STAGES.

    A later command's directory is passed over. Raises FlextronError naming the file and key of anything that cannot be read, and
    saying what was looked for when there is no stage at all.
    """
    if not run.is_dir():
        raise FlextronError(f"{run}: no such directory; report needs a directory of stage outputs")
    found = []
    for directory in (run, *(child for child in run.iterdir() if child.is_dir() and not child.name.startswith("."))):
        path = directory / "metrics.json"
        if path.is_file():
            metrics = Reader(read_json(path), str(path))
            found.append(StageOutput(run, directory, metrics.text("stage"), metrics))
    found = [output for output in found if output.kind in STAGES]
    if not found:
        known = ", ".join(STAGES)
        raise FlextronError(
            f"{run}: no stage output found: looked for metrics.json of a stage ({known}) here and one directory below"
        )
    return sorted(found, key=lambda output: (STAGES.index(output.kind), output.label))


@dataclass(frozen=True)
class Settings:
    """Model config and elastic space as a stage wrote them; None for those it did not write."""

    model: dict[str, Any] | None = None
    space: dict[str, Any] | None = None


def read_settings(metrics: Reader) -> Settings:
    """Settings of the keys `model` and `space`."""
    model, space = (dict(metrics.inner(key).values) if metrics.has(key) else None for key in ("model", "space"))
    return Settings(model, space)


def read_model(metrics: Reader) -> ModelConfig:
    """Model config of the key `model`, checked."""
    given = metrics.inner("model")
    try:
        return ModelConfig.from_dict(given.values)
    except FlextronError as error:
        raise FlextronError(f"{given.where}: {error}") from None


def read_subnetwork(row: Reader, model: ModelConfig) -> SubNetwork:
    """Sub-network of the key `subnetwork`, with as many layers as `model`."""
    subnetwork = SubNetwork.from_dict(row.inner("subnetwork").values, f"{row.where}: subnetwork")
    if len(subnetwork.layers) != model.num_layers:
        raise FlextronError(f"{row.where}: {len(subnetwork.layers)} layers, but the model has {model.num_layers}")
    return subnetwork


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise FlextronError(f"{path}: not readable: {error}") from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FlextronError(f"{path}: not valid JSON: {error}") from None


def read_lines(path: Path) -> Iterator[Reader]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                values = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise FlextronError(f"{path}: line {number} is not valid JSON: {error}") from None
            yield Reader(values, f"{path}: line {number}")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
