"""Routers at work for one target: the token routing that a model computes with.

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
    """One block in one micro-batch, for training its router: its input, and which level each token took.

    hidden_SBD: this rank's part of the sequence. levels_SB, counted_SB (which tokens count), mask_SBK (None without masks): of
    the whole sequence.
    """

    block: int
    number: int
    hidden_SBD: Tensor
    levels_SB: Tensor
    counted_SB: Tensor
    mask_SBK: Tensor | None = None


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch: its number, by which noise differs; its tokens that count (None: all) and those that are padding."""

    number: int = 0
    counted_SB: Tensor | None = None
    padding_SB: Tensor | None = None


@dataclass
class AdaptiveRouting:
    """A TokenRouting (layers/state.py) by routers, for `use_subnetwork`.

    kv_policy: `full` or `own` (layers/tokens/levels.py). noise, seed: scale and seed of Gumbel noise on logits, for training.
    traced: keep `traces`, for training. masked: also compute with masks that get gradients. counts_NK: number of counted tokens
    at each level so far. kept: if given, gets each block's levels [S, B] of the last micro-batch.
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
        """Start a micro-batch. Padding is never routed, never counted, and gets nothing from any block."""
        transposed = (None if mask_BS is None else mask_BS.T for mask_BS in (counted_BS, padding_BS))
        self.micro_batch = MicroBatch(number, *transposed)

    def layer(self, index: int) -> RoutedLayer:
        """Routing of a layer for the micro-batch that was begun, also when it is computed again in a backward pass."""
        micro_batch = self.micro_batch
        return RoutedLayer.of(index, lambda block: AdaptiveBlock(self, block, micro_batch))

    def count(self, block: int, levels_SB: Tensor, counted_SB: Tensor) -> None:
        """Add the counted tokens' levels to `counts_NK`."""
        self.counts_NK[block] += count_levels(levels_SB, self.counts_NK.shape[1], counted_SB)


@dataclass(frozen=True)
class AdaptiveBlock:
    """The BlockRouting (layers/tokens/levels.py) of one block and micro-batch."""

    routing: AdaptiveRouting
    block: int
    micro_batch: MicroBatch

    @property
    def kv_policy(self) -> str:
        """Policy of all blocks."""
        return self.routing.kv_policy

    @property
    def masked(self) -> bool:
        """True if masks are wanted."""
        return self.routing.masked

    @torch.no_grad()
    def levels(self, hidden_SBD: Tensor, sequence_parallel: bool) -> Tensor:
        """Levels [S, B] of the whole sequence: argmax of the logits."""
        routing, ranks = self.routing, parallel_state.get_tensor_model_parallel_world_size()
        logits_SBK = routing.routers(self.block, hidden_SBD, routing.target_C, routing.start_NK)
        if routing.noise:
            length = len(hidden_SBD)
            parts, part = (ranks, parallel_state.get_tensor_model_parallel_rank()) if sequence_parallel else (1, 0)
            noise_SBK = self._gumbel((length * parts, *logits_SBK.shape[1:]))[part * length : (part + 1) * length]
            logits_SBK = logits_SBK + routing.noise * noise_SBK.to(logits_SBK.device)
        levels_SB = logits_SBK.argmax(-1)
        if ranks > 1:
            levels_SB = _agreed(levels_SB, ranks, sequence_parallel)
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
        """[S, B, K]: 1 where a token's level is at least k; the last trace keeps it, for its gradient."""
        width = self.routing.counts_NK.shape[1]
        mask_SBK = (levels_SB.unsqueeze(-1) >= torch.arange(width, device=levels_SB.device)).float().requires_grad_()
        self.routing.traces[-1].mask_SBK = mask_SBK
        return mask_SBK

    def _gumbel(self, shape: tuple[int, ...]) -> Tensor:
        """Noise that depends on the seed, the block and the micro-batch alone."""
        seed = [self.routing.seed, 7, self.block, self.micro_batch.number]
        state = np.random.SeedSequence(seed).generate_state(1)[0]
        uniform = torch.rand(shape, generator=torch.Generator().manual_seed(int(state))).clamp_min(1e-9)
        return -torch.log(-torch.log(uniform))


def _agreed(levels_SB: Tensor, ranks: int, sequence_parallel: bool) -> Tensor:
    """Levels of the whole sequence, equal on all tensor-parallel ranks: sent, since ranks may round logits differently."""
    group, levels_SB = parallel_state.get_tensor_model_parallel_group(), levels_SB.contiguous()
    if not sequence_parallel:
        torch.distributed.broadcast(levels_SB, torch.distributed.get_global_rank(group, 0), group=group)
        return levels_SB
    parts = [torch.empty_like(levels_SB) for _ in range(ranks)]
    torch.distributed.all_gather(parts, levels_SB, group=group)
    return torch.cat(parts)
