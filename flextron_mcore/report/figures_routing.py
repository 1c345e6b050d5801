"""The figure of router training: how the losses, the surrogate and the constraint develop (the paper's figure 12)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flextron_mcore.report.collect import Training
from flextron_mcore.report.collect_routing import Routing, RoutingStep
from flextron_mcore.report.drawing import SIZE, Picture, Theme, log_scale, moving_average, picture, stem, tidy

STAGE_TEXTS = (
    "1: the surrogate learns, the routers do not follow it.",
    "2: they follow it, and both losses fall.",
    "3: its error stays where it is, the routers go on.",
)


@dataclass(frozen=True)
class _Panel:
    """One curve. values: None where a step has none; threshold: a level to draw; averaged: they are moving averages already."""

    title: str
    values: list[float | None]
    log: bool = False
    threshold: float | None = None
    averaged: bool = False

    def points(self, steps: Sequence[RoutingStep]) -> tuple[list[int], list[float]]:
        """Steps and values that can be drawn."""
        pairs = [(row.step, value) for row, value in zip(steps, self.values, strict=True)]
        kept = [(x, y) for x, y in pairs if y is not None and np.isfinite(y) and (y > 0 or not self.log)]
        return [x for x, _ in kept], [y for _, y in kept]


def dynamics(training: Training) -> Picture | None:
    """How the routed networks' loss above the full model's and the surrogate's error develop, and where the routers follow it.

    Without a surrogate the loss of the constraint takes its place; beside it is the temperature of relaxed choices. None where
    nothing was logged.
    """
    routing, steps = training.routing, training.routing.steps
    panels = [panel for panel in _panels(routing) if panel.points(steps)[0]]
    if not panels:
        return None
    window = max(1, len(steps) // 40)
    bounds = stages(routing)

    def draw(figure: Figure, theme: Theme) -> None:
        drawn = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for i, (axes, panel) in enumerate(zip(drawn, panels, strict=True)):
            x, y = panel.points(steps)
            colour = theme.after if i == 0 else theme.before
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(x, _smooth(y, panel, window), "-" if i == 0 else "--", color=colour)
            if panel.threshold is not None:
                label = f"threshold {panel.threshold:g}"
                axes.axhline(panel.threshold, color=theme.ink, linestyle=":", linewidth=1.3, label=label)
                axes.legend(loc="upper right")
            axes.set_title(panel.title, loc="left", fontsize=9.5, fontweight="bold", pad=14 if bounds and i == 0 else 6)
            axes.set_xlabel("Step" if axes is drawn[-1] else "")
            tidy(axes)
            if panel.log:
                log_scale(axes, y)
            _mark_stages(axes, bounds, theme, numbers=i == 0)
        drawn[-1].xaxis.get_major_locator().set_params(integer=True)

    ends = []
    for panel in panels:
        smooth = _smooth(panel.points(steps)[1], panel, window)
        ends.append(f"{panel.title} from {smooth[0]:.3g} to {smooth[-1]:.3g}")
    words = f"Router training over {steps[-1].step:,} steps. {'; '.join(ends)}."
    caption = f"{training.label}: loss of the routed networks, mean of a step, above the full model’s"
    caption += ", and the surrogate’s error (as the paper’s figure 12)" if routing.surrogate else ""
    caption += f"; smoothed over {window} logged steps." if window > 1 else "; not smoothed."
    if routing.surrogate and routing.follows_from() is not None:
        words += f" The routers follow the surrogate from step {routing.follows_from():,}"
        settled = routing.settles_from()
        words += f", whose error settles at step {settled:,}." if settled is not None else "."
    elif routing.surrogate and training.kind == "router":
        words += " The routers never follow the surrogate."
    shown = [text for text, (low, high) in zip(STAGE_TEXTS, bounds, strict=False) if low < high]
    caption += f" {' '.join(shown)}" if bounds else ""
    return picture(f"{stem(training.label)}_dynamics", words, caption, draw, (SIZE[0], 0.7 + 1.5 * len(panels)))


def stages(routing: Routing) -> list[tuple[int, int]]:
    """First and last step of the three stages of router training; empty where the routers never follow a surrogate.

    A stage that did not occur has equal ends.
    """
    first = routing.follows_from()
    if first is None:
        return []
    end = routing.steps[-1].step
    settled = routing.settles_from()
    settled = end if settled is None else max(settled, first)
    return [(routing.steps[0].step, first), (first, settled), (settled, end)]


def _panels(routing: Routing) -> list[_Panel]:
    steps = routing.steps
    panels = [_Panel("Loss above the full model’s (nats per token)", [r.excess if r.routed else None for r in steps])]
    if any(row.surrogate_loss is not None for row in steps):
        errors, threshold = [row.surrogate_error for row in steps], routing.threshold
        panels.append(_Panel("L2 loss of the surrogate (nats²)", [row.surrogate_loss for row in steps], log=True))
        panels.append(_Panel("Surrogate’s error (share of losses’ variance)", errors, True, threshold, averaged=True))
    else:
        panels.append(_Panel("Constraint loss", [row.constraint_loss for row in steps]))
    if routing.relaxed:
        panels.append(_Panel("Temperature", [row.temperature for row in steps], log=True))
    return panels


def _smooth(values: Sequence[float], panel: _Panel, window: int) -> np.ndarray:
    """The moving average, on a log scale of the logarithms."""
    if panel.averaged:
        return np.asarray(values)
    return np.exp(moving_average(np.log(values), window)) if panel.log else moving_average(values, window)


def _mark_stages(axes: Axes, bounds: list[tuple[int, int]], theme: Theme, numbers: bool) -> None:
    """A line at the beginning of the second and the third stage; the numbers of those with room above the axes."""
    if not bounds:
        return
    width = bounds[-1][1] - bounds[0][0]
    for number, (low, high) in enumerate(bounds, start=1):
        if number > 1 and low < high:
            axes.axvline(low, color=theme.muted, linewidth=1.1)
        if numbers and high - low > 0.03 * width:
            place = ((low + high) / 2, 1.02)
            style = {"ha": "center", "va": "bottom", "fontsize": 9, "fontweight": "bold", "color": theme.muted}
            axes.text(*place, str(number), transform=axes.get_xaxis_transform(), **style)
