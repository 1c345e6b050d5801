"""Start of a stage: check `out`, start the CPU runtime (runtime/cpu.py) or process groups, then run the stage's module.

Imports no torch at the top, because the command line imports this module and has to answer `--help` at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError
from flextron_mcore.runs.inputs import check_inputs
from flextron_mcore.runs.output import claimed
from flextron_mcore.settings.training import StageSettings

# Stages that compute on all ranks of a parallel layout, in a single process, or that start process groups themselves if needed.
_PARALLEL = (
    *("pretrain", "importance", "elastic", "router", "joint", "gumbel"),
    *("sensitivity", "compare", "evaluate", "generate", "export"),
)
_SINGLE = ("latency", "select")
_IMPORTING = ("import", "family", "quickstart")
_WITHOUT_OUT = ("launch", "status", "verify")  # these write nothing to their key `out`


def run_stage(settings: StageSettings) -> dict[str, Any]:
    """Run the stage whose settings are given, and return the content of its metrics.json.

    Raises FlextronError, before anything is written, if `out` is, contains or lies in an input, or another process writes to it.
    """
    writes = bool(settings.out) and settings.stage not in _WITHOUT_OUT
    if writes:
        check_inputs(settings)
    _start(settings)
    # Late: they import rich and tqdm, which `--help` does without.
    from flextron_mcore.runs.terminal import own_warnings
    from flextron_mcore.runs.verification import verify_inputs

    with claimed(Path(settings.out)) if writes else contextlib.nullcontext(), own_warnings():
        verify_inputs(settings)
        # Imported by name, because no room below stages/ may import it.
        name = "import_" if settings.stage == "import" else settings.stage
        return importlib.import_module(f"flextron_mcore.stages.{name}").run(settings)


def _start(settings: StageSettings) -> None:
    """Start what the stage computes with.

    Stages that compute (_PARALLEL, _SINGLE) get torch.distributed and Megatron-Core's process groups, with CUDA or without.
    Stages that only import Megatron-Core or start groups themselves (_IMPORTING) get the CPU runtime (runtime/cpu.py) alone.
    It patches Megatron-Core when there is no CUDA, so it must start before a stage imports Megatron-Core's modules. Other
    stages, such as `report`, need neither; `launch` starts it when its cheap checks have passed. Raises FlextronError if the
    stage cannot run in the parallel layout, or with this number of processes.
    """
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
    """Raise FlextronError if the stage cannot run in the parallel layout, or the number of processes is not the one that is set.

    settings: settings of a stage with the sections `model` and `trainer`.
    """
    if settings.model.context_parallel_size > 1:
        raise FlextronError(
            f"model.context_parallel_size={settings.model.context_parallel_size}: the elastic attention is not "
            "context parallel: leave it at 1"
        )
    if settings.stage == "generate" and settings.model.pipeline_model_parallel_size > 1:
        raise FlextronError("generate: decodes on tensor-parallel ranks only: set model.pipeline_model_parallel_size=1")
    trainer = settings.trainer
    wanted = (trainer.num_nodes or 1) * trainer.devices if trainer.devices else None
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted is None and trainer.num_nodes and world % trainer.num_nodes:
        raise FlextronError(
            f"trainer.num_nodes={trainer.num_nodes} does not divide the {world} process(es) that were started: start torchrun "
            "on each node"
        )
    if wanted is not None and wanted != world:
        raise FlextronError(
            f"trainer.num_nodes x trainer.devices = {wanted}, but {world} process(es) were started: "
            f"use torchrun --nproc-per-node={trainer.devices}"
        )
