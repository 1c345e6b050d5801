"""Importance scores (Flextron, eq. 3 and 4), accumulated over calibration samples in one pass of the full model.

Shape suffixes: S sequence, B batch, F neurons of this rank, G KV groups of this rank, Q query heads of a group, H channels of a
head, d all heads' channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from flextron_mcore.config import FlextronError
from flextron_mcore.model import unwrap
from flextron_mcore.pipeline.networks import Batch, run_networks
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.ranks import on_main_process

SCORES = ("activation", "activation_weight")


@dataclass
class LayerScores:
    """Scores of one layer in the order of the checkpoint: neurons [F] and query heads [G, Q], float64, of the whole layer."""

    neurons: Tensor
    heads: Tensor


def importance(
    model: Sequence[torch.nn.Module],
    batches: Callable[[], Iterator[Batch]],
    num_batches: int,
    seq_length: int,
    micro_batch_size: int,
    score: str = "activation",
) -> dict[int, LayerScores]:
    """{global layer index: scores} of this rank's layers, summed over data-parallel ranks, gathered over tensor-parallel ones.

    score "activation": eq. 3, |output of the head|_1, and eq. 4, |what enters fc2|_1 of the neuron (for gated MLPs the product of
    gate and up). "activation_weight" multiplies each by the norm of the columns that follow it (output projection, fc2).
    Tokens count where the loss_mask of their micro-batch is 1.
    """
    if score not in SCORES:
        raise FlextronError(f"score={score!r} is not known: use one of {', '.join(SCORES)}")
    layers = [layer for chunk in model for layer in unwrap(chunk).decoder.layers]
    current = _Tokens()

    def noted() -> Iterator[Batch]:
        for batch in batches():  # each is taken right before it goes through the layers
            current.mask_SB1 = batch["loss_mask"].to(device()).T.unsqueeze(-1)
            yield batch

    with contextlib.ExitStack() as stack, torch.no_grad():
        sums = {layer.layer_number - 1: stack.enter_context(_observed(layer, current)) for layer in layers}
        for chunk in model:
            chunk.eval()
        run_networks(model, noted, num_batches, [None], seq_length, micro_batch_size, forward_only=True)
        scores = {}
        for layer in layers:
            found = sums[layer.layer_number - 1]
            if score == "activation_weight":
                _weigh(layer, found)
            for tensor in (found.neurons, found.heads):
                torch.distributed.all_reduce(tensor, group=parallel_state.get_data_parallel_group())
            space, ranks = layer.mlp.space, parallel_state.get_tensor_model_parallel_world_size()
            heads = _gather(found.heads)
            scores[layer.layer_number - 1] = LayerScores(
                _undeal(_gather(found.neurons), ranks, space.granularity),
                _undeal(heads, ranks, space.granularity) if space.attention_unit == "kv_group" else heads,
            )
    return scores


class _Tokens:
    """Which tokens of the micro-batch in the layers count."""

    mask_SB1: Tensor


@contextlib.contextmanager
def _observed(layer: torch.nn.Module, tokens: _Tokens) -> Iterator[LayerScores]:
    """Accumulate |activation| of a layer's neurons and heads while the context is open."""
    attention, mlp = layer.self_attention, layer.mlp
    projection, size = attention.linear_proj, attention.hidden_size_per_attention_head
    groups, queries = attention.num_query_groups_per_partition, attention.group_size
    sums = LayerScores(
        torch.zeros(mlp.width, dtype=torch.float64, device=device()),
        torch.zeros(groups, queries, dtype=torch.float64, device=device()),
    )

    def neurons(hidden_SBF: Tensor) -> Tensor:
        counted_SBF = hidden_SBF.abs() * tokens.mask_SB1
        sums.neurons += counted_SBF.sum((0, 1), dtype=torch.float32).double()
        return hidden_SBF

    def heads(heads_SBd: Tensor) -> Tensor:
        counted_SBd = heads_SBd.abs() * tokens.mask_SB1
        sums.heads += counted_SBd.unflatten(-1, (groups, queries, size)).sum((0, 1, 4), dtype=torch.float32).double()
        return heads_SBd

    mlp.observe, projection.observe = neurons, heads
    try:
        yield sums
    finally:
        del mlp.observe, projection.observe


def _weigh(layer: torch.nn.Module, sums: LayerScores) -> None:
    attention, mlp = layer.self_attention, layer.mlp
    sums.neurons *= mlp.linear_fc2.weight.double().norm(dim=0)
    columns = attention.linear_proj.weight.double().unflatten(1, (*sums.heads.shape, -1))
    sums.heads *= columns.square().sum((0, 3)).sqrt()


def _gather(local: Tensor) -> Tensor:
    """The parts of all tensor-parallel ranks, one after another along the first dimension."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)


def _undeal(gathered: Tensor, ranks: int, granularity: int) -> Tensor:
    """Ranks one after another -> sorted order: unit a*n + k of rank r is sorted unit a*G + r*n + k."""
    buckets = granularity // ranks
    split = gathered.unflatten(0, (ranks, -1, buckets))
    return split.transpose(0, 1).flatten(0, 2)


def collect(scores: Mapping[int, LayerScores], num_layers: int) -> dict[int, LayerScores]:
    """Scores of all layers, in order, from the pipeline stages that hold them; on every rank those that the main process has."""
    group = parallel_state.get_pipeline_model_parallel_group()
    parts: list[dict[int, LayerScores]] = [{} for _ in range(group.size())]
    mine = {i: LayerScores(s.neurons.cpu(), s.heads.cpu()) for i, s in scores.items()}
    torch.distributed.all_gather_object(parts, mine, group=group)
    merged = {i: s for part in parts for i, s in part.items()}
    # Sorting is shared out over the ranks: they must agree on the last bit, which sums over ranks do not promise.
    return on_main_process(lambda: {i: merged[i] for i in range(num_layers)})
