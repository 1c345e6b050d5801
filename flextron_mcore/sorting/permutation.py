"""Permute a checkpoint's units into decreasing importance (Flextron, section 3.1), tensor by tensor, from disk to disk.

Shape suffixes: C hidden channels, F neurons, G KV groups, Q query heads of a group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flextron_mcore.checkpoint.reader import TensorReader
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.checkpoint.writer import LazyTensor
from flextron_mcore.config import ModelConfig
from flextron_mcore.sorting.importance import LayerScores
from flextron_mcore.space import ElasticSpace

# Where tensors have the channels of the residual stream, by the last two parts of their names.
CHANNEL_AXES = {
    "word_embeddings.weight": 1,
    "position_embeddings.weight": 1,
    "output_layer.weight": 1,
    "linear_qkv.weight": 1,
    "linear_proj.weight": 0,
    "linear_proj.bias": 0,
    "linear_fc1.weight": 1,
    "linear_fc2.weight": 0,
    "linear_fc2.bias": 0,
    **{f"{norm}weight": 0 for norm in ("final_layernorm.", "linear_qkv.layer_norm_", "linear_fc1.layer_norm_")},
    **{f"{norm}bias": 0 for norm in ("final_layernorm.", "linear_qkv.layer_norm_", "linear_fc1.layer_norm_")},
}


@dataclass(frozen=True)
class LayerOrder:
    """Where each unit of a layer comes from: neurons [F]; KV groups [G]; query heads within each (old) group [G, Q]."""

    neurons: Tensor
    groups: Tensor
    queries: Tensor


def order(space: ElasticSpace, scores: LayerScores) -> LayerOrder:
    """Decreasing importance of the units of `space`; what is not elastic keeps its order. Ties keep their order."""
    groups, queries = scores.heads.shape
    by_group = torch.arange(groups)
    by_query = torch.arange(queries).expand(groups, queries)
    if space.attention_unit == "kv_group":
        by_group = scores.heads.sum(1).argsort(descending=True, stable=True)
    else:
        by_query = scores.heads.argsort(dim=1, descending=True, stable=True)
    return LayerOrder(scores.neurons.argsort(descending=True, stable=True), by_group, by_query)


def permute(model: ModelConfig, name: str, tensor: Tensor, layer: LayerOrder) -> Tensor:
    """One tensor of a layer in its new order. name: its last two parts, such as `linear_qkv.weight`."""
    groups, queries, size = model.num_query_groups, model.query_heads_per_group, model.kv_channels
    rows = torch.arange(groups)[:, None]
    if name in ("linear_fc1.weight", "linear_fc1.bias"):
        return tensor.unflatten(0, (2 if model.gated else 1, -1))[:, layer.neurons].flatten(0, 1)
    if name == "linear_fc2.weight":
        return tensor[:, layer.neurons]
    if name in ("linear_qkv.weight", "linear_qkv.bias"):
        within = torch.cat([layer.queries, torch.tensor([queries, queries + 1]).expand(groups, 2)], dim=1)
        return tensor.unflatten(0, (groups, queries + 2, size))[rows, within][layer.groups].flatten(0, 2)
    if name == "linear_proj.weight":
        return tensor.unflatten(1, (groups, queries, size))[:, rows, layer.queries][:, layer.groups].flatten(1, 3)
    return tensor


def permute_channels(name: str, tensor: Tensor, channels_C: Tensor) -> Tensor:
    """One tensor with the channels of the residual stream in their new order. name: as in `permute`."""
    axis = CHANNEL_AXES.get(name)
    return tensor if axis is None else tensor.index_select(axis, channels_C)


def sorted_tensors(
    info: CheckpointInfo, orders: Mapping[int, LayerOrder], channels_C: Tensor | None = None
) -> dict[str, LazyTensor]:
    """The checkpoint's tensors in their new order, made one at a time when they are written.

    channels_C: where each channel of the residual stream comes from; None to leave them.
    """
    reader = TensorReader(info)

    def load(key: str) -> Tensor:
        tensor, name = reader.read(key), ".".join(key.split(".")[-2:])
        if layer := re.match(r"decoder\.layers\.(\d+)\.", key):
            tensor = permute(info.model, name, tensor, orders[int(layer[1])])
        return tensor if channels_C is None else permute_channels(name, tensor, channels_C)

    return {key: LazyTensor(reader.shape(key), reader.dtype(key), lambda key=key: load(key)) for key in reader.keys()}
