"""The topic about the evaluated family: which evaluation is which, the Pareto front, and that labels do not collide."""

from __future__ import annotations

import random

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from flextron_mcore.config import ModelConfig
from flextron_mcore.report import drawing, evaluation
from flextron_mcore.report.evaluation import Evaluation, Mean, Network
from flextron_mcore.report.reader import Settings
from flextron_mcore.space import SKIPPED, LayerChoice, SubNetwork
from tests.report import synthetic

MODEL = ModelConfig(4, 64, 4, 100, 64)


def layer(heads: int = 4, ffn: int = 256) -> LayerChoice:
    return LayerChoice(True, heads, 1, ffn)


def network(name: str, parameters: int, loss: float, *layers: LayerChoice, hidden: int = 64) -> Network:
    net = SubNetwork(hidden, layers or (layer(2),) * 4)
    return Network(name, net, parameters, parameters, 2 * parameters, 10, {}, {}, Mean(loss, 2.0))


def evaluated(*networks: Network) -> Evaluation:
    return Evaluation("evaluate", MODEL, sorted(networks, key=lambda net: -net.parameters), Settings())


@pytest.mark.parametrize(
    ("directories", "family", "before"),
    [
        (["evaluate"], "evaluate", None),
        (["evaluate_parent"], "evaluate_parent", None),
        (["evaluate", "evaluate_parent"], "evaluate", "evaluate_parent"),
        (["before", "evaluate", "evaluate_router"], "evaluate", "before"),
        (["evaluate_1", "evaluate_2"], "evaluate_2", None),
        (["family", "parent"], "family", "parent"),
    ],
)
def test_which_evaluation_is_which(tmp_path, directories, family, before):
    found = synthetic.read(evaluation.TOPIC, tmp_path, **{name: synthetic.EVALUATE for name in directories})
    assert [each.label for each in found] == directories
    assert evaluation.find_family(found).label == family
    old = evaluation.find_before(found)
    assert (old.label if old else None) == before


def test_front_keeps_what_no_smaller_network_beats():
    nets = [
        network("a", 10, 5.0),
        network("b", 20, 6.0),
        network("c", 30, 4.0),
        network("d", 30, 3.0),
        network("e", 5, float("nan")),
    ]
    assert [net.name for net in evaluation.pareto_front(nets)] == ["a", "d"]


def test_point_labels_do_not_cover_each_other_or_the_points():
    rng = random.Random(0)
    nets = [network("full", 2_000_000, 2.0, *(layer(),) * 4)]
    nets += [network(f"net {i}", rng.randrange(1_000_000, 1_900_000), rng.uniform(2.1, 3)) for i in range(25)]
    nets = [
        Network(**{**net.__dict__, "subnetwork": SubNetwork(63, net.subnetwork.layers)}) if i else net
        for i, net in enumerate(nets)
    ]
    family, place = evaluated(*nets), lambda net: (net.parameters / 1e6, net.mean.loss)
    figure = Figure(layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [place(net) for net in family.networks]
    axes.plot(*zip(*points, strict=True), "o")
    evaluation.name_networks(figure, axes, family, place, points, drawing.LIGHT)
    renderer = canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
    assert axes.texts[0].get_text() == "full" and 12 <= len(boxes) <= 26
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*axes.transData.transform(point)) for box in boxes for point in points)
    assert all(axes.get_window_extent().contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_widths_only_where_a_network_is_not_uniform(undrawn):
    uniform = network("uniform", 10, 2.0), network("full", 20, 1.5, *(layer(),) * 4)
    assert [part.key for part in evaluation.sections([evaluated(*uniform)])] == ["family", "pareto"]
    uneven = network("uneven", 15, 1.8, layer(4, 64), layer(1), layer(), SKIPPED)
    *_, part = evaluation.sections([evaluated(*uniform, uneven)])
    assert part.key == "widths" and part.pictures[0].alt.endswith("keeps. uneven: 100/25, 25/100, 100/100, 0/0.")
