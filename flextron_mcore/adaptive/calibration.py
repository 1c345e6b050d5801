"""Calibration: the average cost that routers spend for a target, by which a budget finds its target. No torch import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from flextron_mcore.config import FlextronError

Points = Sequence[tuple[float, float]]  # (target, share of the full model's cost)
# Gaps between targets at first; the largest change of the share within one; how narrow one may become.
_GAPS, _CHANGE, _NARROW = 8, 0.015, 1 / 1024


def calibrate(spent: Callable[[float], float], progress: Callable[[], object] = lambda: None) -> list[tuple[float, float]]:
    """Points between which the share can be interpolated. spent: evaluates the share that is spent at a target from 0 to 1.

    A gap between targets is halved while the share changes much within it, since it does so in steps. progress is called after
    every target.
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
    """Target at which routers spend `share` on average, interpolated; the nearer end of a gap that could not be halved further.

    nearest: take the nearest share where the calibration does not reach that far. Raises FlextronError there without, and where
    there is no calibration.
    """
    if not calibration:
        raise FlextronError("the adaptive routers have no calibration: their training did not end; run `flextron router` again")
    points = sorted(calibration)
    low, high = (pick(spent for _, spent in points) for pick in (min, max))
    if not nearest and not low - 0.005 <= share <= high + 0.005:
        raise FlextronError(f"budget: the adaptive routers spend {low:.3f} to {high:.3f} of the full model's, not {share:.3f}")
    # Routers of little training may spend less for a higher target: a rising gap further on has the share, too.
    rising = (gap for gap in pairwise(points) if gap[0][1] < gap[1][1] and gap[0][1] <= share <= gap[1][1])
    gap = next(rising, None)
    if gap is None:
        return min(points, key=lambda point: abs(point[1] - share))[0]
    (first, below), (second, above) = gap
    if second - first <= _NARROW and above - below > _CHANGE:
        return first if share - below < above - share else second
    return first + (second - first) * (share - below) / (above - below)
