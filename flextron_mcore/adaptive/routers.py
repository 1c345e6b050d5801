"""Input-adaptive routers: every elastic block has a small MLP from budget and hidden state to its candidates (Flextron, 3.2).

R_i(T, h) = W_R tanh(W T + W_H h), where h is what enters the block, normalised. The static routers' choice for T is added, so
that training begins where theirs ended. A choice depends on the token's own h and T only.

Shape suffixes: S sequence, B batch, N blocks, K candidates, C constrained costs, D hidden channels, U hidden units of a router.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from flextron_mcore.choices import Choices
from flextron_mcore.layers.routed_layer import RoutedLayer
from flextron_mcore.routers.static import StaticRouters

# How much of the static routers' log-probabilities is kept, and at most: tokens must be able to choose otherwise.
_KEPT, _MOST = 0.25, 2.0


class AdaptiveRouters(torch.nn.Module):
    """The routers of all blocks. Targets as in StaticRouters: 0 is the smallest network's cost and 1 the full model's."""

    def __init__(self, blocks: Choices, costs: int, hidden_size: int, static: StaticRouters) -> None:
        super().__init__()
        count, width = blocks.exists_NK.shape
        channels = blocks.model.hidden_size
        self.static = static.requires_grad_(False)
        self.target_NUC = torch.nn.Parameter(torch.randn(count, hidden_size, costs))
        self.token_NUD = torch.nn.Parameter(torch.randn(count, hidden_size, channels) * channels**-0.5)
        self.out_NKU = torch.nn.Parameter(torch.zeros(count, width, hidden_size))
        self.bias_NK = torch.nn.Parameter(torch.zeros(count, width))

    def forward(self, block: int, hidden_SBD: Tensor, target_C: Tensor, start_NK: Tensor) -> Tensor:
        """Logits [S, B, K] of one block; minus infinity where it has no candidate. start_NK: `start` of the target."""
        bias_U, bias_K = self.target_NUC[block] @ target_C, self.bias_NK[block] + start_NK[block]
        return router_logits(hidden_SBD, self.token_NUD[block], bias_U, self.out_NKU[block], bias_K)

    @torch.no_grad()
    def start(self, target_C: Tensor) -> Tensor:
        """What tokens' logits start from: [N, K]."""
        log_p_NK = self.static(target_C[None])[0].log_softmax(-1)
        start_NK = (log_p_NK * _KEPT).clamp_min(-_MOST)
        return start_NK.masked_fill(~self.static.exists_NK, -torch.inf)


def router_logits(hidden_SBD: Tensor, token_UD: Tensor, bias_U: Tensor, out_KU: Tensor, bias_K: Tensor) -> Tensor:
    """What a router computes for every token: [S, B, K]. Sums over channels are of the hidden state's precision."""
    hidden_SBD = F.layer_norm(hidden_SBD, hidden_SBD.shape[-1:])
    units_SBU = F.linear(hidden_SBD, token_UD.to(hidden_SBD.dtype), bias_U.to(hidden_SBD.dtype))
    return F.linear(units_SBU.float().tanh_(), out_KU, bias_K)


def chosen(levels_SB: Tensor, width: int, counted_SB: Tensor | None = None) -> Tensor:
    """How many tokens, of those that count, chose each of `width` candidates: [K]. Does not wait for the device."""
    hot_SBK = levels_SB.unsqueeze(-1) == torch.arange(width, device=levels_SB.device)
    if counted_SB is not None:
        hot_SBK = hot_SBK & counted_SB.unsqueeze(-1)
    return hot_SBK.sum((0, 1))


@dataclass
class Seen:
    """What one block saw in one forward pass, in micro-batch `number`. mask_SBK: where masks are wanted."""

    block: int
    number: int
    hidden_SBD: Tensor
    levels_SB: Tensor
    counted_SB: Tensor
    mask_SBK: Tensor | None = None


@dataclass
class TokenRouting:
    """Routers at work for one target: what `use_subnetwork` takes in place of a SubNetwork.

    kv_policy: `full` or `own` (layers/dispatch.py). noise: scale of the Gumbel noise on logits and its seed, for training; none
    in evaluation. masked, watched: keep what blocks see, for a router's training, in `seen`; masked also computes with masks that
    get gradients. counts_NK: how many counted tokens chose what. kept: if given, gets each block's levels [S, B] of the last
    micro-batch.
    """

    routers: AdaptiveRouters
    target_C: Tensor
    kv_policy: str = "full"
    noise: float = 0.0
    seed: int = 0
    masked: bool = False
    watched: bool = False
    counts_NK: Tensor = field(default=None)  # type: ignore[assignment]
    seen: list[Seen] = field(default_factory=list)
    counted_SB: Tensor | None = None
    padding_SB: Tensor | None = None
    number: int = 0
    kept: dict[int, Tensor] | None = None

    def __post_init__(self) -> None:
        self.target_C = self.target_C.to(self.routers.out_NKU.device)
        self.start_NK = self.routers.start(self.target_C)  # once for all blocks and passes
        if self.counts_NK is None:
            self.counts_NK = torch.zeros(self.routers.bias_NK.shape, dtype=torch.float64, device=self.target_C.device)

    def begin(self, number: int = 0, counted_BS: Tensor | None = None, padding_BS: Tensor | None = None) -> None:
        """Before a micro-batch: its number, by which noise differs; which tokens count (None: all); which are padding.

        Padding is never routed, never counted, and gets nothing from any block.
        """
        self.counted_SB = None if counted_BS is None else counted_BS.T
        self.padding_SB = None if padding_BS is None else padding_BS.T
        self.number = number

    def layer(self, index: int) -> RoutedLayer:
        """Routing of a layer for the micro-batch that has begun, also when it is computed again in a backward pass."""
        blocks = (BlockRouter(self, 2 * index + i, self.number, self.counted_SB, self.padding_SB) for i in range(2))
        return RoutedLayer(*blocks)


@dataclass(frozen=True)
class BlockRouter:
    """A block's part of a TokenRouting, for one micro-batch."""

    routing: TokenRouting
    index: int
    number: int
    counted_SB: Tensor | None
    padding_SB: Tensor | None

    @property
    def kv_policy(self) -> str:
        """That of all blocks."""
        return self.routing.kv_policy

    @property
    def masked(self) -> bool:
        """Whether masks are wanted."""
        return self.routing.masked

    @torch.no_grad()
    def levels(self, hidden_SBD: Tensor, sequence_parallel: bool) -> Tensor:
        """Levels [S, B] of the whole sequence: argmax of the logits."""
        routing, ranks = self.routing, parallel_state.get_tensor_model_parallel_world_size()
        logits_SBK = routing.routers(self.index, hidden_SBD, routing.target_C, routing.start_NK)
        if routing.noise:
            whole = (len(hidden_SBD) * (ranks if sequence_parallel else 1), *logits_SBK.shape[1:])
            first = parallel_state.get_tensor_model_parallel_rank() * len(hidden_SBD) if sequence_parallel else 0
            noise_SBK = self._gumbel(whole)[first : first + len(hidden_SBD)].to(logits_SBK.device)
            logits_SBK = logits_SBK + routing.noise * noise_SBK
        levels_SB = logits_SBK.argmax(-1)
        if ranks > 1:
            levels_SB = self._agreed(levels_SB, ranks, sequence_parallel)
        if self.padding_SB is not None:
            levels_SB = levels_SB.masked_fill(self.padding_SB, -1)
        if routing.kept is not None:
            routing.kept[self.index] = levels_SB
        self._count(levels_SB, hidden_SBD)
        return levels_SB

    def masks(self, levels_SB: Tensor) -> Tensor:
        """[S, B, K]: 1 where a token's level is at least k; its gradient is kept in the last of `seen`."""
        width = self.routing.counts_NK.shape[1]
        mask_SBK = (levels_SB.unsqueeze(-1) >= torch.arange(width, device=levels_SB.device)).float().requires_grad_()
        self.routing.seen[-1].mask_SBK = mask_SBK
        return mask_SBK

    def _agreed(self, levels_SB: Tensor, ranks: int, sequence_parallel: bool) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        if not sequence_parallel:
            levels_SB = levels_SB.contiguous()
            torch.distributed.broadcast(levels_SB, torch.distributed.get_global_rank(group, 0), group=group)
            return levels_SB
        parts = [torch.empty_like(levels_SB) for _ in range(ranks)]
        torch.distributed.all_gather(parts, levels_SB.contiguous(), group=group)
        return torch.cat(parts)

    def _count(self, levels_SB: Tensor, hidden_SBD: Tensor) -> None:
        routing = self.routing
        counted_SB = levels_SB >= 0
        if self.counted_SB is not None:
            counted_SB = counted_SB & (self.counted_SB > 0)
        routing.counts_NK[self.index] += chosen(levels_SB, routing.counts_NK.shape[1], counted_SB)
        if routing.masked or routing.watched:
            routing.seen.append(Seen(self.index, self.number, hidden_SBD.detach(), levels_SB, counted_SB))

    def _gumbel(self, shape: tuple[int, ...]) -> Tensor:
        """A function of the seed, the block and the micro-batch alone."""
        state = np.random.SeedSequence([self.routing.seed, 7, self.index, self.number]).generate_state(1)[0]
        uniform = torch.rand(shape, generator=torch.Generator().manual_seed(int(state))).clamp_min(1e-9)
        return -torch.log(-torch.log(uniform))
