"""Sub-networks as columns of a table, in words, and as a picture, for every axis of axes.py. No torch import."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from flextron_mcore.axes import Axis, layer_axes, network_axes
from flextron_mcore.config import ModelConfig
from flextron_mcore.report.drawing import SIZE, Picture, Theme, panels, picture
from flextron_mcore.report.text import short, spread
from flextron_mcore.report.topic import Column
from flextron_mcore.space import SubNetwork

MOST_ROWS = 12  # networks in one picture
MOST_NUMBERS = 12  # up to this many layers the picture has a number in every cell, above it a colour scale


def layer_columns(networks: Sequence[SubNetwork], model: ModelConfig) -> list[Column]:
    """Table columns of the axes that each layer chooses (heads, FFN neurons).

    A column is (header with the full model's size, one cell for each network): the size that all executed layers share, or the
    mean and the range.
    """
    sizes = lambda net, axis: [axis.size(layer) for layer in net.layers if layer.executed]  # noqa: E731
    return [(f"{axis.short} of {axis.full(model):,}", [spread(sizes(net, axis)) for net in networks]) for axis in layer_axes()]


def network_columns(networks: Sequence[SubNetwork], model: ModelConfig, all_axes: bool = True) -> list[Column]:
    """Table columns of the axes that have one size for the whole network (hidden size, depth), not one for each layer.

    A column is (header with the full model's size, one cell with the network's size for each network).

    Args:
        networks: networks, one for each row of the table.
        model: architecture of the full model.
        all_axes: False leaves out axes in which every network has the full size.
    """
    columns = []
    for axis in network_axes():
        sizes = [axis.size(net) for net in networks]
        if all_axes or any(size != axis.full(model) for size in sizes):
            columns.append((f"{axis.short} of {axis.full(model):,}", [f"{size:,}" for size in sizes]))
    return columns


def percent_label(net: SubNetwork, model: ModelConfig) -> str | None:
    """Label such as `50/25`, for 50% of the heads and 25% of the FFN neurons in all layers; None for any other network."""
    if not is_plain(net) or any(axis.size(net) != axis.full(model) for axis in network_axes()):
        return None
    return "/".join(f"{100 * axis.size(net.layers[0]) / axis.full(model):.0f}" for axis in layer_axes())


def describe(net: SubNetwork, model: ModelConfig) -> str:
    """Widths as shares of the full model: `50% heads, 75% FFN`; where layers differ the mean, with 0 for a skipped layer."""
    shares = [sum(axis.size(layer) for layer in net.layers if layer.executed) / axis.full(model) for axis in layer_axes()]
    names = [axis.unit if axis.short.lower() == axis.unit else axis.short for axis in layer_axes()]
    words = ", ".join(f"{100 * share / model.num_layers:.0f}% {name}" for share, name in zip(shares, names, strict=True))
    return words if is_plain(net) else f"{words} (mean)"


def is_plain(net: SubNetwork) -> bool:
    """True if all layers are executed and have the same widths."""
    return net.is_uniform and all(layer.executed for layer in net.layers)


def units() -> list[str]:
    """Units of the axes that each layer chooses, as text: heads, FFN neurons."""
    return [axis.unit if axis.short.lower() == axis.unit else f"{axis.short} {axis.unit}" for axis in layer_axes()]


def shares_in_words() -> str:
    """Explanation of the labels of `percent_label`: `percent of heads / percent of FFN neurons`."""
    return " / ".join(f"percent of {unit}" for unit in units())


def layer_grid(networks: Sequence[tuple[str, SubNetwork]], model: ModelConfig, name: str, before: str = "") -> Picture:
    """Picture of the widths of every layer of some networks.

    Args:
        networks: (name, sub-network) of each row; the first MOST_ROWS are shown.
        model: architecture of the full model.
        name: file name of the picture without its ending.
        before: text that the caption begins with.
    """
    rows, left_out, axes_shown = networks[:MOST_ROWS], len(networks) - MOST_ROWS, layer_axes()
    narrow = any(net.hidden_size != model.hidden_size for _, net in rows)
    names = [f"{short(name, 12)}, {net.hidden_size} wide" if narrow else name for name, net in rows]
    size = lambda axis, layer: axis.size(layer) if layer.executed else 0  # noqa: E731
    shares = np.array([[[size(axis, a) / axis.full(model) for axis in axes_shown] for a in net.layers] for _, net in rows])

    def draw(figure: Figure, theme: Theme) -> None:
        _draw_grid(figure, theme, shares, [short(row, 24 if narrow else 18) for row in names], axes_shown)

    kept = [", ".join("/".join(f"{100 * share:.0f}" for share in layer) for layer in row) for row in shares]
    words = f"P{shares_in_words()[1:]} that each layer keeps. "
    words += "; ".join(f"{row}: {shares}" for row, shares in zip(names, kept, strict=True)) + "."
    caption = (
        f"{before}Percent of its {' and '.join(units())} that each layer keeps (as Flextron, figure 7); – is a skipped layer."
    )
    caption += f" Wide: hidden channels in use, of {model.hidden_size:,}." if narrow else ""
    caption += f" The {MOST_ROWS} largest are shown; {left_out} more are in the table." if left_out > 0 else ""
    return picture(name, words, caption, draw, (SIZE[0], 1.3 + len(axes_shown) * 0.26 * max(len(names), 2)))


def _draw_grid(figure: Figure, theme: Theme, shares: np.ndarray, names: list[str], axes_shown: list[Axis]) -> None:
    """Draw a panel for each axis, with a row for each network and a column for each layer.

    Args:
        figure: figure to draw into.
        theme: colours.
        shares: widths as shares of the full ones [networks, layers, axes]; drawn as shades, and as numbers where there is room.
        names: names of the networks.
        axes_shown: axes of the panels.
    """
    colours = LinearSegmentedColormap.from_list("shades", theme.shades)
    drawn = panels(figure, [axis.title for axis in axes_shown])
    layers = shares.shape[1]
    numbered = layers <= MOST_NUMBERS
    for which, axes in enumerate(drawn):
        values = shares[:, :, which]
        image = axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for (y, x), value in np.ndenumerate(values):
            if numbered or value == 0:
                bright = np.dot(colours(value)[:3], (0.299, 0.587, 0.114)) > 0.5
                style = {"ha": "center", "va": "center", "fontsize": 8, "color": "#10151d" if bright else "#ffffff"}
                axes.text(x, y, f"{100 * value:.0f}" if value else "–", **style)
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(np.arange(layers + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=theme.gap, linewidth=1.5 if numbered else 0.7)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
    ticks = range(0, layers, 1 if numbered else -(-layers // 10))
    drawn[-1].set_xticks(ticks, [str(i + 1) for i in ticks])
    drawn[-1].set_xlabel("Layer")
    if not numbered:
        bar = figure.colorbar(image, ax=drawn, fraction=0.04, pad=0.02, ticks=[0, 0.25, 0.5, 0.75, 1])
        bar.ax.set_yticklabels(["0%", "25%", "50%", "75%", "100%"])
        bar.outline.set_visible(False)
