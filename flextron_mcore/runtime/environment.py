"""The process environment that must be set before torch is imported. Imports the standard library only."""

from __future__ import annotations

import logging
import os
import warnings


def prepare_environment() -> None:
    """Set what must be set before torch is imported; call first of all."""
    # Threads that spin while they wait for each other are ten times slower when another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Megatron-Core reports every optional package it does not find; transformers every file it loads.
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\.")
    for name in ("megatron", "transformers", "torch.distributed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what it warns of when ranks end one after another
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
