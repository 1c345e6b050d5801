"""Latency of blocks whose tokens have different levels, with the time of routers and of sorting tokens.

A block's time is modelled as a sum of (share of tokens at a level) * (cost of the level), plus (amount) * (cost) of each of
OVERHEADS (adaptive/usage.py). The costs are fitted by non-negative least squares to blocks timed in whole networks with many
mixes of levels, and checked against whole networks with other mixes. Static networks are timed in the same rounds, and all times
are scaled to their known costs, because a machine's speed drifts.

Shape suffixes: M mixes, N blocks, K candidates, S sequence, B batch, D hidden channels, U hidden units of a router.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from flextron_mcore.adaptive.routers import count_levels, router_logits
from flextron_mcore.adaptive.table import RoutedTable
from flextron_mcore.adaptive.usage import OVERHEADS, level_shares_NK, overheads_N3
from flextron_mcore.choices import Choices
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.cost import Cost
from flextron_mcore.latency.measure import Setting, runner, time_blocks, time_run, without_drift
from flextron_mcore.layers.tokens.layer import FixedLevels
from flextron_mcore.runtime.distributed import device

# Number of timed mixes of levels: for the fit, times the largest number of candidates; for the check, in all.
_MIXES, _CHECKS = 6, 8


def networks_per_round(choices: Choices) -> int:
    """Number of whole networks that `measure_routed` times in every round."""
    return (_MIXES + 1) * choices.exists_NK.shape[1] + _CHECKS


def measure_routed(
    model: torch.nn.Module,
    choices: Choices,
    setting: Setting,
    rounds: int,
    hidden_size: int,
    kv_policy: str,
    static: Cost,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> RoutedTable:
    """Measure token routing on this device: milliseconds of every level of every axis, and of every kind of routing overhead.

    A level is the index of a block's candidate. Routing overhead is time that tokens of different levels add (OVERHEADS,
    usage.py).

    Args:
        model: full model on one rank.
        choices: blocks of the model and candidates of each.
        setting: workload of a timed run: batch size, prompt length, generated tokens.
        rounds: number of timed rounds.
        hidden_size: hidden units of a router.
        kv_policy: keys and values that a token writes: `full`, of all KV groups, or `own`, of the groups that it uses.
        static: latency of sub-networks without token routing; measured times are scaled to it.
        seed: seed of the random levels of tokens, and of the order of runs.
        progress: called after every timed network.
    """
    run = runner(model, setting, choices.model.vocab_size, seed)
    generator = np.random.default_rng([seed, 9])
    width = choices.exists_NK.shape[1]
    known = [choices.network([min(k, len(sizes) - 1) for sizes in choices.sizes]) for k in range(width)]
    count = networks_per_round(choices) - len(known)
    mixes_MNK = _mixes(choices, count, generator)
    length = setting.prompt_length + setting.generated_tokens - 1
    u_NSB = torch.from_numpy(generator.random((choices.count, length, setting.batch_size)))
    router = RandomRouter(choices.model.hidden_size, hidden_size, width)
    routings, rows_MN = [], []
    for mix_NK in mixes_MNK:
        edges_NK = torch.from_numpy(mix_NK.cumsum(-1)[:, :-1])
        levels_NSB = (u_NSB[..., None] > edges_NK[:, None, None]).sum(-1)
        routings.append(FixedLevels(levels_NSB.to(device()), kv_policy, router))
        rows_MN.append(_rows(choices, levels_NSB, setting.prompt_length))
    networks, fitted, times = [*routings, *known], range(count - _CHECKS), []
    for round_ in range(rounds + 1):
        found: dict[Any, list[float]] = {}
        for m in np.random.default_rng([seed, round_, 9]).permutation(len(networks)):
            if m < count:
                routings[m].begin()
            with use_subnetwork(model, networks[m]):
                if m in fitted:
                    parts, rest = time_blocks(model, run)
                    found |= {(m, n): [value] for n, value in enumerate(parts)} | {("constant", m): [rest]}
                else:
                    found["network", m] = [time_run(run)]
            progress()
        times.append(found)
    median = {key: float(np.median(values)) for key, values in without_drift(times[1:]).items()}
    scale = np.median([static.of(net) / median["network", count + k] for k, net in enumerate(known)])
    median = {key: value * float(scale) for key, value in median.items()}
    constant = float(np.median([median["constant", m] for m in fitted]))
    costs = {}
    for axis in choices.space.layer_axes:
        keys = [(m, n) for m in fitted for n, other in enumerate(choices.axes) if other is axis]
        costs[axis.name], _ = nnls(np.array([rows_MN[m][n] for m, n in keys]), np.array([median[key] for key in keys]))
    errors = []
    for m in range(count - _CHECKS, count):
        predicted = constant + sum(np.dot(row, costs[axis.name]) for axis, row in zip(choices.axes, rows_MN[m], strict=True))
        errors.append(abs(predicted - median["network", m]) / median["network", m])
    check = {"networks": _CHECKS, "median_error": float(np.median(errors)), "largest_error": float(max(errors))}
    levels, overhead = ({name: tuple(found[part].tolist()) for name, found in costs.items()} for part in _PARTS)
    return RoutedTable(hidden_size, levels, overhead, check)


_PARTS = slice(None, -len(OVERHEADS)), slice(-len(OVERHEADS), None)  # costs of levels and of overheads, in the order of `_rows`


def _mixes(choices: Choices, count: int, generator: np.random.Generator) -> np.ndarray:
    """Random shares of tokens at each level [M, N, K], M = count: mixes vary from nearly one level to all levels evenly.

    In mix m, level m modulo a block's number of levels occurs in every block, so that each level occurs in many mixes.
    """
    mixes_MNK = np.zeros((count, *choices.exists_NK.shape))
    for m in range(count):
        for n, sizes in enumerate(choices.sizes):
            others = np.delete(np.arange(len(sizes)), m % len(sizes))
            levels = [m % len(sizes), *generator.permutation(others)[: generator.integers(len(sizes))]]
            mixes_MNK[m, n, levels] = generator.dirichlet([generator.choice([0.2, 1.0, 5.0])] * len(levels))
    return mixes_MNK


def _rows(choices: Choices, levels_NSB: torch.Tensor, prompt_length: int) -> list[list[float]]:
    """Regressors of each block's time: share of tokens at each of its levels, then amount of each of OVERHEADS.

    Args:
        choices: blocks of the model and candidates of each.
        levels_NSB: level of each token in each block.
        prompt_length: tokens of a prompt, the first of S; the tokens after it are generated.
    """
    hot_NSBK = torch.nn.functional.one_hot(levels_NSB, choices.exists_NK.shape[1]).double()
    # Overheads are of the prompt's pass only: decoding passes have one token a sequence, whose levels hardly differ.
    prompt_NK = hot_NSBK[:, :prompt_length].mean((1, 2)).numpy()
    amount_N3 = np.stack(overheads_N3(prompt_NK, level_shares_NK(choices), lambda share: (share > 1e-9).astype(float)), -1)
    share_NK = hot_NSBK.mean((1, 2))
    return [[*share_NK[n, : len(sizes)], *amount_N3[n]] for n, sizes in enumerate(choices.sizes)]


class RandomRouter:
    """Router with random weights, the same for all blocks, which takes as much time as a trained one (for FixedLevels).

    Args:
        channels: hidden channels of the model.
        hidden_size: hidden units of the router.
        width: largest number K of candidates of a block.
    """

    def __init__(self, channels: int, hidden_size: int, width: int) -> None:
        make = lambda *shape: torch.randn(shape, device=device())  # noqa: E731
        self.token_UD, self.bias_U = make(hidden_size, channels), make(hidden_size)
        self.out_KU, self.bias_K = make(width, hidden_size), make(width)

    @torch.no_grad()
    def __call__(self, block: int, hidden_SBD: torch.Tensor) -> torch.Tensor:
        """Choose levels for the input of block number `block`, and return the number [K] of tokens at each level."""
        levels_SB = router_logits(hidden_SBD, self.token_UD, self.bias_U, self.out_KU, self.bias_K).argmax(-1)
        return count_levels(levels_SB, len(self.out_KU), levels_SB >= 0)
