"""The topic about routers: budgets, steps, from where routers follow the surrogate, tables, the picture, and bad values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flextron_mcore.report import routing, training
from flextron_mcore.report.reader import Settings
from flextron_mcore.report.routing import Routers, RouterStep, TrainedRouters, dynamics
from flextron_mcore.report.topic import Section
from flextron_mcore.report.training import Training
from tests.report import synthetic


def read(run, metrics, log=None) -> TrainedRouters:
    return synthetic.read(routing.TOPIC, run, my_router=(metrics, log))[0]


def of_steps(*steps: RouterStep) -> TrainedRouters:
    trained = Training("router", "router", len(steps), 1, 1.0, 1.0, [], [], {}, {}, Settings())
    routers = Routers(["latency"], True, 0.2, None)
    return TrainedRouters("router", "router", synthetic.MODEL, routers, [], trained, list(steps))


def step(number: int, follows: bool = True, error: float | None = None) -> RouterStep:
    return RouterStep(number, 3.0, [3.5], None, 0.1, error, follows)


def sections(run, **stages) -> dict[str, Section]:
    return {part.key: part for part in routing.sections(synthetic.read(routing.TOPIC, run, **stages))}


def test_router_is_a_training_stage_with_budgets_and_signals(tmp_path):
    found = read(tmp_path, *synthetic.routing())
    trained = found.training
    assert (trained.kind, trained.steps, len(trained.train), len(trained.validation)) == ("router", 300, 300, 6)
    assert trained.last == trained.validation[-1][1] and set(trained.first) == {"full", "router 0.6", "router 0.7"}
    assert found.routers == Routers(["latency"], True, 0.2, None) and found.signal == "surrogate"
    assert [budget.name for budget in found.budgets] == ["90%", "80%", "70%", "60%"]
    assert found.budgets[-1].subnetwork == synthetic.best(0.6)
    assert (found.budgets[-1].share, found.budgets[-1].argmax_share) == (synthetic.share(synthetic.best(0.6)), 0.6 + 0.012)
    first = found.steps[0]
    assert first.excess == pytest.approx(sum(first.subnetwork_losses) / 2 - first.loss) and not first.routers_follow_surrogate
    assert first.surrogate_loss > 1 and first.constraint_loss == pytest.approx(0.193, abs=1e-3)
    assert (found.follows_from(), found.steady_from()) == (61, 142)


def test_joint_has_no_surrogate(tmp_path):
    found = read(tmp_path, *synthetic.routing("joint", surrogate=False))
    assert found.signal == "straight-through" and found.follows_from() is None
    assert {row.surrogate_loss for row in found.steps} == {None}


def test_gumbel_has_a_temperature_and_networks_of_all_axes(tmp_path):
    found = read(tmp_path, *synthetic.gumbel())
    assert found.relaxed and found.signal == "relaxed choices" and not found.routers.surrogate
    assert found.steps[-1].temperature == pytest.approx(0.1) and found.steps[0].temperature > 0.9
    assert found.budgets[-1].subnetwork == synthetic.small(0.6) and found.budgets[-1].subnetwork.hidden_size == 128


def test_elastic_has_no_routers(tmp_path):
    metrics, log = synthetic.routing()
    synthetic.write(tmp_path / "elastic", {**metrics, "stage": "elastic"}, log)
    assert not synthetic.read(routing.TOPIC, tmp_path) and len(synthetic.read(training.TOPIC, tmp_path)) == 1


@pytest.mark.parametrize(
    ("follows", "first"),
    [((), None), ((False, False), None), ((True, True), 10), ((False, True, False, True, True), 11), ((False, True, False), 11)],
)
def test_where_the_routers_begin_to_follow(follows, first):
    assert of_steps(*(step(10 + i, follow) for i, follow in enumerate(follows))).follows_from() == first


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["routers"], None, "'routers' must be an object, not null"),
        (["routers", "surrogate"], "yes", "routers: 'surrogate' must be true or false, not \"yes\""),
        (["routers", "costs"], "latency", "routers: 'costs' must be a list of texts, not \"latency\""),
        (["budgets"], {}, "'budgets' must be a list, not {}"),
        (["budgets", 1, "share"], None, "budgets[1]: 'share' must be a number, not null"),
        (["budgets", 0, "subnetwork", "layers"], [], "budgets[0]: 0 layers, but the model has 8"),
        (["model", "num_layers"], 0, "model: "),
    ],
)
@pytest.mark.parametrize("kind", ["router", "joint"])
def test_bad_metrics_are_named(tmp_path, kind, path, value, message):
    synthetic.write(tmp_path / "stage", synthetic.changed(synthetic.routing(kind, steps=1)[0], path, value))
    assert synthetic.problem(tmp_path).startswith(f"{tmp_path / 'stage' / 'metrics.json'}: {message}")


@pytest.mark.parametrize(
    ("key", "value"),
    [("constraint_loss", "x"), ("surrogate_error", []), ("routers_follow_surrogate", 1), ("subnetwork_losses", [None])],
)
def test_bad_log_rows_are_named(tmp_path, key, value):
    metrics, log = synthetic.routing(steps=3)
    row = next(row for row in log if row["event"] == "train" and row["step"] == 3)
    row[key] = value
    synthetic.write(tmp_path / "stage", metrics, log)
    assert f"log.jsonl: line {log.index(row) + 1}: '{key}' must be " in synthetic.problem(tmp_path)


def test_budgets_are_in_a_table(tmp_path, undrawn):
    part = sections(tmp_path, router=synthetic.routing())["budgets"]
    (table,) = part.tables
    assert table.head == ["Budget (router)", "Share", "Share without search", "Heads of 8", "FFN of 1,024"]
    best = synthetic.best(0.7)
    heads = [layer.num_attention_heads for layer in best.layers]
    row = table.rows[2]
    assert row[:3] == ["70%", f"{100 * synthetic.share(best):.1f}%", "71.2%"]
    assert row[3] == f"{sum(heads) / 8:.1f} ({min(heads)}–{max(heads)})"
    (picture,) = part.pictures
    shares = ", ".join(f"{100 * a.num_attention_heads / 8:.0f}/{100 * a.ffn_hidden_size / 1024:.0f}" for a in best.layers)
    assert picture.name == "router_widths" and f"70%: {shares};" in picture.alt and picture.caption.startswith("router: ")
    assert "full model’s latency" in part.note


def test_uniform_choices_are_drawn_too(tmp_path, undrawn):
    metrics, log = synthetic.routing(steps=5)
    metrics["budgets"] = [{**metrics["budgets"][0], "subnetwork": synthetic.SPACE.uniform(synthetic.MODEL, 4, 512).to_dict()}]
    assert "60%: 50/50, 50/50" in sections(tmp_path, router=(metrics, log))["budgets"].pictures[0].alt


def test_training_is_in_a_table(tmp_path, undrawn):
    part = sections(tmp_path, router=synthetic.routing(), joint=synthetic.routing("joint", False))["routers"]
    (table,) = part.tables
    cells = [dict(zip(table.head, row, strict=True)) for row in table.rows]
    assert [row["Routers learn from"] for row in cells] == ["surrogate", "straight-through"]
    assert [row["Validation, last"] for row in cells] == ["3.000", "2.905"]
    names = ["router_dynamics", "router_validation_router", "joint_dynamics", "joint_training", "joint_validation_router"]
    assert [picture.name for picture in part.pictures] == names
    assert "router 0.6 3.902 to 3.509" in part.pictures[1].alt


def test_networks_of_all_axes(tmp_path, undrawn):
    parts = sections(tmp_path, gumbel=synthetic.gumbel(steps=5))
    (table,) = parts["budgets"].tables
    assert table.head[-2:] == ["Hidden of 256", "Layers of 8"]
    assert [row[-2:] for row in table.rows] == [["256", "8"], ["256", "8"], ["192", "6"], ["128", "4"]]
    (picture,) = parts["budgets"].pictures
    assert "60%, 128 wide: " in picture.alt and picture.alt.endswith("0/0, 0/0, 0/0, 0/0.")  # skipped layers
    assert "Wide: hidden channels in use, of 256." in picture.caption
    assert [row[-1] for row in parts["routers"].tables[0].rows] == ["relaxed choices"]
    assert [picture.name for picture in parts["routers"].pictures][:2] == ["gumbel_dynamics", "gumbel_training"]


def test_without_a_log_or_budgets(tmp_path, undrawn):
    metrics = {**synthetic.routing()[0], "budgets": []}
    parts = sections(tmp_path, router=(metrics,))
    assert list(parts) == ["routers"] and parts["routers"].pictures == []


def test_signals_are_compared_where_both_were_tried(tmp_path, undrawn):
    plain = synthetic.routing(surrogate=False)
    parts = sections(tmp_path, router=synthetic.routing(), router_plain=plain, joint=synthetic.routing("joint", False))
    (table,) = parts["signals"].tables
    assert table.head == ["Routers", "Signal", "router 0.6", "router 0.7"]
    assert table.rows == [
        ["router", "surrogate", "3.509", "3.409"],
        ["router_plain", "straight-through", "3.709", "3.609"],
    ]


@pytest.mark.parametrize("others", [{}, {"again": synthetic.routing()}, {"joint": synthetic.routing("joint", False)}])
def test_no_comparison_of_signals_without_two(tmp_path, undrawn, others):
    assert "signals" not in sections(tmp_path, router=synthetic.routing(), **others)


def test_words_name_the_ends_and_where_routers_follow(tmp_path):
    picture = dynamics(read(tmp_path, *synthetic.routing()))
    assert picture.name == "my_router_dynamics"
    assert "over 300 steps" in picture.alt and "L2 loss of the surrogate (nats²) from 1.8" in picture.alt
    assert picture.alt.endswith("The routers follow the surrogate from step 61, whose error settles at step 142.")
    assert all(f" {number}: " in picture.caption for number in (1, 2, 3)) and "smoothed over 7" in picture.caption


def test_panels_have_log_scales_the_threshold_and_the_phases(tmp_path, drawn_by):
    loss, l2, error = drawn_by(routing, dynamics, read(tmp_path, *synthetic.routing())).axes
    assert [axes.get_yscale() for axes in (loss, l2, error)] == ["linear", "log", "log"]
    upright = [[line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1] for axes in (loss, l2, error)]
    assert upright == [[61, 142]] * 3
    assert [line.get_ydata()[0] for line in error.lines if line.get_linestyle() == ":"] == [0.2]
    assert {text.get_text() for text in loss.texts} == {"1", "2", "3"}


@pytest.mark.parametrize(("kind", "surrogate"), [("joint", False), ("router", False)])
def test_without_a_surrogate_the_constraint_is_shown(tmp_path, drawn_by, kind, surrogate):
    found = read(tmp_path, *synthetic.routing(kind, surrogate))
    picture = dynamics(found)
    assert "Constraint loss from 0.18" in picture.alt and "urrogate" not in picture.alt + picture.caption
    assert [axes.get_title("left") for axes in drawn_by(routing, dynamics, found).axes][1] == "Constraint loss"


def test_relaxed_choices_have_a_temperature(tmp_path, drawn_by):
    found = read(tmp_path, *synthetic.gumbel())
    assert "Temperature from 0.98" in dynamics(found).alt
    *_, temperature = drawn_by(routing, dynamics, found).axes
    assert temperature.get_title("left") == "Temperature" and temperature.get_yscale() == "log"


def test_routers_that_never_follow(tmp_path):
    metrics, log = synthetic.routing(steps=40)
    assert dynamics(read(tmp_path, metrics, log)).alt.endswith("The routers never follow the surrogate.")


def test_nothing_logged_gives_no_picture(tmp_path):
    found = read(tmp_path, synthetic.routing()[0])
    assert found.steps == [] and dynamics(found) is None


def test_what_cannot_be_drawn_on_a_log_scale_is_left_out(tmp_path):
    metrics, log = synthetic.routing(steps=70)
    for row in log[2:6]:
        row["surrogate_loss"] = 0.0
    log[10]["surrogate_error"] = float("inf")
    log[12]["surrogate_loss"] = None
    assert "nan" not in dynamics(read(tmp_path, metrics, log)).alt


def test_phases_follow_from_the_settings(tmp_path):
    found = read(tmp_path, *synthetic.routing())
    assert found.phases() == [(1, 61), (61, 142), (142, 300)]
    assert replace(found, steps=found.steps[:61]).phases() == [(1, 61), (61, 61), (61, 61)]
    assert replace(found, steps=found.steps[:60]).phases() == []
