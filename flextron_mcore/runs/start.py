"""Start of a command: the runtime and the process groups first, then the stage's module.

Imports no torch, because the command line imports this and has to answer `--help` at once.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from flextron_mcore.config import FlextronError
from flextron_mcore.settings.training import StageSettings

# Stages that compute at a parallel layout, and those of one process. IMPORTING ones start process groups, if at all, themselves.
_PARALLEL = (
    *("pretrain", "importance", "elastic", "router", "joint", "gumbel"),
    *("sensitivity", "compare", "evaluate", "generate", "export"),
)
_SINGLE = ("latency", "select")
_IMPORTING = ("import", "launch", "family", "quickstart")


def run_stage(settings: StageSettings) -> dict[str, Any]:
    """Run the stage that `settings` are of; its figures."""
    _start(settings)
    # A stage is found by its name, so that nothing below the commands imports them.
    return importlib.import_module(f"flextron_mcore.stages.{'import_' if settings.stage == 'import' else settings.stage}").run(
        settings
    )


def _start(settings: StageSettings) -> None:
    """Start what the stage needs. On a CPU the runtime must precede Megatron-Core's modules, which stages import."""
    if settings.stage not in (*_PARALLEL, *_SINGLE, *_IMPORTING):
        return
    # Late: torch takes a second to import.
    from flextron_mcore.runtime import cpu, distributed

    if settings.stage in _PARALLEL:
        check_processes(settings)
        distributed.initialize(settings.model, settings.seed)
    elif settings.stage in _SINGLE:
        distributed.initialize(seed=settings.seed)
    else:
        cpu.enable()


def check_processes(settings: StageSettings) -> None:
    """Raise FlextronError where the processes that were started and the layout of `settings` do not fit."""
    if settings.model.context_parallel_size > 1:
        raise FlextronError(
            f"model.context_parallel_size={settings.model.context_parallel_size}: the elastic attention is not "
            "context parallel: leave it at 1"
        )
    if settings.stage == "generate" and settings.model.pipeline_model_parallel_size > 1:
        raise FlextronError("generate: decodes on tensor-parallel ranks only: model.pipeline_model_parallel_size=1")
    trainer = settings.trainer
    wanted = (trainer.num_nodes or 1) * trainer.devices if trainer.devices else None
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted is not None and wanted != world:
        raise FlextronError(
            f"trainer.num_nodes x trainer.devices = {wanted}, but {world} process(es) were started: "
            f"use torchrun --nproc-per-node={trainer.devices}"
        )
