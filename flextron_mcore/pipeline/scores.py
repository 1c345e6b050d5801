"""Log-probabilities of continuations, computed in any parallel layout without the logits of whole sequences.

Shape suffixes: S sequence, B batch, C hidden channels, N scored tokens, V vocabulary of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from flextron_mcore import config
from flextron_mcore.choosing import Network, set_subnetwork
from flextron_mcore.layers.gpt import mask_padding
from flextron_mcore.layers.weighted import WeightedNetwork
from flextron_mcore.pipeline.networks import from_last_stage
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.space import SubNetwork


@dataclass(frozen=True)
class Continuation:
    """Tokens whose log-probability is asked for.

    Attributes:
        tokens: input of the network: the context, then the continuation without its last token.
        targets: the continuation, predicted at the last len(targets) positions of `tokens`.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """Score of a continuation.

    Attributes:
        log_probability: sum of the natural logarithms of its tokens' probabilities.
        greedy: True if each token is the likeliest one.
        likeliest: id of the likeliest token at the last position.
    """

    log_probability: float
    greedy: bool
    likeliest: int


@dataclass(frozen=True)
class _MicroBatch:
    """Sequences of one forward pass, padded on the right, and the tokens that are scored in them.

    Attributes:
        tokens_BS: token ids; padding is 0.
        real_BS: False for padding.
        first: index, within the flush, of the first scored token.
        places_N, sequences_N, targets_N: position, sequence and id of each scored token.
    """

    tokens_BS: Tensor
    real_BS: Tensor
    first: int
    places_N: Tensor
    sequences_N: Tensor
    targets_N: Tensor


@torch.no_grad()
def score(
    chunks: Sequence[torch.nn.Module],
    network: Network,
    continuations: Sequence[Continuation],
    micro_batch_size: int,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Score]:
    """Score continuations, each as if it were alone. Call on all ranks with the same arguments; all return the same scores.

    Continuations with the same input share a pass. Inputs are sorted by length, distributed over the data-parallel ranks and
    padded on the right, which a causal model does not see. The output layer computes scored positions only. LongRoPE's
    frequencies depend on the padded length, so that inputs on both sides of its original context do not share a pass.

    Args:
        chunks: this rank's virtual-pipeline chunks (usually one).
        network: sub-network or token routing; None for the full model. Token routing does not count padding.
        continuations: what to score.
        micro_batch_size: sequences of a forward pass.
        progress: called with a number of continuations that are done.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for i, each in enumerate(continuations):
        sharing.setdefault(each.tokens, []).append(i)
    inputs = sorted(sharing, key=lambda tokens: (-len(tokens), tokens))
    stages, ranks = parallel_state.get_pipeline_model_parallel_world_size(), parallel_state.get_data_parallel_world_size()
    most = micro_batch_size * ranks * stages
    found: dict[int, Score] = {}
    short = unwrap(chunks[0]).architecture.short_context or 0
    sides = [[tokens for tokens in inputs if (len(tokens) > short) == longer] for longer in (True, False)]
    for group in (side[start : start + most] for side in sides for start in range(0, len(side), most)):
        table_N2 = _flush(chunks, network, [[(tokens, continuations[i].targets) for i in sharing[tokens]] for tokens in group])
        row = 0
        for i in (i for tokens in group for i in sharing[tokens]):
            targets = continuations[i].targets
            part_N2, row = table_N2[row : row + len(targets)], row + len(targets)
            likeliest = part_N2[:, 1].astype(int).tolist()
            found[i] = Score(float(part_N2[:, 0].sum()), likeliest == list(targets), likeliest[-1])
            progress(1)
    return [found[i] for i in range(len(continuations))]


def _flush(
    chunks: Sequence[torch.nn.Module], network: Network, group: Sequence[Sequence[tuple[tuple[int, ...], tuple[int, ...]]]]
) -> np.ndarray:
    """Run a group of input sequences through a network in one flush of the pipeline, and score their continuations.

    Returns log-probability of each scored token, and id of the likeliest token there: float64 [N, 2], the same on all ranks.

    Args:
        chunks: this rank's virtual-pipeline chunks.
        network: sub-network or token routing; None for the full model.
        group: for each input sequence, longest first, the pairs (input, targets) that share it.
    """
    gpt = unwrap(chunks[0])
    stages, ranks = parallel_state.get_pipeline_model_parallel_world_size(), parallel_state.get_data_parallel_world_size()
    size = -(-len(group) // (ranks * stages))
    unit = gpt.config.tensor_model_parallel_size if gpt.config.sequence_parallel else 1
    length = -(-len(group[0][0][0]) // unit) * unit
    counts = [sum(len(targets) for _, targets in pairs) for pairs in group]
    firsts = np.cumsum([0, *counts])
    rank = parallel_state.get_data_parallel_rank()
    mine = []
    for number in range(stages):
        begin = (number * ranks + rank) * size
        mine.append(_micro_batch(group[begin : begin + size], size, length, int(firsts[min(begin, len(group))])))
    table_N2 = torch.zeros(sum(counts), 2, dtype=torch.float64, device=device())

    def forward_step(iterator: Iterator[tuple[int, _MicroBatch]], chunk: torch.nn.Module) -> tuple[Tensor, Callable]:
        number, batch = next(iterator)
        if not isinstance(network, SubNetwork | WeightedNetwork | None):
            network.begin(number, batch.real_BS)
        set_subnetwork(chunk, network)
        gpt = unwrap(chunk)
        positions_BS = torch.arange(length, device=device()).expand(size, -1)
        layer = gpt.output_layer if gpt.post_process else None
        if layer is not None:
            layer.deferred = True  # the result is the hidden states
        try:
            return chunk(batch.tokens_BS, positions_BS, None), partial(scored, gpt, batch)
        finally:
            if layer is not None:
                layer.deferred = False

    def scored(gpt: GPTModel, batch: _MicroBatch, states_BSC: Tensor, non_loss_data: bool) -> None:
        layer = gpt.output_layer
        states_SBC, weight_VC = layer.prepared(states_BSC.transpose(0, 1).to(gpt.config.params_dtype))
        states_NC = states_SBC[batch.places_N, batch.sequences_N]
        at_once = max(1, config.LOGITS_AT_ONCE // len(weight_VC))
        for start in range(0, len(states_NC), at_once):
            part = slice(start, start + at_once)
            logits_NV = layer.project(states_NC[part].unsqueeze(1), weight_VC).squeeze(1)
            logits_NV = mask_padding(logits_NV, gpt.real_vocab_size).float()
            first = batch.first + start
            table_N2[first : first + len(logits_NV)] = _scores(logits_NV, batch.targets_N[part])

    interleaved = len(chunks) > 1
    iterators = [enumerate(mine) for _ in chunks]
    try:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if interleaved else iterators[0],
            model=list(chunks) if interleaved else chunks[0],
            num_microbatches=stages,
            seq_length=length,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    finally:
        for chunk in chunks:
            set_subnetwork(chunk, None)
    from_last_stage(table_N2)
    torch.distributed.all_reduce(table_N2, group=parallel_state.get_data_parallel_group())
    return table_N2.cpu().numpy()


def _micro_batch(
    inputs: Sequence[Sequence[tuple[tuple[int, ...], tuple[int, ...]]]], size: int, length: int, first: int
) -> _MicroBatch:
    """Micro-batch of `size` sequences of `length` tokens; sequences that `inputs` lacks are padding.

    Args:
        inputs: for each input sequence, the pairs (input, targets) that share it.
        size: number of sequences.
        length: tokens of each sequence, padding included.
        first: index, within the flush, of the first scored token.
    """
    tokens_BS = torch.zeros(size, length, dtype=torch.long)
    real_BS = torch.zeros(size, length, dtype=torch.bool)
    rows: list[tuple[int, int, int]] = []
    for i, pairs in enumerate(inputs):
        tokens = pairs[0][0]
        tokens_BS[i, : len(tokens)] = torch.tensor(tokens)
        real_BS[i, : len(tokens)] = True
        for _, targets in pairs:
            rows += [(len(tokens) - len(targets) + k, i, target) for k, target in enumerate(targets)]
    places_N, sequences_N, targets_N = torch.tensor(rows, dtype=torch.long).view(-1, 3).to(device()).unbind(1)
    return _MicroBatch(tokens_BS.to(device()), real_BS.to(device()), first, places_N, sequences_N, targets_N)


def _scores(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Log-probability of each target and id of the likeliest token, float64 [N, 2]. Only sums over the vocabulary are exchanged.

    logits_NV: logits in float32 of this rank's part of the vocabulary. targets_N: token ids.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    part = logits_NV.shape[-1]
    start = parallel_state.get_tensor_model_parallel_rank() * part
    largest_N, index_N = logits_NV.max(-1)
    top_N = largest_N.clone()
    torch.distributed.all_reduce(top_N, torch.distributed.ReduceOp.MAX, group=group)
    likeliest_N = torch.where(largest_N == top_N, index_N + start, torch.iinfo(torch.long).max)
    torch.distributed.all_reduce(likeliest_N, torch.distributed.ReduceOp.MIN, group=group)
    sum_N = (logits_NV - top_N.unsqueeze(-1)).exp().sum(-1)
    here_N = (targets_N >= start) & (targets_N < start + part)
    rows_N = (targets_N - start).clamp(0, part - 1)
    target_N = logits_NV.gather(-1, rows_N.unsqueeze(-1)).squeeze(-1).masked_fill(~here_N, 0)
    for each_N in (sum_N, target_N):
        torch.distributed.all_reduce(each_N, group=group)
    return torch.stack([(target_N - top_N - sum_N.log()).double(), likeliest_N.double()], -1)
