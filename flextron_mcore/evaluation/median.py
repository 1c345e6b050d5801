"""Order and median of the losses of random networks, some of which may be NaN. No torch import."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def rising(losses: Sequence[float]) -> list[float]:
    """Losses sorted from the lowest to the highest; NaN (of a network that diverged) counts as the highest."""
    return sorted(losses, key=lambda loss: (math.isnan(loss), loss))


def median_loss(losses: Sequence[float]) -> float:
    """Median of at least one loss: the middle one of `rising`, or the mean of the middle two."""
    ordered = rising(losses)
    return statistics.mean((ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]))
