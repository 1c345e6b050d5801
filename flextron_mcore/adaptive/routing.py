"""Token routing by adaptive routers for one target.

Shape suffixes: S sequence, B batch, N blocks, K candidates, C constrained costs, D hidden channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from flextron_mcore.adaptive.routers import AdaptiveRouters, count_levels
from flextron_mcore.layers.tokens.layer import RoutedLayer


@dataclass
class Trace:
    """Record of one block in one micro-batch, from which its router learns.

    Attributes:
        block: index of the block.
        number: number of the micro-batch within the step, over all data-parallel ranks.
        hidden_SBD: input of the block; with sequence parallelism this rank's positions only.
        levels_SB: level (index of the candidate) of each token of the whole sequence.
        counted_SB: True where a token counts in the loss.
        mask_SBK: masks of the levels, whose gradient is the training signal; None if levels were not masked.
    """

    block: int
    number: int
    hidden_SBD: Tensor
    levels_SB: Tensor
    counted_SB: Tensor
    mask_SBK: Tensor | None = None


@dataclass(frozen=True)
class MicroBatch:
    """Micro-batch whose tokens are routed.

    Attributes:
        number: number of the micro-batch within the step, over all data-parallel ranks; part of the seed of the noise.
        counted_SB: True where a token counts in the loss; None if all do.
        padding_SB: True for padding; None without padding.
    """

    number: int = 0
    counted_SB: Tensor | None = None
    padding_SB: Tensor | None = None


@dataclass
class AdaptiveRouting:
    """Token routing of a model by adaptive routers for one target, an argument of `use_subnetwork` (protocol: layers/state.py).

    A level is the index of a block's candidate, 0 the smallest.

    Attributes:
        routers: adaptive routers.
        target_C: target of each cost, 0 (smallest network) to 1 (full model).
        kv_policy: keys and values that a token writes: `full`, of all KV groups, or `own`, of the groups that it uses.
        noise, seed: scale and seed of Gumbel noise on the logits, for training.
        traced: True: record `traces`, for training.
        masked: True: compute all units with masks that get gradients, for training.
        kept: dictionary that receives the levels [S, B] of each block in the last micro-batch; None for none.
        traces: records of blocks and micro-batches since the last step.
        micro_batch: micro-batch whose tokens are routed now.
        counts_NK: number of tokens so far that count in the loss, at each level of each block.
    """

    routers: AdaptiveRouters
    target_C: Tensor
    kv_policy: str = "full"
    noise: float = 0.0
    seed: int = 0
    traced: bool = False
    masked: bool = False
    kept: dict[int, Tensor] | None = None
    traces: list[Trace] = field(default_factory=list, init=False)
    micro_batch: MicroBatch = field(default_factory=MicroBatch, init=False)

    def __post_init__(self) -> None:
        self.target_C = self.target_C.to(self.routers.out_NKU.device)
        self.start_NK = self.routers.start(self.target_C)  # once for all blocks and passes
        self.counts_NK = torch.zeros(self.routers.bias_NK.shape, dtype=torch.float64, device=self.target_C.device)

    def begin(self, number: int = 0, counted_BS: Tensor | None = None, padding_BS: Tensor | None = None) -> None:
        """Start a micro-batch: later calls of `layer` route its tokens. Counts and traces of earlier micro-batches are kept.

        Args:
            number: number of the micro-batch within the step, over all data-parallel ranks; part of the seed of the noise.
            counted_BS: True where a token counts in the loss; None if all do.
            padding_BS: True for padding, which gets level -1: no block computes it. None without padding.
        """
        transposed = (None if mask_BS is None else mask_BS.T for mask_BS in (counted_BS, padding_BS))
        self.micro_batch = MicroBatch(number, *transposed)

    def layer(self, index: int) -> RoutedLayer:
        """Routing of the layer `index` (from 0 over all pipeline stages) for the current micro-batch.

        The result stays valid for recomputation in the backward pass, when a later micro-batch may have begun.
        """
        micro_batch = self.micro_batch
        return RoutedLayer.of(index, lambda block: AdaptiveBlock(self, block, micro_batch))

    def count(self, block: int, levels_SB: Tensor, counted_SB: Tensor) -> None:
        """Add the levels that tokens took in one block to `counts_NK`.

        Args:
            block: index of the block.
            levels_SB: level (index of the candidate) of each token.
            counted_SB: True where a token counts.
        """
        self.counts_NK[block] += count_levels(levels_SB, self.counts_NK.shape[1], counted_SB)


@dataclass(frozen=True)
class AdaptiveBlock:
    """Routing of one block in one micro-batch by an adaptive router; a BlockRouting (protocol of layers/tokens/levels.py).

    Attributes:
        routing: routing of the model; it counts and records the levels.
        block: index of the block.
        micro_batch: micro-batch whose tokens are routed.
    """

    routing: AdaptiveRouting
    block: int
    micro_batch: MicroBatch

    @property
    def kv_policy(self) -> str:
        """Keys and values that a token writes: `full`: of all KV groups, `own`: of those it uses."""
        return self.routing.kv_policy

    @property
    def masked(self) -> bool:
        """True to compute all units for all tokens, multiplied with masks that get gradients."""
        return self.routing.masked

    @torch.no_grad()
    def levels(self, hidden_SBD: Tensor, sequence_parallel: bool) -> Tensor:
        """Choose the level of each token of the whole sequence [S, B]: the candidate with the largest logit; -1 for padding.

        In training, Gumbel noise of scale `routing.noise` is added to the logits first. Call on all tensor-parallel ranks, which
        get equal levels. Levels of tokens that count in the loss are counted; if the routing is traced, all are recorded.

        Args:
            hidden_SBD: input of the block on this rank.
            sequence_parallel: True if `hidden_SBD` has this rank's part of the sequence only.
        """
        routing, ranks = self.routing, parallel_state.get_tensor_model_parallel_world_size()
        logits_SBK = routing.routers(self.block, hidden_SBD, routing.target_C, routing.start_NK)
        if routing.noise:
            length = len(hidden_SBD)
            parts, part = (ranks, parallel_state.get_tensor_model_parallel_rank()) if sequence_parallel else (1, 0)
            noise_SBK = self._gumbel((length * parts, *logits_SBK.shape[1:]))[part * length : (part + 1) * length]
            logits_SBK = logits_SBK + routing.noise * noise_SBK.to(logits_SBK.device)
        levels_SB = logits_SBK.argmax(-1)
        if ranks > 1:
            levels_SB = _sent_to_all_ranks(levels_SB, ranks, sequence_parallel)
        if self.micro_batch.padding_SB is not None:
            levels_SB = levels_SB.masked_fill(self.micro_batch.padding_SB, -1)
        counted_SB = levels_SB >= 0
        if self.micro_batch.counted_SB is not None:
            counted_SB = counted_SB & (self.micro_batch.counted_SB > 0)
        routing.count(self.block, levels_SB, counted_SB)
        if routing.kept is not None:
            routing.kept[self.block] = levels_SB
        if routing.traced:
            number = self.micro_batch.number
            routing.traces.append(Trace(self.block, number, hidden_SBD.detach(), levels_SB, counted_SB))
        return levels_SB

    def masks(self, levels_SB: Tensor) -> Tensor:
        """Masks [S, B, K]: 1 where a token's level is k or higher, else 0. Call after `levels`, on a routing that is `traced`.

        The block's newest trace keeps them, because the router learns from their gradient.
        """
        width = self.routing.counts_NK.shape[1]
        mask_SBK = (levels_SB.unsqueeze(-1) >= torch.arange(width, device=levels_SB.device)).float().requires_grad_()
        self.routing.traces[-1].mask_SBK = mask_SBK
        return mask_SBK

    def _gumbel(self, shape: tuple[int, ...]) -> Tensor:
        """Gumbel noise that depends on the seed, the block and the micro-batch only."""
        seed = [self.routing.seed, 7, self.block, self.micro_batch.number]
        state = np.random.SeedSequence(seed).generate_state(1)[0]
        uniform = torch.rand(shape, generator=torch.Generator().manual_seed(int(state))).clamp_min(1e-9)
        return -torch.log(-torch.log(uniform))


def _sent_to_all_ranks(levels_SB: Tensor, ranks: int, sequence_parallel: bool) -> Tensor:
    """Levels [S, B] of the whole sequence, equal on all tensor-parallel ranks, from the levels that this rank computed.

    Levels are sent, not computed on each rank, because ranks may round logits differently. Call on all tensor-parallel ranks.

    Args:
        levels_SB: levels of the whole sequence, or with sequence parallelism of this rank's positions.
        ranks: number of tensor-parallel ranks.
        sequence_parallel: True if each rank has a part of the sequence.
    """
    group, levels_SB = parallel_state.get_tensor_model_parallel_group(), levels_SB.contiguous()
    if not sequence_parallel:
        torch.distributed.broadcast(levels_SB, torch.distributed.get_global_rank(group, 0), group=group)
        return levels_SB
    parts = [torch.empty_like(levels_SB) for _ in range(ranks)]
    torch.distributed.all_gather(parts, levels_SB, group=group)
    return torch.cat(parts)
