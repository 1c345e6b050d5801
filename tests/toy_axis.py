"""An axis from outside the package: the rank of an adapter after each layer's MLP. One axis record, one layer module."""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule

from flextron_mcore.axes import Axis
from flextron_mcore.layers.block import ElasticBlock
from flextron_mcore.layers.linear import Selection, take
from flextron_mcore.layers.weighted import mask
from flextron_mcore.space import ElasticSpace

RANK = 8


class Adapter(ElasticBlock, MegatronModule):
    """x -> up(tanh(down(x))) with the first `adapter_rank` rows of down and columns of up; whole on each tensor-parallel rank."""

    axis = "adapter_rank"

    def __init__(self, config, space: ElasticSpace) -> None:
        super().__init__(config, space=space)
        self.down = torch.nn.Parameter(torch.empty(RANK, config.hidden_size, dtype=config.params_dtype))
        self.up = torch.nn.Parameter(torch.empty(config.hidden_size, RANK, dtype=config.params_dtype))
        for parameter in (self.down, self.up):
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.sequence_parallel = config.sequence_parallel

    def unit_mask(self, weights_K: torch.Tensor) -> torch.Tensor:
        return mask(weights_K, self.space.sizes[self.axis])

    def forward(self, hidden_SBC: torch.Tensor) -> torch.Tensor:
        state, channels = self.state, hidden_SBC.shape[-1]
        rank = RANK if state.widths is None else state.widths.adapter_rank
        down = take(self.down, Selection((RANK, self.config.hidden_size), ((slice(rank), slice(channels)),), (rank, channels)))
        up = take(self.up, Selection((self.config.hidden_size, RANK), ((slice(channels), slice(rank)),), (channels, rank)))
        if "hidden_size" in state.masks:  # with weighted hidden sizes, a module that reads the residual stream masks its channels
            hidden_SBC = hidden_SBC * state.masks["hidden_size"]
        inner_SBr = torch.tanh(hidden_SBC @ down.T)
        if self.axis in state.masks:
            inner_SBr = inner_SBr * state.masks[self.axis]
        return self.scaled((self.observe(inner_SBr) @ up.T, None))[0]

    def observe(self, inner_SBr: torch.Tensor) -> torch.Tensor:
        return inner_SBr


AXIS = Axis(
    "adapter_rank",
    unit="rows",
    title="Adapter rank",
    short="Adapter",
    block="adapter",
    full=lambda model: RANK,
    fields={"adapter_rank": "rows"},
    default=(0.25, 0.5, 1.0),
    observed="adapter",
    followed_by="adapter.up",
    parallel=False,
    module="tests.toy_axis.Adapter",
    tensors={"adapter.down": ("adapter_rank", "hidden_size"), "adapter.up": ("hidden_size", "adapter_rank")},
)
