"""The tensors of a GPT model under Megatron-Core's names, with symbolic sides. No torch import.

One table serves the parameter counter, cutting (exports/cut.py), dealt order (checkpoint/sharding.py), and estimates of memory
and FLOPs (launch/). `extra` is for tensors that an elastic axis brings beyond the table.
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
    """The widths of a layer (space.LayerChoice): an attribute for each field of the layer's axes."""

    @property
    def executed(self) -> bool: ...


class Network(Protocol):
    """The sizes of a network (space.SubNetwork)."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def layers(self) -> Sequence[Layer]: ...


@dataclass(frozen=True)
class Factor:
    """One of the numbers whose product is a side of a tensor.

    name: `hidden_size`, a field of the layer's widths, or of ModelConfig. last: entries on top of that, at the end, which every
    cut keeps. parallel: tensor-parallel ranks share it.
    """

    name: str
    last: int = 0
    parallel: bool = False

    def size(self, model: ModelConfig, hidden_size: int, layer: Layer | None) -> int:
        """The number; layer is None outside of layers."""
        if self.name == "hidden_size":
            return hidden_size
        return getattr(layer if hasattr(layer, self.name) else model, self.name) + self.last


@dataclass(frozen=True)
class Side:
    """One side of a tensor: factors from the outer to the inner. parts: the factor whose entries other formats store apart."""

    factors: tuple[Factor, ...]
    parts: int | None = None

    def counts(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Entries of each part, by the factors' sizes: (query heads, 1, 1), (1, 1) for gate and up, or (1,) for one part."""
        if self.parts is None:
            return (1,)
        size, last = sizes[self.parts], self.factors[self.parts].last
        return (*((size - last,) if size > last else ()), *(1,) * last)


_GROUPS, _HEAD, _NEURONS = Factor("kv_groups", parallel=True), Factor("kv_channels"), Factor("ffn_hidden_size", parallel=True)
HIDDEN = Side((Factor("hidden_size"),))
VOCABULARY = Side((Factor("vocab_size", parallel=True),))
POSITIONS = Side((Factor("max_position_embeddings"),))
# Group after group its query heads, its key, its value.
QKV = Side((_GROUPS, Factor("query_heads_per_group", last=2), _HEAD), parts=1)
HEADS = Side((_GROUPS, Factor("query_heads_per_group"), _HEAD))
# The gate's projection, which a `gated` MLP has, and the other.
GATE_AND_UP = Side((Factor("gated", last=1), _NEURONS), parts=0)
NEURONS = Side((_NEURONS,))


@dataclass(frozen=True)
class Tensor:
    """A weight or a bias.

    name: in a layer without "decoder.layers.N.". place: "before" the layers, in each "layer", or "after" them. needs: a field of
    ModelConfig and the values with which a model has the tensor; empty if every model has it.
    """

    name: str
    sides: tuple[Side, ...]
    place: str = "layer"
    needs: tuple[Any, ...] = ()

    def key(self, number: int | None) -> str:
        """Name in a model; number: of its layer, None outside of layers."""
        return self.name if number is None else f"decoder.layers.{number}.{self.name}"

    def exists(self, model: ModelConfig) -> bool:
        """True for a model that has the tensor."""
        return not self.needs or getattr(model, self.needs[0]) in self.needs[1:]

    @property
    def embedding(self) -> bool:
        """True for a tensor with a row for each token or position."""
        return self.sides[0] in (VOCABULARY, POSITIONS)

    @property
    def norm_scale(self) -> bool:
        """True for the scale of a norm, which "layernorm1p" stores less one."""
        return self.name.endswith(("layer_norm_weight", "layernorm.weight"))

    def sizes(self, model: ModelConfig, hidden_size: int, layer: Layer | None) -> tuple[tuple[int, ...], ...]:
        """The factors of each side as numbers."""
        return tuple(tuple(factor.size(model, hidden_size, layer) for factor in side.factors) for side in self.sides)

    def numel(self, model: ModelConfig, hidden_size: int, layer: Layer | None = None, ranks: int = 1) -> int:
        """Number of elements that each of `ranks` tensor-parallel ranks holds."""
        return math.prod(
            -(-factor.size(model, hidden_size, layer) // (ranks if factor.parallel else 1))
            for side in self.sides
            for factor in side.factors
        )


_BIASED = ("bias", True)
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
    Tensor("self_attention.linear_qkv.bias", (QKV,), needs=_BIASED),
    Tensor("self_attention.linear_proj.bias", (HIDDEN,), needs=_BIASED),
    Tensor("mlp.linear_fc1.bias", (GATE_AND_UP,), needs=_BIASED),
    Tensor("mlp.linear_fc2.bias", (HIDDEN,), needs=_BIASED),
    Tensor("self_attention.linear_qkv.layer_norm_weight", (HIDDEN,)),
    Tensor("mlp.linear_fc1.layer_norm_weight", (HIDDEN,)),
    Tensor("self_attention.linear_qkv.layer_norm_bias", (HIDDEN,), needs=_SHIFTED),
    Tensor("mlp.linear_fc1.layer_norm_bias", (HIDDEN,), needs=_SHIFTED),
    Tensor("decoder.final_layernorm.weight", (HIDDEN,), "after"),
    Tensor("decoder.final_layernorm.bias", (HIDDEN,), "after", _SHIFTED),
    Tensor("output_layer.weight", (VOCABULARY, HIDDEN), "after", _UNTIED),
)


def declare(tensors: Mapping[str, tuple[str, ...]], parallel: Sequence[str] = ()) -> tuple[Tensor, ...]:
    """Tensors of a layer by name, each with the fields that its sides are as large as; parallel: those that ranks share."""
    return tuple(
        Tensor(name, tuple(Side((Factor(field, parallel=field in parallel),)) for field in fields))
        for name, fields in tensors.items()
    )


@dataclass(frozen=True)
class Placed:
    """A tensor of a network.

    number: of its layer in the network as a dense model, old: in the whole model; None outside of layers. sizes: the factors of
    each side as numbers; whole: those in the whole model.
    """

    tensor: Tensor
    number: int | None
    old: int | None
    sizes: tuple[tuple[int, ...], ...]
    whole: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        """Name in the network as a dense model."""
        return self.tensor.key(self.number)

    @property
    def source(self) -> str:
        """Name in the whole model."""
        return self.tensor.key(self.old)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the network."""
        return tuple(map(math.prod, self.sizes))

    @property
    def factors(self) -> Iterator[tuple[Factor, int]]:
        """All factors in order, with their numbers."""
        for side, sizes in zip(self.tensor.sides, self.sizes, strict=True):
            yield from zip(side.factors, sizes, strict=True)


def of_model(model: ModelConfig, place: str, extra: Sequence[Tensor] = ()) -> list[Tensor]:
    """The tensors that `model` has at a place."""
    return [tensor for tensor in (*TENSORS, *extra) if tensor.place == place and tensor.exists(model)]


def of_network(model: ModelConfig, net: Network, full: Network, extra: Sequence[Tensor] = ()) -> Iterator[Placed]:
    """The tensors of `net`, cut out of `full`, as a dense model in the order of the network; skipped layers have none."""

    def placed(tensor: Tensor, old: int | None = None, new: int | None = None) -> Placed:
        sizes = (tensor.sizes(model, n.hidden_size, None if old is None else n.layers[old]) for n in (net, full))
        return Placed(tensor, new, old, *sizes)

    yield from map(placed, of_model(model, "before", extra))
    for new, old in enumerate(number for number, layer in enumerate(net.layers) if layer.executed):
        yield from (placed(tensor, old, new) for tensor in of_model(model, "layer", extra))
    yield from map(placed, of_model(model, "after", extra))


def find(key: str, extra: Sequence[Tensor] = ()) -> Tensor | None:
    """The tensor that a model stores under `key`; None for a name that no declaration has."""
    name = re.sub(r"^decoder\.layers\.\d+\.", "", key)
    return next((tensor for tensor in (*TENSORS, *extra) if tensor.name == name), None)


def count(model: ModelConfig, net: Network, embeddings: bool = True, extra: tuple[Tensor, ...] = ()) -> int:
    """Exact number of parameters of `net` as a dense model; embeddings=False leaves out those with a row a token or position."""
    total = _count_around(model, net.hidden_size, embeddings, extra)
    for layer, times in Counter(layer for layer in net.layers if layer.executed).items():
        total += times * _count_layer(model, net.hidden_size, layer, extra)
    return total


# Cached because searches count the same layers again and again.
@lru_cache(maxsize=4096)
def _count_layer(model: ModelConfig, hidden_size: int, layer: Layer, extra: tuple[Tensor, ...]) -> int:
    return sum(tensor.numel(model, hidden_size, layer) for tensor in of_model(model, "layer", extra))


@lru_cache(maxsize=64)
def _count_around(model: ModelConfig, hidden_size: int, embeddings: bool, extra: tuple[Tensor, ...]) -> int:
    around = [*of_model(model, "before", extra), *of_model(model, "after", extra)]
    return sum(tensor.numel(model, hidden_size) for tensor in around if embeddings or not tensor.embedding)
