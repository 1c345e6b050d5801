"""Reading `compare` and `sensitivity`, and that bad values are named."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.report.collect import collect
from flextron_mcore.space import SubNetwork
from tests.report import synthetic


def read(run, metrics: dict[str, Any]) -> Any:
    synthetic.write(run / "stage", metrics)
    found = collect(run)
    return (found.comparisons or found.sensitivities)[0]


def test_comparison(tmp_path):
    c = read(tmp_path, synthetic.compare())
    assert (c.label, c.cost, c.samples, c.full_cost) == ("stage", "latency", 128, synthetic.COST.full)
    assert (c.full.selector, c.full.share, c.full.target, c.full.mean_loss) == ("full", 1.0, None, pytest.approx(3.0))
    routed = c.of("router")
    assert [net.target for net in routed] == [0.6, 0.7, 0.8, 0.9]
    assert routed[0].subnetwork == synthetic.best(0.6) and routed[0].loss["prose"] == pytest.approx(routed[0].mean_loss + 0.2)
    assert [(net.name, net.share) for net in c.dense] == [("small one", 12 / synthetic.COST.full), ("without a cost", None)]
    assert c.random[0].router_loss == routed[0].mean_loss and len(c.random[0].losses) == len(c.random[0].shares)
    assert c.equal[0].router_loss == pytest.approx(c.equal[0].mean_loss - 0.05)
    assert c.fits[0].values == (4.71e6, 1.2, 2.5) and c.fits[0].intervals[1] == (-0.25, 2.65)
    assert c.fits[2].values is None and c.fits[2].intervals == (None, None, None)
    assert c.machine["device"] == "Toy GPU" and c.setting == {"kind": "prefill", "batch_size": 2}


def test_comparison_without_routers_and_measurement(tmp_path):
    metrics = {**synthetic.compare("memory"), "networks": [], "equal": [], "dense": [], "scaling_law": []}
    for row in metrics["random"]:
        row.update(router_share=None, router_loss=None, better_than=None)
    c = read(tmp_path, metrics)
    assert (c.networks, c.machine, c.setting) == ([], {}, {})
    assert (c.random[0].router_share, c.random[0].router_loss, c.random[0].better_than) == (None, None, None)


def test_sensitivity(tmp_path):
    s = read(tmp_path, synthetic.sensitivity())
    assert (s.samples, s.full_loss, len(s.blocks)) == (64, 3.0, 48)
    assert s.candidates("heads") == [6, 4, 2] and s.candidates("ffn_hidden_size") == [768, 512, 256]
    curve = s.curve("ffn_hidden_size", 256)
    layers = list(SubNetwork.full(synthetic.MODEL).layers)
    layers[7] = synthetic.SPACE.layer_choice(synthetic.MODEL, 8, 256)
    assert [layer for layer, _ in curve] == list(range(8))
    assert curve[7][1] == pytest.approx(synthetic.loss(SubNetwork(256, tuple(layers))) - 3.0)


@pytest.mark.parametrize(
    ("made", "path", "value", "message"),
    [
        (synthetic.compare, ["cost"], "energy", "'cost' must be one of latency, parameters, memory, not \"energy\""),
        (synthetic.compare, ["full_cost"], 0, "'full_cost' must be more than 0, not 0"),
        (synthetic.compare, ["full"], None, "'full' must be an object, not null"),
        (synthetic.compare, ["full", "cost"], None, "full: 'cost' must be a number, not null"),
        (synthetic.compare, ["networks", 2, "selector"], "oracle", "networks[2]: 'selector' must be one of router, uniform,"),
        (synthetic.compare, ["networks", 0, "loss", "code"], "low", "networks[0]: loss: 'code' must be a number"),
        (synthetic.compare, ["networks", 0, "subnetwork", "layers"], [], "networks[0]: 0 layers, but the model has 8"),
        (synthetic.compare, ["random", 1, "shares"], [0.5], "random[1]: 'mean_losses' has 50 numbers, but 'shares' has 1"),
        (synthetic.compare, ["random", 0, "better_than"], "all", "random[0]: 'better_than' must be a number, not \"all\""),
        (synthetic.compare, ["equal", 0, "share"], None, "equal[0]: 'share' must be a number, not null"),
        (synthetic.compare, ["dense", 0, "name"], 3, "dense[0]: 'name' must be a text, not 3"),
        (
            synthetic.compare,
            ["scaling_law", 0, "of"],
            "flops",
            "scaling_law[0]: 'of' must be one of non_embedding_parameters, cost",
        ),
        (synthetic.compare, ["scaling_law", 0, "E_ci"], [1], "scaling_law[0]: 'E_ci' must be a list of 2 numbers, not [1]"),
        (synthetic.sensitivity, ["blocks"], [], "'blocks' is empty"),
        (synthetic.sensitivity, ["blocks", 3, "axis"], "depth", "blocks[3]: 'axis' must be one of heads, ffn_hidden_size"),
        (synthetic.sensitivity, ["blocks", 3, "layer"], 8, "blocks[3]: 'layer' must be within 0..7, not 8"),
        (synthetic.sensitivity, ["blocks", 0, "degradation"], None, "blocks[0]: 'degradation' must be a number, not null"),
    ],
)
def test_bad_metrics_are_named(tmp_path, made, path, value, message):
    metrics = copy.deepcopy(made())
    inner = metrics
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(FlextronError) as caught:
        read(tmp_path, metrics)
    assert str(caught.value).startswith(f"{tmp_path / 'stage' / 'metrics.json'}: {message}") and "\n" not in str(caught.value)
