"""The figures of `compare` and `sensitivity` (the paper's figures 5, 13 and 6). Losses are in nats per token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from flextron_mcore.report.collect_compare import SELECTORS, Comparison, Fit, RandomNetworks, Sensitivity
from flextron_mcore.report.drawing import MARKERS, SIZE, Picture, Theme, picture, ramp, stem, tidy
from flextron_mcore.report.parts import cost_unit

STYLES = {
    "router": ("o", "-"),
    "uniform": ("s", "--"),
    "matformer": ("^", "-."),
    "sensitivity": ("D", ":"),
    "random": ("x", "none"),
    "dense": ("P", "none"),
}
PANELS = {"heads": "Attention heads", "ffn_hidden_size": "FFN width"}


def _colour(theme: Theme, selector: str) -> str:
    colours = (theme.after, theme.before, *theme.others[:2], theme.muted, theme.others[2])
    return colours[list(STYLES).index(selector)]


def loss_against(comparison: Comparison, by: str) -> Picture:
    """Mean loss of each selector's networks against their `by`: "cost", or "non_embedding_parameters" (the paper's figure 5)."""
    c, title, unit = comparison, *cost_unit(comparison.cost, comparison.full_cost)
    if by == "cost":
        place = lambda net: (100 * net.share, net.mean_loss)  # noqa: E731
        label, word = f"Share of the full model’s {c.cost} (%)", c.cost
        own = lambda x: x / 100 * c.full_cost  # noqa: E731
    else:
        name, scale = cost_unit("parameters", c.full.non_embedding_parameters)
        place = lambda net: (net.non_embedding_parameters / scale, net.mean_loss)  # noqa: E731
        label, word = f"Non-embedding p{name[1:]}", "non-embedding parameters"
        own = lambda x: x * scale  # noqa: E731
    groups = [(selector, c.of(selector)) for selector in SELECTORS]
    groups.append(("dense", [net for net in c.dense if by != "cost" or net.share is not None]))
    groups = [(selector, sorted(nets, key=place)) for selector, nets in groups if nets]
    fit = next((fit for fit in c.fits if (fit.selector, fit.of) == ("router", by) and fit.values), None)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for selector, nets in groups:
            (marker, dash), colour = STYLES[selector], _colour(theme, selector)
            style = {"marker": marker, "linestyle": dash, "markersize": 5, "linewidth": 1.3}
            style["zorder"] = 3.5 if selector == "router" else 3
            text = "dense, from scratch" if selector == "dense" else selector
            axes.plot(*zip(*map(place, nets), strict=True), color=colour, label=text, **style)
        axes.plot(*place(c.full), "*", color=theme.ink, markersize=13, zorder=4, linestyle="none", label="full model")
        routed = [place(net)[0] for net in c.of("router")]
        if fit and routed:
            x = np.linspace(min(routed), max(*routed, place(c.full)[0]), 200)
            axes.plot(x, curve(fit, own(x)), color=theme.ink, linewidth=1, alpha=0.7, label="fit to router (eq. 12)", zorder=2)
        axes.set(xlabel=label, ylabel="Mean loss (nats per token)")
        tidy(axes)
        if by == "cost":
            shown = own(1) / unit  # of one percent
            top = axes.secondary_xaxis("top", functions=(lambda x: x * shown, lambda x: x / shown))
            top.set_xlabel(title)
            top.spines[:].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)

    series = [f"{selector} {', '.join(f'{y:.3f} at {x:.4g}' for x, y in map(place, nets))}" for selector, nets in groups]
    x, y = place(c.full)
    words = f"Mean loss in nats per token against {label[0].lower()}{label[1:]}: {'; '.join(series)};"
    words += f" full model {y:.3f} at {x:.4g}."
    caption = f"{c.label}: mean loss against {word}. Lower and further left is better."
    caption += " The thin line is eq. 12, fitted to the routers’ networks." if fit else ""
    name = f"{stem(c.label)}_loss_{'cost' if by == 'cost' else 'parameters'}"
    return picture(name, words, caption, draw, (SIZE[0], SIZE[1] + 0.5))


def curve(fit: Fit, sizes: np.ndarray) -> np.ndarray:
    """L(N) = (N/Nc)^-alpha + E (the paper's eq. 12); NaN where that is not a number."""
    critical, alpha, floor = fit.values
    with np.errstate(all="ignore"):
        values = (sizes / critical) ** -alpha + floor
    return np.where(np.isfinite(values), values, np.nan)


def random_boxes(comparison: Comparison) -> Picture:
    """Losses of random networks at each budget as boxes, and the routers' as a line (the paper's figure 13)."""
    rows = sorted(((row, finite(row.losses)) for row in comparison.random), key=lambda pair: pair[0].target)
    rows = [(row, losses) for row, losses in rows if losses]
    places = [100 * row.target for row, _ in rows]
    gap = min((b - a for a, b in zip(places, places[1:], strict=False)), default=10.0)
    routed = [(100 * row.target, row.router_loss) for row, _ in rows if row.router_loss is not None]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        axes.boxplot(
            [losses for _, losses in rows],
            positions=places,
            widths=0.5 * gap,
            whis=(0, 100),
            manage_ticks=False,
            patch_artist=True,
            boxprops={"facecolor": theme.grid, "edgecolor": theme.muted},
            medianprops={"color": theme.before, "linewidth": 1.8},
            whiskerprops={"color": theme.muted},
            capprops={"color": theme.muted},
        )
        box = Patch(facecolor=theme.grid, edgecolor=theme.muted, label="random networks")
        handles = [box, *axes.plot([], [], color=theme.before, linewidth=1.8, label="their median")]
        if routed:
            style = {"color": theme.after, "markersize": 5.5, "zorder": 5, "label": "router"}
            handles += axes.plot(*zip(*routed, strict=True), "o-", **style)
        axes.axhline(comparison.full.mean_loss, color=theme.ink, linestyle="--", linewidth=1)
        handles += axes.plot([], [], "--", color=theme.ink, linewidth=1, label="full model")
        axes.set(xlabel=f"Budget (% of the full model’s {comparison.cost})", ylabel="Mean loss (nats per token)")
        tidy(axes, x_numbers=False)
        axes.set_xticks(places, [f"{place:.4g}" for place in places])
        axes.set_xlim(places[0] - 0.6 * gap, places[-1] + 0.6 * gap)
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8.5)

    boxes = "; ".join(_box_words(*row) for row in rows)
    words = f"Box plots of the mean loss of random networks by budget, in nats per token: {boxes}."
    caption = f"{comparison.label}: losses of random networks of each budget (box from quartile to quartile, whiskers to the"
    caption += " extremes), and of the routers’ network of that budget (as the paper’s figure 13)."
    return picture(f"{stem(comparison.label)}_random", words, caption, draw)


def finite(losses: Sequence[float]) -> list[float]:
    """The losses without those of diverged networks."""
    return [value for value in losses if np.isfinite(value)]


def _box_words(row: RandomNetworks, losses: list[float]) -> str:
    text = f"{100 * row.target:.4g}%: {min(losses):.3f} to {max(losses):.3f}, median {np.median(losses):.3f}"
    return text + (f", router {row.router_loss:.3f}" if row.router_loss is not None else "")


def degradation(sensitivity: Sensitivity) -> Picture:
    """What replacing one block costs, by layer: heads above, FFN below, a line a candidate (the paper's figure 6)."""
    s = sensitivity
    axes_shown = [axis for axis in PANELS if s.candidates(axis)]
    label = lambda axis, size: f"{100 * size / s.full_size(axis):.0f}% ({size:,})"  # noqa: E731

    def draw(figure: Figure, theme: Theme) -> None:
        panels = figure.subplots(len(axes_shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, axis in zip(panels, axes_shown, strict=True):
            sizes = s.candidates(axis)
            for i, (size, colour) in enumerate(zip(sizes, ramp(theme, len(sizes)), strict=False)):
                x, y = zip(*((layer + 1, value) for layer, value in s.curve(axis, size)), strict=True)
                style = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4, "linewidth": 1.3}
                axes.plot(x, y, color=colour, label=label(axis, size), **style)
            axes.axhline(0, color=theme.muted, linewidth=0.8)
            axes.set_title(PANELS[axis], loc="left", fontsize=9.5, fontweight="bold")
            axes.set_xlabel("Layer" if axes is panels[-1] else "")
            tidy(axes)
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        panels[-1].xaxis.get_major_locator().set_params(integer=True)
        figure.supylabel("Loss above the full model’s (nats per token)", fontsize=9.5)

    texts = []
    for axis in axes_shown:
        for size in s.candidates(axis):
            values = ", ".join(f"{value:.3g}" for _, value in s.curve(axis, size))
            texts.append(f"{PANELS[axis]} {label(axis, size)}: {values}")
    words = f"Loss above the full model’s, in nats per token, when one block is replaced, by layer. {'; '.join(texts)}."
    caption = "Loss above the full model’s when the block of one layer alone is cut to a candidate (as the paper’s figure 6)."
    return picture(f"{stem(s.label)}_degradation", words, caption, draw, (SIZE[0], 0.8 + 1.9 * len(axes_shown)))
