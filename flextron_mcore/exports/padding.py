"""Padding with zeros of a sub-network whose layers have different widths, for classes whose layers share some of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flextron_mcore.families.tensors import Placed
from flextron_mcore.space import LayerChoice


def widest_slots(layers: Sequence[LayerChoice]) -> list[LayerChoice]:
    """Widths for classes with equal layers: in every layer the largest width of any layer."""
    widest = LayerChoice(
        True,
        max(layer.kv_groups for layer in layers),
        max(layer.query_heads_per_group for layer in layers),
        max(layer.ffn_hidden_size for layer in layers),
    )
    return [widest] * len(layers)


def deci_slots(layers: Sequence[LayerChoice], multiple: int = 1) -> list[LayerChoice]:
    """Widths for DeciLM (Nemotron-NAS): the query heads of the widest layer; KV heads and neurons of the layer itself.

    KV heads are rounded up to a divisor of the query heads, neurons to a multiple. Every layer fits into its slot, because a
    space varies either the KV groups or the query heads of each, not both.
    """
    heads = max(layer.num_attention_heads for layer in layers)
    chosen = [next(n for n in range(layer.kv_groups, heads + 1) if heads % n == 0) for layer in layers]
    return [
        LayerChoice(True, n, heads // n, -(-layer.ffn_hidden_size // multiple) * multiple)
        for n, layer in zip(chosen, layers, strict=True)
    ]


def zero_padded(tensor: torch.Tensor, placed: Placed) -> torch.Tensor:
    """Pad a tensor of a layer with zeros, from its own sizes (`placed.sizes`) to the padded ones (`placed.whole`).

    Zeros follow the units of each factor of a dimension. A factor whose last entries are of another kind (`last`: key and value
    after the query heads of a group) gets the zeros in front of those. Padded query heads, KV heads and neurons add nothing to
    the output, because the weights that read them are zero, too.
    """
    for axis in reversed(range(tensor.dim())):
        tensor = tensor.unflatten(axis, placed.sizes[axis])
    wide = [size for sizes in placed.whole for size in sizes]
    for axis, ((factor, own), whole) in enumerate(zip(placed.factors, wide, strict=True)):
        if own < whole:
            first, last = tensor.split([own - factor.last, factor.last], axis)
            shape = list(tensor.shape)
            shape[axis] = whole - own
            tensor = torch.cat([first, tensor.new_zeros(shape), last], axis)
    ends = [len(sizes) for sizes in placed.whole]
    tensor = tensor.flatten(0, ends[0] - 1)
    return tensor.flatten(1) if len(ends) > 1 else tensor
