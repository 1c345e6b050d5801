"""Cut a sub-network out of a checkpoint: the dense model with its widths (Flextron, section 2)."""

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
from flextron_mcore.space import ElasticSpace, SubNetwork, parameter_share


def cut_config(model: ModelConfig, net: SubNetwork) -> ModelConfig:
    """The dense model of a uniform `net`; of any other, the model of its depth whose every layer has the widest layer's sizes."""
    layers = net.executed_layers
    return replace(
        model,
        num_layers=len(layers),
        hidden_size=net.hidden_size,
        num_attention_heads=max(layer.num_attention_heads for layer in layers),
        num_query_groups=max(layer.kv_groups for layer in layers),
        ffn_hidden_size=max(layer.ffn_hidden_size for layer in layers),
    )


def cut(
    info: CheckpointInfo, net: SubNetwork, reader: TensorReader | None = None, space: ElasticSpace | None = None
) -> dict[str, LazyTensor]:
    """The tensors of `net` as a dense model, under Megatron-Core's names, in the order of the network.

    Skipped layers are left out and the others renumbered; padding of the vocabulary is removed. Modulation is multiplied into
    the last weight and bias of its block, in fp32, to be rounded once. Each tensor is read from the checkpoint when loaded, each
    alone. space: what a uniform `net` is to have as a checkpoint; where its units lie in as many buckets, they are not sorted in
    between. Raises FlextronError when `net` is not in the checkpoint's space or a tensor is missing.
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
        for needed in (source, modulation):
            if needed and needed not in stored:
                raise FlextronError(f"{info.path}: the checkpoint lacks the tensor {needed}")
        lie, to_lie = dealt_axis(info.model, info.space, source), space and dealt_axis(dense, space, placed.name)
        buckets = lie[2] if lie and to_lie and lie[2] == to_lie[2] else 1
        dtype, load = reader.dtype(source), partial(_load, reader, placed, buckets)
        if modulation:
            dtype, load = torch.float32, partial(_modulated, load, reader, modulation, share)
        tensors[placed.name] = LazyTensor(placed.shape, dtype, load, buckets)
    return tensors


def placed_tensors(model: ModelConfig, net: SubNetwork) -> list[Placed]:
    """The tensors of `net` as a dense model, in the order of the network."""
    return list(of_network(model, net, SubNetwork.full(model), added_tensors()))


def plain_norms(model: ModelConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`tensors` of `model` with the scales of "layernorm1p", which are stored less one, as those of a layer norm, in fp32."""
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
    """Raise FlextronError for a stored tensor that no declaration names: it would be missing in what is cut."""
    names = [placed.source for placed in placed_tensors(info.model, SubNetwork.full(info.model))]
    known = {*names, *(_modulation(name) for name in names if info.space.modulation)}
    if unknown := sorted(stored - known):
        raise FlextronError(f"{info.path}: the tensor {unknown[0]} is none that this model declares (families/tensors.py)")


def _load(reader: TensorReader, placed: Placed, buckets: int) -> torch.Tensor:
    if buckets > 1:
        stored = reader.stored(placed.source)
    else:
        stored = reader.read(placed.source, next((size for factor, size in placed.factors if factor.parallel), None))
    part = _take(stored, placed, buckets).reshape(placed.shape)
    # a view would keep the whole in memory
    return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()


def _take(tensor: torch.Tensor, placed: Placed, buckets: int) -> torch.Tensor:
    """The part in use, an axis for each factor: its first entries and those that every cut keeps.

    Units lie in `buckets`, of which each gives as many; where they lie in one (in sorted order), these are all or the first ones.
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
    """The parameter that modulates a block, for a tensor that is the last of it."""
    block, _, tensor = source.rpartition(".linear_")
    return f"{block}.modulation" if tensor.startswith(("proj.", "fc2.")) else None


def _modulated(load: Callable[[], torch.Tensor], reader: TensorReader, modulation: str, share: float) -> torch.Tensor:
    return load().float() * gain(reader.read(modulation), share)
