"""Reading of the outputs of a run's stages: metrics.json and log.jsonl, with checks. No torch import.

Every problem in a file is a FlextronError of one line that names the file and the key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.digests import check_files
from flextron_mcore.files import LARGEST_LOG, explain, parse_json, read_text, read_yaml
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
LOG_FILE = "log.jsonl"
D = TypeVar("D")
_hints = cache(get_type_hints)


@dataclass(frozen=True)
class Reader:
    """Reader of a JSON object in a stage's output, which checks types.

    Reading a key that is missing or has a value of another type raises FlextronError, which names file and key.

    Attributes:
        values: the object.
        where: file, and keys within it, for messages.
        model: architecture that networks in the object are checked against; None for no check.
    """

    values: Mapping[str, Any]
    where: str
    model: ModelConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise FlextronError(f"{self.where}: expected a JSON object, not {_shown(self.values)}")

    def has(self, key: str) -> bool:
        """True if `key` is present and not null."""
        return self.values.get(key) is not None

    def read(self, key: str, hint: Any) -> Any:
        """Value of `key` as the type `hint`. NaN and infinity, losses of a network that diverged, are numbers.

        Raises FlextronError for a missing key or another type.

        hint: a key of PLAIN, a Literal, a dataclass, SubNetwork, a list or dictionary of these, a tuple of types in PLAIN (a list
        of that length), or one of them | None (null or missing).
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
        """Instance of the dataclass `hint`: `given` fields as they are, every other field from the key of its name."""
        if hint is ModelConfig:
            try:
                return ModelConfig.from_dict(self.values)
            except FlextronError as error:
                raise FlextronError(f"{self.where}: {error}") from None
        reader = self.with_model() if _hints(hint).get("model") is ModelConfig else self
        return hint(**given, **{name: reader.read(name, type_) for name, type_ in _hints(hint).items() if name not in given})

    def with_model(self) -> Reader:
        """Reader of the same JSON object that refuses networks with another number of layers than the model at its key `model`.

        Raises FlextronError if `model` is missing or no architecture.
        """
        return replace(self, model=self.read("model", ModelConfig))

    def inner(self, key: str) -> Reader:
        """Reader of the JSON object at `key`. Raises FlextronError for a missing key and a value that is no object."""
        return replace(self, values=self.read(key, dict), where=f"{self.where}: {key}")

    def rows(self, key: str) -> list[Reader]:
        """Readers of the JSON objects in the list at `key`. Raises FlextronError for a missing key and other values."""
        return [replace(self, values=row, where=f"{self.where}: {key}[{i}]") for i, row in enumerate(self.read(key, list))]

    def refuse_empty(self, key: str) -> None:
        """Raise FlextronError if the list at `key` is empty."""
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
    """Architecture (`model`) and elastic space as they stand in a stage's metrics.json; None for one that it did not write."""

    model: dict | None = None
    space: dict | None = None


@dataclass(frozen=True)
class StageOutput:
    """Output directory of a finished stage.

    Attributes:
        run: directory of the run that holds it.
        directory: output directory.
        kind: name of the stage.
        metrics: content of metrics.json.
    """

    run: Path
    directory: Path
    kind: str
    metrics: Reader

    @property
    def label(self) -> str:
        """Name of the directory."""
        return self.directory.resolve().name

    def into(self, hint: type[D], /, **given: Any) -> D:
        """Instance of the dataclass `hint` from metrics.json.

        The fields `label`, `kind` and `settings` describe the directory; fields in `given` are taken as they are; every other
        field is read from the key of its name.
        """
        own = {"label": self.label, "kind": self.kind, "settings": self.metrics.into(Settings)}
        return self.metrics.into(hint, **{name: value for name, value in own.items() if name in _hints(hint)}, **given)

    @property
    def warnings(self) -> list[str]:
        """Texts of the warnings that the stage printed."""
        return self.metrics.read("warnings", list[str]) if self.metrics.has("warnings") else []

    def log(self, event: str) -> list[Reader]:
        """Rows of log.jsonl with this `event` ("train" or "validation"), one for each step, in order; [] without a log.

        If a resumed run repeats a step, the later row counts.
        """
        rows = {row.read("step", int): row for row in self._log if row.values.get("event") == event}
        return [rows[step] for step in sorted(rows)]

    @cached_property
    def _log(self) -> list[Reader]:
        path = self.directory / LOG_FILE
        return list(_read_lines(path)) if path.is_file() else []


def collect(run: Path) -> list[StageOutput]:
    """Finished stages of a run: `run` itself and its direct children, except hidden ones, with metrics.json of a stage in STAGES.

    They are in the order of STAGES, several of one stage by name. Raises FlextronError if there is none, if `run` is no
    directory, for a metrics.json that cannot be read, and for one or a log.jsonl that differs from its digest.
    """
    if not run.is_dir():
        raise FlextronError(f"{run}: no such directory: name one that holds outputs of stages")
    found, known = [], ", ".join(STAGES)
    for directory in (run, *(child for child in run.iterdir() if child.is_dir() and not child.name.startswith("."))):
        path = directory / "metrics.json"
        if path.is_file():
            check_files(directory, path.name, LOG_FILE)
            metrics = Reader(_parse(_read_text(path), str(path)), str(path))
            found.append(StageOutput(run, directory, metrics.read("stage", str), metrics))
    found = [output for output in found if output.kind in STAGES]
    if not found:
        looked = f"looked for metrics.json of a stage ({known}) here and one directory below"
        raise FlextronError(f"{run}: no stage output found: {looked}")
    return sorted(found, key=lambda output: (STAGES.index(output.kind), output.label))


@dataclass(frozen=True)
class Unfinished:
    """Stage of a run that has no metrics.json.

    Attributes:
        label: name of the stage's directory.
        step: last logged step; None if nothing was logged.
        steps: number of steps of the whole training; None for a stage that does not train.
        begun: False if the stage never started.
    """

    label: str
    step: int | None = None
    steps: int | None = None
    begun: bool = True


def unfinished(run: Path, out: Path) -> list[Unfinished]:
    """Stages of `run` without metrics.json: interrupted, running, or not begun yet in a chain (`flextron quickstart`).

    Those of the chain come first, in its order; `report` is left out.

    out: directory of the report, which is passed over.
    """
    chain = _config(run).get("chain") or {}
    names = [name for name, step in chain.items() if step.get("stage") != "report"]
    for child in sorted(run.iterdir()):
        name = child.name.removeprefix(".").removesuffix(".tmp") if child.name.startswith(".") else child.name
        aside = child.name == f".{name}.tmp"  # where a stage that writes at its end collects its output
        if (
            child.is_dir()
            and child != out
            and (aside or _config(child).get("stage") in STAGES)
            and name not in names
            and name != "report"
        ):
            names.append(name)
    return [_unfinished(run, name) for name in names if not (run / name / "metrics.json").is_file()]


def _unfinished(run: Path, name: str) -> Unfinished:
    """State of a stage without metrics.json, from its directory, its log and its configuration."""
    if not (run / name).is_dir():
        return Unfinished(name, begun=(run / f".{name}.tmp").is_dir())
    log, steps = run / name / "log.jsonl", (_config(run / name).get("trainer") or {}).get("max_steps")
    logged = re.findall(r'"step": (\d+)', _read_text(log)) if log.is_file() else []  # the last line may be half a line
    return Unfinished(name, int(logged[-1]) if logged else None, steps)


def _config(directory: Path) -> dict:
    """Content of config.yaml in a stage's directory; {} if the file is missing or cannot be read."""
    try:
        found = read_yaml(directory / "config.yaml")
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return read_text(path, largest=LARGEST_LOG)
    except (UnicodeDecodeError, OSError) as error:
        raise FlextronError(f"{path}: not readable: {explain(error)}") from None


def _read_lines(path: Path) -> Iterator[Reader]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield Reader(_parse(line, f"{path}: line {number}", " is"), f"{path}: line {number}")


def _parse(text: str, where: str, verb: str = ":") -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise FlextronError(f"{where}{verb} not valid JSON: {explain(error)}") from None


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
