"""Part `routed` of a latency table: milliseconds of blocks whose tokens have different levels. No torch import."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from flextron_mcore.adaptive.usage import OVERHEADS, TokenCost
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Cost
from flextron_mcore.files import explain
from flextron_mcore.latency.table import TRUSTED_MEDIAN, LatencyTable


@dataclass(frozen=True)
class RoutedTable:
    """Milliseconds of blocks with token routing in a latency table's workload, for one KV policy.

    The time of routers and of sorting tokens is included.

    Attributes:
        hidden_size: hidden units of a router.
        levels: {axis: milliseconds of a block if all tokens take one candidate, for each candidate of the space}.
        overhead: {axis: milliseconds of a block for an amount of 1 of each kind of routing overhead, in the order of OVERHEADS
            (adaptive/usage.py)}.
        check: relative errors of predicted times of whole networks against measured ones: {"networks": their number,
            "median_error", "largest_error"}.
    """

    hidden_size: int
    levels: Mapping[str, tuple[float, ...]]
    overhead: Mapping[str, tuple[float, ...]]
    check: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for an entry of LatencyTable.routed."""
        return asdict(self)

    @classmethod
    def read(cls, table: LatencyTable, kv_policy: str) -> RoutedTable | None:
        """Read the entry of LatencyTable.routed for a KV policy; None if it was not measured. Raises FlextronError if damaged."""
        row = table.routed.get(kv_policy)
        if row is None:
            return None
        try:
            sizes = {axis.name: table.space.sizes[axis.name] for axis in table.space.layer_axes}
            levels, overhead = ({axis: tuple(map(float, row[name][axis])) for axis in sizes} for name in ("levels", "overhead"))
            for axis, candidates in sizes.items():
                if (len(levels[axis]), len(overhead[axis])) != (len(candidates), len(OVERHEADS)):
                    raise ValueError("it was measured for another elastic space")
            return cls(int(row["hidden_size"]), levels, overhead, dict(row["check"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FlextronError(
                f"latency: the table's part routed.{kv_policy} cannot be read ({explain(error)}): measure it "
                "again with `flextron latency routed.enabled=true`"
            ) from None


def token_cost(cost: Cost, table: LatencyTable | None, kv_policy: str) -> TokenCost:
    """Cost of a pass with token routing, in the unit of `cost`.

    Args:
        cost: cost of sub-networks without token routing.
        table: latency table, whose part `routed` gives the levels and the routing overhead of a latency. Overhead is not counted
            for None, for another cost, or if token routing was not measured with this policy.
        kv_policy: keys and values that a token writes: `full`, of all KV groups, or `own`, of the groups that it uses.
    """
    routed = RoutedTable.read(table, kv_policy) if table and cost.name == "latency" else None
    if routed is None:
        return TokenCost(cost)
    tokens = table.setting["batch_size"] * table.setting["prompt_length"]
    return TokenCost(replace(table.cost(), candidates=routed.levels, narrow=()), routed.overhead, tokens)


def routed_warning(table: LatencyTable, kv_policy: str) -> str | None:
    """Warning about the times that a latency table predicts for token routing with a KV policy; None if they can be trusted.

    Warns if none were measured, and if their median relative error for whole networks is above TRUSTED_MEDIAN.
    """
    routed = RoutedTable.read(table, kv_policy)
    if routed is None:
        return (
            f"the latency table has no measurement of token routing with kv_policy={kv_policy}, so its overhead is not counted: "
            "measure it with `flextron latency routed.enabled=true`"
        )
    if (error := routed.check.get("median_error", 0.0)) > TRUSTED_MEDIAN:
        return (
            f"the table's predictions for token routing (kv_policy={kv_policy}) are off by {error:.1%} of whole networks' "
            f"latency (median), above {TRUSTED_MEDIAN:.0%}: measure again on an idle machine, or with more routed.rounds"
        )
    return None


def warn_of_routed(table: LatencyTable | None, costs: Iterable[Cost], kv_policy: str, warn: Callable[[str], object]) -> None:
    """Print a warning if a latency is among the costs and its predictions for token routing cannot be trusted.

    Args:
        table: latency table; None without.
        costs: costs that budgets of token routing limit.
        kv_policy: keys and values that a token writes: `full`: of all KV groups, `own`: of those it uses.
        warn: function that prints a warning.
    """
    if table and any(cost.name == "latency" for cost in costs) and (warning := routed_warning(table, kv_policy)):
        warn(f"latency: {warning}")
