"""Token routing of a layer: attention and MLP computed with a level for every token.

Shape suffixes: S sequence, B batch, C hidden channels, N blocks, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from megatron.core import parallel_state
from torch import Tensor

from flextron_mcore.axes import layer_axes
from flextron_mcore.config import FlextronError
from flextron_mcore.layers.rows import PrefixRows
from flextron_mcore.layers.state import Output
from flextron_mcore.layers.tokens.attention import routed_attention
from flextron_mcore.layers.tokens.levels import BlockRouting, by_level

if TYPE_CHECKING:  # avoids a cycle: the elastic layers and token routing do not import each other at run time
    from flextron_mcore.layers.attention import ElasticSelfAttention
    from flextron_mcore.layers.mlp import ElasticMLP


@dataclass(frozen=True)
class RoutedLayer:
    """Token routing of one layer, which computes its blocks with a level (index of the candidate) for every token.

    It follows the protocol LayerRouting (layers/state.py). blocks: {layer axis: BlockRouting of the axis's block}.
    """

    blocks: Mapping[str, BlockRouting]

    @classmethod
    def of(cls, index: int, block: Callable[[int], BlockRouting]) -> RoutedLayer:
        """Routing of one layer, from a function that gives the routing of any block.

        Args:
            index: index of the layer, from 0 over all pipeline stages.
            block: function from the number of a block to its BlockRouting. Blocks are numbered by layer, then by axis, as in
                `Choices`.
        """
        axes = layer_axes()
        return cls({axis.name: block(index * len(axes) + i) for i, axis in enumerate(axes)})

    def attention(
        self, module: ElasticSelfAttention, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Output:
        """Self-attention in which every token uses the heads of its own level: [S, B, C] -> ([S, B, C], bias [C] or None).

        Attention is causal. Raises FlextronError for an attention mask, and for arguments that `routed_attention` refuses.

        Args:
            module: attention whose weights are used.
            hidden_states: input [S, B, C].
            attention_mask: must be None.
            args, kwargs: remaining arguments of Megatron-Core's attention, such as the KV cache and rotary angles.
        """
        if attention_mask is not None:
            raise FlextronError("token routing supports the causal mask only: attention_mask must be None")
        return routed_attention(module, self.blocks[module.axis], hidden_states, *args, **kwargs)

    def mlp(self, module: ElasticMLP, hidden_states: Tensor) -> Output:
        """MLP in which every token uses the neurons of its own level: [S, B, C] -> ([S, B, C], bias [C] or None)."""
        routing = self.blocks[module.axis]
        levels_SB = routing.levels(hidden_states, module.config.sequence_parallel)
        widths, channels = [module.local(size) for size in module.space.ffn_hidden_size], hidden_states.shape[-1]
        edges = [0, *widths]
        if routing.masked:
            mask_SBK = routing.masks(levels_SB)[..., : len(widths)]
            sizes = torch.tensor([high - low for low, high in zip(edges, widths, strict=False)], device=levels_SB.device)
            return module.prefix(hidden_states, widths[-1], mask_SBK.repeat_interleave(sizes, -1))
        order, steps = by_level(levels_SB, len(widths))
        ranges = [(edges[step.first], edges[step.last + 1]) for step in steps]
        parts = [part for low, high in ranges for part in module.rows(high, channels, low)]
        counts = [step.count for step in steps]
        rows = PrefixRows(order, [count for count in counts for _ in range(module.parts)])
        hidden = [module.observe(h) for h in module.activated(module.linear_fc1(hidden_states, *parts, rows=rows))]
        columns = [module.columns(high, channels, low) for low, high in ranges]
        return module.linear_fc2(hidden, columns, PrefixRows(order, counts), levels_SB.shape)


class FixedLevels:
    """Token routing with given levels, for timing and tests. Each forward pass takes the levels of the next positions.

    Args:
        levels_NSB: level of each token in each block (by layer, then by axis): index of the candidate, -1 for padding.
        kv_policy: `full` or `own` (BlockRouting).
        router: function (number of the block, its input [S, B, C]) called for each block, so that timing includes a router's
            cost; by default it does nothing.
    """

    def __init__(
        self, levels_NSB: Tensor, kv_policy: str = "full", router: Callable[[int, Tensor], object] = lambda block, hidden: None
    ) -> None:
        self.levels_NSB, self.kv_policy, self.router = levels_NSB, kv_policy, router
        self.begin()

    def begin(self, number: int = 0, counted_BS: Tensor | None = None) -> None:
        """Start again at the first position: the next forward pass takes its levels from there. Both arguments are unused."""
        self.position = [0] * len(self.levels_NSB)

    def layer(self, index: int) -> RoutedLayer:
        """Routing of one layer. index: number of the layer, from 0 over all pipeline stages."""
        return RoutedLayer.of(index, lambda block: _FixedBlock(self, block))


@dataclass(frozen=True)
class _FixedBlock:
    fixed: FixedLevels
    block: int
    masked: ClassVar[bool] = False

    @property
    def kv_policy(self) -> str:
        return self.fixed.kv_policy

    def levels(self, hidden_SBC: Tensor, sequence_parallel: bool) -> Tensor:
        self.fixed.router(self.block, hidden_SBC)
        length = len(hidden_SBC) * (parallel_state.get_tensor_model_parallel_world_size() if sequence_parallel else 1)
        start = self.fixed.position[self.block]
        self.fixed.position[self.block] = start + length
        return self.fixed.levels_NSB[self.block, start : start + length]

    def masks(self, levels_SB: Tensor) -> Tensor:
        raise NotImplementedError("fixed levels have no gradient")
