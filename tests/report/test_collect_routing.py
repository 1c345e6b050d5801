"""Reading `router`, `joint`, `gumbel`: budgets, steps, from where routers follow the surrogate, and that bad values are named."""

from __future__ import annotations

import copy

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.report.collect import Training, collect
from flextron_mcore.report.collect_routing import Routing, RoutingStep
from tests.report import synthetic


def read(run, metrics, log=None) -> Training:
    synthetic.write(run / "stage", metrics, log)
    return collect(run).training[0]


def routing(*follows: bool) -> Routing:
    steps = [RoutingStep(10 + i, 3.0, [], None, None, None, follow) for i, follow in enumerate(follows)]
    return Routing(synthetic.MODEL, ["latency"], True, 0.2, [], steps)


def test_router_is_a_training_stage_with_budgets_and_signals(tmp_path):
    training = read(tmp_path, *synthetic.routing())
    found = training.routing
    assert (training.kind, training.steps, len(training.train), len(training.validation)) == ("router", 300, 300, 6)
    assert training.last == training.validation[-1][1] and set(training.first) == {"full", "router 0.6", "router 0.7"}
    assert (found.costs, found.surrogate, found.threshold, found.signal) == (["latency"], True, 0.2, "surrogate")
    assert [budget.name for budget in found.budgets] == ["90%", "80%", "70%", "60%"]
    assert found.budgets[-1].subnetwork == synthetic.best(0.6)
    assert (found.budgets[-1].share, found.budgets[-1].argmax_share) == (synthetic.share(synthetic.best(0.6)), 0.6 + 0.012)
    first = found.steps[0]
    assert first.excess == pytest.approx(sum(first.routed) / 2 - first.loss) and not first.follows
    assert first.surrogate_loss > 1 and first.constraint_loss == pytest.approx(0.193, abs=1e-3)
    assert (found.follows_from(), found.settles_from()) == (61, 142)


def test_joint_has_no_surrogate(tmp_path):
    found = read(tmp_path, *synthetic.routing("joint", surrogate=False)).routing
    assert found.signal == "straight-through" and found.follows_from() is None
    assert {row.surrogate_loss for row in found.steps} == {None}


def test_gumbel_has_a_temperature_and_networks_of_all_axes(tmp_path):
    found = read(tmp_path, *synthetic.gumbel()).routing
    assert found.relaxed and found.signal == "relaxed choices" and not found.surrogate
    assert found.steps[-1].temperature == pytest.approx(0.1) and found.steps[0].temperature > 0.9
    assert found.budgets[-1].subnetwork == synthetic.small(0.6) and found.budgets[-1].subnetwork.hidden_size == 128


def test_elastic_has_no_routing(tmp_path):
    metrics, log = synthetic.routing()
    assert read(tmp_path, {**metrics, "stage": "elastic"}, log).routing is None


@pytest.mark.parametrize(
    ("follows", "first"),
    [((), None), ((False, False), None), ((True, True), 10), ((False, True, False, True, True), 11), ((False, True, False), 11)],
)
def test_where_the_routers_begin_to_follow(follows, first):
    assert routing(*follows).follows_from() == first


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
    metrics = copy.deepcopy(synthetic.routing(kind, steps=1)[0])
    inner = metrics
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(FlextronError) as caught:
        read(tmp_path, metrics)
    assert str(caught.value).startswith(f"{tmp_path / 'stage' / 'metrics.json'}: {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("constraint_loss", "x"), ("surrogate_error", []), ("routers_follow_surrogate", 1), ("subnetwork_losses", [None])],
)
def test_bad_log_rows_are_named(tmp_path, key, value):
    metrics, log = synthetic.routing(steps=3)
    row = next(row for row in log if row["event"] == "train" and row["step"] == 3)
    row[key] = value
    with pytest.raises(FlextronError) as caught:
        read(tmp_path, metrics, log)
    assert f"log.jsonl: line {log.index(row) + 1}: '{key}' must be " in str(caught.value)
