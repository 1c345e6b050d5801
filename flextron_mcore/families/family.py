"""Declaration of a family of Hugging Face models: config keys and tensor names, for import and export. No torch import."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families.keys import ConfigKey, Key, Rope
from flextron_mcore.families.strictness import ReadKeys, refuse_unread
from flextron_mcore.families.tensors import Layer, Placed

# {field of ModelConfig: value in a family without this feature}
FEATURES = {
    "bias": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "rotary_percent": 1.0,
    "no_rope_freq": None,
    "sliding_window": None,
    "window_attn_skip_freq": None,
}


def any_width(model: ModelConfig, hidden_size: int, layer: Layer) -> None:
    """Return None: the `Family.refusal` of transformers classes that accept any number of heads and neurons, equal in all layers.

    Args:
        model: architecture of the full model.
        hidden_size: channels of the sub-network.
        layer: widths of every layer of the sub-network.
    """


@dataclass(frozen=True)
class Mapped:
    """One Megatron-Core tensor, and the tensors of another format that hold its values.

    Attributes:
        placed: Megatron-Core's tensor in a dense model.
        shapes: {name in the other format: shape}; one entry, or one for each part (query, key, value; gate and up projection).
        counts: relative sizes of the parts along the first dimension: (query heads of a KV group, 1, 1) for query, key and value,
            (1, 1) for gate and up projection, (1,) for a tensor without parts.
        transposed: True if the other format stores the weight as [in, out].
    """

    placed: Placed
    shapes: Mapping[str, tuple[int, ...]]
    counts: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True)
class Names:
    """Table from Megatron-Core's module names to the names in another format, such as Hugging Face's, in that format's order.

    Attributes:
        modules: {Megatron-Core's module: module of the format}, without "decoder.layers.N.", ".weight" and ".bias". A single name
            holds the whole tensor; each name of a tuple holds one part: query, key and value, or gate and up projection.
        layers: the format's prefix of names in a layer, with {} for the layer's index.
        transposed: modules of the format whose weights are stored as [in, out].
    """

    modules: Mapping[str, str | tuple[str, ...]]
    layers: str
    transposed: tuple[str, ...] = ()

    def map(self, tensors: Iterable[Placed], where: str) -> list[Mapped]:
        """Names and shapes of tensors in the format: those before the layers, of each layer, and after the layers.

        Within each of these parts they have the order of `modules`.

        Raises FlextronError, whose message begins with `where`, for a tensor whose module is not in `modules`.
        """
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
        """Names and shapes of one tensor in the format. module, kind: Megatron-Core's module name, and weight or bias."""
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
    """Description of one family of Hugging Face models: config keys, tensor names and limits of its transformers class.

    Attributes:
        name: name of the family in messages.
        architecture: class of transformers, such as LlamaForCausalLM.
        model_type: `model_type` in config.json.
        needs: {field of ModelConfig: values that the family supports}. An import sets a field that no key sets to the first of
            them. A field of FEATURES that is not in `needs` and that no key sets has the value in FEATURES.
        keys: keys of config.json, in the order in which an export writes them.
        widths: {key of config.json: attribute of LayerChoice}, for keys that hold widths of a layer.
        names: table of tensor names.
        prefix: prefix of all names in the base model; checkpoints of the base model without its head lack it.
        ignored: pattern of names of stored tensors that are no weights, such as buffers.
        classes: prefix of the family's class names in transformers, such as Llama; None: the package has no modelling code for
            this family with a different width in each layer, and exports use another family that can represent the model.
        code: class prefix of the family whose files in exports/*/code are written, with names replaced; empty: `classes`.
        grouped: True if several query heads can share a key and value head (grouped-query attention).
        harmless: keys of config.json, beside strictness.HARMLESS, that cannot change the output and that an import ignores.
        refusal: function (model, hidden size, layer) that returns the reason why the transformers class cannot have these widths
            in all its layers, or None if it can.
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
    code: str = ""
    grouped: bool = True
    harmless: frozenset[str] = frozenset()
    refusal: Callable[[ModelConfig, int, Layer], str | None] = any_width

    def model_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """ModelConfig of the model that a config.json describes.

        Raises FlextronError for an option that Megatron-Core would compute differently, and for a key that is neither read nor
        known to have no effect on the output.
        """
        values: dict[str, Any] = {}
        seen = ReadKeys(config)
        for key in self.keys:
            found = key.read(seen)
            for name in found.keys() & values.keys():  # two keys of config.json for one field of ModelConfig
                if found[name] != values[name]:
                    both = " with ".join(f"{k.theirs}={config.get(k.theirs, k.default)}" for k in self.keys if _holds(k, name))
                    raise FlextronError(f"{both} is not supported: the two must be equal")
            values |= found
        refuse_unread(seen, self.harmless, self.architecture)
        return ModelConfig(**{name: allowed[0] for name, allowed in self.needs.items()} | values)

    def config(self, model: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        """Content of config.json, the keys of the family only. source: config.json that the model was imported from, or {}."""
        written: dict[str, Any] = {}
        for key in self.keys:
            written |= key.write(model, source)
        return written

    @property
    def zero_centered(self) -> bool:
        """True if checkpoints store norm scales minus 1, like Megatron-Core with layernorm_zero_centered_gamma (layernorm1p)."""
        return self.needs["normalization"] == ("layernorm1p",)

    def renamed(self, text: str) -> str:
        """Text of a file in exports/*/code, after replacement of the name of the code's family by this family's name."""
        word = self.code or self.classes
        return text.replace(word, self.classes).replace(word.lower(), self.model_type)

    def code_file(self, name: str) -> str:
        """Path in exports/*/code of the file that an export calls `name`, such as modeling_flextron_mistral."""
        return name.replace(self.model_type, (self.code or self.classes).lower())

    def misfits(self, model: ModelConfig) -> list[str]:
        """Requirements of the family that a model does not meet, as texts for messages; [] if the family can represent it."""
        held = {key.ours for key in self.keys if isinstance(key, Key)} | {
            n for key in self.keys for n in getattr(key, "holds", ())
        }
        needs = {name: (default,) for name, default in FEATURES.items() if name not in held} | dict(self.needs)
        needs |= {} if self.grouped else {"num_query_groups": (model.num_attention_heads,)}
        kinds = next((key.kinds for key in self.keys if isinstance(key, Rope)), None)
        scaling = (model.rope_scaling or {}).get("type")
        refused = kinds is not None and scaling is not None and scaling not in kinds
        return ([f"rope_scaling of type {'|'.join(kinds) or 'default'} (it is {scaling})"] if refused else []) + [
            f"{key}={'|'.join(map(_shown, allowed))} (it is {_shown(getattr(model, key))})"
            for key, allowed in needs.items()
            if getattr(model, key) not in allowed
        ]


def _shown(value: Any) -> str:
    """Text of a field of ModelConfig for a message: true, false and null as in config.json."""
    return str(value) if isinstance(value, str) else json.dumps(value)


def _holds(key: ConfigKey, name: str) -> bool:
    """True if an import sets the field `name` of ModelConfig from the key."""
    return isinstance(key, Key) and key.ours == name and not key.kept
