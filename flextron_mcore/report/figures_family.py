"""The figures of a family of models. Losses are in nats per token."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from flextron_mcore.report.collect_family import Family
from flextron_mcore.report.drawing import Picture, Theme, picture, short, stem, tidy
from flextron_mcore.report.parts import cost_unit

SHOWN = ("parameters", "latency")  # costs that losses are drawn against


def losses(family: Family) -> list[Picture]:
    """Loss against parameters, and against latency where that is known; none where nothing was evaluated."""
    return [_loss(family, cost) for cost in SHOWN if cost in family.costs and _drawable(family)]


def _drawable(family: Family) -> list:
    return [member for member in family.members if member.loss is not None and math.isfinite(member.loss)]


def _loss(family: Family, cost: str) -> Picture:
    members = sorted(_drawable(family), key=lambda member: member.costs[cost])
    label, unit = cost_unit(cost, max(member.costs[cost][0] for member in members))
    points = [(member.costs[cost][0] / unit, member.loss) for member in members]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), "o-", color=theme.after, markersize=5.5, linewidth=1.2)
        for i, (member, point) in enumerate(zip(members, points, strict=True)):
            # Names stand above and below the line in turn, so that near ones do not meet.
            side, place = ("bottom", 7) if i % 2 == 0 else ("top", -7)
            style = {"ha": "center", "va": side, "fontsize": 8.5, "color": theme.ink}
            axes.annotate(short(member.budget, 20), point, (0, place), textcoords="offset points", **style)
        axes.set(xlabel=label, ylabel="Mean loss (nats per token)")
        axes.margins(x=0.12, y=0.15)
        tidy(axes)

    series = ", ".join(f"{member.budget}: {y:.3f} at {x:.4g}" for member, (x, y) in zip(members, points, strict=True))
    words = f"Mean loss in nats per token against {label[0].lower()}{label[1:]}, by budget: {series}."
    caption = f"{family.label}: mean loss against {cost}; a point is the model of the budget that it is named by."
    return picture(f"{stem(family.label)}_loss_{cost}", words, caption, draw)
