"""Adaptive routers for the export format `hf_elastic`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flextron_mcore.adaptive.store import read_adaptive_routers
from flextron_mcore.adaptive.table import token_cost
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choices import Choices
from flextron_mcore.latency.table import open_table
from flextron_mcore.routers.store import kind_of_routers


def exported_routers(info: CheckpointInfo, latency: str | None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Adaptive routers of a checkpoint: (description for flextron_family.json, {name: tensor in fp32}).

    The description is {"cost": name, "kv_policy", "calibration", "token_costs": {KV policy: milliseconds} for a latency}. Returns
    None if the checkpoint has no adaptive routers, their training did not end, or they were trained for a latency whose
    table is missing.

    latency: file or directory of the latency table; None for the table beside the routers.
    """
    if info.path is None or kind_of_routers(info.path) != "adaptive":
        return None
    table = open_table(info, latency)
    described, routers = read_adaptive_routers(info.path, Choices(info.model, info.space))
    name, token_costs = described.costs[0], {}
    if not described.calibration or (name == "latency" and table is None):
        return None
    if name == "latency":
        for policy in table.routed:
            cost = token_cost(table.cost(), table, policy)
            levels = {axis: list(costs) for axis, costs in cost.levels.candidates.items()}
            overhead = {axis: list(costs) for axis, costs in cost.overhead.items()}
            token_costs[policy] = {"constant": cost.levels.constant, **levels, "overhead": overhead, "tokens": cost.tokens}
    values = {
        "cost": name,
        "kv_policy": described.kv_policy,
        "calibration": [list(pair) for pair in described.calibration],
        "token_costs": token_costs,
    }
    return values, {key: tensor.detach().float().contiguous() for key, tensor in routers.state_dict().items()}
