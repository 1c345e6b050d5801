"""Numbers as text."""

from __future__ import annotations

import math

import pytest

from flextron_mcore.report.text import (
    big,
    cost_unit,
    duration,
    loss,
    memory,
    perplexity,
    short,
    signed,
    significant,
    small,
    spread,
    stem,
)


def test_numbers_are_short_and_grouped():
    assert [loss(None), loss(2.34567), loss(math.inf)] == ["–", "2.346", "∞"]
    assert [perplexity(9.876), perplexity(12345.6)] == ["9.88", "12,346"]
    assert memory([512, 3 * 2**20]) == ("MiB", ["0.00", "3.00"])
    assert memory([150 * 2**30, 2**30]) == ("GiB", ["150.0", "1.0"])
    assert [duration(s) for s in (1.26, 35.2, 59.7, 725, 3600 * 1234 + 61)] == [
        "1.3 s",
        "35 s",
        "1 min 0 s",
        "12 min 5 s",
        "1,234 h 1 min",
    ]
    assert [spread([4, 4]), spread([2, 3, 8]), spread([256, 1024]), spread([])] == ["4", "4.3 (2–8)", "640 (256–1,024)", "–"]
    assert [big(999), big(1500), big(89_900_000_000)] == ["999", "1.5 thousand", "89.9 billion"]
    assert [small(0.0), small(3.14e-6), small(0.25)] == ["0", "3.1e−6", "2.5e−1"]


def test_significant_digits():
    shown = [significant(v) for v in (1.4649, 52.74, 123456.0, -0.25, 4.71e6, 1.2e-7, 1.5e12, 0.0, math.inf)]
    assert shown == ["1.465", "52.74", "1.235e5", "−0.25", "4.71e6", "1.2e−7", "1.5e12", "0", "∞"]


def test_differences_have_a_sign():
    assert [signed(v) for v in (0.1234, -0.5, 0.0, math.nan)] == ["+0.123", "−0.500", "0.000", "NaN"]


@pytest.mark.parametrize(
    ("cost", "largest", "expected"),
    [
        ("latency", 1e12, ("Latency (ms)", 1.0)),
        ("parameters", 5e8, ("Parameters (millions)", 1e6)),
        ("parameters", 7e9, ("Parameters (billions)", 1e9)),
        ("memory", 100, ("Memory (bytes)", 1.0)),
        ("memory", 3 * 2**30, ("Memory (GiB)", 2.0**30)),
    ],
)
def test_costs_have_their_unit(cost, largest, expected):
    assert cost_unit(cost, largest) == expected


def test_short_cuts_the_middle():
    assert short("x" * 26) == "x" * 26
    cut = short("start " + "x" * 40 + " end")
    assert len(cut) == 26 and cut.startswith("start") and "…" in cut and cut.endswith(" end")


def test_stem_is_a_safe_file_name():
    assert [stem(label) for label in ("my elastic!", "é/..", "")] == ["my_elastic_", "____", "run"]
