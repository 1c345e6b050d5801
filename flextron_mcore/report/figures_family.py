"""The figures of a family of models. Losses are in nats per token."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from flextron_mcore.report.collect_family import Family, Member
from flextron_mcore.report.drawing import Picture, Theme, label_points, picture, short, stem, tidy
from flextron_mcore.report.parts import cost_unit

SHOWN = ("parameters", "latency")  # costs that losses are drawn against


def losses(family: Family) -> list[Picture]:
    """Loss against parameters, and against latency where that is known; none where nothing was evaluated."""
    return [_loss(family, cost) for cost in SHOWN if cost in family.costs and _drawable(family)]


def _drawable(family: Family) -> list[Member]:
    return [member for member in family.members if member.loss is not None and math.isfinite(member.loss)]


def _loss(family: Family, cost: str) -> Picture:
    members = sorted(_drawable(family), key=lambda member: member.costs[cost])
    label, unit = cost_unit(cost, max(member.costs[cost][0] for member in members))
    points = [(member.costs[cost][0] / unit, member.loss) for member in members]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), "o", color=theme.after, markersize=5.5)
        axes.set(xlabel=label, ylabel="Mean loss (nats per token)")
        axes.margins(x=0.12, y=0.15)
        tidy(axes)
        names = [(short(member.budget, 20), point, False) for member, point in zip(members, points, strict=True)]
        label_points(figure, axes, names, points, theme)

    series = ", ".join(f"{member.budget}: {y:.3f} at {x:.4g}" for member, (x, y) in zip(members, points, strict=True))
    words = f"Mean loss in nats per token against {label[0].lower()}{label[1:]}, by budget: {series}."
    caption = f"{family.label}: mean loss against {cost}; a point is the model of the budget that it is named by."
    return picture(f"{stem(family.label)}_loss_{cost}", words, caption, draw)
