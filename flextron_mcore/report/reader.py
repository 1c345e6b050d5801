"""Read JSON that a stage wrote, with checks. No torch import.

Every problem in a file is a FlextronError of one line that names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import SubNetwork


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
        """One of the texts `known`."""
        return self._get(key, f"one of {', '.join(known)}", lambda v: v in known)

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        return self._get(key, "a list of texts", lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v))

    def number_list(self, key: str, length: int | None = None) -> list[float]:
        """A list of numbers, `length` of them where that is given."""
        good = lambda v: isinstance(v, list) and all(map(is_number, v)) and length in (None, len(v))  # noqa: E731
        return [float(x) for x in self._get(key, f"a list of {f'{length} ' if length else ''}numbers", good)]

    def has(self, key: str) -> bool:
        """Whether `key` is there and not null."""
        return self.values.get(key) is not None

    def maybe(self, key: str) -> float | None:
        """A number, or None where it is null or missing."""
        return self.number(key) if self.has(key) else None


@dataclass(frozen=True)
class Settings:
    """Model config and elastic space as a stage wrote them; None where it wrote none."""

    model: dict[str, Any] | None = None
    space: dict[str, Any] | None = None


def read_settings(metrics: Reader) -> Settings:
    """The keys `model` and `space`."""
    model, space = (dict(metrics.inner(key).values) if metrics.has(key) else None for key in ("model", "space"))
    return Settings(model, space)


def read_model(metrics: Reader) -> ModelConfig:
    """The key `model`, checked."""
    given = metrics.inner("model")
    try:
        return ModelConfig.from_dict(given.values)
    except FlextronError as error:
        raise FlextronError(f"{given.where}: {error}") from None


def read_subnetwork(row: Reader, model: ModelConfig) -> SubNetwork:
    """The key `subnetwork`, with as many layers as `model`."""
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
