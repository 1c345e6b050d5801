"""Routers in a checkpoint's directory: routers.safetensors, their description routers.json, and the latency table.

The files do not depend on the parallel layout of the run that wrote them.
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
from flextron_mcore.digests import read_description, seal
from flextron_mcore.files import check_file, explain, read_json
from flextron_mcore.routers.static import StaticRouters
from flextron_mcore.space import SubNetwork

ROUTERS_FILE, WEIGHTS_FILE = "routers.json", "routers.safetensors"
STATE_FILE = "router_training.pt"  # state of the routers' training: optimizers and more
FORMAT_VERSION = 1
KINDS = ("static", "gumbel", "adaptive")  # adaptive routers are read by adaptive/store.py


@dataclass(frozen=True)
class RouterInfo:
    """Description of trained routers.

    Attributes:
        costs: names of the costs that the routers were trained for.
        ranges: (least, largest) budget of the training for each cost, as shares of the full model's cost.
        hidden_size: hidden units of a router.
        memory: dtype and KV cache that a memory cost counts: {"dtype", "batch_size", "length"}.
        kind: `static`: routers choose the widths of the layers. `gumbel`: the sizes of all axes. `adaptive`: a candidate of each
            block for every token (adaptive/store.py).
        evaluated: (candidate index of each choice, loss in nats per token) of networks whose loss was evaluated.
        uniform: True if all layers share their choices; only for gumbel.
    """

    costs: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]
    hidden_size: int
    memory: Mapping[str, Any]
    kind: str = "static"
    evaluated: tuple[tuple[tuple[int, ...], float], ...] = ()
    uniform: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, the content of routers.json."""
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
        """Build from the plain types of `to_dict`. Raises KeyError, TypeError or ValueError for others."""
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
        """Choices that the routers make: `widths`, or for kind gumbel the choices of all axes of the same space.

        widths: choices of the layers.
        """
        return replace(widths, all_axes=True, uniform=self.uniform) if self.kind == "gumbel" else widths

    def losses(self, widths: Choices) -> dict[SubNetwork, float]:
        """{network: loss in nats per token} of the networks whose loss was evaluated. widths: choices of the layers."""
        choices = self.choices(widths)
        return {choices.network(indices): loss for indices, loss in self.evaluated}


def write_routers(folder: Path, info: RouterInfo, routers: torch.nn.Module, table: Mapping[str, Any] | None) -> None:
    """Write routers into a checkpoint's directory.

    Args:
        folder: directory of the checkpoint.
        info: description of the routers.
        routers: module whose state is written.
        table: latency table of the training, as plain types; None without.
    """
    save_file({name: tensor.detach().contiguous() for name, tensor in routers.state_dict().items()}, folder / WEIGHTS_FILE)
    (folder / ROUTERS_FILE).write_text(json.dumps(info.to_dict(), indent=1) + "\n", encoding="utf-8")
    if table is not None:
        (folder / TABLE_FILE).write_text(json.dumps(seal(table), indent=1) + "\n", encoding="utf-8")


def read_routers(folder: Path, choices: Choices) -> tuple[RouterInfo, StaticRouters]:
    """Read a checkpoint's routers of kind static or gumbel; of adaptive routers, the static routers that they started from.

    Raises FlextronError if there are no routers or they are damaged.

    Args:
        folder: directory of the checkpoint.
        choices: choices of the layers (without `all_axes`).
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
    """Context with (content of routers.json, {name: tensor of routers.safetensors}) of a checkpoint's directory.

    Raises FlextronError if there are no routers or they are damaged. Errors in the body of the `with` count as damage, too.
    """
    file = folder / ROUTERS_FILE
    if not file.is_file():
        raise FlextronError(f"checkpoint={folder}: has no routers: train them with `flextron router`, or choose another selector")
    try:
        values = read_json(file)
        if values["format"] != FORMAT_VERSION or values["kind"] not in KINDS:
            raise FlextronError(
                f"{file}: routers of format {values['format']}, kind {values['kind']!r} are not known here: known are format "
                f"{FORMAT_VERSION}, kinds {', '.join(KINDS)}"
            )
        check_file(folder / WEIGHTS_FILE)
        yield values, load_file(folder / WEIGHTS_FILE)
    except FlextronError:
        raise
    except Exception as error:  # includes safetensors' own error classes
        raise FlextronError(
            f"{file}: the routers cannot be read ({explain(error)}): use another checkpoint, or train "
            "them again with `flextron router`"
        ) from None


def static_part(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{name: tensor} of the static routers, which adaptive routers store as `static.name`."""
    return {name.removeprefix("static."): tensor for name, tensor in weights.items() if name.startswith("static.")}


def kind_of_routers(folder: Path) -> str | None:
    """Kind of a checkpoint's routers as routers.json gives it, unchecked (KINDS); None without a readable routers.json."""
    try:
        return str(read_json(folder / ROUTERS_FILE)["kind"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def check_same_table(folder: Path, table: Mapping[str, Any] | None) -> None:
    """Raise FlextronError if the checkpoint in `folder` was written with another latency table than `table`, or is damaged.

    table: table as plain types; None: without a table.
    """
    file = folder / TABLE_FILE
    before = read_description(file) if file.is_file() else None
    if before != json.loads(json.dumps(table)):
        raise FlextronError(f"{folder}: holds a run with another latency table: choose another out, or overwrite=true")


def save_state(file: Path, **parts: Any) -> None:
    """Write the state of a router training: state dicts of modules and optimizers, and plain values."""
    torch.save({name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}, file)


def load_state(file: Path) -> dict[str, Any]:
    """Read the state that `save_state` wrote; nothing in the file is executed. Raises FlextronError for a damaged file."""
    try:
        check_file(file)
        return torch.load(file, weights_only=True)
    except Exception as error:
        raise FlextronError(
            f"{file}: cannot be resumed from ({explain(error)}): remove its directory to continue from an earlier checkpoint"
        ) from None
