"""Floating-point operations of networks and of training steps. No torch import.

FLOPs are counted as in Megatron-LM's `num_floating_point_operations`: matrix products only, 2 m n k each; half of the attention
scores, for causal masking; the padded vocabulary; two forward passes for a backward pass.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean

from flextron_mcore.axes import added_tensors
from flextron_mcore.config import ModelConfig
from flextron_mcore.families.tensors import of_model
from flextron_mcore.space import ElasticSpace, LayerChoice, SubNetwork


@dataclass(frozen=True)
class Costs:
    """FLOPs per token of forward passes, by network.

    Attributes:
        model: architecture of the full model.
        space: elastic space of the model.
        length: tokens of a sequence.
        tensor: number of tensor-parallel ranks; the vocabulary is padded to a multiple of it.
    """

    model: ModelConfig
    space: ElasticSpace
    length: int
    tensor: int = 1

    def layer(self, choice: LayerChoice, hidden_size: int | None = None, number: int | None = None) -> float:
        """FLOPs per token of one executed layer with the widths `choice`.

        Args:
            choice: widths.
            hidden_size: hidden channels of the network; None: all.
            number: index of the layer; None: a mean over all layers, whose sliding windows may differ.
        """
        size = hidden_size or self.model.hidden_size
        return self._products(choice, size) + self._scores(choice, number)

    def _products(self, choice: LayerChoice, hidden_size: int, block: str = "") -> float:
        """FLOPs per token of the products with a layer's weights.

        With `space.compensation` also of the product of a matrix [q, q] with the outputs of the q heads in each KV group.

        Args:
            choice: widths of the layer.
            hidden_size: hidden channels of the network.
            block: "self_attention" for the weights of that block only; "" for all.
        """
        tensors = of_model(self.model, "layer", added_tensors())
        weights = [t for t in tensors if len(t.sides) == 2 and t.name.startswith(block)]
        compensated = self.space.compensation and choice.query_heads_per_group > 1
        scalars = choice.num_attention_heads * choice.query_heads_per_group if compensated else 0
        return 2.0 * (sum(t.numel(self.model, hidden_size, choice) for t in weights) + scalars * self.model.kv_channels)

    def _scores(self, choice: LayerChoice, number: int | None = None) -> float:
        """FLOPs per token of a layer's attention scores and of their products with values.

        Args:
            choice: widths of the layer.
            number: index of the layer; None: a mean over all layers, whose sliding windows may differ.
        """
        seen = mean(self._keys) if number is None else self._keys[number]
        return 4.0 * seen * choice.num_attention_heads * self.model.kv_channels

    @cached_property
    def _keys(self) -> list[float]:
        """Keys that a query of each layer sees, on average."""
        windows = [min(window or self.length, self.length) for window in self.model.windows]
        return [window * (1 - window / (2 * self.length)) for window in windows]

    def head(self, hidden_size: float | None = None) -> float:
        """FLOPs per token of the output layer, forward only, padded vocabulary included. hidden_size: channels; None: all."""
        return 2.0 * (hidden_size or self.model.hidden_size) * (-(-self.model.vocab_size // self.tensor) * self.tensor)

    def of(self, net: SubNetwork) -> float:
        """FLOPs per token of a sub-network."""
        products = Counter(net.executed_layers)  # once for equal layers: training counts every step
        layers = sum(times * self._products(layer, net.hidden_size) for layer, times in products.items())
        return self.head(net.hidden_size) + layers + self.attention(net)

    def attention(self, net: SubNetwork) -> float:
        """FLOPs per token of a sub-network's attention scores and of their products with values."""
        return sum(self._scores(layer, number) for number, layer in enumerate(net.layers) if layer.executed)

    def backward_to_gates(self, net: SubNetwork) -> float:
        """FLOPs per token of the backward pass that gives router gates their gradients, through frozen weights.

        A router gate is a scalar that multiplies a block's output. The pass ends at the gate of the first block, the attention of
        the first executed layer.
        """
        first = next((number for number, layer in enumerate(net.layers) if layer.executed), None)
        if first is None:
            return 0.0
        layer = net.layers[first]
        untouched = self._products(layer, net.hidden_size, "self_attention") + 2 * self._scores(layer, first)
        return self.of(net) + self.attention(net) - untouched

    @property
    def full(self) -> float:
        """FLOPs per token of the full model."""
        return self.of(SubNetwork.full(self.model))

    @property
    def smallest(self) -> float:
        """FLOPs per token of the smallest sub-network."""
        return self.of(self.space.uniform(self.model, *(sizes[0] for sizes in self.space.sizes.values())))

    def drawn(self, mode: str = "flextron") -> float:
        """Expected FLOPs per token of a random sub-network, as `flextron elastic` draws them.

        mode: "flextron" draws every size at random; "matformer" draws one FFN size below the full one, all else full.
        """
        sizes = dict(self.space.sizes)
        if mode == "matformer":
            widths = sizes["ffn_hidden_size"]
            sizes = {name: values[-1:] for name, values in sizes.items()} | {"ffn_hidden_size": widths[:-1] or widths}
        of_layer = itertools.product(*(sizes[axis.name] for axis in self.space.layer_axes))
        choices = [self.space.layer_choice(self.model, *layer) for layer in of_layer]
        depth = mean(sizes["depth"])
        return mean(self.head(h) + depth * mean(self.layer(choice, h) for choice in choices) for h in sizes["hidden_size"])

    def budgeted(self, low: float | None, high: float, part: float) -> float:
        """FLOPs per token of a network whose cost equals its budget; FLOPs are taken to be proportional to the cost.

        Args:
            low: least budget, as a share of the full model's cost; None: the smallest network's cost.
            high: largest budget, as a share of the full model's cost.
            part: position of the budget between `low` (0) and `high` (1).
        """
        bottom = self.smallest if low is None else low * self.full
        return bottom + part * (high * self.full - bottom)


def step_flops(costs: Costs, networks: Sequence[SubNetwork | None], frozen: bool = False, gates: bool = False) -> float:
    """FLOPs per token of a training step: forward and backward passes of its networks, without recomputation.

    Args:
        costs: FLOPs per token of the model's networks.
        networks: networks of the step, None for one that computes all units.
        frozen: True if the weights get no gradients.
        gates: True if router gates (scalars on the outputs of blocks) of all networks but the first get gradients; counts only
            with `frozen`.
    """
    nets = [SubNetwork.full(costs.model) if net is None else net for net in networks]
    forward = sum(map(costs.of, nets))
    if not frozen:
        return 3 * forward
    return forward + (sum(map(costs.backward_to_gates, nets[1:])) if gates else 0.0)
