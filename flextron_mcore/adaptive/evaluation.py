"""What routers that choose for every token do on data: loss, average cost, and which levels they choose.

Shape suffixes: N blocks, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from megatron.core import parallel_state

from flextron_mcore.adaptive.cost import RoutingCost, overhead_costs_N3, overhead_N3, size_NK
from flextron_mcore.adaptive.routers import TokenRouting
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Cost
from flextron_mcore.evaluation.perplexity import evaluate
from flextron_mcore.pipeline.networks import run_networks

# Of calibration: gaps between targets at first; the largest change of the share within one; how narrow one may become.
_GAPS, _CHANGE, _NARROW = 8, 0.015, 1 / 1024


@dataclass(frozen=True)
class Routed:
    """Of one domain: loss [nats per token], and the share of its tokens that chose each candidate, [N, K]."""

    loss: float
    share_NK: np.ndarray


def average(cost: Cost, blocks: Choices, share_NK: np.ndarray) -> float:
    """A token's average cost for a mix of levels, in the cost's unit: a sum over blocks, as that of a sub-network is.

    Where it costs something that tokens differ: as in a pass of tokens that chose independently.
    """
    return cost.constant + float(block_costs(cost, blocks, share_NK).sum())


def block_costs(cost: Cost, blocks: Choices, share_NK: np.ndarray) -> np.ndarray:
    """What each block has of that: [N]."""
    tokens = cost.tokens if isinstance(cost, RoutingCost) else 1
    much_N3 = np.stack(overhead_N3(share_NK, size_NK(blocks), lambda share: 1 - (1 - share) ** tokens), -1)
    mixed_N = (much_N3 * overhead_costs_N3(blocks, cost)).sum(-1)
    return (share_NK * blocks.costs_NK(cost)).sum(-1) + mixed_N


def each_cost(cost: Cost, blocks: Choices, levels_NS: np.ndarray) -> np.ndarray:
    """What each token of a text is worth, with its own level in every block: [S], on average what they cost together.

    What it adds that several levels occur is all tokens' alike.
    """
    one_hot_SNK = np.eye(blocks.exists_NK.shape[1])[levels_NS.T]
    each_S = np.array([average(cost, blocks, share_NK) for share_NK in one_hot_SNK])
    return each_S + average(cost, blocks, one_hot_SNK.mean(0)) - each_S.mean()


def evaluate_routed(
    model: Sequence[torch.nn.Module],
    datasets: Mapping[str, torch.utils.data.Dataset],
    routing: Callable[[], TokenRouting],
    seq_length: int,
    micro_batch_size: int,
    max_samples: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Routed]:
    """{domain: Routed}, on its samples or its first `max_samples`. Call on all ranks. routing: makes a new one."""
    found = {}
    for domain, dataset in datasets.items():
        at_work = routing()
        losses = evaluate(model, {domain: dataset}, {"": at_work}, seq_length, micro_batch_size, max_samples)
        counts_NK = total_counts(at_work.counts_NK)
        shares_NK = counts_NK / counts_NK.sum(-1, keepdim=True).clamp_min(1)
        found[domain] = Routed(losses[""][domain], shares_NK.cpu().numpy())
        if progress:
            progress(domain)
    return found


def each_token(model: Sequence[torch.nn.Module], routing: TokenRouting, tokens_BS: torch.Tensor) -> np.ndarray:
    """Levels [N, S] that the routers choose for the tokens of one sequence (B = 1). Call on all ranks."""
    kept: dict[int, torch.Tensor] = {}
    routing.kept = kept
    length = tokens_BS.shape[1]
    batch = {
        "tokens": tokens_BS,
        "labels": torch.zeros_like(tokens_BS),
        "loss_mask": torch.ones(tokens_BS.shape),
        "position_ids": torch.arange(length).expand(1, -1),
    }
    training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    with torch.no_grad():
        count = stages if virtual else 1  # the interleaved schedule takes multiples of the stages
        run_networks(model, lambda: iter([batch] * count), count, [routing], length, 1, forward_only=True)
    for chunk, was_training in zip(model, training, strict=True):
        chunk.train(was_training)
    levels_NS = torch.zeros(len(routing.counts_NK), length, dtype=torch.long, device=routing.counts_NK.device)
    for block, levels_SB in kept.items():
        levels_NS[block] = levels_SB[:, 0]
    torch.distributed.all_reduce(levels_NS, group=parallel_state.get_pipeline_model_parallel_group())
    return levels_NS.cpu().numpy()


def total_counts(counts_NK: torch.Tensor) -> torch.Tensor:
    """How many tokens chose what, over all data-parallel ranks and pipeline stages."""
    total_NK = counts_NK.clone()
    for group in (parallel_state.get_data_parallel_group(), parallel_state.get_pipeline_model_parallel_group()):
        torch.distributed.all_reduce(total_NK, group=group)
    return total_NK


def calibrate(spent: Callable[[float], float], progress: Callable[[], object] = lambda: None) -> list[tuple[float, float]]:
    """[(target, share of the full model's cost)]: what `spent` tells for targets from 0 to 1, closely enough to go between them.

    Gaps between targets are halved while the share changes much within one: it does so in steps. progress is called after every
    target.
    """
    found: dict[float, float] = {}

    def at(target: float) -> float:
        if target not in found:
            found[target] = spent(target)
            progress()
        return found[target]

    gaps = [(i / _GAPS, (i + 1) / _GAPS) for i in range(_GAPS)]
    while gaps:
        low, high = gaps.pop(0)
        if abs(at(high) - at(low)) > _CHANGE and high - low > _NARROW:
            gaps += [(low, (low + high) / 2), ((low + high) / 2, high)]
    return sorted(found.items())


def target_for(calibration: Sequence[tuple[float, float]], share: float, nearest: bool = False) -> float:
    """The target at which routers spend `share` of the full model's cost on average, between the calibration's points.

    Within a step, where the calibration could not come nearer, that of the nearer end.
    Raises FlextronError where there is no calibration, and, unless the `nearest` will do, where it does not reach that far.
    """
    if not calibration:
        raise FlextronError("the adaptive routers have no calibration: their training did not end; run `flextron router` again")
    points = sorted(calibration)
    low, high = (pick(spent for _, spent in points) for pick in (min, max))
    if not nearest and not low - 0.005 <= share <= high + 0.005:
        raise FlextronError(f"budget: the adaptive routers spend {low:.3f} to {high:.3f} of the full model's, not {share:.3f}")
    # Where it falls from a point to the next, as with routers of little training, a gap further on has the share, too.
    rising = (gap for gap in pairwise(points) if gap[0][1] < gap[1][1] and gap[0][1] <= share <= gap[1][1])
    gap = next(rising, None)
    if gap is None:
        return min(points, key=lambda point: abs(point[1] - share))[0]
    (first, below), (second, above) = gap
    if second - first <= _NARROW and above - below > _CHANGE:
        return first if share - below < above - share else second
    return first + (second - first) * (share - below) / (above - below)
