"""What differs between the supported versions of Megatron-Core (0.16.1 to 0.19)."""

from __future__ import annotations

import inspect
from typing import Any

from megatron.core import dist_checkpointing


def save_options() -> dict[str, Any]:
    """Arguments for dist_checkpointing.save.

    In 0.19 the background writer is by default that of a package of its own (nvidia-resiliency-ext); Megatron-Core's writer, the
    only one before, is still there.
    """
    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}
