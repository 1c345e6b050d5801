"""Token routing of a layer: its two blocks computed with a level for every token (layers/dispatch.py).

Shape suffixes: S sequence, B batch, C hidden channels, F neurons of this rank, f those of a step, K candidates, h heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from megatron.core import parallel_state
from torch import Tensor

from flextron_mcore.config import FlextronError
from flextron_mcore.layers.dispatch import BlockRouting, Leading, by_level
from flextron_mcore.layers.routed_attention import routed_attention
from flextron_mcore.layers.state import Output

if TYPE_CHECKING:
    from flextron_mcore.layers.attention import ElasticSelfAttention
    from flextron_mcore.layers.mlp import ElasticMLP


@dataclass(frozen=True)
class RoutedLayer:
    """The LayerRouting (layers/state.py) of two blocks' routings."""

    of_attention: BlockRouting
    of_mlp: BlockRouting

    def attention(
        self, module: ElasticSelfAttention, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Output:
        """Each token with the heads of its own level."""
        if attention_mask is not None:
            raise FlextronError("routing token by token knows the causal mask only: attention_mask must be None")
        levels_SB = self.of_attention.levels(hidden_states, module.config.sequence_parallel)
        return routed_attention(module, self.of_attention, hidden_states, levels_SB, *args, **kwargs)

    def mlp(self, module: ElasticMLP, hidden_states: Tensor) -> Output:
        """Each token with the neurons of its own level."""
        levels_SB = self.of_mlp.levels(hidden_states, module.config.sequence_parallel)
        widths, channels = [module.local(size) for size in module.space.ffn_hidden_size], hidden_states.shape[-1]
        edges = [0, *widths]
        if self.of_mlp.masked:
            mask_SBK = self.of_mlp.masks(levels_SB)[..., : len(widths)]
            sizes = torch.tensor([high - low for low, high in zip(edges, widths, strict=False)], device=levels_SB.device)
            return module.prefix(hidden_states, widths[-1], mask_SBK.repeat_interleave(sizes, -1))
        order, steps = by_level(levels_SB, len(widths))
        ranges = [(edges[step.first], edges[step.last + 1]) for step in steps]
        parts = [part for low, high in ranges for part in module.rows(high, channels, low)]
        counts = [step.count for step in steps]
        products = module.linear_fc1(
            hidden_states, *parts, rows=Leading(order, [count for count in counts for _ in range(module.parts)])
        )
        columns = [module.columns(high, channels, low) for low, high in ranges]
        hidden = [module.observe(h) for h in module.activated(products)]
        return module.linear_fc2(hidden, columns, Leading(order, counts), levels_SB.shape)


class GivenLevels:
    """Routing by levels [N blocks, S, B] that are given: of all tokens of a micro-batch, of which a pass takes the next ones.

    For timing and tests. also: called with what enters a block, as routers are that would find the levels.
    """

    def __init__(
        self, levels_NSB: Tensor, kv_policy: str = "full", also: Callable[[int, Tensor], object] = lambda index, hidden: None
    ) -> None:
        self.levels_NSB, self.kv_policy, self.also = levels_NSB, kv_policy, also
        self.begin()

    def begin(self, number: int = 0, counted_BS: Tensor | None = None) -> None:
        """From the first token on."""
        self.position = [0] * len(self.levels_NSB)

    def layer(self, index: int) -> RoutedLayer:
        """The levels of a layer's blocks."""
        return RoutedLayer(_GivenBlock(self, 2 * index), _GivenBlock(self, 2 * index + 1))


@dataclass(frozen=True)
class _GivenBlock:
    given: GivenLevels
    index: int
    masked: ClassVar[bool] = False

    @property
    def kv_policy(self) -> str:
        return self.given.kv_policy

    def levels(self, hidden_SBC: Tensor, sequence_parallel: bool) -> Tensor:
        self.given.also(self.index, hidden_SBC)
        length = len(hidden_SBC) * (parallel_state.get_tensor_model_parallel_world_size() if sequence_parallel else 1)
        start = self.given.position[self.index]
        self.given.position[self.index] = start + length
        return self.given.levels_NSB[self.index, start : start + length]

    def masks(self, levels_SB: Tensor) -> Tensor:
        raise NotImplementedError("given levels have no gradient")
