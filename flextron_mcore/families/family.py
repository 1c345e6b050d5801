"""A family of Hugging Face models: config keys and tensor names, declared once for import and export. No torch import."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families.keys import ConfigKey, Key
from flextron_mcore.families.tensors import Layer, Placed


@dataclass(frozen=True)
class Mapped:
    """A Megatron-Core tensor in another format: names and shapes of what it is stored as, in the order of its parts.

    counts: how many entries of the factor `parts` of its first side each part has. transposed: it is stored [in, out].
    """

    placed: Placed
    shapes: Mapping[str, tuple[int, ...]]
    counts: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True)
class Names:
    """A format's names for Megatron-Core's tensors, in the order in which it stores them.

    modules: Megatron-Core's module, of a layer without "decoder.layers.N." -> the format's, without ".weight" and ".bias". One
    name holds the whole tensor, its parts joined; several hold one part each (query, key, value; gate, up). layers: the beginning
    of names in a layer, {} for its number. transposed: names whose weights are stored [in, out].
    """

    modules: Mapping[str, str | tuple[str, ...]]
    layers: str
    transposed: tuple[str, ...] = ()

    def map(self, tensors: Iterable[Placed], where: str) -> list[Mapped]:
        """`tensors` in the format. Raises FlextronError, beginning with `where`, for one that no name is declared for."""
        order = list(self.modules)
        found = []
        for placed in tensors:
            parts = re.fullmatch(r"(.*)[._](weight|bias)", placed.tensor.name)
            if parts is None or parts[1] not in self.modules:
                raise FlextronError(f"{where}: no name is declared for the tensor {placed.name}")
            module, kind = parts.groups()
            rank = ("before", "layer", "after").index(placed.tensor.place), placed.number or 0, order.index(module)
            found.append((rank, self._mapped(placed, module, kind)))
        return [mapped for _, mapped in sorted(found, key=lambda pair: pair[0])]

    def _mapped(self, placed: Placed, module: str, kind: str) -> Mapped:
        theirs = self.modules[module]
        theirs = (theirs,) if isinstance(theirs, str) else theirs
        start = "" if placed.number is None else self.layers.format(placed.number)
        rows, *columns = placed.shape
        counts = placed.tensor.sides[0].counts(placed.sizes[0])
        if len(theirs) == 1:
            shapes = [(rows, *columns)]
        else:
            shapes = [(rows // sum(counts) * n, *columns) for n in counts]
        transposed = bool(columns) and theirs[0] in self.transposed
        names = [f"{start}{name}.{kind}" for name in theirs]
        return Mapped(placed, {n: s[::-1] if transposed else s for n, s in zip(names, shapes, strict=False)}, counts, transposed)


@dataclass(frozen=True)
class Family:
    """A family of Hugging Face models: one file of this package each, listed in `families.FAMILIES`.

    name: for messages. architecture, model_type: transformers' class and its name in config.json. classes: what transformers
    calls the family in class names, where exports/hf/code has the subclass whose layers may differ in width; None: it has not.
    needs: values of ModelConfig that the family can have; an import has the first. grouped: True if query heads may share keys
    and values. keys: of config.json, in its order. widths: keys that hold the widths of one layer -> attributes of LayerChoice.
    names: of tensors. prefix: what names begin with, absent in checkpoints of the bare model. ignored: stored tensors that are no
    weights. refusal: (model, hidden size, layer) -> why the class cannot hold layers that all have these widths, None if it can.
    """

    name: str
    architecture: str
    model_type: str
    needs: Mapping[str, tuple[Any, ...]]
    keys: tuple[ConfigKey, ...]
    widths: Mapping[str, str]
    names: Names
    prefix: str
    ignored: re.Pattern[str]
    classes: str | None = None
    grouped: bool = True
    refusal: Callable[[ModelConfig, int, Layer], str | None] = field(default=lambda model, hidden_size, layer: None)

    def model_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """ModelConfig of a config.json. Raises FlextronError for an option that Megatron-Core would compute differently."""
        values: dict[str, Any] = {}
        for key in self.keys:
            found = key.read(config)
            for name in found.keys() & values.keys():  # Megatron-Core has one value where the family has two
                if found[name] != values[name]:
                    both = " with ".join(f"{k.theirs}={config.get(k.theirs, k.default)}" for k in self.keys if _holds(k, name))
                    raise FlextronError(f"{both} is not supported: the two must be equal")
            values |= found
        return ModelConfig(**{name: allowed[0] for name, allowed in self.needs.items()} | values)

    def config(self, model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        """The part of config.json that describes a dense model; source: that which the model was imported from, or {}."""
        written: dict[str, Any] = {}
        for key in self.keys:
            written |= key.write(model, source)
        return written

    def misfits(self, model: ModelConfig) -> list[str]:
        """Requirements that `model` does not meet; empty if the family can represent it."""
        needs = dict(self.needs) | ({} if self.grouped else {"num_query_groups": (model.num_attention_heads,)})
        return [
            f"{key}={'|'.join(map(str, allowed))} (it is {getattr(model, key)})"
            for key, allowed in needs.items()
            if getattr(model, key) not in allowed
        ]


def _holds(key: ConfigKey, name: str) -> bool:
    return isinstance(key, Key) and key.ours == name and not key.kept
