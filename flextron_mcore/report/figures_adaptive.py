"""The figures of adaptive routers (the paper's figures 8 and 9, and what single tokens spend). Losses in nats per token."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from flextron_mcore.report.collect_adaptive import Adaptive, TokenCosts
from flextron_mcore.report.drawing import MARKERS, SIZE, Picture, Theme, picture, ramp, tidy
from flextron_mcore.report.parts import percent

_COLUMNS = 64  # characters of a line of text
_NAMES = {"full": "adaptive, kv full", "own": "adaptive, kv own"}


def pareto(found: Adaptive, costs: str, name: str, label: str) -> Picture:
    """Mean loss against the average share, static and adaptive."""
    series = {"static": [(100 * b.static_share, b.static_loss) for b in found.budgets]}
    for policy, text in _NAMES.items():
        if points := [
            (100 * b.adaptive[policy].share, b.adaptive[policy].mean_loss) for b in found.budgets if policy in b.adaptive
        ]:
            series[text] = points

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for (text, points), marker, colour in zip(
            series.items(), MARKERS, (theme.before, theme.after, theme.others[0]), strict=False
        ):
            axes.plot(*zip(*sorted(points), strict=True), f"{marker}-", color=colour, label=text, markersize=5)
        axes.set(xlabel=f"Average share of the full model’s {costs} (%)", ylabel="Mean loss (nats per token)")
        axes.legend()
        tidy(axes)

    words = "; ".join(f"{text} {', '.join(f'{y:.3f} at {x:.1f}%' for x, y in points)}" for text, points in series.items())
    caption = f"{label}: mean loss against what tokens spend on average. Lower and further left is better."
    return picture(name, f"Mean loss against the average share of {costs}: {words}.", caption, draw)


def degradation(found: Adaptive, costs: str, name: str, label: str) -> Picture:
    """Each domain's loss above the full model's against the budget (the paper's figure 8)."""
    budgets = [100 * b.target for b in found.budgets]
    series = {d: [b.adaptive[found.kv_policy].loss[d] - full for b in found.budgets] for d, full in found.full_loss.items()}

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        for (domain, losses), colour, marker in zip(
            series.items(), ramp(theme, len(series)), MARKERS * len(series), strict=False
        ):
            axes.plot(budgets, losses, f"{marker}-", color=colour, label=domain, markersize=5)
        axes.set(xlabel=f"Budget (% of the full model’s {costs})", ylabel="Loss above the full model’s (nats)")
        axes.legend()
        tidy(axes)

    cells = []
    for domain, losses in series.items():
        cells.append(f"{domain} {', '.join(f'{y:.3f} at {x:.0f}%' for x, y in zip(budgets, losses, strict=True))}")
    words = "; ".join(cells)
    caption = f"{label}: what each domain loses at a budget (as the paper’s figure 8)."
    return picture(name, f"Loss above the full model’s, by domain: {words}.", caption, draw)


def allocation(found: Adaptive, name: str, label: str) -> Picture:
    """The mean level of each block, by domain, for the middle budget (the paper's figure 9)."""
    budget = found.budgets[len(found.budgets) // 2]
    mix = budget.adaptive[found.kv_policy]
    domains = list(mix.levels)
    mean = np.array([[_mean_level(block) for block in mix.levels[domain]] for domain in domains])
    layers = mean.shape[1] // 2

    def draw(figure: Figure, theme: Theme) -> None:
        colours = LinearSegmentedColormap.from_list("shares", theme.shades)
        for axes, part, title in zip(figure.subplots(2, 1), (mean[:, ::2], mean[:, 1::2]), ("Attention", "FFN"), strict=True):
            drawn = axes.imshow(part, cmap=colours, vmin=0, vmax=1, aspect="auto")
            axes.set_yticks(range(len(domains)), domains)
            axes.set_xticks(range(layers), [str(i + 1) for i in range(layers)])
            axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
            axes.spines[:].set_visible(False)
        axes.set_xlabel("Layer")
        figure.colorbar(drawn, ax=figure.axes, label="Mean level, 0 smallest, 1 largest", shrink=0.8)

    cells = [f"{domain} {', '.join(f'{value:.2f}' for value in row)}" for domain, row in zip(domains, mean, strict=True)]
    words = f"Mean level of attention and FFN of each layer in turn, by domain: {'; '.join(cells)}."
    caption = f"{label}: how much of every block the tokens of a domain use on average, at a budget of {percent(budget.target)}"
    return picture(name, words, f"{caption} (as the paper’s figure 9).", draw, (SIZE[0], 1.6 + 0.5 * len(domains)))


def heat(tokens: TokenCosts, name: str, costs: str) -> Picture:
    """A text whose tokens are coloured by what they spent."""
    cells = []
    for text, share in zip(tokens.texts, tokens.shares, strict=True):
        shown = text.replace("\n", "⏎").replace("\t", "→") or "·"
        cells += [(character, share) for character in shown]
    lines = [cells[i : i + _COLUMNS] for i in range(0, len(cells), _COLUMNS)]
    low, high = min(tokens.shares), max(tokens.shares)
    span = high - low or 1.0

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        colours = LinearSegmentedColormap.from_list("shares", theme.shades)
        grid = np.full((len(lines), _COLUMNS), np.nan)
        for y, line in enumerate(lines):
            for x, (character, share) in enumerate(line):
                grid[y, x] = (share - low) / span
                ink = "black" if sum(colours(grid[y, x])[:3]) > 1.6 else "white"
                axes.text(x, y, character, ha="center", va="center", fontsize=6, family="monospace", color=ink)
        drawn = axes.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
        axes.set_axis_off()
        bar = figure.colorbar(drawn, ax=axes, orientation="horizontal", fraction=0.08, ticks=[0, 1])
        bar.ax.set_xticklabels([percent(low), percent(high)])

    order = [text for _, text in sorted(zip(tokens.shares, tokens.texts, strict=True), reverse=True)]
    words = f"What the first {len(order)} tokens of a text of {tokens.domain} spend, {percent(low)} to {percent(high)} of the"
    words += f" full model’s {costs}; most: {', '.join(map(repr, order[:5]))}; least: {', '.join(map(repr, order[-5:]))}."
    caption = f"{tokens.domain}: the share of the full model’s {costs} that each token spends, at a budget of"
    return picture(name, words, f"{caption} {percent(tokens.budget)}.", draw, (SIZE[0], 0.8 + 0.17 * len(lines)))


def _mean_level(shares: list[float]) -> float:
    """0 where all tokens are at the smallest level, 1 at the largest."""
    return sum(level * share for level, share in enumerate(shares)) / max(len(shares) - 1, 1)
