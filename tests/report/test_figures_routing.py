"""The picture of router training: what is in it, and where its three stages are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flextron_mcore.report import figures_routing
from flextron_mcore.report.collect import Training, collect
from flextron_mcore.report.figures_routing import dynamics, stages
from tests.report import synthetic


def read(run, *made) -> Training:
    synthetic.write(run / "my_router", *made)
    return collect(run).training[0]


def drawn_by(monkeypatch, training) -> list:
    """The axes of the picture."""
    kept = []
    monkeypatch.setattr(figures_routing, "picture", lambda name, alt, caption, draw, size: kept.append(draw))
    dynamics(training)
    from matplotlib.figure import Figure

    from flextron_mcore.report.drawing import LIGHT

    figure = Figure()
    kept[0](figure, LIGHT)
    return figure.axes


def test_words_name_the_ends_and_where_routers_follow(tmp_path):
    picture = dynamics(read(tmp_path, *synthetic.routing()))
    assert picture.name == "my_router_dynamics"
    assert "over 300 steps" in picture.alt and "L2 loss of the surrogate (nats²) from 1.8" in picture.alt
    assert picture.alt.endswith("The routers follow the surrogate from step 61, whose error settles at step 142.")
    assert all(f" {number}: " in picture.caption for number in (1, 2, 3)) and "smoothed over 7" in picture.caption


def test_panels_have_log_scales_the_threshold_and_the_stages(tmp_path, monkeypatch):
    loss, l2, error = drawn_by(monkeypatch, read(tmp_path, *synthetic.routing()))
    assert [axes.get_yscale() for axes in (loss, l2, error)] == ["linear", "log", "log"]
    upright = [[line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1] for axes in (loss, l2, error)]
    assert upright == [[61, 142]] * 3
    assert [line.get_ydata()[0] for line in error.lines if line.get_linestyle() == ":"] == [0.2]
    assert {text.get_text() for text in loss.texts} == {"1", "2", "3"}


@pytest.mark.parametrize(("kind", "surrogate"), [("joint", False), ("router", False)])
def test_without_a_surrogate_the_constraint_is_shown(tmp_path, monkeypatch, kind, surrogate):
    training = read(tmp_path, *synthetic.routing(kind, surrogate))
    picture = dynamics(training)
    assert "Constraint loss from 0.18" in picture.alt and "urrogate" not in picture.alt + picture.caption
    assert [axes.get_title("left") for axes in drawn_by(monkeypatch, training)][1] == "Constraint loss"


def test_relaxed_choices_have_a_temperature(tmp_path, monkeypatch):
    training = read(tmp_path, *synthetic.gumbel())
    assert "Temperature from 0.98" in dynamics(training).alt
    *_, temperature = drawn_by(monkeypatch, training)
    assert temperature.get_title("left") == "Temperature" and temperature.get_yscale() == "log"


def test_routers_that_never_follow(tmp_path):
    metrics, log = synthetic.routing(steps=40)
    assert dynamics(read(tmp_path, metrics, log)).alt.endswith("The routers never follow the surrogate.")


def test_nothing_logged_gives_no_picture(tmp_path):
    training = read(tmp_path, synthetic.routing()[0])
    assert training.routing.steps == [] and dynamics(training) is None


def test_what_cannot_be_drawn_on_a_log_scale_is_left_out(tmp_path):
    metrics, log = synthetic.routing(steps=70)
    for row in log[2:6]:
        row["surrogate_loss"] = 0.0
    log[10]["surrogate_error"] = float("inf")
    log[12]["surrogate_loss"] = None
    assert "nan" not in dynamics(read(tmp_path, metrics, log)).alt


def test_stages(tmp_path):
    routing = read(tmp_path, *synthetic.routing()).routing
    assert stages(routing) == [(1, 61), (61, 142), (142, 300)]
    assert stages(replace(routing, steps=routing.steps[:61])) == [(1, 61), (61, 61), (61, 61)]
    assert stages(replace(routing, steps=routing.steps[:60])) == []
