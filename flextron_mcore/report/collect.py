"""Read a run directory: the metrics.json and log.jsonl that the stages wrote, checked and typed. No torch import.

Every problem in a file is a FlextronError of one line that names the file and the key. Losses are in nats per token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import SubNetwork

STAGES = ("prepare", "pretrain", "import", "importance", "elastic", "evaluate", "export")
BEFORE_WORDS = ("parent", "before")


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
        return float(self._get(key, "a number", _is_number))

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


@dataclass(frozen=True)
class Domain:
    """Sizes of one domain of a data set: tokens, documents and bytes of text."""

    name: str
    train_tokens: int
    valid_tokens: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class Data:
    """One `prepare` directory."""

    label: str
    vocab_size: int
    domains: list[Domain]


@dataclass(frozen=True)
class Training:
    """One `pretrain` or `elastic` directory. `seconds` of wall time; losses in nats per token.

    train: (step, loss of the full model, losses of the sampled sub-networks); validation: (step, loss of each network).
    first_loss, last_loss: the full model's first and last validation loss, None where it was not validated.
    """

    label: str
    kind: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    train: list[tuple[int, float, list[float]]]
    validation: list[tuple[int, dict[str, float]]]
    first_loss: float | None
    last_loss: float | None
    settings: Settings


@dataclass(frozen=True)
class Settings:
    """Model config and elastic space as a stage wrote them; None where it wrote none."""

    model: dict[str, Any] | None = None
    space: dict[str, Any] | None = None


@dataclass(frozen=True)
class AblationRow:
    """One row of the sorting ablation (the paper's Table 5)."""

    setup: str
    order: str
    score: str
    loss: float
    perplexity: float


@dataclass(frozen=True)
class Ablation:
    """One `importance` directory; `samples` calibration samples."""

    label: str
    samples: int
    score: str
    rows: list[AblationRow]


@dataclass(frozen=True)
class Network:
    """One evaluated network: its choice, its size (parameters, bytes) and its loss per domain (nats per token)."""

    name: str
    subnetwork: SubNetwork
    parameters: int
    non_embedding_parameters: int
    weight_bytes: int
    kv_cache_bytes: int
    loss: dict[str, float]
    perplexity: dict[str, float]
    mean_loss: float
    mean_perplexity: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as in the metrics.json it was read from."""
        values = {**self.__dict__, "subnetwork": self.subnetwork.to_dict()}
        values["mean"] = {"loss": values.pop("mean_loss"), "perplexity": values.pop("mean_perplexity")}
        return values


@dataclass(frozen=True)
class Series:
    """One `evaluate` directory: the networks, largest first."""

    label: str
    model: ModelConfig
    networks: list[Network]
    settings: Settings

    def full(self) -> Network | None:
        """The network that is the whole model, or None."""
        whole = SubNetwork.full(self.model)
        return next((net for net in self.networks if net.subnetwork == whole), None)

    def same_shape(self, subnetwork: SubNetwork) -> Network | None:
        """The network with exactly these widths, or None."""
        return next((net for net in self.networks if net.subnetwork == subnetwork), None)


@dataclass(frozen=True)
class Export:
    """One `export` directory. `difference`: largest difference of a logit from the elastic model's, None if not measured."""

    label: str
    format: str
    architecture: str
    parameters: int
    bytes: int
    path: str
    difference: float | None


@dataclass
class Run:
    """All that was found in a run directory; a stage that was not run has an empty list."""

    name: str
    stages: list[tuple[str, str]] = field(default_factory=list)  # (directory, stage)
    data: list[Data] = field(default_factory=list)
    training: list[Training] = field(default_factory=list)
    ablations: list[Ablation] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    exports: list[Export] = field(default_factory=list)
    imported: list[Settings] = field(default_factory=list)

    def before(self) -> Series | None:
        """The evaluation before elastic training: the first whose directory name says so, where another one does not."""
        marked = [s for s in self.series if _says_before(s.label)]
        return marked[0] if marked and len(marked) < len(self.series) else None

    def family(self) -> Series | None:
        """The evaluation the report is about: `evaluate` if there is one, else the last of those that are not `before`."""
        after = [s for s in self.series if not _says_before(s.label)] or self.series
        return next((s for s in after if s.label == "evaluate"), after[-1] if after else None)

    def settings(self) -> Settings:
        """Model and space: those of the family, else of the latest training stage, else of the import."""
        family = self.family()
        found = [family.settings] if family else []
        found += [training.settings for training in reversed(self.training)] + self.imported
        return Settings(
            next((s.model for s in found if s.model is not None), None),
            next((s.space for s in found if s.space is not None), None),
        )


def collect(run: Path) -> Run:
    """Read every stage directory of `run`: `run` itself and its direct children that hold a metrics.json.

    A stage this report does not show (a later command's) is passed over. Raises FlextronError naming the file and key of
    anything that cannot be read, and saying what was looked for when there is no stage at all.
    """
    run = Path(run)
    if not run.is_dir():
        raise FlextronError(f"{run}: no such directory; report needs a directory of stage outputs")
    children = sorted(child for child in run.iterdir() if child.is_dir() and not child.name.startswith("."))
    found = []
    for directory in [run, *children]:
        path = directory / "metrics.json"
        if path.is_file():
            metrics = Reader(_read_json(path), str(path))
            kind = metrics.text("stage")
            if kind in STAGES:
                found.append((STAGES.index(kind), directory.resolve().name, directory, metrics))
    if not found:
        raise FlextronError(
            f"{run}: no stage output found: looked for metrics.json of a stage ({', '.join(STAGES)}) here and one directory below"
        )
    result = Run(run.resolve().name)
    for order, label, directory, metrics in sorted(found, key=lambda item: item[:2]):
        kind = STAGES[order]
        result.stages.append((label, kind))
        if kind == "prepare":
            result.data.append(_data(label, metrics))
        elif kind in ("pretrain", "elastic"):
            result.training.append(_training(label, kind, metrics, directory / "log.jsonl"))
        elif kind == "import":
            result.imported.append(_settings(metrics))
        elif kind == "importance":
            result.ablations.append(_ablation(label, metrics))
        elif kind == "evaluate":
            result.series.append(_series(label, metrics))
        else:
            result.exports.append(_export(label, metrics, run))
    return result


def _data(label: str, metrics: Reader) -> Data:
    domains = metrics.inner("domains")
    sizes = ("train_tokens", "valid_tokens", "documents", "bytes")
    rows = [(name, domains.inner(name)) for name in domains.values]
    return Data(label, metrics.whole("vocab_size"), [Domain(name, *(row.whole(size) for size in sizes)) for name, row in rows])


def _training(label: str, kind: str, metrics: Reader, log: Path) -> Training:
    """A resumed run writes some steps again; the later row of a step counts."""
    train: dict[int, tuple[int, float, list[float]]] = {}
    validation: dict[int, tuple[int, dict[str, float]]] = {}
    for row in _read_lines(log) if log.is_file() else ():
        event = row.values.get("event")
        if event == "train":
            subs = row.values.get("subnetwork_losses") or []
            if not isinstance(subs, list) or not all(_is_number(x) for x in subs):
                raise FlextronError(f"{row.where}: 'subnetwork_losses' must be a list of numbers")
            train[row.whole("step")] = (row.whole("step"), row.number("loss"), [float(x) for x in subs])
        elif event == "validation":
            validation[row.whole("step")] = (row.whole("step"), row.numbers("losses"))
    logged = [validation[step][1]["full"] for step in sorted(validation) if "full" in validation[step][1]]
    ends = [_validation_end(metrics, end, logged) for end in ("first", "last")]
    return Training(
        label,
        kind,
        metrics.whole("steps"),
        metrics.whole("tokens"),
        metrics.number("seconds"),
        metrics.number("tokens_per_second"),
        [train[step] for step in sorted(train)],
        [validation[step] for step in sorted(validation)],
        ends[0],
        ends[1],
        _settings(metrics),
    )


def _validation_end(metrics: Reader, end: str, logged: list[float]) -> float | None:
    """The full model's `first` or `last` validation loss: from metrics.json, else from the log."""
    given = metrics.values.get("validation")
    row = given.get(end) if isinstance(given, Mapping) else None
    losses = row.get("losses", row) if isinstance(row, Mapping) else None
    value = losses.get("full") if isinstance(losses, Mapping) else None
    if _is_number(value):
        return float(value)
    return logged[0 if end == "first" else -1] if logged else None


def _ablation(label: str, metrics: Reader) -> Ablation:
    rows = [
        AblationRow(r.text("setup"), r.text("order"), r.text("score"), r.number("loss"), r.number("perplexity"))
        for r in metrics.rows("ablation")
    ]
    return Ablation(label, metrics.whole("samples"), metrics.text("score"), rows)


def _series(label: str, metrics: Reader) -> Series:
    given = metrics.inner("model")
    try:
        model = ModelConfig.from_dict(given.values)
    except FlextronError as error:
        raise FlextronError(f"{given.where}: {error}") from None
    networks = []
    for row in metrics.rows("networks"):
        subnetwork = SubNetwork.from_dict(row.inner("subnetwork").values, f"{row.where}: subnetwork")
        if len(subnetwork.layers) != model.num_layers:
            raise FlextronError(f"{row.where}: {len(subnetwork.layers)} layers, but the model has {model.num_layers}")
        sizes = [row.whole(k) for k in ("parameters", "non_embedding_parameters", "weight_bytes", "kv_cache_bytes")]
        mean = row.inner("mean")
        losses = row.numbers("loss"), row.numbers("perplexity"), mean.number("loss"), mean.number("perplexity")
        networks.append(Network(row.text("name"), subnetwork, *sizes, *losses))
    if not networks:
        raise FlextronError(f"{metrics.where}: 'networks' is empty")
    return Series(label, model, sorted(networks, key=lambda net: -net.parameters), _settings(metrics))


def _export(label: str, metrics: Reader, run: Path) -> Export:
    path = Path(metrics.text("path"))
    if path.is_absolute() and path.is_relative_to(run.resolve()):
        path = path.relative_to(run.resolve())
    difference = metrics.values.get("max_logit_difference")
    return Export(
        label,
        metrics.text("format"),
        metrics.text("architecture"),
        metrics.whole("parameters"),
        metrics.whole("bytes"),
        str(path),
        None if difference is None else metrics.number("max_logit_difference"),
    )


def _settings(metrics: Reader) -> Settings:
    model, space = (None if metrics.values.get(key) is None else dict(metrics.inner(key).values) for key in ("model", "space"))
    return Settings(model, space)


def _says_before(label: str) -> bool:
    return any(word in label.lower() for word in BEFORE_WORDS)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise FlextronError(f"{path}: not readable: {error}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FlextronError(f"{path}: not valid JSON: {error}") from None


def _read_lines(path: Path) -> Iterator[Reader]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                values = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise FlextronError(f"{path}: line {number} is not valid JSON: {error}") from None
            yield Reader(values, f"{path}: line {number}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
