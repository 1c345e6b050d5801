"""The figures: what is computed for them, and that labels do not collide."""

from __future__ import annotations

import random

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from flextron_mcore.config import ModelConfig
from flextron_mcore.report import drawing, figures
from flextron_mcore.report.collect import AblationRow, Network, Series, Settings, Training
from flextron_mcore.space import LayerChoice, SubNetwork

MODEL = ModelConfig(4, 64, 4, 100, 64)


def layer(heads: int = 4, ffn: int = 256, executed: bool = True) -> LayerChoice:
    return LayerChoice(executed, heads, 1, ffn)


def network(name: str, parameters: int, loss: float, *layers: LayerChoice, hidden: int = 64) -> Network:
    net = SubNetwork(hidden, layers or (layer(2),) * 4)
    return Network(name, net, parameters, parameters, 2 * parameters, 10, {}, {}, loss, 2.0)


def series(*networks: Network) -> Series:
    return Series("evaluate", MODEL, sorted(networks, key=lambda net: -net.parameters), Settings())


def test_front_keeps_what_no_smaller_network_beats():
    nets = [
        network("a", 10, 5.0),
        network("b", 20, 6.0),
        network("c", 30, 4.0),
        network("d", 30, 3.0),
        network("e", 5, float("nan")),
    ]
    assert [net.name for net in figures._front(nets)] == ["a", "d"]


def test_point_labels_do_not_cover_each_other_or_the_points():
    rng = random.Random(0)
    nets = [network("full", 2_000_000, 2.0, *(layer(),) * 4)]
    nets += [network(f"net {i}", rng.randrange(1_000_000, 1_900_000), rng.uniform(2.1, 3)) for i in range(25)]
    nets = [
        Network(**{**net.__dict__, "subnetwork": SubNetwork(63, net.subnetwork.layers)}) if i else net
        for i, net in enumerate(nets)
    ]
    family, place = series(*nets), lambda net: (net.parameters / 1e6, net.mean_loss)
    figure = Figure(layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [place(net) for net in family.networks]
    axes.plot(*zip(*points, strict=True), "o")
    figures._label_points(figure, axes, family, place, points, drawing.LIGHT)
    renderer = canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
    assert axes.texts[0].get_text() == "full" and 12 <= len(boxes) <= 26
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*axes.transData.transform(point)) for box in boxes for point in points)
    assert all(axes.get_window_extent().contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_widths_only_where_a_network_is_not_uniform(monkeypatch):
    uniform = network("uniform", 10, 2.0), network("full", 20, 1.5, *(layer(),) * 4)
    assert figures.layer_widths(series(*uniform)) is None
    mixed = network("mixed", 15, 1.8, layer(4, 64), layer(1), layer(), layer(executed=False))
    picture = figures.layer_widths(series(*uniform, mixed))
    assert picture.alt.endswith("mixed: 100/25, 25/100, 100/100, 0/0.")
    monkeypatch.setattr(figures, "MOST_NUMBERS", 2)  # the look of a deep model: a colour scale, no numbers
    many = [network(f"mixed {i}", i, 2.0, layer(1), layer(), layer(), layer()) for i in range(14)]
    assert "2 more are in the table" in figures.layer_widths(series(*many)).caption


def test_validation_networks_are_grouped():
    names = ["full", "uniform 50% heads 25% ffn", "random 1", "random 2", "mine"]
    rows = [(step, {name: 3.0 - step / 10 for name in names}) for step in (0, 5)]
    training = Training("my elastic!", "elastic", 5, 1, 1.0, 1.0, [], rows, {}, {}, Settings())
    made = figures.validation_curves(training)
    assert [picture.name for picture in made] == [f"my_elastic__validation_{group}" for group in ("uniform", "random", "other")]
    assert "random 2 3.000 to 2.500" in made[1].alt and "mine" not in made[1].alt
    assert (
        figures.validation_curves(Training("e", "pretrain", 5, 1, 1.0, 1.0, [], [(0, {"full": 3.0})], {}, {}, Settings())) == []
    )


def test_bars_name_the_score_when_there_are_several():
    rows = [AblationRow("full (baseline)", "-", "l1", 3.0, 20.0), AblationRow("50% ffn", "unsorted", "l1", 6.0, 403.0)]
    rows += [AblationRow("50% ffn", "sorted", score, loss, 90.0) for score, loss in (("l1", 4.5), ("l1 x weight", 4.4))]
    alt = figures.ablation_bars(rows, "sorting").alt
    assert "50% ffn, sorted by l1 x weight: 4.400" in alt and "50% ffn, unsorted: 6.000" in alt and "full model: 3.000" in alt
