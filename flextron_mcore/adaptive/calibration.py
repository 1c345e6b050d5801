"""Calibration of adaptive routers: which average cost a target leads to, and which target meets a budget. No torch import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from flextron_mcore.config import FlextronError

Points = Sequence[tuple[float, float]]  # (target, average cost as a share of the full model's)
_GAPS = 8  # intervals between targets at first
_CHANGE = 0.015  # intervals in which the share changes more are halved
_NARROW = 1 / 1024  # least width of an interval


def calibrate(spent: Callable[[float], float], progress: Callable[[], object] = lambda: None) -> list[tuple[float, float]]:
    """Points (target, average cost) from target 0 to 1, sorted, for interpolation; the cost is a share of the full model's cost.

    A target is 0 for the smallest network's cost and 1 for the full model's. The cost may jump between two targets, so an
    interval with a large change is halved.

    Args:
        spent: function from a target to the average cost that the routers spend, as a share of the full model's cost.
        progress: called after every evaluated target.
    """
    found: dict[float, float] = {}

    def at(target: float) -> float:
        if target not in found:
            found[target] = spent(target)
            progress()
        return found[target]

    gaps = [(i / _GAPS, (i + 1) / _GAPS) for i in range(_GAPS)]
    while gaps:
        low, high = gaps.pop(0)
        if abs(at(high) - at(low)) > _CHANGE and high - low > _NARROW:
            gaps += [(low, (low + high) / 2), ((low + high) / 2, high)]
    return sorted(found.items())


def target_for(calibration: Points, share: float, nearest: bool = False) -> float:
    """Target at which the routers spend the average cost `share`, interpolated between the points of a calibration.

    A target is 0 for the smallest network's cost and 1 for the full model's. Where the cost jumps between two neighbouring
    targets, the target with the nearer cost is returned. Raises FlextronError for an empty calibration, and unless `nearest` for
    a share that is more than 0.005 outside of the calibration.

    Args:
        calibration: points (target, average cost as a share of the full model's cost).
        share: average cost to reach, as a share of the full model's cost.
        nearest: True: for a share outside of the calibration, take the nearest point.
    """
    if not calibration:
        raise FlextronError(
            "the adaptive routers have no calibration, because their training did not end: run the same `flextron router` or "
            "`flextron joint` command again"
        )
    points = sorted(calibration)
    low, high = (pick(spent for _, spent in points) for pick in (min, max))
    if not nearest and not low - 0.005 <= share <= high + 0.005:
        raise FlextronError(
            f"budget={share:.3f}: the adaptive routers serve {low:.3f} to {high:.3f} of the full model's cost: choose a budget "
            "in this range"
        )
    # With little training the share may fall where the target rises: use an interval in which it rises.
    rising = (gap for gap in pairwise(points) if gap[0][1] < gap[1][1] and gap[0][1] <= share <= gap[1][1])
    gap = next(rising, None)
    if gap is None:
        return min(points, key=lambda point: abs(point[1] - share))[0]
    (first, below), (second, above) = gap
    if second - first <= _NARROW and above - below > _CHANGE:
        return first if share - below < above - share else second
    return first + (second - first) * (share - below) / (above - below)
