"""Scaling law of a family of networks: L(N) = (N / Nc)^-alpha + E (Flextron, eq. 12 and Table 3). No torch import."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import t as student

NAMES = ("Nc", "alpha", "E")


def fit(sizes: Sequence[float], losses: Sequence[float]) -> dict[str, Any]:
    """Fit L(N) = (N / Nc)^-alpha + E by least squares to networks of sizes N (`sizes`) and losses L (`losses`).

    Returns {"Nc", "alpha", "E"} and the 95 % confidence interval [low, high] of each: {"Nc_ci", "alpha_ci", "E_ci"}. All values
    are None if the points do not determine them: fewer than four sizes, no decreasing law, or an interval that is not finite.
    """
    unknown = {**dict.fromkeys(NAMES), **{f"{name}_ci": None for name in NAMES}}
    n, loss = np.array(sizes, float), np.array(losses, float)
    if len(set(sizes)) < 4:
        return unknown
    x = n / n.max()

    def law(x: np.ndarray, amplitude: float, alpha: float, e: float) -> np.ndarray:
        return amplitude * x**-alpha + e

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", OptimizeWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            found, covariance = curve_fit(law, x, loss, _start(x, loss), maxfev=10_000)
    except (RuntimeError, OptimizeWarning, ValueError, np.linalg.LinAlgError):
        return unknown
    amplitude, alpha, e = found.tolist()
    if amplitude <= 0 or alpha <= 0:
        return unknown
    # Nc = N_max amplitude^(1 / alpha). `slope` is the derivative of log(Nc / N_max) by the three fitted numbers.
    log_nc = np.log(amplitude) / alpha
    slope = np.array([1 / (amplitude * alpha), -log_nc / alpha, 0.0])
    half = student.ppf(0.975, len(loss) - 3) * np.sqrt([slope @ covariance @ slope, *np.diag(covariance)[1:]])
    with np.errstate(over="ignore"):
        ends = np.exp(log_nc + np.array([-1, 0, 1]) * half[0]) * n.max()
    if not (np.isfinite(half).all() and np.isfinite(ends).all()):
        return unknown
    return {
        "Nc": float(ends[1]),
        "alpha": alpha,
        "E": e,
        "Nc_ci": [float(ends[0]), float(ends[2])],
        "alpha_ci": [alpha - float(half[1]), alpha + float(half[1])],
        "E_ci": [e - float(half[2]), e + float(half[2])],
    }


def _start(x: np.ndarray, loss: np.ndarray) -> tuple[float, float, float]:
    """Start values (amplitude, alpha, E) for the fit of amplitude * x^-alpha + E.

    For each alpha of a grid, amplitude and E follow from a linear fit; the alpha with the least squared error is taken.
    """
    best = (np.inf, (1.0, 1.0, float(loss.min())))
    for alpha in np.geomspace(0.05, 30, 60):
        basis = np.stack([x**-alpha, np.ones_like(x)], 1)
        (amplitude, e), *_ = np.linalg.lstsq(basis, loss, rcond=None)
        error = float(((basis @ (amplitude, e) - loss) ** 2).sum())
        best = min(best, (error, (float(amplitude), float(alpha), float(e))))
    return best[1]
