"""Families of models: what is true of each, declared once for import, export, counting and cutting. No torch import.

A family is a file here that ends in a `Family`, listed in FAMILIES; tensors.py has the tensors that all of them have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families import gpt2, llama
from flextron_mcore.families.family import Family

FAMILIES = [llama.FAMILY, gpt2.FAMILY]


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its first architecture, or by its model type if it names none. Raises FlextronError."""
    if config.get("quantization_config"):
        raise FlextronError("quantized models are not supported: import the original")
    if family := _named(config):
        return family
    architectures, model_type = config.get("architectures"), config.get("model_type")
    shown = (
        f"architecture {', '.join(map(str, architectures))}" if isinstance(architectures, list) else f"model_type {model_type!r}"
    )
    raise FlextronError(f"{shown} is not supported: only {', '.join(family.architecture for family in FAMILIES)}")


def family_of_model(model: ModelConfig, source: Mapping[str, Any] | None) -> Family:
    """The family that `model` can be written as: the one of `source`, the config.json that it was imported from, if it fits.

    Raises FlextronError for a model of no family.
    """
    named = _named(source or {})
    known = sorted(FAMILIES, key=lambda family: family is not named)
    complaints = []
    for family in known:
        misfits = family.misfits(model)
        if not misfits:
            return family
        complaints.append((len(misfits), f"{family.name} needs {', '.join(misfits)}"))
    nearest_first = "; ".join(text for _, text in sorted(complaints))
    raise FlextronError(f"format=hf: this model is of no family that it can write: {nearest_first}")


def _named(config: Mapping[str, Any]) -> Family | None:
    architectures, model_type = config.get("architectures"), config.get("model_type")
    for family in FAMILIES:
        if family.architecture in architectures if isinstance(architectures, list) else family.model_type == model_type:
            return family
    return None
