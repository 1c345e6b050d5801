"""Evaluation of adaptive routers on data: loss, and the levels of the tokens.

Shape suffixes: N blocks, K candidates, S tokens of a text, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state

from flextron_mcore.adaptive.routing import AdaptiveRouting
from flextron_mcore.evaluation.perplexity import evaluate
from flextron_mcore.pipeline.networks import run_networks


@dataclass(frozen=True)
class RoutedEvaluation:
    """Result of token routing on one domain.

    Attributes:
        loss: mean loss in nats per token.
        share_NK: share of the tokens that count in the loss at each level k (index of the candidate, 0 the smallest) of block n.
    """

    loss: float
    share_NK: np.ndarray


def evaluate_routed(
    model: Sequence[torch.nn.Module],
    datasets: Mapping[str, torch.utils.data.Dataset],
    routing: Callable[[], AdaptiveRouting],
    seq_length: int,
    micro_batch_size: int,
    max_samples: int | None = None,
    progress: Callable[[str], object] = lambda domain: None,
) -> dict[str, RoutedEvaluation]:
    """Evaluate adaptive routers on each domain: {domain: RoutedEvaluation}. Call on all ranks.

    Args:
        model: this rank's virtual-pipeline chunks.
        datasets: {domain: dataset}.
        routing: function that returns a new AdaptiveRouting, whose counts of tokens are zero.
        seq_length: tokens of a sample.
        micro_batch_size: samples of a micro-batch.
        max_samples: number of samples of each domain, the first ones; None for all.
        progress: called with the name of each domain that is done.
    """
    found = {}
    for domain, dataset in datasets.items():
        at_work = routing()
        losses = evaluate(model, {domain: dataset}, {"": at_work}, seq_length, micro_batch_size, max_samples)
        counts_NK = total_counts(at_work.counts_NK)
        shares_NK = counts_NK / counts_NK.sum(-1, keepdim=True).clamp_min(1)
        found[domain] = RoutedEvaluation(losses[""][domain], shares_NK.cpu().numpy())
        progress(domain)
    return found


def levels_of_text(model: Sequence[torch.nn.Module], routing: AdaptiveRouting, tokens_BS: torch.Tensor) -> np.ndarray:
    """Levels [N, S] that adaptive routers choose in each block for the tokens of one sequence. Call on all ranks.

    A level is the index of a block's candidate, 0 the smallest. All ranks get the same levels.

    Args:
        model: this rank's virtual-pipeline chunks.
        routing: adaptive routers at a target; its `kept` and its counts change.
        tokens_BS: token ids, B = 1.
    """
    routing.kept = {}
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
    # The number of micro-batches must be a multiple of the pipeline stages in Megatron-Core's interleaved schedule.
    interleaved = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    count = parallel_state.get_pipeline_model_parallel_world_size() if interleaved else 1
    with torch.no_grad():
        run_networks(model, lambda: iter([batch] * count), count, [routing], length, 1, forward_only=True)
    for chunk, was_training in zip(model, training, strict=True):
        chunk.train(was_training)
    levels_NS = torch.zeros(len(routing.counts_NK), length, dtype=torch.long, device=routing.counts_NK.device)
    for block, levels_SB in routing.kept.items():
        levels_NS[block] = levels_SB[:, 0]
    torch.distributed.all_reduce(levels_NS, group=parallel_state.get_pipeline_model_parallel_group())
    return levels_NS.cpu().numpy()


def total_counts(counts_NK: torch.Tensor) -> torch.Tensor:
    """Sum token counts [N, K] over data-parallel ranks and pipeline stages; returns a new tensor. Call on all ranks."""
    total_NK = counts_NK.clone()
    for group in (parallel_state.get_data_parallel_group(), parallel_state.get_pipeline_model_parallel_group()):
        torch.distributed.all_reduce(total_NK, group=group)
    return total_NK
