"""Families of Hugging Face models: config keys and tensor names, declared once for import and export. No torch import.

Each family has a file in this package that defines FAMILY, an instance of `Family`; FAMILIES lists them. tensors.py declares the
tensors of all families under Megatron-Core's names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families import gpt2, llama, ministral, mistral, nemotron, phi3, qwen2, qwen3, smollm3
from flextron_mcore.families.family import Family
from flextron_mcore.families.unsupported import lacking

FAMILIES = [
    *(llama.FAMILY, mistral.FAMILY, ministral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, smollm3.FAMILY, phi3.FAMILY),
    *(nemotron.FAMILY, gpt2.FAMILY),
]


def family_of_config(config: Mapping[str, Any]) -> Family:
    """Family of a config.json, found by `architectures`, or by `model_type` if `architectures` is absent or empty.

    Raises FlextronError for a quantized model, for an unsupported architecture, and if the two keys name different families.
    """
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if family := _named(config):
        if config.get("quantization_config"):
            raise FlextronError("quantized models are not supported: import the original model")
        if model_type not in (None, family.model_type):
            raise FlextronError(
                f"architectures {json.dumps(architectures)} and model_type {json.dumps(model_type)} name different models: "
                "download config.json again"
            )
        return family
    shown = (
        f"architecture {', '.join(name if isinstance(name, str) else json.dumps(name) for name in architectures)}"
        if architectures and isinstance(architectures, list)
        else f"model_type {json.dumps(model_type)}"
    )
    reason = f": it has {found}" if (found := lacking(config)) else ""
    raise FlextronError(f"{shown} is not supported{reason}: only {', '.join(family.architecture for family in FAMILIES)}")


def family_of_model(model: ModelConfig, source: Mapping[str, Any] | None) -> Family:
    """Family that a model can be exported as, preferably that of `source`, the config.json that it was imported from.

    Raises FlextronError if no family can represent the model.
    """
    named = _named(source or {})
    known = sorted(FAMILIES, key=lambda family: family is not named)
    complaints = []
    for family in known:
        misfits = family.misfits(model)
        if not misfits:
            return family
        complaints.append((len(misfits), f"{family.name} needs {', '.join(misfits)}"))
    nearest_first = "; ".join(text for _, text in sorted(complaints)[:3])
    raise FlextronError(f"format=hf: no supported family can represent this model: {nearest_first}: use format=megatron")


def coded_family(model: ModelConfig, family: Family) -> Family | None:
    """Family whose modelling code exports a model with different widths in its layers.

    Returns `family` if it has such code and can represent the model, else another family that can, else None.
    """
    known = sorted(FAMILIES, key=lambda other: other is not family)
    return next((other for other in known if other.classes and not other.misfits(model)), None)


def _named(config: Mapping[str, Any]) -> Family | None:
    """Family that a config.json names, by `architectures` if this lists any, else by `model_type`; None for an unknown one."""
    architectures, model_type = config.get("architectures"), config.get("model_type")
    names = bool(architectures) and isinstance(architectures, list)
    for family in FAMILIES:
        if family.architecture in architectures if names else family.model_type == model_type:
            return family
    return None
