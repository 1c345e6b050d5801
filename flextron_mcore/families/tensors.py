"""Table of the tensors of a GPT model, under Megatron-Core's names and with symbolic sizes. No torch import.

The parameter counter, the cut of sub-networks (exports/cut.py), the order of units in checkpoints (checkpoint/sharding.py) and
the estimates of memory and FLOPs (launch/) read this table. Each dimension of a tensor is a `Side`, a product of factors.
Arguments named `extra` are tensors that elastic axes add to the table.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from flextron_mcore.config import ModelConfig


class Layer(Protocol):
    """Widths of one layer of a sub-network (space.LayerChoice), such as kv_groups and ffn_hidden_size, one attribute each."""

    @property
    def executed(self) -> bool:
        """False for a skipped layer."""


class Network(Protocol):
    """Sizes of a sub-network (space.SubNetwork): hidden size, and widths of each layer."""

    @property
    def hidden_size(self) -> int:
        """Channels of the residual stream."""

    @property
    def layers(self) -> Sequence[Layer]:
        """Widths of each layer."""


@dataclass(frozen=True)
class Factor:
    """One factor of a dimension's size, such as kv_groups in kv_groups x (query heads of a group + 2) x kv_channels.

    Attributes:
        name: `hidden_size`, a field of the layer's widths, or a field of ModelConfig.
        last: entries added at the end, which every sub-network keeps, such as 2 for key and value after the query heads.
        parallel: True if the factor is split over tensor-parallel ranks.
    """

    name: str
    last: int = 0
    parallel: bool = False

    def size(self, model: ModelConfig, hidden_size: int, layer: Layer | None) -> int:
        """Value of the factor in a sub-network.

        Args:
            model: architecture of the full model.
            hidden_size: channels of the sub-network.
            layer: widths of the tensor's layer; None for a tensor outside of layers.
        """
        if self.name == "hidden_size":
            return hidden_size
        return getattr(layer if hasattr(layer, self.name) else model, self.name) + self.last


@dataclass(frozen=True)
class Side:
    """One dimension of a tensor, whose size is a product of factors.

    Attributes:
        factors: factors of the size, outermost first.
        parts: index of the factor whose entries other formats store as separate tensors (query, key, value; gate, up); None:
            other formats store one tensor.
    """

    factors: tuple[Factor, ...]
    parts: int | None = None

    def counts(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Number of entries of each part: (query heads of a group, 1, 1), (1, 1) for gate and up, or (1,) without parts.

        sizes: values of the factors.
        """
        if self.parts is None:
            return (1,)
        size, last = sizes[self.parts], self.factors[self.parts].last
        return (*((size - last,) if size > last else ()), *(1,) * last)


_GROUPS, _HEAD, _NEURONS = Factor("kv_groups", parallel=True), Factor("kv_channels"), Factor("ffn_hidden_size", parallel=True)
HIDDEN = Side((Factor("hidden_size"),))
VOCABULARY = Side((Factor("vocab_size", parallel=True),))
POSITIONS = Side((Factor("max_position_embeddings"),))
CHANNELS = Side((_HEAD,))
# Megatron-Core's fused QKV: for each KV group the query heads, then the key, then the value.
QKV = Side((_GROUPS, Factor("query_heads_per_group", last=2), _HEAD), parts=1)
HEADS = Side((_GROUPS, Factor("query_heads_per_group"), _HEAD))
# Megatron-Core's fc1: the gate projection, if the MLP is gated, then the up projection.
GATE_AND_UP = Side((Factor("gated", last=1), _NEURONS), parts=0)
NEURONS = Side((_NEURONS,))


@dataclass(frozen=True)
class Tensor:
    """Declaration of one weight or bias of a GPT model.

    Attributes:
        name: Megatron-Core's name; for a tensor in a layer without "decoder.layers.N.".
        sides: dimensions of the tensor.
        place: "before" for embeddings, "layer" for a tensor of every layer, "after" for final norm and output layer.
        needs: (field or property of ModelConfig, values for which the model has the tensor ...); () if every model has it.
    """

    name: str
    sides: tuple[Side, ...]
    place: str = "layer"
    needs: tuple[Any, ...] = ()

    def key(self, number: int | None) -> str:
        """Full name in a state dict. number: index of the tensor's layer; None for a tensor outside of layers."""
        return self.name if number is None else f"decoder.layers.{number}.{self.name}"

    def exists(self, model: ModelConfig) -> bool:
        """True if a model with this architecture has the tensor."""
        return not self.needs or getattr(model, self.needs[0]) in self.needs[1:]

    @property
    def embedding(self) -> bool:
        """True for a tensor with one row for each token or position: embeddings and output layer."""
        return self.sides[0] in (VOCABULARY, POSITIONS)

    @property
    def norm_scale(self) -> bool:
        """True for the scale of a norm, which normalization "layernorm1p" stores minus 1."""
        return self.name.endswith(("layer_norm_weight", "layernorm.weight"))

    def sizes(self, model: ModelConfig, hidden_size: int, layer: Layer | None) -> tuple[tuple[int, ...], ...]:
        """Values of the factors of each dimension in a sub-network.

        Args:
            model: architecture of the full model.
            hidden_size: channels of the sub-network.
            layer: widths of the tensor's layer; None for a tensor outside of layers.
        """
        return tuple(tuple(factor.size(model, hidden_size, layer) for factor in side.factors) for side in self.sides)

    def numel(self, model: ModelConfig, hidden_size: int, layer: Layer | None = None, ranks: int = 1) -> int:
        """Number of elements on one tensor-parallel rank, with every parallel factor rounded up to a multiple of the ranks.

        Args:
            model: architecture of the full model.
            hidden_size: channels of the sub-network.
            layer: widths of the tensor's layer; None for a tensor outside of layers.
            ranks: number of tensor-parallel ranks.
        """
        return math.prod(
            -(-factor.size(model, hidden_size, layer) // (ranks if factor.parallel else 1))
            for side in self.sides
            for factor in side.factors
        )


_BIASED, _QKV_BIASED, _HEADS_NORMED = ("bias", True), ("qkv_bias", True), ("qk_layernorm", True)
_SHIFTED = ("normalization", "layernorm", "layernorm1p")
_LEARNED = ("position_embedding_type", "learned_absolute")
_UNTIED = ("share_embeddings_and_output_weights", False)

TENSORS = (
    Tensor("embedding.word_embeddings.weight", (VOCABULARY, HIDDEN), "before"),
    Tensor(
        "embedding.position_embeddings.weight", (POSITIONS, HIDDEN), "before", ("position_embedding_type", "learned_absolute")
    ),
    Tensor("self_attention.linear_qkv.weight", (QKV, HIDDEN)),
    Tensor("self_attention.linear_proj.weight", (HIDDEN, HEADS)),
    Tensor("mlp.linear_fc1.weight", (GATE_AND_UP, HIDDEN)),
    Tensor("mlp.linear_fc2.weight", (HIDDEN, NEURONS)),
    Tensor("self_attention.linear_qkv.bias", (QKV,), needs=_QKV_BIASED),
    Tensor("self_attention.linear_proj.bias", (HIDDEN,), needs=_BIASED),
    Tensor("mlp.linear_fc1.bias", (GATE_AND_UP,), needs=_BIASED),
    Tensor("mlp.linear_fc2.bias", (HIDDEN,), needs=_BIASED),
    Tensor("self_attention.linear_qkv.layer_norm_weight", (HIDDEN,)),
    Tensor("mlp.linear_fc1.layer_norm_weight", (HIDDEN,)),
    Tensor("self_attention.q_layernorm.weight", (CHANNELS,), needs=_HEADS_NORMED),
    Tensor("self_attention.k_layernorm.weight", (CHANNELS,), needs=_HEADS_NORMED),
    Tensor("self_attention.linear_qkv.layer_norm_bias", (HIDDEN,), needs=_SHIFTED),
    Tensor("mlp.linear_fc1.layer_norm_bias", (HIDDEN,), needs=_SHIFTED),
    Tensor("decoder.final_layernorm.weight", (HIDDEN,), "after"),
    Tensor("decoder.final_layernorm.bias", (HIDDEN,), "after", _SHIFTED),
    Tensor("output_layer.weight", (VOCABULARY, HIDDEN), "after", _UNTIED),
)


def declare(tensors: Mapping[str, tuple[str, ...]], parallel: Sequence[str] = ()) -> tuple[Tensor, ...]:
    """Declarations of tensors that an elastic axis adds to every layer.

    tensors: {name: field that gives the size of each dimension}. parallel: fields that are split over tensor-parallel ranks.
    """
    return tuple(
        Tensor(name, tuple(Side((Factor(field, parallel=field in parallel),)) for field in fields))
        for name, fields in tensors.items()
    )


@dataclass(frozen=True)
class Placed:
    """One tensor of a dense model that is cut out of the full model as a sub-network.

    Attributes:
        tensor: declaration of the tensor.
        number: index of the tensor's layer in the dense model; None for a tensor outside of layers.
        old: index of the tensor's layer in the full model; None for a tensor outside of layers.
        sizes: values of the factors of each dimension in the dense model.
        whole: values of the factors of each dimension in the full model.
    """

    tensor: Tensor
    number: int | None
    old: int | None
    sizes: tuple[tuple[int, ...], ...]
    whole: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        """Name in the dense model."""
        return self.tensor.key(self.number)

    @property
    def source(self) -> str:
        """Name in the full model."""
        return self.tensor.key(self.old)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the dense model."""
        return tuple(map(math.prod, self.sizes))

    @property
    def factors(self) -> Iterator[tuple[Factor, int]]:
        """(factor, value in the dense model) of all factors, dimension by dimension."""
        for side, sizes in zip(self.tensor.sides, self.sizes, strict=True):
            yield from zip(side.factors, sizes, strict=True)


def of_model(model: ModelConfig, place: str, extra: Sequence[Tensor] = ()) -> list[Tensor]:
    """Declarations of the tensors that a model has before, in or after its layers.

    Args:
        model: architecture of the model.
        place: "before", "layer" or "after", as in `Tensor.place`.
        extra: tensors that axes add to TENSORS (axes.added_tensors).
    """
    return [tensor for tensor in (*TENSORS, *extra) if tensor.place == place and tensor.exists(model)]


def of_network(model: ModelConfig, net: Network, full: Network, extra: Sequence[Tensor] = ()) -> Iterator[Placed]:
    """Tensors of the dense model that a sub-network becomes, each with its shape and its origin in the full model.

    The order is embeddings, executed layers, final norm, output layer. Skipped layers have no tensors.

    Args:
        model: architecture of the full model.
        net: sub-network.
        full: sub-network of the full model's sizes.
        extra: tensors that axes add to TENSORS (axes.added_tensors).
    """

    def placed(tensor: Tensor, old: int | None = None, new: int | None = None) -> Placed:
        sizes = (tensor.sizes(model, n.hidden_size, None if old is None else n.layers[old]) for n in (net, full))
        return Placed(tensor, new, old, *sizes)

    yield from map(placed, of_model(model, "before", extra))
    for new, old in enumerate(number for number, layer in enumerate(net.layers) if layer.executed):
        yield from (placed(tensor, old, new) for tensor in of_model(model, "layer", extra))
    yield from map(placed, of_model(model, "after", extra))


def find(key: str, extra: Sequence[Tensor] = ()) -> Tensor | None:
    """Declaration of the tensor with the full name `key`, None if none is declared. extra: tensors that axes add to TENSORS."""
    name = re.sub(r"^decoder\.layers\.\d+\.", "", key)
    return next((tensor for tensor in (*TENSORS, *extra) if tensor.name == name), None)


def count(model: ModelConfig, net: Network, embeddings: bool = True, extra: tuple[Tensor, ...] = ()) -> int:
    """Exact number of parameters of the dense model that a sub-network becomes.

    Args:
        model: architecture of the full model.
        net: sub-network.
        embeddings: False leaves out the embeddings and the output layer.
        extra: tensors that axes add to TENSORS (axes.added_tensors).
    """
    total = _count_around(model, net.hidden_size, embeddings, extra)
    for layer, times in Counter(layer for layer in net.layers if layer.executed).items():
        total += times * _count_layer(model, net.hidden_size, layer, extra)
    return total


# Cached because selectors count the same layers many times.
@lru_cache(maxsize=4096)
def _count_layer(model: ModelConfig, hidden_size: int, layer: Layer, extra: tuple[Tensor, ...]) -> int:
    """Number of parameters of one executed layer.

    Args:
        model: architecture of the full model.
        hidden_size: channels of the sub-network.
        layer: widths of the layer.
        extra: tensors that axes add to TENSORS (axes.added_tensors).
    """
    return sum(tensor.numel(model, hidden_size, layer) for tensor in of_model(model, "layer", extra))


@lru_cache(maxsize=64)
def _count_around(model: ModelConfig, hidden_size: int, embeddings: bool, extra: tuple[Tensor, ...]) -> int:
    """Number of parameters outside of the layers.

    Args:
        model: architecture of the full model.
        hidden_size: channels of the sub-network.
        embeddings: False leaves out the embeddings and the output layer.
        extra: tensors that axes add to TENSORS (axes.added_tensors).
    """
    around = [*of_model(model, "before", extra), *of_model(model, "after", extra)]
    return sum(tensor.numel(model, hidden_size) for tensor in around if embeddings or not tensor.embedding)
