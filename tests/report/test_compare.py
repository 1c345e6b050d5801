"""The topic about `compare`: what is read, the tables, the pictures, and that bad values are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from flextron_mcore.report import compare
from flextron_mcore.report.compare import MEANINGS, STYLES, Comparison, Fit, loss_against, random_boxes
from flextron_mcore.report.drawing import DARK, LIGHT
from flextron_mcore.report.topic import Section
from flextron_mcore.settings.sections import ALL_SELECTORS
from tests.report import synthetic


def read(run: Path, metrics: dict[str, Any]) -> Comparison:
    return synthetic.read(compare.TOPIC, run, compare=metrics)[0]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Comparison:
    return read(tmp_path_factory.mktemp("run"), synthetic.compare())


@pytest.fixture
def parts(comparison, undrawn):
    return {part.key: part for part in compare.sections([comparison])}


def part_of(c: Comparison, key: str) -> Section:
    """Part `key` of the report's section about `compare`."""
    return next(part for part in compare.sections([c]) if part.key == key)


def labels(figure: Figure) -> dict[str, object]:
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_what_is_read(comparison):
    c = comparison
    assert (c.label, c.cost, c.samples, c.full_cost) == ("compare", "latency", 128, synthetic.COST.full)
    assert (c.share(c.full), c.full.mean_loss) == (1.0, pytest.approx(3.0))
    by_router = c.of("router")
    assert [net.target for net in by_router] == [0.6, 0.7, 0.8, 0.9]
    assert by_router[0].subnetwork == synthetic.best(0.6) and by_router[0].loss["prose"] == pytest.approx(
        by_router[0].mean_loss + 0.2
    )
    assert [(net.name, c.share(net)) for net in c.dense] == [("small one", 12 / synthetic.COST.full), ("without a cost", None)]
    assert c.random[0].router_loss == by_router[0].mean_loss and len(c.random[0].mean_losses) == len(c.random[0].shares)
    assert c.equal[0].router_loss == pytest.approx(c.equal[0].mean_loss - 0.05)
    fit, unknown = c.scaling_law[0], c.scaling_law[2]
    assert (fit.Nc, fit.alpha, fit.E) == (4.71e6, 1.2, 2.5) and fit.alpha_ci == (-0.25, 2.65) and fit.determined
    assert (unknown.Nc, unknown.Nc_ci, unknown.determined) == (None, None, False)
    assert c.machine["device"] == "Toy GPU" and c.setting == {"kind": "prefill", "batch_size": 2}


def test_comparison_without_routers_and_measurement(tmp_path):
    metrics = {**synthetic.compare("memory"), "networks": [], "equal": [], "dense": [], "scaling_law": []}
    for row in metrics["random"]:
        row.update(router_share=None, router_loss=None, better_than=None)
    c = read(tmp_path, metrics)
    assert (c.networks, c.machine, c.setting) == ([], None, None)
    assert (c.random[0].router_share, c.random[0].router_loss, c.random[0].better_than) == (None, None, None)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["cost"], "energy", "'cost' must be one of latency, parameters, memory, not \"energy\""),
        (["full_cost"], 0, "'full_cost' must be more than 0, not 0"),
        (["full"], None, "'full' must be an object, not null"),
        (["full", "cost"], None, "full: 'cost' must be a number, not null"),
        (["networks", 2, "selector"], "oracle", "networks[2]: 'selector' must be one of router, uniform,"),
        (["networks", 0, "loss", "code"], "low", "networks[0]: loss: 'code' must be a number"),
        (["networks", 0, "subnetwork", "layers"], [], "networks[0]: 0 layers, but the model has 8"),
        (["random", 1, "shares"], [0.5], "random[1]: 'mean_losses' has 50 numbers, but 'shares' has 1"),
        (["random", 0, "better_than"], "all", "random[0]: 'better_than' must be a number, not \"all\""),
        (["equal", 0, "share"], None, "equal[0]: 'share' must be a number, not null"),
        (["dense", 0, "name"], 3, "dense[0]: 'name' must be a text, not 3"),
        (["scaling_law", 0, "of"], "flops", "scaling_law[0]: 'of' must be one of non_embedding_parameters, cost"),
        (["scaling_law", 0, "E_ci"], [1], "scaling_law[0]: 'E_ci' must be a list of 2 numbers, not [1]"),
    ],
)
def test_bad_metrics_are_named(tmp_path, path, value, message):
    synthetic.write(tmp_path / "stage", synthetic.changed(synthetic.compare(), path, value))
    assert synthetic.problem(tmp_path).startswith(f"{tmp_path / 'stage' / 'metrics.json'}: {message}")


def test_table_of_losses(parts):
    part = parts["compare"]
    (table,) = part.tables
    rows = [dict(zip(table.head, row, strict=True)) for row in table.rows]
    assert [row["Selector"] for row in rows[:6]] == ["full model", *["router"] * 4, "uniform"]
    by_router, best = rows[4], synthetic.best(0.6)
    assert (by_router["Target"], by_router["Share"]) == ("60.0%", f"{100 * synthetic.share(best):.1f}%")
    assert (by_router["Latency (ms)"], by_router["Mean loss"]) == (
        f"{synthetic.COST.of(best):.3f}",
        f"{synthetic.loss(best):.3f}",
    )
    assert by_router["Loss, code"] == f"{synthetic.loss(best) - 0.2:.3f}"
    assert (rows[0]["Target"], rows[0]["Share"], rows[0]["Parameters"]) == ("–", "100.0%", "12,587,264")
    assert [rows[-1][key] for key in ("Selector", "Share", "Latency (ms)", "Mean loss", "Loss, code")] == [
        *("dense: without a cost", "–", "–", "3.420", "–")
    ]
    assert table.strong == 0 and len(rows) == 1 + 5 * 4 + 2
    assert [picture.name for picture in part.pictures] == ["compare_loss_cost", "compare_loss_parameters"]
    assert part.title == "Loss against latency"
    assert " Measured on Toy GPU, bfloat16, prefill, batch size 2." in part.note and "on 128 samples" in part.note


@pytest.mark.parametrize(("cost", "column"), [("memory", "Memory (MiB)"), ("parameters", None)])
def test_costs_other_than_latency_have_their_units(tmp_path, undrawn, cost, column):
    part = part_of(read(tmp_path, synthetic.compare(cost)), "compare")
    head = part.tables[0].head
    assert head[3:5] == ([column, "Parameters"] if column else ["Parameters", "Non-embedding parameters"])
    assert "Measured" not in part.note
    assert column is None or part.tables[0].rows[0][3] == "17.0"


def test_fits_are_in_a_table(parts):
    rows = parts["scaling"].tables[0].rows
    assert rows[0] == [
        *("router", "non-embedding parameters", "5"),
        *("4.71e6 (4e6 to 5.5e6)", "1.2 (−0.25 to 2.65)", "2.5 (2.4 to 2.6)"),
    ]
    assert rows[1][1] == "latency (ms)"
    assert rows[2] == ["matformer", "latency (ms)", "3", *["not determined"] * 3]


def test_random_networks_are_in_a_table(parts):
    table = parts["random"].tables[0]
    row = dict(zip(table.head, table.rows[-1], strict=True))
    given = synthetic.compare()["random"][0]
    losses = sorted(given["mean_losses"])
    assert (row["Budget"], row["Networks"]) == ("60.0%", str(len(losses)))
    assert (row["Best"], row["Worst"]) == (f"{losses[0]:.3f}", f"{losses[-1]:.3f}")
    assert row["Median"] == f"{losses[len(losses) // 2]:.3f}" and len(losses) % 2
    assert (row["Router"], row["Better than"]) == (f"{given['router_loss']:.3f}", f"{100 * given['better_than']:.1f}%")


def test_random_networks_are_shown_without_routers(tmp_path, undrawn):
    metrics = synthetic.compare()
    metrics["random"] = [
        {"target": 0.6, "shares": [0.6, 0.6, 0.6], "mean_losses": [float("nan"), 3.5, 3.0], "router_share": None},
        {"target": 0.5, "shares": [], "mean_losses": []},
    ]
    part = part_of(read(tmp_path, metrics), "random")
    assert part.tables[0].rows == [["60.0%", "3", "3.000", "3.500", "NaN", "–", "–", "–"], ["50.0%", "0", *["–"] * 6]]
    assert len(part.pictures) == 1


def test_networks_of_equal_cost_are_in_a_table(parts):
    rows = parts["equal"].tables[0].rows
    net = synthetic.SPACE.uniform(synthetic.MODEL, 4, 512)
    share, loss = f"{100 * synthetic.share(net):.1f}%", synthetic.loss(net)
    assert rows[1] == ["uniform", "50% heads, 50% FFN", share, f"{loss:.3f}", share, f"{loss - 0.05:.3f}", "−0.050"]
    assert [row[0] for row in rows] == ["uniform", "uniform", "matformer", "matformer"]


def test_networks_of_equal_cost_are_shown_without_routers(tmp_path, undrawn):
    metrics = synthetic.compare()
    metrics["equal"] = [{**metrics["equal"][0], "router_share": None, "router_loss": None}]
    part = part_of(read(tmp_path, metrics), "equal")
    assert part.tables[0].rows[0][-3:] == ["–", "–", "–"]


def test_several_comparisons_have_their_labels(tmp_path, undrawn):
    both = {"compare": synthetic.compare(), "compare_memory": synthetic.compare("memory")}
    parts = compare.sections(synthetic.read(compare.TOPIC, tmp_path, **both))
    assert [part.key for part in parts[1::4]] == ["compare", "compare2"] and len({part.key for part in parts}) == 8
    assert [part.title for part in parts[1::4]] == ["Loss against latency (compare)", "Loss against memory (compare_memory)"]


def test_parts_without_data_are_left_out(tmp_path, undrawn):
    metrics = {**synthetic.compare(), "random": [], "equal": [], "dense": [], "scaling_law": []}
    assert [part.key for part in compare.sections([read(tmp_path, metrics)])] == ["compare"]


def test_the_summary_has_a_sentence(comparison):
    c = comparison
    text, better = compare.sentence(c), 100 * c.random[0].better_than
    assert text.startswith("Asked for 60% of the full model’s latency, the routers choose a network with a mean loss of 3.765")
    assert f"against 3.000 of the full model on the same 128 samples and better than {better:.1f}% of random networks" in text
    assert compare.sentence(replace(c, random=[])).endswith("against 3.000 of the full model on the same 128 samples.")
    assert compare.sentence(replace(c, networks=[])) is None


def test_curve_is_equation_12():
    fit = Fit("router", "cost", 5, 10.0, 2.0, 1.5, None, None, None)
    assert np.allclose(fit.loss(np.array([5.0, 10.0, 20.0])), [5.5, 2.5, 1.75])
    assert np.isnan(fit.loss(np.array([0.0]))).all()


def test_loss_against_cost(comparison, drawn_by):
    picture = loss_against(comparison, "cost")
    assert picture.name == "compare_loss_cost"
    assert "router 3.765 at 58.82, 3.503 at 69.41" in picture.alt and picture.alt.endswith("full model 3.000 at 100.")
    assert "dense 3.420 at 70.59;" in picture.alt and "eq. 12" in picture.caption
    figure = drawn_by(compare, loss_against, comparison, "cost")
    lines = labels(figure)
    names = ["router", "uniform", "matformer", "sensitivity", "random", "dense, from scratch", "full model"]
    assert list(lines) == [*names, "fit to router (eq. 12)"]
    assert len({line.get_marker() for line in lines.values()}) == len({line.get_color() for line in lines.values()}) + 1 == 8
    x, y = lines["fit to router (eq. 12)"].get_data()
    assert (x[0], x[-1]) == (pytest.approx(100 * synthetic.share(synthetic.best(0.6))), 100)
    assert y[-1] == pytest.approx((synthetic.COST.full / 11.6) ** -1.8 + 2.5)
    assert figure.axes[0].child_axes[0].get_xlabel() == "Latency (ms)"


def test_loss_against_parameters_has_dense_models_without_a_cost(comparison, drawn_by):
    picture = loss_against(comparison, "non_embedding_parameters")
    assert picture.name == "compare_loss_parameters" and "non-embedding parameters (millions)" in picture.alt
    assert "dense 3.420 at 4.8, 3.420 at 4.8;" in picture.alt and "full model 3.000 at 8.393." in picture.alt
    figure = drawn_by(compare, loss_against, comparison, "non_embedding_parameters")
    assert len(labels(figure)["dense, from scratch"].get_xdata()) == 2 and not figure.axes[0].child_axes


def test_an_undetermined_fit_is_not_drawn(comparison, drawn_by):
    unknown = replace(comparison, scaling_law=[replace(fit, E=None) for fit in comparison.scaling_law])
    assert "eq. 12" not in loss_against(unknown, "cost").caption
    assert "fit to router (eq. 12)" not in labels(drawn_by(compare, loss_against, unknown, "cost"))


def test_colours_differ_in_both_themes():
    for theme in (LIGHT, DARK):
        assert len({compare.colour(theme, selector) for selector in STYLES}) == len(STYLES)
    assert len(set(STYLES.values())) == len(STYLES)


def test_boxes_show_the_random_networks(comparison, drawn_by):
    picture = random_boxes(comparison)
    row, losses = comparison.random[0], comparison.random[0].mean_losses
    words = f"60%: {min(losses):.3f} to {max(losses):.3f}, median {np.median(losses):.3f}, router {row.router_loss:.3f};"
    assert picture.name == "compare_random" and words in picture.alt
    axes = drawn_by(compare, random_boxes, comparison).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["60", "70", "80", "90"]
    router = next(line for line in axes.lines if line.get_label() == "router")
    assert list(router.get_xdata()) == [60, 70, 80, 90] and router.get_ydata()[0] == row.router_loss
    assert len(axes.patches) == 4


def test_boxes_without_routers_and_with_diverged_networks(comparison, drawn_by):
    row = replace(comparison.random[0], router_loss=None, mean_losses=[3.9, float("nan"), 4.1], shares=[0.6] * 3)
    gone = replace(comparison.random[1], mean_losses=[float("inf")], shares=[0.7])
    alone = replace(comparison, random=[row, gone])
    assert random_boxes(alone).alt.endswith("per token: 60%: 3.900 to 4.100, median 4.100.")
    axes = drawn_by(compare, random_boxes, alone).axes[0]
    assert len(axes.patches) == 1 and "router" not in [line.get_label() for line in axes.lines]


def test_every_selector_has_a_style_and_a_meaning():
    assert set(ALL_SELECTORS) == MEANINGS.keys() and MEANINGS.keys() < STYLES.keys()
