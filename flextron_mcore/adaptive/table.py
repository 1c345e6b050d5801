"""The `routed` part of a latency table: milliseconds of blocks whose tokens have different levels. No torch import."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from flextron_mcore.adaptive.usage import OVERHEADS, TokenCost
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Cost
from flextron_mcore.latency.table import TRUSTED_MEDIAN, LatencyTable


@dataclass(frozen=True)
class RoutedTable:
    """Milliseconds of routed blocks, routers and grouping included, for one KV policy.

    hidden_size: of the routers. levels: by axis, cost of each of the space's candidates where all tokens are at it. overhead: by
    axis, cost of each of OVERHEADS. check: relative errors of sums against whole networks.
    """

    hidden_size: int
    levels: Mapping[str, tuple[float, ...]]
    overhead: Mapping[str, tuple[float, ...]]
    check: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for LatencyTable.routed."""
        return asdict(self)

    @classmethod
    def read(cls, table: LatencyTable, kv_policy: str) -> RoutedTable | None:
        """The part of a table for a policy, None where it was not measured. Raises FlextronError for one that cannot be read."""
        row = table.routed.get(kv_policy)
        if row is None:
            return None
        try:
            sizes = {axis.name: table.space.sizes[axis.name] for axis in table.space.layer_axes}
            levels, overhead = ({axis: tuple(map(float, row[name][axis])) for axis in sizes} for name in ("levels", "overhead"))
            for axis, candidates in sizes.items():
                if (len(levels[axis]), len(overhead[axis])) != (len(candidates), len(OVERHEADS)):
                    raise ValueError("it is of another space")
            return cls(int(row["hidden_size"]), levels, overhead, dict(row["check"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FlextronError(
                f"latency: the table's part routed.{kv_policy} cannot be read ({type(error).__name__}: {error}): measure it "
                "again with `flextron latency routed.enabled=true`"
            ) from None


def token_cost(cost: Cost, table: LatencyTable | None, kv_policy: str) -> TokenCost:
    """Cost of tokens with levels of their own, in the unit of `cost`; a latency with the routing overhead that `table` knows."""
    routed = RoutedTable.read(table, kv_policy) if table and cost.name == "latency" else None
    if routed is None:
        return TokenCost(cost)
    tokens = table.setting["batch_size"] * table.setting["prompt_length"]
    return TokenCost(replace(table.cost(), candidates=routed.levels, narrow=()), routed.overhead, tokens)


def routed_warning(table: LatencyTable, kv_policy: str) -> str | None:
    """Reason not to trust the part of a table about tokens with levels of their own; None if it may be trusted."""
    routed = RoutedTable.read(table, kv_policy)
    if routed is None:
        return (
            "the latency table knows nothing of tokens that choose for themselves, so routing is not counted: measure it with "
            "`flextron latency routed.enabled=true`"
        )
    if (error := routed.check.get("median_error", 0.0)) > TRUSTED_MEDIAN:
        return (
            f"its sums for tokens that choose for themselves (kv_policy={kv_policy}) are off by {error:.1%} of whole networks' "
            f"latency (median), above {TRUSTED_MEDIAN:.0%}: measure again on an idle machine, or with more routed.rounds"
        )
    return None


def warn_of_routed(table: LatencyTable | None, costs: Iterable[Cost], kv_policy: str, say: Callable[[str], object]) -> None:
    """Say what speaks against a table whose latencies tokens are to be counted with."""
    if table and any(cost.name == "latency" for cost in costs) and (warning := routed_warning(table, kv_policy)):
        say(f"warning: latency: {warning}")
