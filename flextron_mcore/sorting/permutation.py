"""Permute a checkpoint's units into decreasing importance (Flextron, section 3.1), tensor by tensor, from disk to disk.

Shape suffixes: C hidden channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from flextron_mcore.axes import added_tensors
from flextron_mcore.checkpoint.reader import TensorReader
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.checkpoint.writer import LazyTensor
from flextron_mcore.config import ModelConfig
from flextron_mcore.families.tensors import find
from flextron_mcore.sorting.importance import LayerScores
from flextron_mcore.space import ElasticSpace, SubNetwork

Orders = dict[str, Tensor]
"""Where each unit comes from, by field: [U], or within each unit of the axis's field before it [V, U]."""


def order(model: ModelConfig, space: ElasticSpace, scores: LayerScores) -> Orders:
    """Decreasing importance of a layer's units of `space`; what is not elastic keeps its order. Ties keep their order."""
    orders = {}
    for axis in space.layer_axes:
        field, fields = axis.unit_field(model, space.attention_unit), list(axis.fields)
        inner = tuple(range(fields.index(field) + 1, len(fields)))
        units = scores.units[axis.name].sum(inner) if inner else scores.units[axis.name]
        orders[field] = units.argsort(dim=-1, descending=True, stable=True)
    return orders


def permute(model: ModelConfig, key: str, tensor: Tensor, orders: Orders) -> Tensor:
    """One tensor with its units in their new order. key: its name in the checkpoint."""
    declared = find(key, added_tensors())
    if declared is None:
        return tensor
    full = SubNetwork.full(model)
    layer = full.layers[0] if declared.place == "layer" else None
    view, axis = tensor, 0
    for side, sizes in zip(declared.sides, declared.sizes(model, full.hidden_size, layer), strict=True):
        if len(sizes) > 1:  # of one factor the checkpoint may have more: it pads the vocabulary
            view = view.unflatten(axis, sizes)
        for factor, size in zip(side.factors, sizes, strict=True):
            if factor.name in orders:
                view = _select(view, axis, orders[factor.name], size)
            axis += 1
    return view.reshape(tensor.shape)


def _select(view: Tensor, axis: int, units: Tensor, size: int) -> Tensor:
    """`view` with the units along an axis in their new order, each row of the axis before it in its own; the last ones stay."""
    rest = torch.arange(units.shape[-1], size).expand(*units.shape[:-1], -1)
    units = torch.cat([units, rest], -1)
    if units.dim() == 1:
        return view.index_select(axis, units)
    moved = view.movedim((axis - 1, axis), (0, 1))[torch.arange(len(units))[:, None], units]
    return moved.movedim((0, 1), (axis - 1, axis))


def sorted_tensors(info: CheckpointInfo, orders: Mapping[int, Orders], channels_C: Tensor | None = None) -> dict[str, LazyTensor]:
    """The checkpoint's tensors in their new order, made one at a time when they are written.

    channels_C: where each channel of the residual stream comes from; None to leave them.
    """
    reader = TensorReader(info)
    of_network = {} if channels_C is None else {"hidden_size": channels_C}

    def load(key: str) -> Tensor:
        layer = re.match(r"decoder\.layers\.(\d+)\.", key)
        return permute(info.model, key, reader.read(key), of_network | (orders[int(layer[1])] if layer else {}))

    return {key: LazyTensor(reader.shape(key), reader.dtype(key), lambda key=key: load(key)) for key in reader.keys()}
