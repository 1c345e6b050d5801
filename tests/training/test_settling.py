"""In which blocks it is worth that tokens choose, for losses and costs that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flextron_mcore.evaluation.routed import Routed, average
from flextron_mcore.training.settling import runs, worth_N
from tests.routing_toy import family, latency
from tests.training.test_adaptive import learner_of, spent_by_halves


def test_worth_is_what_it_saves_less_what_it_costs():
    """Half of the tokens at one level and half at the next but one: settled at the level between."""
    blocks = family(2)
    static = latency(blocks)
    mixed = ((0.3, 0.0, 0.0), (0.7, 0.0, 0.0))
    cost = replace(static, mixed=mixed, tokens=1000, settled=static)
    saves_N, asked = np.array([0.0, 0.5, 0.05, 0.2]), []
    slope = 0.4  # of the loss, by milliseconds

    def run(target, levels):
        asked.append((target, dict(levels)))
        share_NK = np.zeros((blocks.count, 4))
        if target in (0.0, 1.0):
            share_NK[:, int(3 * target)] = 1
        else:
            share_NK[:, [0, 2]] = 0.5
        spent = average(cost, blocks, share_NK)
        loss = 3.0 - slope * spent
        for block, level in levels.items():
            assert level == 1
            loss += saves_N[block]
        return Routed(loss, share_NK)

    ticks = []
    found_N = worth_N(run, blocks, cost, progress=lambda: ticks.append(1))
    assert len(asked) == len(ticks) == runs(blocks.count) and all(len(levels) <= 1 for _, levels in asked)
    for block in range(blocks.count):
        row = (static.heads, static.ffn_hidden_size)[block % 2]
        costs_more = mixed[block % 2][0] + (row[0] + row[2]) / 2 - row[1]
        assert found_N[block] == pytest.approx(saves_N[block] - slope * costs_more), block
    assert (found_N < 0).any() and (found_N > 0).any()
    asked.clear()
    again_N = worth_N(run, blocks, cost, settled=(1,))
    assert again_N[1] == -np.inf and len(asked) == runs(blocks.count - 1) and all(1 not in levels for _, levels in asked)


def test_where_more_cost_does_not_help_it_has_no_price():
    blocks = family(1)
    cost = replace(latency(blocks), mixed=((9.0,) * 3,) * 2, tokens=10, settled=latency(blocks))
    share_NK = np.full((2, 4), 0.25)
    found_N = worth_N(lambda target, levels: Routed(3.0 + target + 0.1 * len(levels), share_NK), blocks, cost)
    assert found_N == pytest.approx([0.1, 0.1])


def test_what_settled_blocks_spend_is_counted_as_in_a_network():
    """And the targets go as low as that allows."""
    spent, lows = [], []
    for settled in ((), (0,), (0, 1)):
        learner = learner_of(8, 0.5, (0.2, 0.0, 0.0))
        static = learner.costs[0]
        learner.counted = {
            "full": [replace(learner.counted["full"][0], heads=tuple(3 * x for x in static.heads), settled=static)]
        }
        learner.settle(settled)
        assert learner.info.settled == settled and learner.routers.settled == set(settled)
        spent.append(spent_by_halves(learner) * static.full)
        lows.append(float(learner.low_C))
    differ = 0.2 * static.full * (2 * 0.5 * 1.05 / 0.55 - 1)
    assert spent[0] - spent[1] == pytest.approx(static.heads[0] + static.heads[3] + differ, rel=1e-4)
    assert spent[1] - spent[2] == pytest.approx(differ, rel=1e-4)
    assert lows[0] > lows[1] == pytest.approx(lows[2], abs=1e-6) and lows[2] == pytest.approx(0.0, abs=1e-6)
