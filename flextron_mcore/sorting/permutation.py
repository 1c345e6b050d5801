"""Permutation of a checkpoint's units into decreasing importance (Flextron, section 3.1), tensor by tensor, from disk to disk.

Shape suffixes: C hidden channels, G KV groups, Q query heads of a group.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping

import torch
from torch import Tensor

from flextron_mcore.axes import HEADS, added_tensors
from flextron_mcore.checkpoint.reader import DTYPES, TensorReader
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.checkpoint.writer import LazyTensor
from flextron_mcore.config import ModelConfig
from flextron_mcore.families.tensors import find
from flextron_mcore.layers.compensation import TENSOR, folded
from flextron_mcore.sorting.compensation import unfolded
from flextron_mcore.sorting.importance import LayerScores
from flextron_mcore.space import ElasticSpace, SubNetwork

Orders = dict[str, Tensor]
"""Permutations {field: old index of each unit [U], or [V, U] for units (query heads) inside of units (KV groups)}."""


def order(model: ModelConfig, space: ElasticSpace, scores: LayerScores) -> Orders:
    """Permutations that bring the elastic units of one layer (heads, neurons) into decreasing importance. Ties keep their order.

    Returns {field of LayerChoice: old index of each unit, the most important first}.

    Args:
        model: architecture of the full model.
        space: elastic space, whose attention unit decides between KV groups and query heads.
        scores: importance scores of the layer, for this attention unit.
    """
    orders = {}
    for axis in space.layer_axes:
        field = axis.unit_field(model, space.attention_unit)
        orders[field] = scores.units[axis.name].argsort(dim=-1, descending=True, stable=True)
        if axis is HEADS and scores.compensation is not None:
            orders[field] = scores.compensation.order_GQ
    return orders


def permute(model: ModelConfig, key: str, tensor: Tensor, orders: Orders) -> Tensor:
    """Permute the units (heads, neurons, channels) of one tensor of a checkpoint; other tensors are returned as they are.

    Args:
        model: architecture of the full model.
        key: name of the tensor in the checkpoint.
        tensor: value of the tensor.
        orders: {field of LayerChoice or SubNetwork: permutation of its units}, for the tensor's layer and for `hidden_size`.
    """
    declared = find(key, added_tensors())
    if declared is None:
        return tensor
    full = SubNetwork.full(model)
    layer = full.layers[0] if declared.place == "layer" else None
    view, axis = tensor, 0
    for side, sizes in zip(declared.sides, declared.sizes(model, full.hidden_size, layer), strict=True):
        if len(sizes) > 1:  # a single factor stays as it is: the vocabulary may be padded beyond the declared size
            view = view.unflatten(axis, sizes)
        for factor, size in zip(side.factors, sizes, strict=True):
            if factor.name in orders:
                view = _select(view, axis, orders[factor.name], size)
            axis += 1
    return view.reshape(tensor.shape)


def _select(view: Tensor, axis: int, units: Tensor, size: int) -> Tensor:
    """Permute the first entries of one dimension: entry i of the result is entry units[i] of `view`. The others keep their place.

    Other entries are key and value, which follow the query heads of a KV group in a fused QKV weight.

    Args:
        view: tensor with a dimension for each factor of its size (families/tensors.py).
        axis: dimension of the units.
        units: old index of each unit [U]; or [V, U], a permutation for each of the V entries of the dimension before `axis`, such
            as the KV groups that hold the query heads.
        size: length of the dimension `axis`, at least U.
    """
    rest = torch.arange(units.shape[-1], size).expand(*units.shape[:-1], -1)
    units = torch.cat([units, rest], -1)
    if units.dim() == 1:
        return view.index_select(axis, units)
    moved = view.movedim((axis - 1, axis), (0, 1))[torch.arange(len(units))[:, None], units]
    return moved.movedim((0, 1), (axis - 1, axis))


def sorted_tensors(
    info: CheckpointInfo,
    orders: Mapping[int, Orders],
    channels_C: Tensor | None = None,
    compensations: Mapping[int, Tensor] = types.MappingProxyType({}),
) -> dict[str, LazyTensor]:
    """{name: tensor} of a checkpoint with permuted units (heads, neurons, channels), each read and permuted when it is written.

    A compensation that the checkpoint has is multiplied into its output projections.

    Args:
        info: checkpoint to read.
        orders: {index of a layer: {field of LayerChoice: permutation of its units}}.
        channels_C: old index of each channel of the residual stream; None to leave the channels.
        compensations: {index of a layer: compensation T [G, Q, Q] of its permuted query heads}; {} for none.
    """
    reader = TensorReader(info)
    of_network = {} if channels_C is None else {"hidden_size": channels_C}
    heads = (info.model.num_query_groups, info.model.query_heads_per_group, info.model.kv_channels)

    def load(key: str) -> Tensor:
        layer = re.match(r"decoder\.layers\.(\d+)\.", key)
        tensor, number = reader.read(key), int(layer[1]) if layer else None
        projection = layer is not None and key == f"{layer[0]}{TENSOR.rpartition('.')[0]}.weight"
        if projection and info.space.compensation:
            compensation_GQQ = reader.read(f"{layer[0]}{TENSOR}").double()
            tensor = folded(tensor.double().unflatten(1, heads), compensation_GQQ).flatten(1)
        tensor = permute(info.model, key, tensor, of_network | (orders[number] if layer else {}))
        if projection and number in compensations:
            tensor = unfolded(tensor.unflatten(1, heads), matrix(number)).flatten(1)
        return tensor.to(reader.dtype(key))

    def matrix(number: int) -> Tensor:
        """Compensation of a layer, rounded as it is stored, so that the full model does not depend on the rounding."""
        return compensations[number].to(DTYPES[info.dtype])

    keys = [key for key in reader.keys() if not key.endswith(TENSOR)]
    tensors = {key: LazyTensor(reader.shape(key), reader.dtype(key), lambda key=key: load(key)) for key in keys}
    for number, given in compensations.items():
        tensors[f"decoder.layers.{number}.{TENSOR}"] = LazyTensor(
            tuple(given.shape), DTYPES[info.dtype], lambda number=number: matrix(number)
        )
    return tensors
