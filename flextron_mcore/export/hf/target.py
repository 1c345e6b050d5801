"""What a family of Hugging Face models must say to be an export target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flextron_mcore.config import ModelConfig
from flextron_mcore.space import LayerChoice, SubNetwork


@dataclass(frozen=True)
class Part:
    """One Megatron-Core tensor as Hugging Face tensors: `shapes` by name, which `split` gives in that order."""

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    split: Callable[[torch.Tensor], Sequence[torch.Tensor]] = lambda tensor: (tensor,)


@dataclass(frozen=True)
class Target:
    """A family that sub-networks can be exported as: one file of this package each, listed in `hf.TARGETS`.

    name: for messages. stock: the class of transformers; `code/` has its subclass whose layers may differ in width, `elastic`.
    classes, model_type: what names of its classes, and of its files, begin and end with.
    misfits: what a model must have and has not, empty if the family can represent it.
    not_stock: why the stock class cannot hold a sub-network, None if it can.
    config: (dense model, config.json that the model was imported from or {}) -> config.json of the stock class.
    widths: the keys of config.json that hold the widths of one layer.
    parts: (full model, layers kept, hidden size) -> all tensors, in the order of the network.
    """

    name: str
    stock: str
    classes: str
    model_type: str
    misfits: Callable[[ModelConfig], list[str]]
    not_stock: Callable[[ModelConfig, SubNetwork], str | None]
    config: Callable[[ModelConfig, Mapping[str, Any]], dict[str, Any]]
    widths: Callable[[LayerChoice], dict[str, int]]
    parts: Callable[[ModelConfig, Sequence[LayerChoice], int], Iterator[Part]]

    @property
    def elastic(self) -> str:
        """The class in `code/`."""
        return f"Flextron{self.stock}"

    @property
    def code_files(self) -> tuple[str, str]:
        """The files of `code/` that an export of `elastic` carries, without `.py`: configuration and model."""
        return f"configuration_flextron_{self.model_type}", f"modeling_flextron_{self.model_type}"


def misfit(model: ModelConfig, key: str, *wanted: Any) -> list[str]:
    """The complaint that `model.key` is none of `wanted`, as a list of one or none."""
    found = getattr(model, key)
    return [] if found in wanted else [f"{key}={'|'.join(map(str, wanted))} (it is {found})"]
