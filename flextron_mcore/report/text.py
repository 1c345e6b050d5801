"""Numbers as text for the page: losses (nats per token), shares, counts, sizes and durations."""

from __future__ import annotations

import math
from collections.abc import Sequence

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
MINUS = "−"
NONE = "–"


def loss(value: float | None) -> str:
    """Text of a loss with three decimals; NaN, ∞ or −∞ for one that is not finite, – for None."""
    return NONE if value is None else f"{value:,.3f}" if math.isfinite(value) else _not_finite(value)


def perplexity(value: float) -> str:
    """Text of a perplexity, with two decimals below 1,000 and none from there; NaN or ∞ for one that is not finite."""
    return _not_finite(value) if not math.isfinite(value) else f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """Text of a share in 0..1 as percent with one decimal, such as 62.5%; – for None."""
    return NONE if share is None else f"{100 * share:.1f}%"


def small(value: float) -> str:
    """Text of a small number with two significant digits and a power of ten, such as 3.1e−6; 0 for zero."""
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+").replace("e-", f"e{MINUS}")


def big(count: int) -> str:
    """Text of a count with three digits and thousand, million, billion or trillion: 3.42 million; below 1,000 as it is."""
    for size, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


def memory(sizes: Sequence[int]) -> tuple[str, list[str]]:
    """(unit that suits the largest of `sizes`, each size in that unit as text). sizes: bytes."""
    largest = max(sizes, default=0)
    power = _power(largest)
    digits = 0 if power == 0 else 1 if largest >= 100 * 1024**power else 2
    return UNITS[power], [f"{size / 1024**power:,.{digits}f}" for size in sizes]


def cost_unit(cost: str, largest: float) -> tuple[str, float]:
    """(label of a cost with a unit that suits `largest`, such as "Memory (GiB)"; that unit's size in the cost's own unit).

    Args:
        cost: name of the cost: latency, parameters or memory.
        largest: largest value to show, in the cost's own unit (cost.OWN_UNITS: ms, parameters, bytes).
    """
    if cost == "parameters":
        return ("Parameters (billions)", 1e9) if largest >= 1e9 else ("Parameters (millions)", 1e6)
    if cost == "memory":
        return f"Memory ({UNITS[_power(largest)]})", 1024.0 ** _power(largest)
    return "Latency (ms)", 1.0


def significant(value: float) -> str:
    """Text of a number with four significant digits; very large and small ones with a power of ten, such as 1.234e6."""
    if not math.isfinite(value):
        return _not_finite(value)
    mantissa, _, power = f"{value:.4g}".replace("-", MINUS).partition("e")
    return f"{mantissa}e{power.lstrip('+').replace(f'{MINUS}0', MINUS).removeprefix('0')}" if power else mantissa


def signed(value: float | None) -> str:
    """Text of a difference of losses with three decimals: +0.123, −0.123, 0.000; – for None."""
    return f"{'+' if value is not None and value > 0 else ''}{loss(value)}".replace("-", MINUS)


def duration(seconds: float) -> str:
    """Text of a duration: 3.5 s (below ten seconds), 35 s, 12 min 5 s, 3 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def spread(widths: Sequence[int]) -> str:
    """Text of the widths of some layers: the width that all share, or mean and range as 4.3 (2–8); – without widths."""
    if not widths:
        return NONE
    low, high = min(widths), max(widths)
    mean = sum(widths) / len(widths)
    return f"{low:,}" if low == high else f"{mean:,.{0 if high >= 100 else 1}f} ({low:,}–{high:,})"


def lower(label: str) -> str:
    """Label with a small first letter, for use within a sentence."""
    return label[0].lower() + label[1:]


def short(text: str, most: int = 26) -> str:
    """Text cut in the middle to at most `most` characters, for a legend or label."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"


def stem(label: str) -> str:
    """Label as part of a file name: ASCII letters, digits, - and _ stay, others become _; "run" for an empty label."""
    return "".join(c if c.isalnum() and c.isascii() or c in "-_" else "_" for c in label) or "run"


def _power(largest: float) -> int:
    """Index in UNITS of the unit that suits a number of bytes."""
    return max(power for power in range(len(UNITS)) if power == 0 or largest >= 1024**power)


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
