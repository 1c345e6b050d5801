"""Cutting a sub-network out of a checkpoint as a dense model (Flextron, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from flextron_mcore.axes import added_tensors
from flextron_mcore.checkpoint.reader import TensorReader
from flextron_mcore.checkpoint.sharding import dealt_axis
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.checkpoint.writer import LazyTensor
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families.tensors import Placed, find, of_network
from flextron_mcore.layers.block import gain
from flextron_mcore.layers.compensation import TENSOR
from flextron_mcore.layers.compensation import folded as folded_weight
from flextron_mcore.space import ElasticSpace, SubNetwork, parameter_share


def cut_config(model: ModelConfig, net: SubNetwork) -> ModelConfig:
    """Architecture of a sub-network as a dense model; where layers differ in a width, all get the largest."""
    layers = net.executed_layers
    kept = [number for number, layer in enumerate(net.layers) if layer.executed]

    def of_kept(values: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return values and tuple(values[number] for number in kept)

    return replace(
        model,
        no_rope_freq=of_kept(model.no_rope_freq),
        window_attn_skip_freq=of_kept(model.window_attn_skip_freq),
        num_layers=len(layers),
        hidden_size=net.hidden_size,
        num_attention_heads=max(layer.num_attention_heads for layer in layers),
        num_query_groups=max(layer.kv_groups for layer in layers),
        ffn_hidden_size=max(layer.ffn_hidden_size for layer in layers),
    )


def cut(
    info: CheckpointInfo,
    net: SubNetwork,
    reader: TensorReader | None = None,
    space: ElasticSpace | None = None,
    refitted: Mapping[str, torch.Tensor] | None = None,
    folded: bool = True,
) -> dict[str, LazyTensor]:
    """Tensors of a sub-network as a dense model, {Megatron-Core's name: tensor}, in the order of the network.

    Skipped layers are left out and the others renumbered. Padding of the vocabulary is removed. Modulation is multiplied into the
    last weight and bias of its block, and the compensation of heads into the output projection, in fp32, so that they are rounded
    only once. Each tensor is read when it is loaded.

    Args:
        info: opened checkpoint.
        net: sub-network.
        reader: reader of the checkpoint; None opens one.
        space: elastic space of the checkpoint that the tensors will be written to, for a uniform network. Tensors whose heads or
            neurons both checkpoints deal into the same number of buckets (checkpoint/sharding.py) then keep the order of the
            disk, which saves reordering. None: all tensors with heads and neurons in order.
        refitted: {name in the full model: tensor of the sub-network that replaces the slice of the full model's}, in fp32
            (exports/compensation.py).
        folded: multiply the compensation of heads into the output projection; False for a model that computes it itself.

    Raises:
        FlextronError: the network is not in the checkpoint's space, or the checkpoint lacks a tensor or has an unknown one.
    """
    info.space.check(info.model, net)
    reader = reader or TensorReader(info)
    stored, dense = set(reader.keys()), cut_config(info.model, net)
    _check_names(info, stored)
    share = parameter_share(info.model, net) if info.space.modulation else 1.0
    tensors = {}
    for placed in placed_tensors(info.model, net):
        source = placed.source
        modulation = _modulation(source) if share < 1 else None
        compensation = _compensation(info, source) if folded else None
        for needed in (source, modulation, compensation):
            if needed and needed not in stored:
                raise FlextronError(
                    f"{info.path}: the checkpoint lacks the tensor {needed}: bring it back from a copy, or make it again"
                )
        lie, to_lie = dealt_axis(info.model, info.space, source), space and dealt_axis(dense, space, placed.name)
        buckets = lie[2] if lie and to_lie and lie[2] == to_lie[2] else 1
        dtype, load = reader.dtype(source), partial(_load, reader, placed, buckets)
        if refitted and source in refitted:
            buckets, dtype, load = 1, torch.float32, refitted[source].clone
        if compensation:
            dtype, load = torch.float32, partial(_compensated, load, reader, compensation, placed)
        if modulation:
            dtype, load = torch.float32, partial(_modulated, load, reader, modulation, share)
        tensors[placed.name] = LazyTensor(placed.shape, dtype, load, buckets)
    return tensors


def placed_tensors(model: ModelConfig, net: SubNetwork) -> list[Placed]:
    """Tensors of a sub-network as a dense model, in the order of the network, each with its place in the full model's tensors."""
    return list(of_network(model, net, SubNetwork.full(model), added_tensors()))


def plain_norms(model: ModelConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors of a model whose norms are "layernorm1p" (scales stored minus 1), with the scales of plain LayerNorm.

    Such scales become fp32. Tensors of other models are returned as they are.
    """
    if model.normalization != "layernorm1p":
        return dict(tensors)

    def scale(load: Callable[[], torch.Tensor]) -> torch.Tensor:
        return load().float() + 1

    return {
        name: replace(lazy, dtype=torch.float32, load=partial(scale, lazy.load))
        if find(name, added_tensors()).norm_scale
        else lazy
        for name, lazy in tensors.items()
    }


def _check_names(info: CheckpointInfo, stored: set[str]) -> None:
    """Raise FlextronError for a stored tensor that families/tensors.py does not declare: the cut model would lack it."""
    names = [placed.source for placed in placed_tensors(info.model, SubNetwork.full(info.model))]
    known = {*names, *(_modulation(name) for name in names if info.space.modulation), *(_compensation(info, n) for n in names)}
    if unknown := sorted(stored - known):
        raise FlextronError(f"{info.path}: the tensor {unknown[0]} is none that this model declares (families/tensors.py)")


def _load(reader: TensorReader, placed: Placed, buckets: int) -> torch.Tensor:
    """Read the tensor of a dense model from the full model's tensor in a checkpoint.

    Args:
        reader: reader of the checkpoint.
        placed: the tensor's place and size in the dense model.
        buckets: number of buckets into which heads or neurons stay dealt (checkpoint/sharding.py); 1 for units in order.
    """
    if buckets > 1:
        stored = reader.stored(placed.source)
    else:
        stored = reader.read(placed.source, next((size for factor, size in placed.factors if factor.parallel), None))
    part = _take(stored, placed, buckets).reshape(placed.shape)
    # A view would keep the whole tensor in memory.
    return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()


def _take(tensor: torch.Tensor, placed: Placed, buckets: int) -> torch.Tensor:
    """Entries of a tensor that the sub-network uses, with a dimension for each factor of its size.

    They are the first entries along each factor, and the last ones that every sub-network keeps, such as key and value after the
    query heads (`Factor.last`).

    Args:
        tensor: tensor of the full model.
        placed: the tensor's place and size in the dense model.
        buckets: number of buckets into which heads or neurons are dealt (checkpoint/sharding.py), each of which gives the same
            number of its first units; 1 for units in order.
    """
    for axis in reversed(range(tensor.dim())):
        side = zip(placed.tensor.sides[axis].factors, placed.whole[axis], strict=True)
        tensor = tensor.unflatten(axis, [n for factor, size in side for n in ((buckets, -1) if factor.parallel else (size,))])
    axis = 0
    for factor, kept in placed.factors:
        if factor.parallel:
            axis, kept = axis + 1, kept // buckets
        size = tensor.shape[axis]
        if factor.last and kept < size:
            rows = [*range(kept - factor.last), *range(size - factor.last, size)]
            tensor = tensor.index_select(axis, torch.tensor(rows))
        else:
            tensor = tensor.narrow(axis, 0, kept)
        axis += 1
    return tensor


def _modulation(source: str) -> str | None:
    """Name of the modulation that applies to a block's last weight or bias, None for other tensors."""
    block, _, tensor = source.rpartition(".linear_")
    return f"{block}.modulation" if tensor.startswith(("proj.", "fc2.")) else None


def _compensation(info: CheckpointInfo, source: str) -> str | None:
    """Name of the compensation that applies to an output projection's weight; None for other tensors or without one."""
    projection = f"{TENSOR.rpartition('.')[0]}.weight"
    return f"{source.removesuffix(projection)}{TENSOR}" if info.space.compensation and source.endswith(projection) else None


def _compensated(load: Callable[[], torch.Tensor], reader: TensorReader, compensation: str, placed: Placed) -> torch.Tensor:
    """Weight of an output projection in fp32, multiplied by the compensation matrix of each KV group (layers/compensation.py).

    Args:
        load: function () that returns the weight of the sub-network.
        reader: reader of the checkpoint.
        compensation: name of the compensation in the checkpoint.
        placed: the weight's place and size in the dense model.
    """
    groups, queries, size = placed.sizes[1]
    matrix_Gqq = reader.read(compensation)[:groups, :queries, :queries].float()
    return folded_weight(load().float().unflatten(1, (groups, queries, size)), matrix_Gqq).flatten(1)


def _modulated(load: Callable[[], torch.Tensor], reader: TensorReader, modulation: str, share: float) -> torch.Tensor:
    """Last weight or bias of a block in fp32, times the gain of the block's modulation.

    Args:
        load: function () that returns the tensor of the sub-network.
        reader: reader of the checkpoint.
        modulation: name of the modulation in the checkpoint.
        share: parameters of the sub-network / parameters of the full model.
    """
    return load().float() * gain(reader.read(modulation), share)
