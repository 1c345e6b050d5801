"""The figures about data, training and evaluated networks. Losses are in nats per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from flextron_mcore.config import ModelConfig
from flextron_mcore.report.collect import AblationRow, Network, Series, Training
from flextron_mcore.report.drawing import (
    MARKERS,
    SIZE,
    Picture,
    Theme,
    label_points,
    moving_average,
    percent_label,
    picture,
    ramp,
    short,
    stem,
    tidy,
)
from flextron_mcore.space import SubNetwork

Point = tuple[float, float]
MOST_LABELS = 12  # lines named in one legend
MOST_ROWS = 12  # networks in the picture of widths
MOST_NUMBERS = 12  # layers up to which that picture has a number in every cell; above, a colour scale


def pareto(family: Series, drawn: Sequence[Series], before: Series | None, name: str, caption: str) -> Picture:
    """Mean loss against parameters of the series `drawn`, in order; where that is `family` alone, its networks are named."""
    unit, word = (1e9, "billions") if family.networks[0].parameters >= 1e9 else (1e6, "millions")
    place = lambda net: (net.parameters / unit, net.mean_loss)  # noqa: E731

    def draw(figure: Figure, theme: Theme) -> None:
        axes, others = figure.subplots(), iter(theme.others * len(drawn))
        obstacles: list[Point] = []
        for series in drawn:
            colour = theme.after if series is family else theme.before if series is before else next(others)
            points = [place(net) for net in series.networks]
            face = colour if series is family else "none"
            label = short(series.label) + (" (before training)" if series is before else "")
            axes.plot(*zip(*points, strict=True), "o", color=colour, markerfacecolor=face, markersize=5.5, label=label, zorder=3)
            full = series.full()
            if full:
                axes.plot(*place(full), "*", color=colour, markerfacecolor=face, markersize=13, zorder=4)
            obstacles += points
        line = [place(net) for net in _front(family.networks)]
        if line:
            axes.plot(*zip(*line, strict=True), "-", color=theme.after, linewidth=1.2, alpha=0.55, zorder=2, label="Pareto front")
            obstacles += _along(line)
        axes.plot([], [], "*", color=theme.muted, markersize=10, linestyle="none", label="full model")
        axes.set(xlabel=f"Parameters ({word}, embeddings included)", ylabel="Mean loss (nats per token)")
        axes.margins(x=0.09, y=0.1)
        tidy(axes)
        if len(drawn) > 1:
            axes.legend(loc="best")
        else:
            axes.legend(loc="upper right")
            _label_points(figure, axes, family, place, obstacles, theme)

    full, least = family.full(), family.networks[-1]
    words = f"Scatter plot of mean loss against parameters for {len(family.networks)} networks"
    if full:
        words += f"; full model {full.mean_loss:.3f} nats per token at {full.parameters:,} parameters"
    words += f"; smallest, {least.name}: {least.mean_loss:.3f} at {least.parameters:,}."
    if before and before in drawn:
        words += f" The series {before.label} shows the same before training."
    return picture(name, words, caption, draw)


def train_curve(training: Training) -> Picture:
    """Training loss of the full model and, smoothed with their range, of the step's sub-networks."""
    steps, full = [row[0] for row in training.train], [row[1] for row in training.train]
    subs = [(step, losses) for step, _, losses in training.train if losses]
    window = max(1, len(steps) // 40)
    validated = [(step, losses["full"]) for step, losses in training.validation if "full" in losses]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        if subs:
            x, means = [step for step, _ in subs], [float(np.mean(losses)) for _, losses in subs]
            low, high = [min(losses) for _, losses in subs], [max(losses) for _, losses in subs]
            low, high = moving_average(low, window), moving_average(high, window)
            axes.fill_between(x, low, high, color=theme.before, alpha=0.18, linewidth=0, label="sub-networks, lowest to highest")
            axes.plot(x, moving_average(means, window), "--", color=theme.before, label="sub-networks, mean")
        axes.plot(steps, full, color=theme.after, alpha=0.25, linewidth=0.8)
        axes.plot(steps, moving_average(full, window), color=theme.after, label="full model")
        if validated and not subs:
            style = {"color": theme.ink, "markersize": 4, "linewidth": 1, "label": "full model, validation"}
            axes.plot(*zip(*validated, strict=True), "o--", **style)
        axes.set(xlabel="Step", ylabel="Training loss (nats per token)" if subs else "Loss (nats per token)")
        tidy(axes)
        axes.legend(loc="upper right")

    smooth = f"smoothed over {window} logged steps" if window > 1 else "not smoothed"
    words = f"Training loss over {steps[-1]:,} steps; full model from {full[0]:.3f} to {full[-1]:.3f} nats per token."
    text = f"Training loss of the full model{' and of the step’s sub-networks' if subs else ''}, {smooth}."
    return picture(f"{stem(training.label)}_training", words, text, draw)


def validation_curves(training: Training) -> list[Picture]:
    """Validation loss while training: uniform networks (the paper's fig. 10), random ones (fig. 11), routed ones, any others."""
    names = list(dict.fromkeys(name for _, losses in training.validation for name in losses if name != "full"))
    groups: dict[str, list[str]] = {"uniform": [], "random": [], "router": [], "other": []}
    for name in names:
        groups[next((g for g in ("uniform", "random", "router") if name.startswith(g)), "other")].append(name)
    texts = {
        "uniform": "Validation loss of uniform sub-networks (the same widths in every layer; as the paper’s figure 10).",
        "random": "Validation loss of random sub-networks (as the paper’s figure 11).",
        "router": f"{training.label}: validation loss of what the routers choose, by share of the full model’s cost.",
        "other": "Validation loss of the other sub-networks.",
    }
    return [_validation(training, group, members, texts[group]) for group, members in groups.items() if members]


def _validation(training: Training, group: str, names: list[str], caption: str) -> Picture:
    curves = {name: [(step, losses[name]) for step, losses in training.validation if name in losses] for name in ["full", *names]}
    ordered = sorted(names, key=lambda name: -curves[name][-1][1])

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        colours = ramp(theme, len(ordered))
        for i, name in enumerate(ordered):
            label = short(name.removeprefix("uniform ")) if i < MOST_LABELS else None
            marker = MARKERS[i % len(MARKERS)]
            axes.plot(*zip(*curves[name], strict=True), marker=marker, markersize=3, linewidth=1.3, color=colours[i], label=label)
        if len(ordered) > MOST_LABELS:
            axes.plot([], [], color="none", label=f"and {len(ordered) - MOST_LABELS} more")
        if curves["full"]:
            axes.plot(*zip(*curves["full"], strict=True), color=theme.ink, linewidth=2.2, label="full model", zorder=4)
        axes.set(xlabel="Step", ylabel="Validation loss (nats per token)")
        tidy(axes)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)

    rows = (min(len(names), MOST_LABELS + 1) + 2) // 2
    ends = ", ".join(f"{name} {curves[name][0][1]:.3f} to {curves[name][-1][1]:.3f}" for name in curves if curves[name])
    words = f"Validation loss in nats per token, first to last: {ends}."
    return picture(f"{stem(training.label)}_validation_{group}", words, caption, draw, (SIZE[0], SIZE[1] + 0.17 * rows))


def ablation_bars(rows: Sequence[AblationRow], name: str) -> Picture:
    """Loss with half the heads or half the FFN, unsorted and sorted, before any training (the paper's Table 5)."""
    base = next((row for row in rows if row.order == "-"), None)
    cut = [row for row in rows if row.order != "-"]
    setups = list(dict.fromkeys(row.setup for row in cut))
    many = len({row.score for row in cut if row.order == "sorted"}) > 1
    kind = lambda row: f"sorted by {row.score}" if many and row.order == "sorted" else row.order  # noqa: E731
    kinds = list(dict.fromkeys(kind(row) for row in cut))

    def draw(figure: Figure, theme: Theme) -> None:
        axes, colours = figure.subplots(), (theme.before, theme.after, *theme.others)
        width = 0.74 / max(len(kinds), 1)
        for i, series in enumerate(kinds):
            bars = {row.setup: row.loss for row in cut if kind(row) == series}
            places = [setups.index(s) + (i - (len(kinds) - 1) / 2) * width for s in bars]
            made = axes.bar(places, list(bars.values()), width * 0.92, color=colours[i % len(colours)], label=short(series, 34))
            axes.bar_label(made, fmt="%.3f", padding=2, fontsize=9, color=theme.ink)
        if base:
            axes.axhline(base.loss, color=theme.ink, linestyle="--", label=f"full model, {base.loss:.3f}", zorder=4)
        axes.set_xticks(range(len(setups)), [short(s) for s in setups])
        axes.set_ylabel("Loss (nats per token)")
        axes.margins(x=0.08, y=0.12)
        tidy(axes, x_numbers=False)
        figure.legend(loc="outside lower center", ncols=2 if many else 3)

    words = "Bar chart of loss in nats per token: " + "; ".join(f"{r.setup}, {kind(r)}: {r.loss:.3f}" for r in cut)
    words += f"; full model: {base.loss:.3f}." if base else "."
    return picture(name, words, "Loss when half of one operator is cut, before any training. Lower is better.", draw)


def layer_widths(series: Series) -> Picture | None:
    """Heads and FFN width of every layer of the networks that are not uniform (as the paper's fig. 7); None if all are."""
    nets = [net for net in series.networks if not net.subnetwork.is_uniform or not all(a.executed for a in net.subnetwork.layers)]
    if not nets:
        return None
    return layer_grid([(net.name, net.subnetwork) for net in nets], series.model, "layer_widths")


def layer_grid(networks: Sequence[tuple[str, SubNetwork]], model: ModelConfig, name: str, before: str = "") -> Picture:
    """Heads and FFN width of every layer, a row for each named network, largest first; the caption begins with `before`."""
    rows, left_out = networks[:MOST_ROWS], len(networks) - MOST_ROWS
    narrow = any(net.hidden_size != model.hidden_size for _, net in rows)
    names = [f"{short(name, 12)}, {net.hidden_size} wide" if narrow else name for name, net in rows]
    layers, numbered = model.num_layers, model.num_layers <= MOST_NUMBERS
    widths = lambda layer: (layer.num_attention_heads, layer.ffn_hidden_size) if layer.executed else (0, 0)  # noqa: E731
    shares = np.array([[widths(layer) for layer in net.layers] for _, net in rows])
    shares = shares / (model.num_attention_heads, model.ffn_hidden_size)

    def draw(figure: Figure, theme: Theme) -> None:
        colours = LinearSegmentedColormap.from_list("shades", theme.shades)
        panels = figure.subplots(2, 1, sharex=True)
        for which, (axes, title) in enumerate(zip(panels, ("Attention heads", "FFN width"), strict=True)):
            values = shares[:, :, which]
            image = axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            for (y, x), value in np.ndenumerate(values):
                if numbered or value == 0:
                    bright = np.dot(colours(value)[:3], (0.299, 0.587, 0.114)) > 0.5
                    style = {"ha": "center", "va": "center", "fontsize": 8, "color": "#10151d" if bright else "#ffffff"}
                    axes.text(x, y, f"{100 * value:.0f}" if value else "–", **style)
            axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
            axes.set_yticks(range(len(names)), [short(row, 24 if narrow else 18) for row in names])
            axes.set_xticks(np.arange(layers + 1) - 0.5, minor=True)
            axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
            axes.grid(which="minor", color=theme.gap, linewidth=1.5 if numbered else 0.7)
            axes.tick_params(which="both", length=0)
            axes.spines[:].set_visible(False)
        ticks = range(0, layers, 1 if numbered else -(-layers // 10))
        panels[1].set_xticks(ticks, [str(i + 1) for i in ticks])
        panels[1].set_xlabel("Layer")
        if not numbered:
            bar = figure.colorbar(image, ax=panels, fraction=0.04, pad=0.02, ticks=[0, 0.25, 0.5, 0.75, 1])
            bar.ax.set_yticklabels(["0%", "25%", "50%", "75%", "100%"])
            bar.outline.set_visible(False)

    kept = [", ".join(f"{100 * heads:.0f}/{100 * ffn:.0f}" for heads, ffn in row) for row in shares]
    words = "Percent of heads / percent of FFN neurons that each layer keeps. "
    words += "; ".join(f"{row}: {shares}" for row, shares in zip(names, kept, strict=True)) + "."
    caption = f"{before}Percent of its heads and FFN neurons that each layer keeps (as the paper’s figure 7)"
    caption += "; – is a skipped layer."
    caption += f" Wide: hidden channels in use, of {model.hidden_size:,}." if narrow else ""
    caption += f" The {MOST_ROWS} largest are shown; {left_out} more are in the table." if left_out > 0 else ""
    return picture(name, words, caption, draw, (SIZE[0], 1.3 + 2 * 0.26 * max(len(names), 2)))


def _front(networks: Sequence[Network]) -> list[Network]:
    """The networks that no smaller one beats, smallest first (the Pareto front)."""
    front: list[Network] = []
    for net in sorted((n for n in networks if np.isfinite(n.mean_loss)), key=lambda n: (n.parameters, n.mean_loss)):
        if not front or net.mean_loss < front[-1].mean_loss:
            front.append(net)
    return front


def _along(line: list[Point], parts: int = 12) -> list[Point]:
    """Points along a polyline, for labels to keep away from."""
    ends = zip(line, line[1:], strict=False)
    return [(a[0] + (b[0] - a[0]) * t / parts, a[1] + (b[1] - a[1]) * t / parts) for a, b in ends for t in range(parts)]


def _label_points(
    figure: Figure, axes: Axes, series: Series, place: Callable[[Network], Point], obstacles: list[Point], theme: Theme
) -> None:
    """Name the points where there is room: the full model first, then the smallest, then down in size."""
    full = series.full()
    nets = [net for net in series.networks if net is full or not full or net.subnetwork != full.subnetwork]
    nets.sort(key=lambda net: (net is not full, net is not series.networks[-1], -net.parameters))
    name = lambda net: percent_label(net.subnetwork, series.model) or short(net.name, 20)  # noqa: E731
    label_points(
        figure, axes, [("full" if net is full else name(net), place(net), net is full) for net in nets], obstacles, theme
    )
