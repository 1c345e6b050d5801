"""Choice of a sub-network from a stage's settings: costs, budgets, selectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.cost import Budget, Cost, memory_cost, parameter_cost, parse_budget, show
from flextron_mcore.digests import check_file
from flextron_mcore.files import explain, read_json
from flextron_mcore.latency.measure import device_name
from flextron_mcore.latency.table import LatencyTable, open_table
from flextron_mcore.runs.opened import check_widths_only
from flextron_mcore.runs.terminal import warn
from flextron_mcore.selection import selectors
from flextron_mcore.selection.selectors import Selector
from flextron_mcore.selection.trained import trained_selector
from flextron_mcore.settings.sections import ALL_SELECTORS
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.space import ElasticSpace, SubNetwork

Losses = Callable[[Sequence[SubNetwork]], Sequence[float]]


def latency_table(settings: StageSettings, info: CheckpointInfo) -> LatencyTable | None:
    """Latency table that settings.latency names, else the one stored with the checkpoint's routers; None without either.

    Raises FlextronError for a table that is missing, damaged, or of another model or space.
    """
    return open_table(info, settings.latency)


def check_table(table: LatencyTable | None) -> None:
    """Print a warning if a latency table predicts networks badly, and if it was measured on another device than this one."""
    if table is None:
        return
    if warning := table.warning():
        warn(f"do not trust the latency table: {warning}")
    if (where := table.machine.get("device")) != (here := device_name()):
        warn(f"the latency table is of another device: {where}; this one is {here}")


def available_costs(settings: StageSettings, info: CheckpointInfo, table: LatencyTable | None) -> dict[str, Cost]:
    """{name: cost} of the costs that budgets can limit: `latency` (if there is a table), `parameters` and `memory`.

    Args:
        settings: settings of the stage, which give the KV cache and the precision that `memory` counts (`memory_setting`).
        info: checkpoint whose networks have the costs.
        table: latency table; None: no cost `latency`.
    """
    memory = memory_setting(settings, info)
    costs = {"latency": table.cost()} if table else {}
    costs["parameters"] = parameter_cost(info.model, info.space)
    costs["memory"] = memory_cost(info.model, info.space, **memory)
    return costs


def memory_setting(settings: StageSettings, info: CheckpointInfo) -> dict[str, Any]:
    """Keyword arguments of `memory_cost`: `dtype` of weights and KV cache, `batch_size` and `length` (tokens) of the KV cache.

    `dtype` is the key dtype, else trainer.precision, else the checkpoint's. Without kv_cache.length it is the model's default.
    """
    trainer = getattr(settings, "trainer", None)
    dtype = getattr(settings, "dtype", None) or getattr(trainer, "precision", None) or info.dtype
    kv = settings.kv_cache
    length = kv.length or info.model.default_length
    return {"dtype": dtype, "batch_size": kv.batch_size, "length": length}


def cost_label(name: str, settings: StageSettings, info: CheckpointInfo) -> str:
    """Heading of a cost in a table: its name, for `memory` followed by size and precision of the KV cache that it counts.

    Args:
        name: name of the cost.
        settings: settings of the stage, which give the KV cache and the precision (`memory_setting`).
        info: checkpoint, which gives length and precision where the settings have none.
    """
    if name != "memory":
        return name
    counted = memory_setting(settings, info)
    return "memory: weights and KV cache of {batch_size} x {length} tokens in {dtype}".format(**counted)


def budgets(wanted: float | str | Sequence, costs: dict[str, Cost]) -> list[Budget]:
    """Parse budgets as a user types them (`0.6`, `25ms`, a list): one network must meet all of them.

    Raises FlextronError for an empty list, and for a budget that cannot be parsed, is of a cost that is not in `costs`, or is
    below the cost of every network. costs: {name: cost}.
    """
    found = parse_budget(wanted, costs)
    if not found:
        raise FlextronError("budget: is empty; give one such as 0.6, 25ms, 3.4B or 8GiB")
    return found


def selector(settings: StageSettings, info: CheckpointInfo, name: str, losses: Losses | None = None) -> Selector:
    """Make the selector of a name: an object whose `select` chooses a network for budgets.

    Args:
        settings: settings of the stage. `latency`, `sensitivity`, `random_networks` and `seed` are read if the selector needs
            them.
        info: checkpoint from whose elastic space the networks are chosen.
        name: one of ALL_SELECTORS.
        losses: function from a list of networks to the loss of each in nats per token; needed by `random` only.

    Raises:
        FlextronError: the name is unknown, or what the selector needs is missing or damaged: trained routers, `losses`, or the
            result of `flextron sensitivity`.
    """
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
            if settings.stage == "select":
                raise FlextronError("selector=random: evaluates networks on data: give data=, which `flextron prepare` wrote")
            raise FlextronError(
                "selector=random: evaluates networks on data, which this stage does not read: write a network with "
                "`flextron select selector=random`, and give that file as subnetwork="
            )
        return selectors.Random(choices, settings.random_networks, settings.seed, losses)
    raise FlextronError(f"selector={name!r} is not known: use one of {', '.join(ALL_SELECTORS)}")


def select(
    settings: StageSettings, info: CheckpointInfo, losses: Losses | None = None, budget: float | str | Sequence | None = None
) -> tuple[SubNetwork, list[Budget]]:
    """Choose a network for a budget with the selector that settings.selector names.

    Deterministic: every rank finds the same network without communication. Prints warnings about a doubtful latency table, a
    budget above the full model's cost, and a budget outside of the range that the routers were trained for.

    Args:
        settings: settings of the stage.
        info: checkpoint from whose elastic space the network is chosen.
        losses: function from a list of networks to the loss of each in nats per token; needed by selector `random` only.
        budget: budget as a user types it; None: settings.budget.

    Returns:
        The network, and the parsed budgets, all of which it meets. If each of them is above the full model's cost, the network is
        the full model, and no selector runs.

    Raises:
        FlextronError: a budget or the selector cannot be used, or no network meets all budgets together.
    """
    table = latency_table(settings, info)
    costs = available_costs(settings, info, table)
    check_table(table)
    wanted = budgets(settings.budget if budget is None else budget, costs)
    for each in wanted:
        if each.asked is not None:
            name, full = each.cost.name, show(each.cost.name, each.cost.full)
            warn(f"budget {name} <= {show(name, each.asked)} allows the full model, whose {name} is {full}")
    if all(each.asked is not None for each in wanted):
        return SubNetwork.full(info.model), wanted
    picks = selector(settings, info, settings.selector, losses)
    for budget in wanted:
        if settings.selector == "router" and (trained := picks.untrained(budget)):
            low, high = trained
            warn(f"{budget} is outside the range that the routers were trained for, {low:.3g} to {high:.3g} of the full model")
    return picks.select(wanted), wanted


@dataclass(frozen=True)
class Chosen:
    """Network that a stage exports or runs, and how it was chosen.

    Attributes:
        network: the network.
        origin: how it was chosen, in words for a model card, such as "selector router for latency <= 25 ms".
        budgets: budgets that it was chosen for; empty for the full model and for a network from a file.
    """

    network: SubNetwork
    origin: str
    budgets: Sequence[Budget] = ()


def chosen_network(settings: StageSettings, info: CheckpointInfo) -> Chosen:
    """Network that a stage is to take: chosen for settings.budget, read from the file settings.subnetwork, or the full model.

    Raises FlextronError if both keys are set, if no network meets the budget, and for a file of another space or model.
    """
    if settings.budget is not None:
        if settings.subnetwork is not None:
            raise FlextronError("subnetwork= and budget= are two ways to say which network to take: give only one")
        net, wanted = select(settings, info)
        return Chosen(net, f"selector {settings.selector} for {' and '.join(map(str, wanted))}", wanted)
    if settings.subnetwork is not None:
        return Chosen(info.network(settings.subnetwork), f"the sub-network in {Path(settings.subnetwork).name}")
    return Chosen(SubNetwork.full(info.model), "the full model")


def _router_selector(settings: StageSettings, info: CheckpointInfo, choices: Choices) -> Selector:
    return trained_selector(info.path, choices, available_costs(settings, info, latency_table(settings, info)))


def _degradations(settings: StageSettings, choices: Choices) -> np.ndarray:
    """Degradations [blocks, candidates], read from the result of `flextron sensitivity` that settings.sensitivity names.

    A degradation is the loss of the full model with one block at a smaller candidate, minus the full model's own loss, in nats
    per token. It is 0 for a block's largest candidate, and where a block has fewer candidates than others. Raises FlextronError
    for a result that is missing, damaged, incomplete or of another model or space.
    """
    if not settings.sensitivity:
        raise FlextronError("selector=sensitivity: give sensitivity=, the directory that `flextron sensitivity` wrote")
    file = Path(settings.sensitivity)
    file = file / "metrics.json" if file.is_dir() else file
    table = np.full(choices.exists_NK.shape, np.nan)
    try:
        check_file(file)
        values = read_json(file, given=True)
        model = ModelConfig.from_dict(values["model"])
        if model != choices.model or ElasticSpace.from_dict(model, values["space"]) != choices.space:
            raise FlextronError(f"{file}: is of another model or space than checkpoint=: run `flextron sensitivity` for this one")
        for row in values["blocks"]:
            block = choices.blocks.index((row["layer"], row["axis"]))
            table[block, choices.sizes[block].index(row["size"])] = float(row["degradation"])
    except FlextronError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FlextronError(f"{file}: is not what `flextron sensitivity` writes ({explain(error)}): run it again") from None
    for block, sizes in enumerate(choices.sizes):
        table[block, len(sizes) - 1] = 0.0
    if missing := np.argwhere(np.isnan(table) & choices.exists_NK).tolist():
        raise FlextronError(f"{file}: lacks candidate {missing[0][1]} of block {missing[0][0]}: run `flextron sensitivity` again")
    return np.nan_to_num(table)
