"""The pictures of `compare` and `sensitivity`: what is drawn, and what it says in words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from flextron_mcore.report import figures_compare
from flextron_mcore.report.collect import collect
from flextron_mcore.report.collect_compare import Comparison, Fit, Sensitivity
from flextron_mcore.report.drawing import DARK, LIGHT
from tests.report import synthetic


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Comparison:
    run = tmp_path_factory.mktemp("run")
    synthetic.write(run / "compare", synthetic.compare())
    return collect(run).comparisons[0]


@pytest.fixture(scope="module")
def sensitivity(tmp_path_factory) -> Sensitivity:
    run = tmp_path_factory.mktemp("run")
    synthetic.write(run / "sensitivity", synthetic.sensitivity())
    return collect(run).sensitivities[0]


def drawn_by(monkeypatch, make, *arguments) -> Figure:
    """The figure of the picture that `make` makes."""
    kept = []
    monkeypatch.setattr(figures_compare, "picture", lambda name, alt, caption, draw, *size: kept.append(draw))
    make(*arguments)
    figure = Figure()
    kept[0](figure, LIGHT)
    return figure


def labels(figure: Figure) -> dict[str, object]:
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_curve_is_equation_12():
    fit = Fit("router", "cost", 5, (10.0, 2.0, 1.5), (None,) * 3)
    assert np.allclose(figures_compare.curve(fit, np.array([5.0, 10.0, 20.0])), [5.5, 2.5, 1.75])
    assert np.isnan(figures_compare.curve(fit, np.array([0.0]))).all()


def test_loss_against_cost(comparison, monkeypatch):
    picture = figures_compare.loss_against(comparison, "cost")
    assert picture.name == "compare_loss_cost"
    assert "router 3.765 at 58.82, 3.503 at 69.41" in picture.alt and picture.alt.endswith("full model 3.000 at 100.")
    assert "dense 3.420 at 70.59;" in picture.alt and "eq. 12" in picture.caption
    figure = drawn_by(monkeypatch, figures_compare.loss_against, comparison, "cost")
    lines = labels(figure)
    names = ["router", "uniform", "matformer", "sensitivity", "random", "dense, from scratch", "full model"]
    assert list(lines) == [*names, "fit to router (eq. 12)"]
    assert len({line.get_marker() for line in lines.values()}) == len({line.get_color() for line in lines.values()}) + 1 == 8
    x, y = lines["fit to router (eq. 12)"].get_data()
    assert (x[0], x[-1]) == (pytest.approx(100 * synthetic.share(synthetic.best(0.6))), 100)
    assert y[-1] == pytest.approx((synthetic.COST.full / 11.6) ** -1.8 + 2.5)
    assert figure.axes[0].child_axes[0].get_xlabel() == "Latency (ms)"


def test_loss_against_parameters_has_dense_models_without_a_cost(comparison, monkeypatch):
    picture = figures_compare.loss_against(comparison, "non_embedding_parameters")
    assert picture.name == "compare_loss_parameters" and "non-embedding parameters (millions)" in picture.alt
    assert "dense 3.420 at 4.8, 3.420 at 4.8;" in picture.alt and "full model 3.000 at 8.393." in picture.alt
    figure = drawn_by(monkeypatch, figures_compare.loss_against, comparison, "non_embedding_parameters")
    assert len(labels(figure)["dense, from scratch"].get_xdata()) == 2 and not figure.axes[0].child_axes


def test_an_undetermined_fit_is_not_drawn(comparison, monkeypatch):
    unknown = replace(comparison, fits=[replace(fit, values=None) for fit in comparison.fits])
    assert "eq. 12" not in figures_compare.loss_against(unknown, "cost").caption
    assert "fit to router (eq. 12)" not in labels(drawn_by(monkeypatch, figures_compare.loss_against, unknown, "cost"))


def test_colours_differ_in_both_themes():
    for theme in (LIGHT, DARK):
        assert len({figures_compare._colour(theme, selector) for selector in figures_compare.STYLES}) == 6
    assert len(set(figures_compare.STYLES.values())) == 6


def test_random_boxes(comparison, monkeypatch):
    picture = figures_compare.random_boxes(comparison)
    row, losses = comparison.random[0], comparison.random[0].losses
    words = f"60%: {min(losses):.3f} to {max(losses):.3f}, median {np.median(losses):.3f}, router {row.router_loss:.3f};"
    assert picture.name == "compare_random" and words in picture.alt
    axes = drawn_by(monkeypatch, figures_compare.random_boxes, comparison).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["60", "70", "80", "90"]
    router = next(line for line in axes.lines if line.get_label() == "router")
    assert list(router.get_xdata()) == [60, 70, 80, 90] and router.get_ydata()[0] == row.router_loss
    assert len(axes.patches) == 4


def test_boxes_without_routers_and_with_diverged_networks(comparison, monkeypatch):
    row = replace(comparison.random[0], router_loss=None, losses=[3.9, float("nan"), 4.1], shares=[0.6] * 3)
    gone = replace(comparison.random[1], losses=[float("inf")], shares=[0.7])
    alone = replace(comparison, random=[row, gone])
    assert figures_compare.random_boxes(alone).alt.endswith("per token: 60%: 3.900 to 4.100, median 4.000.")
    axes = drawn_by(monkeypatch, figures_compare.random_boxes, alone).axes[0]
    assert len(axes.patches) == 1 and "router" not in [line.get_label() for line in axes.lines]


def test_degradation(sensitivity, monkeypatch):
    picture = figures_compare.degradation(sensitivity)
    assert picture.name == "sensitivity_degradation"
    assert "FFN width 25% (256): 0.0444, 0.0592" in picture.alt and "Attention heads 75% (6): 0.0148" in picture.alt
    heads, ffn = drawn_by(monkeypatch, figures_compare.degradation, sensitivity).axes
    assert [axes.get_title("left") for axes in (heads, ffn)] == ["Attention heads", "FFN width"]
    lines = [line for line in ffn.lines if line.get_marker() != "None"]
    assert [line.get_label() for line in lines] == ["75% (768)", "50% (512)", "25% (256)"]
    assert list(lines[0].get_xdata()) == list(range(1, 9)) and len({line.get_marker() for line in lines}) == 3
    assert heads.get_ylim() == ffn.get_ylim()


def test_an_axis_without_candidates_has_no_panel(sensitivity, monkeypatch):
    only = replace(sensitivity, blocks=[block for block in sensitivity.blocks if block.axis == "heads"])
    assert "FFN" not in figures_compare.degradation(only).alt
    assert len(drawn_by(monkeypatch, figures_compare.degradation, only).axes) == 1
