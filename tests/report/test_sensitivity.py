"""The topic about `sensitivity`: what is read, the table, the picture, and that bad values are named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flextron_mcore.report import sensitivity
from flextron_mcore.report.sensitivity import Sensitivity
from flextron_mcore.space import SubNetwork
from tests.report import synthetic


@pytest.fixture
def found(tmp_path) -> Sensitivity:
    return synthetic.read(sensitivity.TOPIC, tmp_path, sensitivity=synthetic.sensitivity())[0]


def test_what_is_read(found):
    assert (found.samples, found.full_loss, len(found.blocks)) == (64, 3.0, 48)
    assert found.candidates("heads") == [6, 4, 2] and found.candidates("ffn_hidden_size") == [768, 512, 256]
    curve = found.curve("ffn_hidden_size", 256)
    layers = list(SubNetwork.full(synthetic.MODEL).layers)
    layers[7] = synthetic.SPACE.layer_choice(synthetic.MODEL, 8, 256)
    assert list(curve) == list(range(8))
    assert curve[7] == pytest.approx(synthetic.loss(SubNetwork(256, tuple(layers))) - 3.0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["blocks"], [], "'blocks' is empty"),
        (["blocks", 3, "axis"], "depth", "blocks[3]: 'axis' must be one of heads, ffn_hidden_size"),
        (["blocks", 3, "layer"], 8, "blocks[3]: 'layer' must be within 0..7, not 8"),
        (["blocks", 0, "degradation"], None, "blocks[0]: 'degradation' must be a number, not null"),
    ],
)
def test_bad_metrics_are_named(tmp_path, path, value, message):
    synthetic.write(tmp_path / "stage", synthetic.changed(synthetic.sensitivity(), path, value))
    assert synthetic.problem(tmp_path).startswith(f"{tmp_path / 'stage' / 'metrics.json'}: {message}")


def test_the_table(found, undrawn):
    (part,) = sensitivity.sections([found])
    (table,) = part.tables
    assert table.head[:2] == ["Layer", "Heads 6 (75%)"] and table.head[-1] == "FFN 256 (25%)"
    given = {(b["layer"], b["axis"], b["size"]): b["degradation"] for b in synthetic.sensitivity()["blocks"]}
    ffn = [given[layer, "ffn_hidden_size", 256] for layer in range(8)]
    assert [row[-1] for row in table.rows] == [*(f"+{value:.3f}" for value in ffn), f"+{sum(ffn) / 8:.3f}"]
    assert [row[0] for row in table.rows] == [*map(str, range(1, 9)), "mean"] and table.strong == 8
    assert part.pictures[0].name == "sensitivity_degradation" and "3.000 nats per token on these 64 samples" in part.note


def test_blocks_that_were_not_tried_are_blank(found, undrawn):
    tried = [block for block in found.blocks if (block.layer, block.axis) != (2, "heads")]
    (part,) = sensitivity.sections([replace(found, blocks=tried)])
    assert part.tables[0].rows[2][1:4] == ["–", "–", "–"] and part.tables[0].rows[2][4] != "–"


def test_the_picture(found, drawn_by):
    picture = sensitivity.degradation(found)
    assert picture.name == "sensitivity_degradation"
    assert "FFN width 25% (256): 0.0444, 0.0592" in picture.alt and "Attention heads 75% (6): 0.0148" in picture.alt
    heads, ffn = drawn_by(sensitivity, sensitivity.degradation, found).axes
    assert [axes.get_title("left") for axes in (heads, ffn)] == ["Attention heads", "FFN width"]
    lines = [line for line in ffn.lines if line.get_marker() != "None"]
    assert [line.get_label() for line in lines] == ["75% (768)", "50% (512)", "25% (256)"]
    assert list(lines[0].get_xdata()) == list(range(1, 9)) and len({line.get_marker() for line in lines}) == 3
    assert heads.get_ylim() == ffn.get_ylim()


def test_an_axis_without_candidates_has_no_panel(found, drawn_by):
    only = replace(found, blocks=[block for block in found.blocks if block.axis == "heads"])
    assert "FFN" not in sensitivity.degradation(only).alt
    assert len(drawn_by(sensitivity, sensitivity.degradation, only).axes) == 1
