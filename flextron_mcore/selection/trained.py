"""Selector of the routers in a checkpoint. A file of its own, because reading routers imports torch and router.py does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Cost
from flextron_mcore.routers.static import log_probabilities
from flextron_mcore.routers.store import read_routers
from flextron_mcore.selection.router import RouterSelector


def trained_selector(folder: Path, choices: Choices, costs: Mapping[str, Cost]) -> RouterSelector:
    """Read the routers of a checkpoint as a selector.

    Raises FlextronError for a checkpoint without routers, and if a cost that they were trained for is missing in `costs`.

    Args:
        folder: directory of the checkpoint.
        choices: choices of the layers, without `all_axes`; the kind of the routers tells if hidden size and depth are choices.
        costs: {name: cost} that are available.
    """
    routers, weights = read_routers(folder, choices)
    if missing := [name for name in routers.costs if name not in costs]:
        raise FlextronError(
            f"checkpoint={folder}: its routers were trained for {missing[0]}: give {missing[0]}=DIR, the directory of a "
            f"`flextron {missing[0]}` run"
        )
    ranges = dict(zip(routers.costs, routers.ranges, strict=True))
    trained = {name: costs[name] for name in routers.costs}
    choices = routers.choices(choices)
    return RouterSelector(choices, trained, log_probabilities(weights), ranges, routers.losses(choices))
