"""flextron_family.json of an hf_elastic export: costs of sub-networks, and a table of the network for every budget.

`selection/router.py` looks a budget's network up in bins of a cost whose contents do not depend on the budget. A table of these
bins therefore gives the same network for every budget, without the solver. Selectors with few networks are tabulated as steps of
a cost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flextron_mcore.checkpoint.reader import TensorReader
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Cost, memory_cost, parameter_cost
from flextron_mcore.exports.formats import Job
from flextron_mcore.latency.table import open_table
from flextron_mcore.layers.compensation import TENSOR
from flextron_mcore.routers.store import kind_of_routers
from flextron_mcore.selection.router import BIN, WITHIN, RouterSelector
from flextron_mcore.selection.selectors import MatFormer, Uniform
from flextron_mcore.selection.trained import trained_selector
from flextron_mcore.settings.formats import HfElasticSettings
from flextron_mcore.settings.sections import CacheSettings
from flextron_mcore.space import DTYPE_BYTES, SKIPPED, SubNetwork

FAMILY_FILE = "flextron_family.json"
FORMAT_VERSION = 2
_LISTS = ("modulation", "compensation", "networks")  # lists with an entry a line
_SELECTORS = {"uniform": Uniform, "matformer": MatFormer}
_Picks = RouterSelector | Uniform | MatFormer


@dataclass
class _Networks:
    """Numbering of the networks in the table, each of which is stored once."""

    numbers: dict[SubNetwork, int] = field(default_factory=dict)

    def number(self, net: SubNetwork) -> int:
        """Number of a network; a new one gets the next number."""
        return self.numbers.setdefault(net, len(self.numbers))


def build_family(job: Job) -> dict[str, Any]:
    """Content of flextron_family.json: costs of sub-networks, and a table with the network for every budget.

    Without settings of the format, routers choose the networks if the checkpoint has any, else networks are uniform. Raises
    FlextronError for a selector that cannot be tabulated, a latency table that cannot be read or is of another model, and listed
    networks outside of the space.
    """
    info, dtype = job.info, job.dtype
    choices = Choices(info.model, info.space)
    settings = job.settings or HfElasticSettings(selector="router", latency=None, kv_cache=CacheSettings())
    name = settings.selector
    kind = kind_of_routers(info.path) if info.path else None
    if name == "router" and kind is None:
        name = "uniform"
    if name != "router" and name not in _SELECTORS:
        known = ", ".join(["router", *_SELECTORS])
        raise FlextronError(
            f"selector={name}: format=hf_elastic needs the networks of all budgets in advance: set hf_elastic.selector to one of "
            f"{known}"
        )
    table = open_table(info, settings.latency)
    kv = settings.kv_cache
    memory = {"batch_size": kv.batch_size, "length": kv.length or info.model.max_position_embeddings}
    costs = {"latency": table.cost()} if table else {}
    costs["parameters"] = parameter_cost(info.model, info.space)
    costs["memory"] = memory_cost(info.model, info.space, dtype, **memory)
    picks: _Picks = trained_selector(info.path, choices, costs) if name == "router" else _SELECTORS[name](choices)
    ranges = picks.ranges if isinstance(picks, RouterSelector) else {}
    networks = _Networks()
    listed = [info.network(Path(file)) for file in settings.networks]
    answers = {cost.name: _answers(picks, cost, networks, listed) for cost in costs.values()}
    return {
        "format": FORMAT_VERSION,
        "model": info.model.to_dict(),
        "space": info.space.to_dict(),
        "selector": name,
        "fraction_of": "latency" if table else next(iter(ranges), "parameters"),
        "cell": BIN,
        "within": picks.within if isinstance(picks, RouterSelector) else WITHIN,
        "costs": {cost.name: _cost(cost) for cost in costs.values()},
        "latency": {"machine": dict(table.machine), "setting": dict(table.setting)} if table else None,
        "memory": {"dtype": dtype, "bytes_a_number": DTYPE_BYTES[dtype], **memory},
        "ranges": {cost: list(pair) for cost, pair in ranges.items()},
        "adaptive": job.token_routers and job.token_routers[0],
        "modulation": _modulation(info),
        "compensation": _compensation(info),
        "answers": answers,
        "networks": [_row(net) for net in networks.numbers],
    }


def write_family(file: Path, values: Mapping[str, Any]) -> None:
    """Write flextron_family.json as readable JSON, with one network, cost bin or layer's modulation on a line each."""
    text = json.dumps({k: v for k, v in values.items() if k not in (*_LISTS, "answers")}, indent=1)[:-2]
    tables = []
    for cost, table in values["answers"].items():
        parts = [f'"{kind}": [\n   ' + ",\n   ".join(map(json.dumps, lines)) + "\n  ]" for kind, lines in table.items()]
        tables.append(f'"{cost}": {{\n  ' + ",\n  ".join(parts) + "\n  }")
    text += ',\n "answers": {\n  ' + ",\n  ".join(tables) + "\n },\n"
    lists = [f'"{name}": [\n  ' + ",\n  ".join(map(json.dumps, values[name])) + "\n ]" for name in _LISTS]
    text += " " + ",\n ".join(lists) + "\n}\n"
    file.write_text(text, encoding="utf-8")


def read_networks(info: CheckpointInfo, values: Mapping[str, Any]) -> list[SubNetwork]:
    """Networks listed in flextron_family.json, each at the index that is its number in `answers`.

    Args:
        info: checkpoint that was exported.
        values: content of flextron_family.json.
    """
    networks = []
    for row in values["networks"]:
        pairs = zip(row["heads"], row["ffn_hidden_size"], strict=True)
        layers = [info.space.layer_choice(info.model, *pair) if pair[0] else SKIPPED for pair in pairs]
        networks.append(SubNetwork(row["hidden_size"], tuple(layers)))
    return networks


def _answers(picks: _Picks, cost: Cost, networks: _Networks, listed: list[SubNetwork]) -> dict[str, list]:
    """Table that gives the network for every budget of one cost; networks are numbers of `networks`.

    A router's table has `cells`, [score, cost, network] or null for each bin of the cost, cheapest first
    (selection/router.py), and `least`, [the cheapest network]. Other selectors have `steps`, [cost, network] in rising order: a
    budget gets the last one that it allows. `given` is [cost, network] of each network in `listed`.
    """
    more = [[cost.of(net), networks.number(net)] for net in listed]
    if isinstance(picks, RouterSelector):
        bins = [found and [*found[:2], networks.number(found[2])] for found in picks.bins(cost)]
        return {"cells": bins, "least": [networks.number(picks.choices.least(cost))], "given": more}
    # The answer of `picks.select` to every limit, in one pass: it takes the first network of the highest rank.
    ranked = [(cost.of(net), picks.rank(net), -i, net) for i, net in enumerate(picks.networks())]
    ranked.sort(key=lambda row: row[0])
    steps: list[list] = []
    best, limits = None, [*(row[0] for row in ranked[1:]), None]
    for (limit, *row), following in zip(ranked, limits, strict=True):
        best = max(best, row, key=lambda row: row[:2]) if best else row
        if following != limit and (not steps or steps[-1][1] != networks.number(best[2])):
            steps.append([limit, networks.number(best[2])])
    return {"steps": steps, "given": more}


def _modulation(info: CheckpointInfo) -> list[list[list[float]]]:
    """Modulation parameters (layers/block.py) [layers][attention, MLP][2] of a checkpoint; [] for a model without modulation."""
    if not info.space.modulation:
        return []
    reader, blocks = TensorReader(info), ("self_attention", "mlp")
    names = [[f"decoder.layers.{i}.{block}.modulation" for block in blocks] for i in range(info.model.num_layers)]
    return [[reader.read(name).tolist() for name in layer] for layer in names]


def _compensation(info: CheckpointInfo) -> list[list[list[list[float]]]]:
    """Compensation (layers/compensation.py) [layers][KV groups][query heads][query heads] of a checkpoint; [] without."""
    if not info.space.compensation:
        return []
    reader = TensorReader(info)
    return [reader.read(f"decoder.layers.{i}.{TENSOR}").tolist() for i in range(info.model.num_layers)]


def _cost(cost: Cost) -> dict[str, Any]:
    """Cost as plain types: "full" and "smallest", "constant", {axis: cost of each candidate}, and "narrow".

    "narrow" has constant and candidates for each smaller hidden size.
    """
    narrow = {str(size): _sums(part) for size, part in cost.narrow}
    return {"full": cost.full, "smallest": cost.smallest, **_sums(cost), "narrow": narrow}


def _sums(cost: Cost) -> dict[str, Any]:
    """Terms of a cost as plain types: constant, and {axis: cost of each candidate}."""
    return {"constant": cost.constant, **{name: list(costs) for name, costs in cost.candidates.items()}}


def _row(net: SubNetwork) -> dict[str, Any]:
    """Entry of a network: hidden size, query heads and neurons of each layer, 0 for a skipped layer."""
    layers = [layer if layer.executed else SKIPPED for layer in net.layers]
    return {
        "hidden_size": net.hidden_size,
        "heads": [layer.num_attention_heads for layer in layers],
        "ffn_hidden_size": [layer.ffn_hidden_size for layer in layers],
    }
