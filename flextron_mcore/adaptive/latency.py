"""What blocks cost whose tokens choose for themselves: routers, grouping and all (layers/dispatch.py).

A block's time is the sum over levels of the share of tokens there times a cost of the level, and where tokens differ the
OVERHEADS (adaptive/cost.py): levels that occur are products of their own (layers/dispatch.py). These costs are fitted (least
squares, none below 0) to blocks timed in whole networks, with many mixes of one level, a few or all, and checked against whole
networks with other mixes. A machine is not as fast all the time: some static networks are timed beside them, and all is in
proportion to their costs.

Shape suffixes: M mixes, N blocks, K candidates, S sequence, B batch, D hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from flextron_mcore.adaptive.cost import OVERHEADS, overhead_N3, size_NK
from flextron_mcore.choices import Choices
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.cost import Cost
from flextron_mcore.latency.measure import Setting, runner, time_blocks, time_run, without_drift
from flextron_mcore.latency.table import RoutedTable
from flextron_mcore.layers.routed_layer import GivenLevels
from flextron_mcore.runtime.distributed import device

# Mixes that are fitted to, for each candidate, and mixes for the check.
_MIXES, _CHECKS = 6, 8


def networks_per_round(blocks: Choices) -> int:
    """How many networks a round times."""
    return (_MIXES + 1) * blocks.exists_NK.shape[1] + _CHECKS


def measure_routed(
    model: torch.nn.Module,
    blocks: Choices,
    setting: Setting,
    rounds: int,
    hidden_size: int,
    kv_policy: str,
    static: Cost,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> RoutedTable:
    """The costs of levels on this device, in the unit of `static`, that of networks without routing.

    hidden_size: of the routers. progress is called after every network.
    """
    run = runner(model, setting, blocks.model.vocab_size, seed)
    generator = np.random.default_rng([seed, 9])
    width = blocks.exists_NK.shape[1]
    known = [blocks.network([min(k, len(sizes) - 1) for sizes in blocks.sizes]) for k in range(width)]
    count = networks_per_round(blocks) - len(known)
    mixes_MNK = np.zeros((count, *blocks.exists_NK.shape))
    for m in range(count):  # every level in many of them; some nearly pure, some even
        for n, sizes in enumerate(blocks.sizes):
            others = np.delete(np.arange(len(sizes)), m % len(sizes))
            levels = [m % len(sizes), *generator.permutation(others)[: generator.integers(len(sizes))]]
            mixes_MNK[m, n, levels] = generator.dirichlet([generator.choice([0.2, 1.0, 5.0])] * len(levels))
    length = setting.prompt_length + setting.generated_tokens - 1
    u_NSB = torch.from_numpy(generator.random((blocks.count, length, setting.batch_size)))
    router = random_router(blocks.model.hidden_size, hidden_size, width)
    routings, rows_MN = [], []
    for mix_NK in mixes_MNK:
        edges_NK = torch.from_numpy(mix_NK.cumsum(-1)[:, :-1])
        levels_NSB = (u_NSB[..., None] > edges_NK[:, None, None]).sum(-1)
        routings.append(GivenLevels(levels_NSB.to(device()), kv_policy, router))
        counted = torch.nn.functional.one_hot(levels_NSB, mix_NK.shape[-1]).double().mean((1, 2))
        # Single tokens that follow a prompt hardly differ from others of their pass.
        first = torch.nn.functional.one_hot(levels_NSB[:, : setting.prompt_length], width).double().mean((1, 2))
        much_N3 = np.stack(overhead_N3(first.numpy(), size_NK(blocks), lambda share: (share > 1e-9).astype(float)), -1)
        rows_MN.append([[*counted[n, : len(sizes)], *much_N3[n]] for n, sizes in enumerate(blocks.sizes)])
    networks, times = [*routings, *known], []
    for round_ in range(rounds + 1):
        found: dict[Any, list[float]] = {}
        for m in np.random.default_rng([seed, round_, 9]).permutation(len(networks)):
            if m < count:
                routings[m].begin()
            with use_subnetwork(model, networks[m]):
                if m >= count - _CHECKS:
                    found["network", m] = [time_run(run)]
                else:
                    parts, rest = time_blocks(model, run)
                    found |= {(m, n): [value] for n, value in enumerate(parts)} | {("constant", m): [rest]}
            progress()
        times.append(found)
    median = {key: float(np.median(values)) for key, values in without_drift(times[1:]).items()}
    scale = np.median([static.of(net) / median["network", count + k] for k, net in enumerate(known)])
    median = {key: value * float(scale) for key, value in median.items()}
    constant = float(np.median([median["constant", m] for m in range(count - _CHECKS)]))
    costs: dict[str, list[float]] = {}
    for axis in blocks.space.layer_axes:
        rows = [(m, n) for m in range(count - _CHECKS) for n, other in enumerate(blocks.axes) if other is axis]
        found, _ = nnls(np.array([rows_MN[m][n] for m, n in rows]), np.array([median[row] for row in rows]))
        costs[axis.name] = found.tolist()
    errors = []
    for m in range(count - _CHECKS, count):
        predicted = constant + sum(np.dot(row, costs[blocks.axes[n].name]) for n, row in enumerate(rows_MN[m]))
        errors.append(abs(predicted - median["network", m]) / median["network", m])
    check = {"networks": _CHECKS, "median_error": float(np.median(errors)), "largest_error": float(max(errors))}
    candidates = {name: tuple(found[: -len(OVERHEADS)]) for name, found in costs.items()}
    overhead = {name: tuple(found[-len(OVERHEADS) :]) for name, found in costs.items()}
    return RoutedTable(hidden_size, candidates, overhead, check)


def random_router(channels: int, hidden_size: int, width: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """What computes as a block's router does (adaptive/routers.py), for `also` of GivenLevels."""
    return _Router(channels, hidden_size, width)


class _Router:
    def __init__(self, channels: int, hidden_size: int, width: int) -> None:
        make = lambda *shape: torch.randn(shape, device=device())  # noqa: E731
        self.token_UD, self.bias_U = make(hidden_size, channels), make(hidden_size)
        self.out_KU, self.bias_K = make(width, hidden_size), make(width)

    @torch.no_grad()
    def __call__(self, index: int, hidden_SBD: torch.Tensor) -> torch.Tensor:
        from flextron_mcore.adaptive.routers import chosen, router_logits

        levels_SB = router_logits(hidden_SBD, self.token_UD, self.bias_U, self.out_KU, self.bias_K).argmax(-1)
        return chosen(levels_SB, len(self.out_KU), levels_SB >= 0)  # they count what they choose
