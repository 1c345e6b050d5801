"""Sub-networks in words, and as a picture of their widths."""

from __future__ import annotations

import pytest

from flextron_mcore.axes import AXES, Axis
from flextron_mcore.config import ModelConfig
from flextron_mcore.report import networks
from flextron_mcore.report.networks import describe, layer_columns, layer_grid, network_columns, percent_label
from flextron_mcore.space import SKIPPED, LayerChoice, SubNetwork
from tests.report import synthetic

MODEL = ModelConfig(4, 64, 4, 100, 64)


def layer(heads: int = 4, ffn: int = 256) -> LayerChoice:
    return LayerChoice(True, heads, 1, ffn)


UNEVEN = SubNetwork(64, (layer(4, 64), layer(1), layer(), SKIPPED))


@pytest.mark.parametrize(
    ("net", "label"),
    [
        (SubNetwork(64, (layer(2, 64),) * 4), "50/25"),
        (SubNetwork(64, (layer(2), layer(4), layer(4), layer(4))), None),
        (SubNetwork(64, (layer(),) * 3 + (SKIPPED,)), None),
        (SubNetwork(32, (layer(),) * 4), None),
    ],
)
def test_labels_are_in_percent(net, label):
    assert percent_label(net, MODEL) == label


def test_networks_are_described_in_words():
    uniform = synthetic.SPACE.uniform(synthetic.MODEL, 2, 768)
    assert describe(uniform, synthetic.MODEL) == "25% heads, 75% FFN"
    skipped = SubNetwork(256, (*uniform.layers[:4], *[LayerChoice(False, 8, 1, 1024)] * 4))
    assert describe(skipped, synthetic.MODEL) == "12% heads, 38% FFN (mean)"


def test_columns_have_the_widths_of_layers():
    full = SubNetwork.full(MODEL)
    assert layer_columns([full, UNEVEN], MODEL) == [("Heads of 4", ["4", "3.0 (1–4)"]), ("FFN of 256", ["256", "192 (64–256)"])]
    assert network_columns([full, UNEVEN], MODEL) == [("Hidden of 64", ["64", "64"]), ("Layers of 4", ["4", "3"])]
    assert network_columns([full, UNEVEN], MODEL, all_axes=False) == [("Layers of 4", ["4", "3"])]


def test_grid_says_what_every_layer_keeps(undrawn):
    picture = layer_grid([("uneven", UNEVEN)], MODEL, "widths", "run: ")
    assert picture.alt == "Percent of heads / percent of FFN neurons that each layer keeps. uneven: 100/25, 25/100, 100/100, 0/0."
    assert picture.caption.startswith("run: Percent of its heads and FFN neurons that each layer keeps (as Flextron, figure 7)")
    many = layer_grid([(f"uneven {i}", UNEVEN) for i in range(14)], MODEL, "widths")
    assert "2 more are in the table" in many.caption and "uneven 12" not in many.alt


@pytest.mark.parametrize(("most", "numbers", "panels"), [(12, ["100", "25", "100", "–"], 2), (2, ["–"], 3)])
def test_deep_models_have_a_colour_scale_in_place_of_numbers(monkeypatch, drawn_by, most, numbers, panels):
    monkeypatch.setattr(networks, "MOST_NUMBERS", most)
    figure = drawn_by(networks, layer_grid, [("uneven", UNEVEN)], MODEL, "widths")
    assert [axes.get_title("left") for axes in figure.axes[:2]] == ["Attention heads", "FFN width"]
    assert [text.get_text() for text in figure.axes[0].texts] == numbers and len(figure.axes) == panels


def test_an_added_axis_is_shown_everywhere(monkeypatch, drawn_by):
    full = {"adapter_rank": "ranks"}
    rank = Axis("rank", "channels", "Adapter rank", "Adapter", block="adapter", full=lambda model: 8, fields=full)
    monkeypatch.setitem(AXES, "rank", rank)
    half = LayerChoice.of({"kv_groups": 2, "query_heads_per_group": 1, "ffn_hidden_size": 256, "adapter_rank": 4})
    net = SubNetwork(64, (half,) * 4)
    assert layer_columns([net], MODEL)[-1] == ("Adapter of 8", ["4"])
    assert percent_label(net, MODEL) == "50/100/50" and describe(net, MODEL) == "50% heads, 100% FFN, 50% Adapter"
    picture = layer_grid([("half", net)], MODEL, "widths")
    words = "Percent of heads / percent of FFN neurons / percent of Adapter channels that each layer keeps."
    assert picture.alt == f"{words} half: 50/100/50, 50/100/50, 50/100/50, 50/100/50."
    assert drawn_by(networks, layer_grid, [("half", net)], MODEL, "widths").axes[2].get_title("left") == "Adapter rank"
