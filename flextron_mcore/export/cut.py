"""Cut a sub-network out of a checkpoint: the dense model with its widths (Flextron, section 2).

Shape suffixes: C hidden channels, G KV groups, R query heads of a group followed by its key and its value, Q query heads of a
group, H channels of a head, B gate and up projections (2, or 1 for an ungated MLP), F neurons; small letters for the part in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from flextron_mcore.checkpoint.reader import TensorReader
from flextron_mcore.checkpoint.sharding import dealt_axis
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.checkpoint.writer import LazyTensor
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.layers.modulation import gain
from flextron_mcore.space import ElasticSpace, LayerChoice, SubNetwork, parameter_share

_Cut = Callable[[torch.Tensor, int], torch.Tensor]


def cut_config(model: ModelConfig, net: SubNetwork) -> ModelConfig:
    """The dense model of a uniform `net`; of any other, the model of its depth whose every layer has the widest layer's sizes."""
    layers = executed_layers(net)
    return replace(
        model,
        num_layers=len(layers),
        hidden_size=net.hidden_size,
        num_attention_heads=max(layer.num_attention_heads for layer in layers),
        num_query_groups=max(layer.kv_groups for layer in layers),
        ffn_hidden_size=max(layer.ffn_hidden_size for layer in layers),
    )


def executed_layers(net: SubNetwork) -> list[LayerChoice]:
    """The layers that a cut keeps, in order."""
    return [layer for layer in net.layers if layer.executed]


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
    share = parameter_share(info.model, net) if info.space.modulation else 1.0
    tensors = {}
    for name, source, shape, units, take in _cuts(info.model, net):
        modulation = _modulation(source) if share < 1 else None
        for needed in (source, modulation):
            if needed and needed not in stored:
                raise FlextronError(f"{info.path}: the checkpoint lacks the tensor {needed}")
        lie, to_lie = dealt_axis(info.model, info.space, source), space and dealt_axis(dense, space, name)
        buckets = lie[2] if lie and to_lie and lie[2] == to_lie[2] else 1
        dtype, load = reader.dtype(source), partial(_load, reader, source, shape, units, take, buckets)
        if modulation:
            dtype, load = torch.float32, partial(_modulated, load, reader, modulation, share)
        tensors[name] = LazyTensor(shape, dtype, load, buckets)
    return tensors


def shapes(model: ModelConfig, net: SubNetwork) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of `cut`, without a checkpoint."""
    return {name: shape for name, _, shape, *_ in _cuts(model, net)}


def _load(reader: TensorReader, source: str, shape: tuple[int, ...], units: int | None, take: _Cut, buckets: int) -> torch.Tensor:
    part = take(reader.read(source, units) if buckets == 1 else reader.stored(source), buckets).reshape(shape)
    # a view would keep the whole in memory
    return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()


def _modulation(source: str) -> str | None:
    """The parameter that modulates a block, for a tensor that is the last of it."""
    block, _, tensor = source.rpartition(".linear_")
    return f"{block}.modulation" if tensor.startswith(("proj.", "fc2.")) else None


def _modulated(load: Callable[[], torch.Tensor], reader: TensorReader, modulation: str, share: float) -> torch.Tensor:
    return load().float() * gain(reader.read(modulation), share)


def _cuts(model: ModelConfig, net: SubNetwork) -> Iterator[tuple[str, str, tuple[int, ...], int | None, _Cut]]:
    """Of every tensor: name in the dense model, name in the supernet, shape in the dense model, units to read, how to take it.

    It is taken from a tensor whose units lie in so many buckets; where they lie in one (in sorted order), of all units or of the
    first ones.
    """
    c = net.hidden_size

    def table(name: str, rows: int) -> tuple[str, str, tuple[int, ...], int | None, _Cut]:
        return name, name, (rows, c), None, lambda weight, _: weight[:rows, :c]

    yield table("embedding.word_embeddings.weight", model.vocab_size)
    if model.position_embedding_type == "learned_absolute":
        yield table("embedding.position_embeddings.weight", model.max_position_embeddings)
    kept = [i for i, layer in enumerate(net.layers) if layer.executed]
    for new, old in enumerate(kept):
        layer = net.layers[old]
        for name, (shape, take) in _layer_cuts(model, layer, c).items():
            units = layer.ffn_hidden_size if name.startswith("mlp") else layer.kv_groups
            yield f"decoder.layers.{new}.{name}", f"decoder.layers.{old}.{name}", shape, units, take
    for kind in _norm_parts(model):
        name = f"decoder.final_layernorm.{kind}"
        yield name, name, (c,), None, lambda vector, _: vector[:c]
    if not model.share_embeddings_and_output_weights:
        yield table("output_layer.weight", model.vocab_size)


def _layer_cuts(model: ModelConfig, choice: LayerChoice, c: int) -> dict[str, tuple[tuple[int, ...], _Cut]]:
    """Name within a layer -> (shape, how to take it)."""
    Q, H = model.query_heads_per_group, model.kv_channels
    g, q, f = choice.kv_groups, choice.query_heads_per_group, choice.ffn_hidden_size
    B = 2 if model.gated else 1
    rows = [*range(q), Q, Q + 1]  # of R: the first query heads, the key, the value

    def first(vector_C: torch.Tensor, _: int) -> torch.Tensor:
        return vector_C[:c]

    def group_rows(tensor: torch.Tensor, buckets: int) -> torch.Tensor:
        grouped_GRH = tensor.unflatten(0, (buckets, -1, Q + 2, H))[:, : g // buckets]
        return grouped_GRH if q == Q else grouped_GRH[:, :, rows]

    def neurons(tensor: torch.Tensor, buckets: int) -> torch.Tensor:
        return tensor.unflatten(0, (B, buckets, -1))[:, :, : f // buckets]

    cuts: dict[str, tuple[tuple[int, ...], _Cut]] = {
        "self_attention.linear_qkv.weight": ((g * (q + 2) * H, c), lambda w, n: group_rows(w, n)[..., :c]),
        "self_attention.linear_proj.weight": (
            (c, g * q * H),
            lambda w, n: w[:c].unflatten(1, (n, -1, Q, H))[:, :, : g // n, :q],
        ),
        "mlp.linear_fc1.weight": ((B * f, c), lambda w, n: neurons(w, n)[..., :c]),
        "mlp.linear_fc2.weight": ((c, f), lambda w, n: w[:c].unflatten(1, (n, -1))[:, :, : f // n]),
    }
    if model.bias:
        cuts["self_attention.linear_qkv.bias"] = ((g * (q + 2) * H,), group_rows)
        cuts["self_attention.linear_proj.bias"] = ((c,), first)
        cuts["mlp.linear_fc1.bias"] = ((B * f,), neurons)
        cuts["mlp.linear_fc2.bias"] = ((c,), first)
    for kind in _norm_parts(model):
        cuts[f"self_attention.linear_qkv.layer_norm_{kind}"] = ((c,), first)
        cuts[f"mlp.linear_fc1.layer_norm_{kind}"] = ((c,), first)
    return cuts


def _norm_parts(model: ModelConfig) -> tuple[str, ...]:
    return ("weight",) if model.normalization == "rmsnorm" else ("weight", "bias")
