"""Fit of the scaling law, eq. 12: loss = (size / Nc) ** -alpha + E."""

from __future__ import annotations

import numpy as np
import pytest

from flextron_mcore.evaluation.scaling import fit

SIZES = np.array([3.4e9, 3.9e9, 4.1e9, 4.8e9, 5.5e9, 6.4e9])


def law(sizes, nc, alpha, e):
    return (np.asarray(sizes) / nc) ** -alpha + e


@pytest.mark.parametrize("nc, alpha, e", [(2e9, 1.5, 1.7), (1e9, 3.0, 2.1), (3e9, 0.8, 0.5)])
def test_an_exact_law_is_found(nc, alpha, e):
    found = fit(SIZES, law(SIZES, nc, alpha, e))
    assert found["alpha"] == pytest.approx(alpha, rel=1e-3) and found["E"] == pytest.approx(e, rel=1e-3)
    assert found["Nc"] == pytest.approx(nc, rel=1e-3)
    for name, value in (("Nc", nc), ("alpha", alpha), ("E", e)):
        low, high = found[f"{name}_ci"]
        assert low <= value * (1 + 1e-3) and high >= value * (1 - 1e-3) and high - low < 0.05 * value


def test_noise_widens_the_intervals_and_they_cover():
    """About 95 of 100 confidence intervals of 95 % contain the true value."""
    sizes = np.linspace(1, 4, 12)
    inside, widths = 0, []
    for seed in range(100):
        noise = np.random.default_rng(seed).normal(scale=0.003, size=len(sizes))
        found = fit(sizes, law(sizes, 1.2, 1.4, 2.0) + noise)
        low, high = found["E_ci"]
        inside += low <= 2.0 <= high
        widths.append(high - low)
    assert 85 <= inside <= 100 and np.median(widths) > 0.01


@pytest.mark.parametrize("sizes, losses", [([1, 2, 3], [3, 2, 1]), ([1, 1, 1, 1, 1], [3, 2, 1, 2, 3]), ([1, 2, 3, 4], [2.0] * 4)])
def test_a_law_that_the_points_do_not_determine_is_none(sizes, losses):
    found = fit(sizes, losses)
    assert found.keys() == {"Nc", "alpha", "E", "Nc_ci", "alpha_ci", "E_ci"}
    if len(set(losses)) > 1:
        assert set(found.values()) == {None}
