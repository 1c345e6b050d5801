"""Calibration of adaptive routers: shares spent at targets, and the target for a budget."""

from __future__ import annotations

import math

import pytest

from flextron_mcore.adaptive.calibration import calibrate, target_for
from flextron_mcore.config import FlextronError


def test_calibration_finds_the_steps():
    asked = []

    def spent(target: float) -> float:
        asked.append(target)
        return 0.5 + 0.2 * target + 0.15 / (1 + math.exp((0.34 - target) * 300)) + 0.15 * (target > 0.7)

    found = calibrate(spent)
    assert len(asked) == len(set(asked)) == len(found) < 64 and found == sorted(found)
    for share in (0.55, 0.58, 0.6, 0.65, 0.7, 0.75, 0.95):
        assert spent(target_for(found, share)) == pytest.approx(share, abs=0.008), share
    # No target spends a share within a jump of `spent`, so such a share gets one of the jump's ends. A constant `spent` needs few
    # evaluations.
    assert min(abs(spent(target_for(found, 0.85)) - end) for end in (0.79, 0.94)) < 0.005
    assert len(calibrate(lambda target: 0.6)) == 9


def test_a_budget_finds_its_target():
    calibration = [(0.0, 0.55), (0.5, 0.6), (0.75, 0.59), (1.0, 0.9)]
    assert target_for(calibration, 0.575) == pytest.approx(0.25)
    assert target_for(calibration, 0.59) == pytest.approx(0.4) and target_for(calibration, 0.6) == 0.5
    assert target_for(calibration, 0.745) == pytest.approx(0.875)
    assert target_for(calibration, 0.5, nearest=True) == 0.0 and target_for(calibration, 0.97, nearest=True) == 1.0
    steps = [(0.25, 0.5), (0.25 + 1 / 1024, 0.6), (0.5, 0.6), (0.5 + 1 / 1024, 0.612), (1.0, 0.9)]
    assert [target_for(steps, share) for share in (0.54, 0.56)] == [0.25, 0.25 + 1 / 1024]
    assert target_for(steps, 0.603) == pytest.approx(0.5 + 0.25 / 1024)  # a rise of 0.012 is interpolated, not taken for a jump
    assert target_for(steps, 0.5) == 0.25 and target_for(steps, 0.9) == 1.0
    # Briefly trained routers may spend less at a higher target. Shares that only a target above that one spends are found, too.
    falls = [(0.0, 0.88), (0.25, 0.8), (0.5, 0.85), (1.0, 0.95)]
    assert [target_for(falls, share) for share in (0.8, 0.82, 0.86)] == pytest.approx([0.25, 0.35, 0.55])
    assert target_for([(0.0, 0.9), (1.0, 0.7)], 0.75) == 1.0 and target_for([(0.0, 0.6), (1.0, 0.6)], 0.6) == 0.0
    with pytest.raises(FlextronError, match=r"budget=0.500: the adaptive routers serve 0.550 to 0.900 of the full model's cost"):
        target_for(calibration, 0.5)
    with pytest.raises(FlextronError, match="no calibration"):
        target_for([], 0.5)
