"""Elastic large language models on Megatron-Core: many sub-networks in one trained model.

`__all__` lists the public API. Importing the package imports neither torch nor Megatron-Core; they are imported when a name that
needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flextron_mcore.api import export, initialize, select
    from flextron_mcore.choosing import use_subnetwork
    from flextron_mcore.config import FlextronError, ModelConfig
    from flextron_mcore.model import build_model
    from flextron_mcore.space import ElasticSpace, SubNetwork

__version__ = "0.1.0"
__all__ = [
    "ElasticSpace",
    "FlextronError",
    "ModelConfig",
    "SubNetwork",
    "build_model",
    "export",
    "initialize",
    "select",
    "use_subnetwork",
]
_LIGHT = {"FlextronError": "config", "ModelConfig": "config", "ElasticSpace": "space", "SubNetwork": "space"}
_HEAVY = {"build_model": "model", "use_subnetwork": "choosing", "export": "api", "initialize": "api", "select": "api"}


def __getattr__(name: str) -> Any:
    if name in _HEAVY:
        # The CPU runtime must be enabled before Megatron-Core is imported.
        importlib.import_module("flextron_mcore.runtime.cpu").enable()
    elif name not in _LIGHT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{(_LIGHT | _HEAVY)[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
