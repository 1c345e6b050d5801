"""Style and drawing of figures, each as two PNGs: on white (also written as a file), and on transparent for dark pages.

Figures are drawn on matplotlib's Agg canvas without pyplot, so there is no global state, and equal input gives equal bytes.
Colours are Okabe and Ito's, which colour-blind readers can tell apart; lines also differ in marker or dash.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

DPI = 200
SIZE = (5.0, 3.6)  # inches; small enough that 9.5 pt text is readable when the image is as wide as a phone
MARKERS = "osD^vPX<>"


@dataclass(frozen=True)
class Theme:
    """Colours of all figures on one background, light or dark, as matplotlib takes them.

    Attributes:
        background: background of the figure; "none" is transparent.
        ink: text, and lines of the full model.
        muted: axes, ticks, and lines that stand back behind the data.
        grid: grid lines.
        after: first data colour, such as of the model after training.
        before: second data colour, such as of the model before training, or of sub-networks.
        gap: lines between the cells of a grid of numbers.
        others: further data colours.
        shades: colour scale for shares of the full size, from the smallest to the largest share.
        lines: colour scale for lines that have an order, such as networks by size.
    """

    background: str
    ink: str
    muted: str
    grid: str
    after: str
    before: str
    gap: str
    others: tuple[str, ...]
    shades: tuple[str, ...]
    lines: tuple[str, ...]


LIGHT = Theme(
    background="#ffffff",
    ink="#1d2430",
    muted="#667080",
    grid="#e3e6eb",
    after="#0072b2",
    before="#d55e00",
    gap="#ffffff",
    others=("#009e73", "#cc79a7", "#e69f00"),
    shades=("#f4f7fb", "#9cc4e4", "#0072b2", "#063a63"),
    lines=("#440154", "#31688e", "#2a9d7c", "#c9a800"),
)
DARK = Theme(
    background="none",
    ink="#e4e8ee",
    muted="#9aa4b2",
    grid="#333a45",
    after="#56b4e9",
    before="#f0883e",
    gap="#1a1f27",
    others=("#2fc79a", "#e29cc4", "#f0b93a"),
    shades=("#20262f", "#1f4e79", "#2f86c5", "#9ad4ff"),
    lines=("#b79cf0", "#56a8e0", "#45c9a0", "#f3dc5c"),
)


@dataclass(frozen=True)
class Picture:
    """Finished figure, for light and dark pages.

    Attributes:
        name: file name without its ending.
        alt: description in words, for readers who do not see the figure.
        caption: text below the figure.
        light, dark: PNG bytes.
    """

    name: str
    alt: str
    caption: str
    light: bytes
    dark: bytes


def ramp(theme: Theme, count: int) -> np.ndarray:
    """Colours of lines that have an order, from the last of `theme.lines` to the first: RGBA rows in 0..1 [max(count, 2), 4]."""
    return LinearSegmentedColormap.from_list("lines", theme.lines)(np.linspace(1, 0, max(count, 2)))


def moving_average(values: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average, as long as `values`; near both ends the mean is over the values inside the window that exist.

    window: number of values in a mean; an even number counts as the next odd one.
    """
    half, inside = max(window, 1) // 2, slice(max(window, 1) // 2, max(window, 1) // 2 + len(values))
    kernel = np.ones(2 * half + 1)
    return np.convolve(values, kernel)[inside] / np.convolve(np.ones(len(values)), kernel)[inside]


def chart(figure: Figure, xlabel: str, ylabel: str = "Mean loss (nats per token)") -> Axes:
    """Make the axes of a figure with one panel, in the style of the report.

    Args:
        figure: figure to draw into.
        xlabel, ylabel: labels of the axes.
    """
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    tidy(axes)
    return axes


def panels(figure: Figure, titles: Sequence[str], **options: bool) -> list[Axes]:
    """Make panels above each other that share the x axis, one for each title.

    options: further arguments of matplotlib's Figure.subplots.
    """
    made = list(figure.subplots(len(titles), 1, sharex=True, squeeze=False, **options)[:, 0])
    for axes, title in zip(made, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    return made


def tidy(axes: Axes, x_numbers: bool = True) -> None:
    """Give axes a grid behind the data and no frame above and on the right.

    x_numbers: True for numbers on the x axis, which get round ticks and vertical grid lines; False for names.
    """
    axes.grid(axis="y" if not x_numbers else "both")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if x_numbers:
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=(1, 2, 2.5, 5, 10), integer=axes.get_xlabel() in ("Step", "Layer")))


def log_scale(axes: Axes, values: Sequence[float]) -> None:
    """Give axes a logarithmic y scale for positive `values`, with plain numbers as ticks.

    The ticks are powers of ten and, if the values span less than a factor of 100, also 2 and 5 times these.
    """
    axes.set_yscale("log")
    few = max(values) < 100 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def label_points(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[str, tuple[float, float], bool]],
    obstacles: Sequence[tuple[float, float]],
    theme: Theme,
) -> None:
    """Write names beside points, clear of other names, obstacles and the legend; a name without room is left out.

    Args:
        figure, axes: figure and axes to draw into.
        labels: (text, coordinates of the point, bold), the most important first.
        obstacles: points that labels keep away from.
        theme: colours.
    """
    figure.draw_without_rendering()
    renderer, frame = figure.canvas.get_renderer(), axes.get_window_extent()
    unit = figure.dpi / 72  # pixels a point
    taken = [axes.get_legend().get_window_extent(renderer).extents] if axes.get_legend() else []
    for x, y in obstacles:
        px, py = axes.transData.transform((x, y))
        taken.append((px - 4 * unit, py - 4 * unit, px + 4 * unit, py + 4 * unit))
    around = [(7, 0), (-7, 0), (0, 8), (0, -8), (6, 7), (-6, 7), (6, -7), (-6, -7), (0, 16), (0, -16)]
    around += [(10, 14), (-10, -14), (-10, 14), (10, -14), (14, 22), (-14, -22), (-14, 22), (14, -22)]
    for text, point, bold in labels:
        for dx, dy in [(11, 0), (-11, 0), *around] if bold else around:
            sides = ("left" if dx > 0 else "right" if dx < 0 else "center", "bottom" if dy > 0 else "top" if dy < 0 else "center")
            near = (0 if dx > 0 else 1 if dx < 0 else 0.5, 0 if dy > 0 else 1)  # the corner where a leader line starts
            leader = {"arrowstyle": "-", "color": theme.muted, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3, "relpos": near}
            label = axes.annotate(
                text,
                point,
                (dx, dy),
                textcoords="offset points",
                ha=sides[0],
                va=sides[1],
                fontsize=8.5,
                color=theme.ink,
                fontweight="bold" if bold else "normal",
                in_layout=False,
                arrowprops=leader if abs(dy) > 8 else None,
            )
            label.update_positions(renderer)
            left, low, right, high = box = Text.get_window_extent(label, renderer).extents
            inside = left > frame.x0 and right < frame.x1 and low > frame.y0 and high < frame.y1
            if inside and not any(left < b[2] and b[0] < right and low < b[3] and b[1] < high for b in taken):
                taken.append(box)
                break
            label.remove()


def picture(
    name: str, alt: str, caption: str, draw: Callable[[Figure, Theme], None], size: tuple[float, float] = SIZE
) -> Picture:
    """Draw a picture twice, for light and for dark pages.

    Args:
        name: file name without its ending.
        alt: description in words, for readers who do not see the picture.
        caption: text below the picture.
        draw: function (figure, theme) that draws into the figure in the theme's colours; called twice.
        size: width and height in inches.
    """
    return Picture(name, alt, caption, _render(draw, size, LIGHT), _render(draw, size, DARK))


def _render(draw: Callable[[Figure, Theme], None], size: tuple[float, float], theme: Theme) -> bytes:
    """Draw a figure in the colours of a theme, and return it as the bytes of a PNG file.

    The user's matplotlibrc is ignored, and text is drawn literally (`$` begins no formula).
    """
    style: dict[str, object] = {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "text.parse_math": False,
        "grid.color": theme.grid,
    }
    style |= {"legend.frameon": False, "legend.fontsize": 9}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), theme.ink)
    style |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), theme.muted)
    style |= dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), theme.background)
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()
