"""Keys of Hugging Face files that name Python code, which transformers runs with trust_remote_code=True."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")


def without_code(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy of a Hugging Face configuration without the keys in CODE_KEYS."""
    return {key: value for key, value in values.items() if key not in CODE_KEYS}
