"""In which blocks it is worth that tokens choose for themselves; the others are settled (routers/adaptive.py). Not in the paper.

A block's router costs time, and so does it to bring tokens into groups: a small block, or one whose tokens want much the same,
loses more than it saves. This is tried: on the same data, each block once as it is, and once with one level for all its tokens.

Shape suffixes: N blocks, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from flextron_mcore.blocks import Blocks
from flextron_mcore.cost import Cost
from flextron_mcore.evaluation.routed import Routed, average, block_costs

# Between 0 and 1; blocks are tried at those in the middle.
_TARGETS = (0.0, 1 / 3, 2 / 3, 1.0)


def runs(tried: int) -> int:
    """How often `worth_N` runs the model to try so many blocks."""
    return len(_TARGETS) + (len(_TARGETS) - 2) * tried


def worth_N(
    run: Callable[[float, Mapping[int, int]], Routed],
    blocks: Blocks,
    cost: Cost,
    settled: Collection[int] = (),
    progress: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """What it is worth in each block that tokens choose, in nats per token: [N]; below 0 it is better if they don't.

    run: what the routers do at a target if some more blocks have one level for all tokens, {block: level}. cost: of tokens'
    choices; a difference of cost is worth what the loss changes with it from one target to another. settled: blocks that are not
    tried, as they are already: minus infinity.
    """

    def told(target: float, level: Mapping[int, int]) -> Routed:
        found = run(target, level)
        progress()
        return found

    whole = [told(target, {}) for target in _TARGETS]
    spent = [average(cost, blocks, routed.share_NK, settled) for routed in whole]
    alike_NK = blocks.costs_NK(cost, range(blocks.count))
    worth = np.zeros(blocks.count)
    for i, target in list(enumerate(_TARGETS))[1:-1]:
        saved = spent[i + 1] - spent[i - 1]
        price = max(whole[i - 1].loss - whole[i + 1].loss, 0.0) / saved if saved > 0 else 0.0
        share_NK = whole[i].share_NK
        costs_N = block_costs(cost, blocks, share_NK)
        for block, sizes in enumerate(blocks.sizes):
            if block in settled:
                worth[block] = -np.inf
                continue
            level = min(round(float(share_NK[block] @ np.arange(share_NK.shape[1]))), len(sizes) - 1)
            rises = told(target, {block: level}).loss - whole[i].loss
            worth[block] += rises + price * (alike_NK[block, level] - costs_N[block])
    return worth / (len(_TARGETS) - 2)
