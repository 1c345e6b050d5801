"""Routers in a checkpoint's directory: routers.safetensors, routers.json that says what they are, and the latency table.

They do not depend on the layout of the run that wrote them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file

from flextron_mcore.checkpoint.store import TABLE_FILE
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.routers.static import StaticRouters
from flextron_mcore.runtime.disk import first_line
from flextron_mcore.space import SubNetwork

ROUTERS_FILE, WEIGHTS_FILE = "routers.json", "routers.safetensors"
STATE_FILE = "router_training.pt"  # what continues their training
FORMAT_VERSION = 1
KINDS = ("static", "gumbel", "adaptive")  # adaptive routers are read by adaptive/store.py


@dataclass(frozen=True)
class RouterInfo:
    """Description of trained routers.

    costs: names of the costs that they were trained for. ranges: for each the least and largest target, as shares of the full
    model's. memory: what a memory cost counts, {"dtype", "batch_size", "length"}. kind: static, or gumbel: over all axes, with
    one choice for all layers if `uniform`; other kinds have a class of their own. evaluated: (candidates of the choices, loss)
    of evaluated networks that static routers may choose.
    """

    costs: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]
    hidden_size: int
    memory: Mapping[str, Any]
    kind: str = "static"
    evaluated: tuple[tuple[tuple[int, ...], float], ...] = ()
    uniform: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for routers.json."""
        return {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "costs": list(self.costs),
            "ranges": [list(pair) for pair in self.ranges],
            "hidden_size": self.hidden_size,
            "memory": dict(self.memory),
            "evaluated": [[list(indices), loss] for indices, loss in self.evaluated],
            "uniform": self.uniform,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The reverse of `to_dict`."""
        return cls(
            tuple(values["costs"]),
            tuple((float(low), float(high)) for low, high in values["ranges"]),
            values["hidden_size"],
            values["memory"],
            values["kind"],
            tuple((tuple(indices), float(loss)) for indices, loss in values.get("evaluated", ())),
            bool(values.get("uniform", False)),
        )

    def choices(self, widths: Choices) -> Choices:
        """Choices that the routers make: `widths`, or those of all axes in the same space."""
        return replace(widths, all_axes=True, uniform=self.uniform) if self.kind == "gumbel" else widths

    def losses(self, widths: Choices) -> dict[SubNetwork, float]:
        """`evaluated`, by network."""
        choices = self.choices(widths)
        return {choices.network(indices): loss for indices, loss in self.evaluated}


def write_routers(folder: Path, info: RouterInfo, routers: torch.nn.Module, table: Mapping[str, Any] | None) -> None:
    """Write the routers' files into a checkpoint's directory. table: of the latencies they were trained with, as plain types."""
    save_file({name: tensor.detach().contiguous() for name, tensor in routers.state_dict().items()}, folder / WEIGHTS_FILE)
    (folder / ROUTERS_FILE).write_text(json.dumps(info.to_dict(), indent=1) + "\n", encoding="utf-8")
    if table is not None:
        (folder / TABLE_FILE).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def read_routers(folder: Path, choices: Choices) -> tuple[RouterInfo, StaticRouters]:
    """Routers of the checkpoint in `folder` that choose a network; of another kind those that they started from.

    Raises FlextronError where it has none or they cannot be read.
    """
    with opened_routers(folder) as (values, weights):
        if values["kind"] not in ("static", "gumbel"):
            weights = static_part(weights)
            values = {**values, "kind": "static", "hidden_size": weights["shift_NU"].shape[-1]}
        info = RouterInfo.from_dict(values)
        routers = StaticRouters(info.choices(choices), len(info.costs), info.hidden_size)
        routers.load_state_dict(weights)
    return info, routers


@contextlib.contextmanager
def opened_routers(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """routers.json and routers.safetensors of a checkpoint. Raises FlextronError where they, or the block, cannot read them."""
    file = folder / ROUTERS_FILE
    if not file.is_file():
        raise FlextronError(
            f"checkpoint={folder}: has no routers: train them with `flextron router`, or choose another selector (selector=...)"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT_VERSION or values["kind"] not in KINDS:
            raise FlextronError(f"{file}: routers of format {values['format']}, kind {values['kind']!r} are not known here")
        yield values, load_file(folder / WEIGHTS_FILE)
    except FlextronError:
        raise
    except Exception as error:  # safetensors has errors of its own
        raise FlextronError(f"{file}: the routers cannot be read ({type(error).__name__}: {first_line(error)})") from None


def static_part(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the static routers that others started from."""
    return {name.removeprefix("static."): tensor for name, tensor in weights.items() if name.startswith("static.")}


def kind_of_routers(folder: Path) -> str | None:
    """One of KINDS, or None where there are none that can be read."""
    try:
        return str(json.loads((folder / ROUTERS_FILE).read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def check_same_table(folder: Path, table: Mapping[str, Any] | None) -> None:
    """Raise FlextronError where the checkpoint in `folder` was written with another latency table."""
    file = folder / TABLE_FILE
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if before != json.loads(json.dumps(table)):
        raise FlextronError(f"{folder}: holds a run with another latency table: choose another out, or overwrite=true")


def save_state(file: Path, **parts: Any) -> None:
    """Write the state that a router run continues from: of modules and optimizers, and plain values."""
    torch.save({name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}, file)


def load_state(file: Path) -> dict[str, Any]:
    """Read the state that `save_state` wrote. Raises FlextronError for a file that cannot be read."""
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:
        raise FlextronError(f"{file}: cannot be resumed from ({type(error).__name__})") from None
