"""What differs between the supported versions of Megatron-Core (0.16.1 to 0.19), and of Python in what they write."""

from __future__ import annotations

import inspect
import pathlib
import sys
from typing import Any

from megatron.core import dist_checkpointing


def know_paths() -> None:
    """Let this Python read checkpoints that 3.13 wrote: torch pickles paths into .metadata, whose module has a new name there."""
    sys.modules.setdefault("pathlib._local", pathlib)


def save_options() -> dict[str, Any]:
    """Arguments for dist_checkpointing.save.

    In 0.19 the background writer is by default that of a package of its own (nvidia-resiliency-ext); Megatron-Core's writer, the
    only one before, is still there.
    """
    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}
