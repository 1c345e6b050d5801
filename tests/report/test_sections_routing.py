"""The sections about routers: their tables, and which pictures they have."""

from __future__ import annotations

import pytest

from flextron_mcore.report.collect import collect
from flextron_mcore.report.parts import Section
from flextron_mcore.report.sections_routing import routing_sections
from tests.report import synthetic

pytestmark = pytest.mark.usefixtures("undrawn")


def sections(run, **stages) -> dict[str, Section]:
    for name, made in stages.items():
        synthetic.write(run / name, *made)
    return {part.key: part for part in routing_sections(collect(run).routed())}


def test_budgets(tmp_path):
    part = sections(tmp_path, router=synthetic.routing())["budgets"]
    (table,) = part.tables
    assert table.head == ["Budget (router)", "Share", "Share of the bare argmax", "Heads of 8", "FFN of 1,024"]
    best = synthetic.best(0.7)
    heads = [layer.num_attention_heads for layer in best.layers]
    row = table.rows[2]
    assert row[:3] == ["70%", f"{100 * synthetic.share(best):.1f}%", "71.2%"]
    assert row[3] == f"{sum(heads) / 8:.1f} ({min(heads)}–{max(heads)})"
    (picture,) = part.pictures
    shares = ", ".join(f"{100 * a.num_attention_heads / 8:.0f}/{100 * a.ffn_hidden_size / 1024:.0f}" for a in best.layers)
    assert picture.name == "router_widths" and f"70%: {shares};" in picture.alt and picture.caption.startswith("router: ")
    assert "full model’s latency" in part.note


def test_uniform_choices_are_drawn_too(tmp_path):
    metrics, log = synthetic.routing(steps=5)
    metrics["budgets"] = [{**metrics["budgets"][0], "subnetwork": synthetic.SPACE.uniform(synthetic.MODEL, 4, 512).to_dict()}]
    assert "60%: 50/50, 50/50" in sections(tmp_path, router=(metrics, log))["budgets"].pictures[0].alt


def test_training(tmp_path):
    part = sections(tmp_path, router=synthetic.routing(), joint=synthetic.routing("joint", False))["routers"]
    (table,) = part.tables
    cells = [dict(zip(table.head, row, strict=True)) for row in table.rows]
    assert [row["Routers follow"] for row in cells] == ["surrogate", "straight-through"]
    assert [row["Validation, last"] for row in cells] == ["3.000", "2.905"]
    names = ["router_dynamics", "router_validation_router", "joint_dynamics", "joint_training", "joint_validation_router"]
    assert [picture.name for picture in part.pictures] == names
    assert "router 0.6 3.902 to 3.509" in part.pictures[1].alt


def test_networks_of_all_axes(tmp_path):
    parts = sections(tmp_path, gumbel=synthetic.gumbel(steps=5))
    (table,) = parts["budgets"].tables
    assert table.head[-2:] == ["Hidden of 256", "Layers of 8"]
    assert [row[-2:] for row in table.rows] == [["256", "8"], ["256", "8"], ["192", "6"], ["128", "4"]]
    (picture,) = parts["budgets"].pictures
    assert "60%, 128 wide: " in picture.alt and picture.alt.endswith("0/0, 0/0, 0/0, 0/0.")  # skipped layers
    assert "Wide: hidden channels in use, of 256." in picture.caption
    assert [row[-1] for row in parts["routers"].tables[0].rows] == ["relaxed choices"]
    assert [picture.name for picture in parts["routers"].pictures][:2] == ["gumbel_dynamics", "gumbel_training"]


def test_without_a_log_or_budgets(tmp_path):
    metrics = {**synthetic.routing()[0], "budgets": []}
    parts = sections(tmp_path, router=(metrics,))
    assert list(parts) == ["routers"] and parts["routers"].pictures == []


def test_signals_are_compared_where_both_were_tried(tmp_path):
    plain = synthetic.routing(surrogate=False)
    parts = sections(tmp_path, router=synthetic.routing(), router_plain=plain, joint=synthetic.routing("joint", False))
    (table,) = parts["signals"].tables
    assert table.head == ["Routers", "Signal", "router 0.6", "router 0.7"]
    assert table.rows == [
        ["router", "surrogate", "3.509", "3.409"],
        ["router_plain", "straight-through", "3.709", "3.609"],
    ]


@pytest.mark.parametrize("others", [{}, {"again": synthetic.routing()}, {"joint": synthetic.routing("joint", False)}])
def test_no_comparison_of_signals_without_two(tmp_path, others):
    assert "signals" not in sections(tmp_path, router=synthetic.routing(), **others)
