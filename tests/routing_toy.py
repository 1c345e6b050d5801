"""A space with known costs and a known loss, for tests of routers and selectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from flextron_mcore.adaptive.table import RoutedTable
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.cost import Cost
from flextron_mcore.digests import seal
from flextron_mcore.latency.measure import device_name
from flextron_mcore.latency.table import LatencyTable, Timing, Timings
from flextron_mcore.settings.sections import KV_POLICIES
from flextron_mcore.space import ElasticSpace, SubNetwork
from tests import toy


def family(layers: int = 4, **space) -> Choices:
    arch = toy.config(num_layers=layers)
    return Choices(arch, ElasticSpace.build(arch, **space))


def latency(choices: Choices) -> Cost:
    """Latency with made-up milliseconds, different for every candidate."""

    def at(channels: int) -> Cost:
        share = channels / choices.model.hidden_size
        heads = tuple(1.1 * size**0.7 * share + 0.31 for size in choices.space.heads)
        widths = tuple(0.083 * size**0.9 * share + 0.17 for size in choices.space.ffn_hidden_size)
        candidates = {"heads": heads, "ffn_hidden_size": widths}
        return Cost("latency", choices.model, choices.space, 0.4 + 1.6 * share, candidates)

    narrow = tuple((size, at(size)) for size in choices.space.hidden_size[:-1])
    return replace(at(choices.model.hidden_size), narrow=narrow)


def true_loss(choices: Choices, seed: int = 0):
    """Function from a network to its loss above the full model's. Blocks differ in weight, and neighbouring layers interact."""
    generator = np.random.default_rng(seed)
    weights = generator.uniform(0.1, 1.0, choices.count)
    pairs = generator.uniform(0.0, 0.15, choices.count - 1)
    sizes = np.array([len(candidates) for candidates in choices.sizes])

    def loss(net: SubNetwork) -> float:
        missing = 1 - (np.array(choices.indices(net)) + 1) / sizes
        return 0.2 * float((weights * missing**2).sum() + (pairs * missing[1:] * missing[:-1]).sum())

    return loss


def write_table(checkpoint: Path, file: Path, routed: bool = False, **changes) -> Path:
    """Write a made-up latency table for a checkpoint, so that no test depends on a clock. routed: with costs of token routing."""
    info = open_checkpoint(checkpoint)
    cost = latency(Choices(info.model, info.space))
    timing = lambda value: Timing(value, value)  # noqa: E731
    table = LatencyTable(
        info.model,
        info.space,
        {"kind": "prefill", "batch_size": 1, "prompt_length": 8, "generated_tokens": 1},
        {"device": device_name(), "dtype": "float32", **changes.pop("machine", {})},
        "median",
        {
            size: Timings(
                timing(cost.at(size).constant),
                {name: tuple(map(timing, costs)) for name, costs in cost.at(size).candidates.items()},
            )
            for size in info.space.hidden_size
        },
        {"networks": 20, "median_error": 0.01, "p95_error": 0.02, "largest_error": 0.02},
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    if routed:
        candidates = {name: tuple(0.97 * value for value in values) for name, values in cost.candidates.items()}
        one = 0.001 * cost.full
        overhead = {"heads": (2 * one, one, 3 * one), "ffn_hidden_size": (one, 2 * one, 0.0)}
        row = RoutedTable(32, candidates, overhead, {}).to_dict()
        table = replace(table, routed=dict.fromkeys(KV_POLICIES, row))
    file.write_text(json.dumps(seal({**table.to_dict(), **changes})))
    return file
