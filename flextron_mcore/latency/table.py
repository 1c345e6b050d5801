"""Latency table of a device: milliseconds of every candidate of every kind of block (for Flextron, eq. 6 and 8). No torch import.

The latency of a network is the sum over its blocks plus a constant (embedding, final norm, output layer), all for its hidden
size. A table is stored as readable JSON.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flextron_mcore.axes import AXES, DEPTH
from flextron_mcore.checkpoint.store import TABLE_FILE, CheckpointInfo
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.cost import Cost
from flextron_mcore.digests import unseal
from flextron_mcore.files import explain, read_json
from flextron_mcore.space import ElasticSpace, SubNetwork

FORMAT_VERSION = 1
STATISTICS = ("minimum", "median")
# Largest relative errors against whole networks, median and 95th percentile, of a table that is trusted.
TRUSTED_MEDIAN, TRUSTED_P95 = 0.03, 0.08


@dataclass(frozen=True)
class Timing:
    """Minimum and median of repeated measurements, in milliseconds."""

    minimum: float
    median: float


@dataclass(frozen=True)
class Timings:
    """Timings for networks of one hidden size.

    Attributes:
        constant: time of all that is not a block (embedding, final norm, output layer).
        candidates: {axis: time of each candidate of a block, smallest first}.
    """

    constant: Timing
    candidates: Mapping[str, tuple[Timing, ...]]

    def costs(self, statistic: str) -> tuple[float, dict[str, tuple[float, ...]]]:
        """(constant, {axis: cost of each candidate}) in milliseconds. statistic: one of STATISTICS (minimum or median)."""
        get = operator.attrgetter(statistic)
        return get(self.constant), {name: tuple(map(get, timings)) for name, timings in self.candidates.items()}


@dataclass(frozen=True)
class LatencyTable:
    """Latency of the candidates of a space, for one workload on one device.

    Attributes:
        model: architecture of the full model.
        space: elastic space.
        setting: workload as plain types (`Setting`), such as {"kind": "prefill", "batch_size": 2, "prompt_length": 4096, ...}.
        machine: device, dtype, versions and load.
        statistic: one of STATISTICS, used by `cost` and `check`.
        timings: {hidden size: timings}.
        check: relative errors of predictions against the measured times of whole networks (`check_errors`); empty without.
        routed: {KV policy: plain types of RoutedTable (adaptive/table.py)}; empty without.
    """

    model: ModelConfig
    space: ElasticSpace
    setting: Mapping[str, Any]
    machine: Mapping[str, Any]
    statistic: str
    timings: Mapping[int, Timings]
    check: Mapping[str, float] = field(default_factory=dict)
    routed: Mapping[str, Any] = field(default_factory=dict)

    def cost(self) -> Cost:
        """Latency of sub-networks as a Cost, in milliseconds."""
        costs = {
            size: Cost("latency", self.model, self.space, *timings.costs(self.statistic))
            for size, timings in self.timings.items()
        }
        return replace(costs.pop(self.model.hidden_size), narrow=tuple(costs.items()))

    def warning(self) -> str | None:
        """Reason not to trust the table's predictions (never checked, or large errors for whole networks); None if they hold."""
        if not self.check:
            return "it was not checked against whole networks"
        median, p95 = self.check["median_error"], self.check["p95_error"]
        if median > TRUSTED_MEDIAN or p95 > TRUSTED_P95:
            return (
                f"its sums are off by {median:.1%} (median) and {p95:.1%} (95th percentile) of whole networks' latency, above "
                f"{TRUSTED_MEDIAN:.0%} and {TRUSTED_P95:.0%}: measure again on an idle machine, or with more rounds"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Table as plain types, a row for every candidate, for latency.json; smaller hidden sizes are in the list `narrow`."""
        narrow = [{"hidden_size": size, **self._rows(size)} for size in self.space.hidden_size[:-1]]
        return {
            "format": FORMAT_VERSION,
            "machine": dict(self.machine),
            "setting": dict(self.setting),
            "statistic": self.statistic,
            "full_model_ms": self.cost().full,
            "smallest_network_ms": self.cost().smallest,
            "check": dict(self.check),
            **self._rows(self.model.hidden_size),
            **({"narrow": narrow} if narrow else {}),
            "routed": dict(self.routed),
            "model": self.model.to_dict(),
            "space": self.space.to_dict(),
        }

    def _rows(self, hidden_size: int) -> dict[str, Any]:
        """Rows of the table for one hidden size: the constant, and for each block a row for every candidate, in milliseconds."""
        timings = self.timings[hidden_size]
        rows: dict[str, Any] = {"constant": _milliseconds(timings.constant)}
        for axis in self.space.layer_axes:
            rows[axis.block] = [
                {
                    **dict(zip(axis.fields, axis.split(self.model, self.space.attention_unit, size), strict=True)),
                    **_milliseconds(t),
                }
                for size, t in zip(self.space.sizes[axis.name], timings.candidates[axis.name], strict=True)
            ]
        return rows

    @classmethod
    def from_file(cls, path: str | Path, model: ModelConfig, space: ElasticSpace) -> LatencyTable:
        """Read a table. Raises FlextronError if it is missing, damaged, of another model, or lacks candidates of `space`.

        Args:
            path: JSON file.
            model: architecture of the full model.
            space: elastic space, which may have fewer candidates than the table.
        """
        try:
            values = unseal(read_json(path, given=True), Path(path))
            if values["format"] != FORMAT_VERSION:
                raise FlextronError(f"{path}: a latency table of format {values['format']}, not {FORMAT_VERSION}: measure again")
            if ModelConfig.from_dict(values["model"]) != model:
                raise FlextronError(f"{path}: is the latency table of another model: measure one with `flextron latency`")
            parts = {model.hidden_size: values, **{part["hidden_size"]: part for part in values.get("narrow", ())}}
            _check_candidates(path, "hidden_size", parts, space.hidden_size)
            statistic = values["statistic"]
            if statistic not in STATISTICS:
                raise FlextronError(f"{path}: statistic {statistic!r} is not known: use one of {', '.join(STATISTICS)}")
            return cls(
                model,
                space,
                values["setting"],
                values["machine"],
                statistic,
                {size: _timings(path, parts[size], space) for size in space.hidden_size},
                values["check"],
                values.get("routed", {}),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FlextronError(
                f"{path}: is not a latency table ({explain(error)}): measure one with `flextron latency`"
            ) from None


def fit(
    model: ModelConfig,
    space: ElasticSpace,
    latencies: Sequence[tuple[SubNetwork, float]],
    setting: Mapping[str, Any],
    machine: Mapping[str, Any],
) -> LatencyTable:
    """Fit a table to measured latencies of whole networks, by least squares.

    Latencies do not determine all entries, so the smallest candidate of each axis is set to 0, and its cost is part of the
    constant. If depth is elastic, the smallest number of heads instead has the cost of a layer. The table's `check` compares it
    with the same latencies. Raises FlextronError if the networks leave an entry undetermined, or one is outside of the space.

    Args:
        model: architecture of the full model.
        space: elastic space.
        latencies: (network, milliseconds) pairs.
        setting: workload, as plain types.
        machine: description of the device.
    """
    first = space.layer_axes[0]
    fitted = {axis.name: space.sizes[axis.name][1:] for axis in space.layer_axes}
    if space.elastic(DEPTH):
        fitted[first.name] = space.sizes[first.name]
    entries = ["the constant", *(f"{size} {AXES[name].unit}" for name, sizes in fitted.items() for size in sizes)]
    rows = np.zeros((len(latencies), len(space.hidden_size), len(entries)))
    for row, (net, _) in zip(rows, latencies, strict=True):
        space.check(model, net)
        has = [[AXES[name].size(layer) for layer in net.executed_layers].count(size) for name in fitted for size in fitted[name]]
        row[space.hidden_size.index(net.hidden_size)] = [1.0, *has]
    matrix = rows.reshape(len(latencies), -1)
    if np.linalg.matrix_rank(matrix) < matrix.shape[1]:
        sizes = f" at each of the hidden sizes {list(space.hidden_size)}" if len(space.hidden_size) > 1 else ""
        raise FlextronError(
            f"{len(latencies)} measured networks do not determine the {matrix.shape[1]} entries of the table "
            f"({', '.join(entries)}{sizes}): measure more, with different widths in their layers"
        )
    found, *_ = np.linalg.lstsq(matrix, np.array([milliseconds for _, milliseconds in latencies]), rcond=None)
    timings = {}
    for size, part in zip(space.hidden_size, found.reshape(len(space.hidden_size), -1).tolist(), strict=True):
        constant, *rest = (Timing(value, value) for value in part)
        found_of = dict(zip(((name, size) for name in fitted for size in fitted[name]), rest, strict=True))
        candidates = {name: tuple(found_of.get((name, size), Timing(0.0, 0.0)) for size in space.sizes[name]) for name in fitted}
        timings[size] = Timings(constant, candidates)
    table = LatencyTable(model, space, setting, machine, "median", timings)
    return replace(table, check=check_errors(table.cost(), latencies))


def check_errors(cost: Cost, latencies: Sequence[tuple[SubNetwork, float]]) -> dict[str, float]:
    """Errors |cost - measured| / measured of whole networks: {networks: number, median_error, p95_error, largest_error}.

    Args:
        cost: latency cost in ms.
        latencies: (network, measured milliseconds) pairs.
    """
    errors = np.array([abs(cost.of(net) - value) / value for net, value in latencies])
    return {
        "networks": len(latencies),
        "median_error": float(np.median(errors)),
        "p95_error": float(np.percentile(errors, 95)),
        "largest_error": float(errors.max()),
    }


def _timings(path: str | Path, part: Mapping[str, Any], space: ElasticSpace) -> Timings:
    """Timings of one hidden size from its rows in a table's file. Raises FlextronError if a candidate of `space` is missing."""
    candidates = {}
    for axis in space.layer_axes:
        known = {math.prod(row[name] for name in axis.fields): _timing(row) for row in part[axis.block]}
        _check_candidates(path, axis.name, known, space.sizes[axis.name])
        candidates[axis.name] = tuple(known[size] for size in space.sizes[axis.name])
    return Timings(_timing(part["constant"]), candidates)


def _check_candidates(path: str | Path, axis: str, known: Mapping[int, Any], wanted: Sequence[int]) -> None:
    """Raise FlextronError if one of the `wanted` candidates of an axis is not in `known`, the candidates of a table."""
    if missing := [size for size in wanted if size not in known]:
        raise FlextronError(
            f"{path}: lacks the candidates {missing} of space.{axis}: measure a table of this checkpoint with `flextron latency`"
        )


def _milliseconds(timing: Timing) -> dict[str, float]:
    """Timing as plain types: {minimum_ms, median_ms}."""
    return {f"{name}_ms": value for name, value in asdict(timing).items()}


def _timing(row: Mapping[str, Any]) -> Timing:
    """Timing from plain types, {minimum_ms, median_ms}. Raises ValueError for a number that is not finite."""
    values = [float(row[f"{name}_ms"]) for name in STATISTICS]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"a latency of {values} ms")
    return Timing(*values)


def open_table(info: CheckpointInfo, latency: str | None) -> LatencyTable | None:
    """Open a latency table for a checkpoint; None if `latency` is None and the checkpoint has no table.

    Raises FlextronError if the table is missing, damaged, of another model, or lacks candidates of the checkpoint's space.

    Args:
        info: opened checkpoint.
        latency: file, or directory of `flextron latency`; None for latency.json in the checkpoint, where it lies beside routers.
    """
    if not latency and (info.path is None or not (info.path / TABLE_FILE).is_file()):
        return None
    file = Path(latency or info.path)
    return LatencyTable.from_file(file / TABLE_FILE if file.is_dir() else file, info.model, info.space)
