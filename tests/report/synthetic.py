"""Synthetic outputs of the stages about routers, as the stages write them: metrics.json as a dict, log.jsonl as rows."""

from __future__ import annotations

import copy
import functools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.cost import Cost
from flextron_mcore.report import TOPICS
from flextron_mcore.report.reader import collect
from flextron_mcore.report.topic import Topic
from flextron_mcore.space import ElasticSpace, SubNetwork, count_parameters

MODEL = ModelConfig(8, 256, 8, 8192, 512, ffn_hidden_size=1024)
SPACE = ElasticSpace.build(MODEL, granularity=2)
COST = Cost("latency", MODEL, SPACE, 1.0, {"heads": (0.5, 0.7, 0.9, 1.1), "ffn_hidden_size": (0.3, 0.5, 0.7, 0.9)})
SETTINGS = {"model": MODEL.to_dict(), "space": SPACE.to_dict()}
TARGETS = (0.6, 0.7, 0.8, 0.9)
NETWORK = {
    "name": "full",
    "subnetwork": SubNetwork.full(MODEL).to_dict(),
    **{"parameters": 10, "non_embedding_parameters": 5, "weight_bytes": 20, "kv_cache_bytes": 8},
    **{"loss": {"prose": 2.0}, "perplexity": {"prose": 7.4}, "mean": {"loss": 2.0, "perplexity": 7.4}},
}
EVALUATE = {"stage": "evaluate", "networks": [NETWORK], "model": MODEL.to_dict(), "space": None}
ELASTIC = {"stage": "elastic", "steps": 4, "tokens": 400, "seconds": 1.5, "tokens_per_second": 266.7, "validation": {}}
EXPORT = {"stage": "export", "format": "hf", "architecture": "A", "parameters": 1, "bytes": 2}


def draw(rng: random.Random) -> SubNetwork:
    """A random member of the space."""
    layers = (SPACE.layer_choice(MODEL, rng.choice(SPACE.heads), rng.choice(SPACE.ffn_hidden_size)) for _ in range(8))
    return SubNetwork(256, tuple(layers))


def share(net: SubNetwork) -> float:
    """Latency as a fraction of the full model's."""
    return COST.of(net) / COST.full


def loss(net: SubNetwork) -> float:
    """Made-up loss: FFN blocks of deep layers matter most, heads least."""
    kept = sum(0.3 * a.num_attention_heads / 8 + 0.1 * (i + 3) * a.ffn_hidden_size / 1024 for i, a in enumerate(net.layers))
    return 3.0 + 1.5 * (1 - kept / (8 * 0.3 + 0.1 * sum(range(3, 11))))


@functools.cache
def best(target: float, count: int = 400) -> SubNetwork:
    """The best of many random networks within `target`, a stand-in for what routers choose."""
    rng = random.Random(f"best {target}")
    nets = [SPACE.uniform(MODEL, 2, 256), *(draw(rng) for _ in range(count))]
    return min((net for net in nets if share(net) <= target), key=loss)


def routing(kind: str = "router", surrogate: bool = True, steps: int = 300) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics.json, log.jsonl) of `router` or `joint`. With a surrogate, routers follow it from step 61 on, not at 64."""
    rng, rows = random.Random(f"{kind} {surrogate}"), []
    names = [f"router {target}" for target in TARGETS[:2]]
    bad = 0.0 if surrogate else 0.2
    for step in range(1, steps + 1):
        follows = surrogate and step > 60 and step != 64
        full = 3.0 if kind == "router" else 2.9 + 0.1 * math.exp(-step / 100)
        excess = bad + 0.4 + 0.5 * math.exp(-max(0, step - 60) / 60) + 0.1 * min(step, 60) / 60
        row = {
            "step": step,
            "event": "train",
            "loss": full + rng.gauss(0, 0.02),
            "subnetwork_losses": [full + excess + rng.gauss(0, 0.1) for _ in range(2)],
            "targets": [[0.6], [0.7]],
            "costs": [[0.65], [0.72]],
            "constraint_loss": 0.2 * math.exp(-step / 30),
            "tokens_per_second": 1000.0,
        }
        if surrogate and kind == "router":
            row["surrogate_loss"] = 2.0 * math.exp(-step / 25) + 0.01 * abs(rng.gauss(1, 0.5))
            row["surrogate_error"] = 0.2 * (1.5 if not follows else 0.5) * math.exp(-step / 300)
            row["routers_follow_surrogate"] = follows
        rows.append(row)
        if step == 1 or step % 60 == 0:
            losses = {name: full + excess - 0.1 * i for i, name in enumerate(names)}
            rows.append({"step": step, "event": "validation", "losses": {**losses, "full": full}})
    ends = [row["losses"] for row in rows if row["event"] == "validation"]
    budgets = [
        {"target": t, "share": share(best(t)), "argmax_share": t + 0.012, "subnetwork": best(t).to_dict()} for t in TARGETS
    ]
    metrics = {"stage": kind, "steps": steps, "tokens": steps * 8192, "seconds": 61.0, "tokens_per_second": 40285.0, **SETTINGS}
    metrics |= {"validation": {"first": ends[0], "last": ends[-1]}, "budgets": budgets}
    return {**metrics, "routers": {"costs": ["latency"], "surrogate": surrogate, "threshold": 0.2}}, rows


def small(target: float) -> SubNetwork:
    """A narrow network of few layers, the fewer the smaller the target."""
    hidden, depth = (128, 4) if target < 0.65 else (192, 6) if target < 0.75 else (256, 8)
    space = ElasticSpace.build(MODEL, granularity=2, hidden_size=(0.5, 0.75, 1.0), depth=(0.5, 0.75, 1.0))
    return space.network(MODEL, best(target).layers, hidden, depth)


def gumbel(steps: int = 300) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """metrics.json and log.jsonl of `gumbel`."""
    metrics, rows = routing("joint", False, steps)
    for row in rows:
        if row["event"] == "train":
            row["temperature"] = 0.1 ** (row["step"] / steps)
    budgets = [{**budget, "subnetwork": small(budget["target"]).to_dict()} for budget in metrics["budgets"]]
    return {**metrics, "stage": "gumbel", "budgets": budgets}, rows


def family(latency: bool = True, losses: bool = True) -> dict[str, Any]:
    """metrics.json of `family`, the largest budget first."""
    rows, whole = [], count_parameters(MODEL)
    for target in TARGETS[::-1]:
        net = small(target)
        executed = [layer for layer in net.layers if layer.executed]
        costs = {"parameters": {"value": count_parameters(MODEL, net), "share": count_parameters(MODEL, net) / whole}}
        costs |= {"latency": {"value": 20.0 * target, "share": target}} if latency else {}
        row = {"budget": f"{target}", "subnetwork": net.to_dict(), "costs": costs, "hidden_size": net.hidden_size}
        row |= {"depth": len(executed), "uniform": False, "exports": {"hf": f"{target}_hf"}, "compensated": None}
        rows.append({**row, "loss": 4.0 - target if losses else None})
    return {"stage": "family", "selector": "router", "model": MODEL.to_dict(), "networks": rows}


def sensitivity() -> dict[str, Any]:
    """metrics.json of `sensitivity`."""
    full, blocks = SubNetwork.full(MODEL), []
    for axis, sizes in (("heads", SPACE.heads), ("ffn_hidden_size", SPACE.ffn_hidden_size)):
        for layer in range(8):
            for size in sizes[:-1]:
                widths = {"heads": 8, "ffn_hidden_size": 1024, axis: size}
                layers = list(full.layers)
                layers[layer] = SPACE.layer_choice(MODEL, *widths.values())
                value = loss(SubNetwork(256, tuple(layers)))
                blocks.append({"layer": layer, "axis": axis, "size": size, "loss": value, "degradation": value - 3.0})
    return {"stage": "sensitivity", "samples": 64, "full_loss": 3.0, "blocks": blocks, **SETTINGS}


def compare(cost: str = "latency") -> dict[str, Any]:
    """metrics.json of `compare`, with every selector. The scaling law is determined for the router, not for matformer."""
    unit = {"latency": 1.0, "parameters": 1e6, "memory": 2.0**20}[cost]

    def network(net: SubNetwork, **more: Any) -> dict[str, Any]:
        sizes = {"parameters": count_parameters(MODEL, net), "non_embedding_parameters": count_parameters(MODEL, net, False)}
        losses = {"loss": {"prose": loss(net) + 0.2, "code": loss(net) - 0.2}, "mean_loss": loss(net)}
        return {**more, "cost": COST.of(net) * unit, **sizes, **losses}

    def chosen(selector: str, target: float, net: SubNetwork) -> dict[str, Any]:
        return network(net, selector=selector, target=target, subnetwork=net.to_dict(), share=share(net))

    uniform = {0.6: (4, 512), 0.7: (4, 768), 0.8: (6, 768), 0.9: (8, 768)}
    matformer = {0.6: (8, 256), 0.7: (8, 256), 0.8: (8, 512), 0.9: (8, 768)}
    rng, networks, boxes = random.Random("compare"), [], []
    for target in TARGETS:
        by_router, greedy = best(target), best(target, 100)
        networks.append(chosen("router", target, by_router))
        networks.append(chosen("uniform", target, SPACE.uniform(MODEL, *uniform[target])))
        networks.append(chosen("matformer", target, SPACE.uniform(MODEL, *matformer[target])))
        networks.append(chosen("sensitivity", target, greedy))
        drawn = [net for net in (draw(rng) for _ in range(2000)) if target - 0.1 < share(net) <= target][:50]
        networks.append(chosen("random", target, drawn[0]))
        better = sum(loss(net) > loss(by_router) for net in drawn) / len(drawn)
        row = {"target": target, "shares": [share(n) for n in drawn], "mean_losses": [loss(n) for n in drawn]}
        boxes.append({**row, "router_share": share(by_router), "router_loss": loss(by_router), "better_than": better})
    equal = []
    for selector, nets in (("uniform", uniform), ("matformer", matformer)):
        for target in TARGETS[:2]:
            net = SPACE.uniform(MODEL, *nets[target])
            row = {"selector": selector, "subnetwork": net.to_dict(), "share": share(net), "mean_loss": loss(net)}
            equal.append({**row, "router_share": share(net), "router_loss": loss(net) - 0.05})
    dense = {"parameters": 9_000_000, "non_embedding_parameters": 4_800_000, "mean_loss": 3.42}
    fit = {"Nc": 4.71e6, "alpha": 1.2, "E": 2.5, "Nc_ci": [4e6, 5.5e6], "alpha_ci": [-0.25, 2.65], "E_ci": [2.4, 2.6]}
    in_cost = {"Nc": 11.6 * unit, "alpha": 1.8, "E": 2.5, "alpha_ci": [1.5, 2.1], "E_ci": [2.4, 2.6]}
    in_cost["Nc_ci"] = [11.0 * unit, 12.25 * unit]
    return {
        "stage": "compare",
        **SETTINGS,
        "cost": cost,
        "full_cost": COST.full * unit,
        "smallest_cost": COST.smallest * unit,
        "machine": {"device": "Toy GPU", "dtype": "bfloat16", "threads": None} if cost == "latency" else None,
        "setting": {"kind": "prefill", "batch_size": 2} if cost == "latency" else None,
        "samples": 128,
        "full": network(SubNetwork.full(MODEL)),
        "networks": networks,
        "random": boxes,
        "equal": equal,
        "dense": [{"name": "small one", "cost": 12.0 * unit, **dense}, {"name": "without a cost", "cost": None, **dense}],
        "scaling_law": [
            {"selector": "router", "of": "non_embedding_parameters", "points": 5, **fit},
            {"selector": "router", "of": "cost", "points": 5, **in_cost},
            {"selector": "matformer", "of": "cost", "points": 3, **dict.fromkeys(fit)},
        ],
    }


def write(directory: Path, metrics: dict[str, Any], log: list[dict[str, Any]] | None = None) -> None:
    """Write a stage's directory: metrics.json and, if there is one, log.jsonl."""
    directory.mkdir(parents=True)
    (directory / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    if log is not None:
        (directory / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")


def read(topic: Topic, run: Path, **stages: Any) -> list:
    """Results that `topic` reads from a run. run: {stage: metrics.json, or (metrics.json, log.jsonl)}."""
    for name, made in stages.items():
        write(run / name, *(made if isinstance(made, tuple) else (made,)))
    return topic.results(collect(run))


def changed(metrics: dict[str, Any], path: list[str | int], value: Any) -> dict[str, Any]:
    """A copy of `metrics` with another value at `path`."""
    inner = result = copy.deepcopy(metrics)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return result


def problem(run: Path, topics: Sequence[Topic] = TOPICS) -> str:
    """Message with which the report refuses `run`, which is one line."""
    with pytest.raises(FlextronError) as caught:
        outputs = collect(run)
        for topic in topics:
            topic.results(outputs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
