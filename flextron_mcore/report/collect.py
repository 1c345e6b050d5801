"""Read a run directory: the metrics.json and log.jsonl that the stages wrote, checked and typed. No torch import.

Every problem in a file is a FlextronError of one line that names the file and the key. Losses are in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.report.collect_adaptive import EvaluatedMix, read_evaluated
from flextron_mcore.report.collect_compare import Comparison, Sensitivity, read_comparison, read_sensitivity
from flextron_mcore.report.collect_family import Family, read_family
from flextron_mcore.report.collect_routing import ROUTING_STAGES, Routing, read_routing
from flextron_mcore.report.reader import (
    Reader,
    Settings,
    is_number,
    read_json,
    read_lines,
    read_model,
    read_settings,
    read_subnetwork,
)
from flextron_mcore.space import SubNetwork, count_parameters

STAGES = (
    "prepare",
    "pretrain",
    "import",
    "importance",
    "elastic",
    *ROUTING_STAGES,
    "sensitivity",
    "evaluate",
    "compare",
    "family",
    "export",
)
TRAINING_STAGES = ("pretrain", "elastic", *ROUTING_STAGES)
BEFORE_WORDS = ("parent", "before")


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
    """One directory of a training stage. `seconds` of wall time; losses in nats per token.

    train: (step, loss of the full model, losses of the sampled sub-networks); validation: (step, loss of each network).
    first, last: first and last validation loss of each network. routing: of ROUTING_STAGES, what trained the routers.
    """

    label: str
    kind: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    train: list[tuple[int, float, list[float]]]
    validation: list[tuple[int, dict[str, float]]]
    first: dict[str, float]
    last: dict[str, float]
    settings: Settings
    routing: Routing | None = None

    @property
    def first_loss(self) -> float | None:
        """The full model's first validation loss, None where it was not validated."""
        return self.first.get("full")

    @property
    def last_loss(self) -> float | None:
        """The full model's last validation loss, None where it was not validated."""
        return self.last.get("full")


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
        """Plain types, as in the metrics.json it was read from; hidden size and executed layers on top."""
        values = {**self.__dict__, "subnetwork": self.subnetwork.to_dict()}
        values["mean"] = {"loss": values.pop("mean_loss"), "perplexity": values.pop("mean_perplexity")}
        values["hidden_size"], values["depth"] = self.subnetwork.hidden_size, self.depth
        return values

    @property
    def depth(self) -> int:
        """Executed layers."""
        return sum(layer.executed for layer in self.subnetwork.layers)


@dataclass(frozen=True)
class Series:
    """One `evaluate` directory: the networks, largest first."""

    label: str
    model: ModelConfig
    networks: list[Network]
    settings: Settings

    def share(self, net: Network) -> float:
        """The network's parameters as a fraction of the full model's."""
        return net.parameters / count_parameters(self.model)

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
    mixes: list[EvaluatedMix] = field(default_factory=list)
    exports: list[Export] = field(default_factory=list)
    imported: list[Settings] = field(default_factory=list)
    sensitivities: list[Sensitivity] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    families: list[Family] = field(default_factory=list)

    def routed(self) -> list[Training]:
        """The training stages that trained routers."""
        return [training for training in self.training if training.routing]

    def before(self) -> Series | None:
        """The evaluation before elastic training: the first whose directory name says so, where another one does not."""
        marked = [s for s in self.series if _says_before(s.label)]
        return marked[0] if marked and len(marked) < len(self.series) else None

    def family(self) -> Series | None:
        """The evaluation the report is about: `evaluate` if there is one, else the last of those that are not `before`."""
        after = [s for s in self.series if not _says_before(s.label)] or self.series
        return next((s for s in after if s.label == "evaluate"), after[-1] if after else None)

    def settings(self) -> Settings:
        """Model and space: those of the family, else of the latest training stage, else of the import or the analyses."""
        family = self.family()
        found = [family.settings] if family else []
        found += [training.settings for training in reversed(self.training)] + self.imported
        found += [stage.settings for stage in (*self.comparisons, *self.sensitivities)]
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
            metrics = Reader(read_json(path), str(path))
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
        elif kind in TRAINING_STAGES:
            result.training.append(_training(label, kind, metrics, directory / "log.jsonl"))
        elif kind == "import":
            result.imported.append(read_settings(metrics))
        elif kind == "importance":
            result.ablations.append(_ablation(label, metrics))
        elif kind == "evaluate":
            mix = read_evaluated(label, metrics)
            result.mixes.extend([mix] if mix else [])
            result.series.extend([] if mix else [_series(label, metrics)])
        elif kind == "sensitivity":
            result.sensitivities.append(read_sensitivity(label, metrics))
        elif kind == "compare":
            result.comparisons.append(read_comparison(label, metrics))
        elif kind == "family":
            result.families.append(read_family(label, metrics))
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
    train: dict[int, Reader] = {}
    validation: dict[int, tuple[int, dict[str, float]]] = {}
    for row in read_lines(log) if log.is_file() else ():
        event = row.values.get("event")
        if event == "train":
            train[row.whole("step")] = row
        elif event == "validation":
            validation[row.whole("step")] = (row.whole("step"), row.numbers("losses"))
    rows = [train[step] for step in sorted(train)]
    logged = [validation[step] for step in sorted(validation)]
    return Training(
        label,
        kind,
        metrics.whole("steps"),
        metrics.whole("tokens"),
        metrics.number("seconds"),
        metrics.number("tokens_per_second"),
        [_train_row(row) for row in rows],
        logged,
        _validation_end(metrics, "first", logged),
        _validation_end(metrics, "last", logged[::-1]),
        read_settings(metrics),
        read_routing(metrics, rows) if kind in ROUTING_STAGES else None,
    )


def _train_row(row: Reader) -> tuple[int, float, list[float]]:
    losses = row.number_list("subnetwork_losses") if row.has("subnetwork_losses") else []
    return row.whole("step"), row.number("loss"), losses


def _validation_end(metrics: Reader, end: str, logged: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The `first` or `last` validation loss of each network: from metrics.json, else from the log, which begins at that end."""
    given = metrics.values.get("validation")
    row = given.get(end) if isinstance(given, Mapping) else None
    losses = row.get("losses", row) if isinstance(row, Mapping) else None
    found = {name: float(value) for name, value in losses.items() if is_number(value)} if isinstance(losses, Mapping) else {}
    for _, values in logged:
        found = {**values, **found}
    return found


def _ablation(label: str, metrics: Reader) -> Ablation:
    rows = [
        AblationRow(r.text("setup"), r.text("order"), r.text("score"), r.number("loss"), r.number("perplexity"))
        for r in metrics.rows("ablation")
    ]
    return Ablation(label, metrics.whole("samples"), metrics.text("score"), rows)


def _series(label: str, metrics: Reader) -> Series:
    model, networks = read_model(metrics), []
    for row in metrics.rows("networks"):
        subnetwork = read_subnetwork(row, model)
        sizes = [row.whole(k) for k in ("parameters", "non_embedding_parameters", "weight_bytes", "kv_cache_bytes")]
        mean = row.inner("mean")
        losses = row.numbers("loss"), row.numbers("perplexity"), mean.number("loss"), mean.number("perplexity")
        networks.append(Network(row.text("name"), subnetwork, *sizes, *losses))
    if not networks:
        raise FlextronError(f"{metrics.where}: 'networks' is empty")
    return Series(label, model, sorted(networks, key=lambda net: -net.parameters), read_settings(metrics))


def _export(label: str, metrics: Reader, run: Path) -> Export:
    path = Path(metrics.text("path"))
    if path.is_absolute() and path.is_relative_to(run.resolve()):
        path = path.relative_to(run.resolve())
    return Export(
        label,
        metrics.text("format"),
        metrics.text("architecture"),
        metrics.whole("parameters"),
        metrics.whole("bytes"),
        str(path),
        metrics.maybe("max_logit_difference"),
    )


def _says_before(label: str) -> bool:
    return any(word in label.lower() for word in BEFORE_WORDS)
