"""The network that a stage is to take: costs, budgets, selectors. For select, evaluate, export, compare and router."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.cost import Budget, Cost, memory_cost, parameter_cost, parse_budget
from flextron_mcore.latency.measure import device_name
from flextron_mcore.latency.table import LatencyTable, open_table
from flextron_mcore.runs.opened import check_widths_only
from flextron_mcore.runs.terminal import say
from flextron_mcore.selection import selectors
from flextron_mcore.selection.selectors import Selector
from flextron_mcore.selection.trained import trained_selector
from flextron_mcore.settings.sections import ALL_SELECTORS
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.space import ElasticSpace, SubNetwork

Losses = Callable[[Sequence[SubNetwork]], Sequence[float]]


def latency_table(settings: StageSettings, info: CheckpointInfo) -> LatencyTable | None:
    """The table of settings.latency, or else the one beside the routers, if any."""
    return open_table(info, settings.latency)


def check_table(table: LatencyTable | None) -> None:
    """Say what speaks against a table: its own errors, or that it was measured elsewhere."""
    if table is None:
        return
    if warning := table.warning():
        say(f"warning: do not trust the latency table: {warning}")
    if (where := table.machine.get("device")) != (here := device_name()):
        say(f"warning: the latency table is of another device: {where}; this one is {here}")


def available_costs(settings: StageSettings, info: CheckpointInfo, table: LatencyTable | None) -> dict[str, Cost]:
    """{name: Cost}: the latency where there is a table, parameters, memory as settings.kv_cache and settings.dtype count it."""
    memory = memory_setting(settings, info)
    costs = {"latency": table.cost()} if table else {}
    costs["parameters"] = parameter_cost(info.model, info.space)
    costs["memory"] = memory_cost(info.model, info.space, **memory)
    return costs


def memory_setting(settings: StageSettings, info: CheckpointInfo) -> dict[str, Any]:
    """Data type and KV cache that a memory cost counts: {"dtype", "batch_size", "length"}."""
    trainer = getattr(settings, "trainer", None)
    dtype = getattr(settings, "dtype", None) or getattr(trainer, "precision", None) or info.dtype
    kv = settings.kv_cache
    length = kv.length or info.model.max_position_embeddings
    return {"dtype": dtype, "batch_size": kv.batch_size, "length": length}


def budgets(wanted: float | str | Sequence, costs: dict[str, Cost]) -> list[Budget]:
    """The parts of a budget as the user gives it, which hold together."""
    found = parse_budget(wanted, costs)
    if not found:
        raise FlextronError("budget: is empty; give one such as 0.6, 25ms, 3.4B or 8GiB")
    return found


def selector(settings: StageSettings, info: CheckpointInfo, name: str, losses: Losses | None = None) -> Selector:
    """The selector `name`. losses: evaluates networks, for `random`. Raises FlextronError where it lacks what it needs."""
    choices = Choices(info.model, info.space)
    if name == "router":
        return _router_selector(settings, info, choices)
    if name == "uniform":
        return selectors.Uniform(choices)
    if name == "matformer":
        return selectors.MatFormer(choices)
    if name == "sensitivity":
        check_widths_only(info, "selector=sensitivity")
        return selectors.Sensitivity(choices, _degradations(settings, choices))
    if name == "random":
        if losses is None:
            raise FlextronError("selector=random: evaluates networks: give data=")
        return selectors.Random(choices, settings.random_networks, settings.seed, losses)
    raise FlextronError(f"selector={name!r} is not known: use one of {', '.join(ALL_SELECTORS)}")


def select(
    settings: StageSettings, info: CheckpointInfo, losses: Losses | None = None, budget: float | str | Sequence | None = None
) -> tuple[SubNetwork, list[Budget]]:
    """The network of settings.selector for `budget`, by default settings.budget, and that budget, parsed.

    The same on every rank, which decides for itself.
    """
    table = latency_table(settings, info)
    costs = available_costs(settings, info, table)
    check_table(table)
    wanted = budgets(settings.budget if budget is None else budget, costs)
    picks = selector(settings, info, settings.selector, losses)
    for budget in wanted:
        if settings.selector == "router" and (trained := picks.untrained(budget)):
            low, high = trained
            say(f"warning: {budget} is outside of what the routers were trained for, {low:.3g} to {high:.3g} of the full model")
    return picks.select(wanted), wanted


@dataclass(frozen=True)
class Chosen:
    """A network of a checkpoint. origin: how it was chosen, in words. budgets: those that it was chosen for."""

    network: SubNetwork
    origin: str
    budgets: Sequence[Budget] = ()


def chosen_network(settings: StageSettings, info: CheckpointInfo) -> Chosen:
    """Network for settings.budget, or of the file settings.subnetwork, or the full one. Raises FlextronError for both keys."""
    if settings.budget is not None:
        if settings.subnetwork is not None:
            raise FlextronError("subnetwork= and budget= are two ways to say which network: give one")
        net, wanted = select(settings, info)
        return Chosen(net, f"selector {settings.selector} for {' and '.join(map(str, wanted))}", wanted)
    if settings.subnetwork is not None:
        return Chosen(info.network(settings.subnetwork), f"the sub-network in {Path(settings.subnetwork).name}")
    return Chosen(SubNetwork.full(info.model), "the full model")


def _router_selector(settings: StageSettings, info: CheckpointInfo, choices: Choices) -> Selector:
    return trained_selector(info.path, choices, available_costs(settings, info, latency_table(settings, info)))


def _degradations(settings: StageSettings, choices: Choices) -> np.ndarray:
    """[blocks, candidates] from the metrics.json of `flextron sensitivity`."""
    if not settings.sensitivity:
        raise FlextronError("selector=sensitivity: give sensitivity=, the directory that `flextron sensitivity` wrote")
    file = Path(settings.sensitivity)
    file = file / "metrics.json" if file.is_dir() else file
    table = np.full(choices.exists_NK.shape, np.nan)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        model = ModelConfig.from_dict(values["model"])
        if model != choices.model or ElasticSpace.from_dict(model, values["space"]) != choices.space:
            raise FlextronError(f"{file}: is of another model or space: measure it with `flextron sensitivity`")
        for row in values["blocks"]:
            block = choices.blocks.index((row["layer"], row["axis"]))
            table[block, choices.sizes[block].index(row["size"])] = float(row["degradation"])
    except FlextronError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FlextronError(f"{file}: is not what `flextron sensitivity` writes ({type(error).__name__}: {error})") from None
    for block, sizes in enumerate(choices.sizes):
        table[block, len(sizes) - 1] = 0.0
    if missing := np.argwhere(np.isnan(table) & choices.exists_NK).tolist():
        raise FlextronError(f"{file}: lacks candidate {missing[0][1]} of block {missing[0][0]}: measure it again")
    return np.nan_to_num(table)
