"""Drawing: moving averages, scales, colours, and independence of the user's matplotlib settings."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from flextron_mcore.report import drawing


def plot() -> drawing.Picture:
    """Figure with a label that matplotlib would read as mathematics."""

    def draw(figure: Figure, theme: drawing.Theme) -> None:
        axes = figure.subplots()
        axes.plot([1, 2], [3, 4], color=theme.after, label="$a_{$")
        axes.legend()
        drawing.tidy(axes)

    return drawing.picture("plot", "", "", draw)


def test_moving_average_keeps_length_and_place():
    assert np.allclose(drawing.moving_average([1, 2, 6, 3, 5], 3), [1.5, 3, 11 / 3, 14 / 3, 4])
    assert np.allclose(drawing.moving_average([1.0, 4.0], 1), [1, 4])
    assert np.allclose(drawing.moving_average([1.0, 4.0, 4.0], 99), 3.0)


@pytest.mark.parametrize(
    ("values", "expected"), [([0.03, 0.2, 0.31], ["0.05", "0.1", "0.2"]), ([0.0005, 2.0], ["0.001", "0.01", "0.1", "1"])]
)
def test_log_scale_has_plain_numbers(values, expected):
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(range(len(values)), values)
    drawing.log_scale(axes, values)
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    shown = [t.get_text() for t, y in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True) if low <= y <= high]
    assert shown == expected
    assert len(axes.yaxis.get_minorticklocs()) == 0


def test_ramp_runs_from_the_last_colour_to_the_first():
    colours = drawing.ramp(drawing.LIGHT, 3)
    assert [matplotlib.colors.to_hex(colour) for colour in colours[[0, -1]]] == [drawing.LIGHT.lines[-1], drawing.LIGHT.lines[0]]
    assert len(drawing.ramp(drawing.LIGHT, 1)) == 2


def test_settings_of_the_user_neither_matter_nor_change():
    plain = plot()
    with matplotlib.rc_context({"font.size": 31.0, "axes.linewidth": 9.0, "lines.linewidth": 7.0}):
        other = plot()
        assert matplotlib.rcParams["font.size"] == 31.0 and matplotlib.rcParams["text.parse_math"]
    assert (plain.light, plain.dark) == (other.light, other.dark)


@pytest.mark.parametrize(("theme", "corner"), [("light", (255, 255, 255, 255)), ("dark", (0, 0, 0, 0))])
def test_background_suits_the_page(theme, corner):
    found = Image.open(io.BytesIO(getattr(plot(), theme))).getpixel((0, 0))
    assert found[3] == corner[3] and (found[3] == 0 or found == corner)
