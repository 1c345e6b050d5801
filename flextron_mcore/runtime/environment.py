"""Environment variables and warning filters that must be set before torch is imported. Imports the standard library only."""

from __future__ import annotations

import logging
import os
import warnings


def prepare_environment() -> None:
    """Set defaults of environment variables and silence warnings of libraries. Call before torch is imported."""
    # OpenMP threads that spin while they wait run ten times slower when another process needs a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Megatron-Core reports every optional package it does not find; transformers every file it loads.
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\.")
    for name in ("megatron", "transformers", "torch.distributed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A process that writes a part of a checkpoint logs its error; the error is raised in the training, too.
    logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d warns when ranks end one after another
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of transformers too, which draws one for each model it loads
