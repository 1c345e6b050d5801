"""Start and stop the process groups, pick the device, seed every generator."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import torch

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime import cpu


def initialize(parallel: Mapping[str, Any] | None = None, seed: int = 1234) -> None:
    """Start torch.distributed and Megatron-Core's process groups for this process.

    parallel: NeMo's names tensor_model_parallel_size, pipeline_model_parallel_size,
    virtual_pipeline_model_parallel_size, context_parallel_size. Without torchrun it is a world of one process.
    Raises FlextronError when the number of processes does not fit the layout.
    """
    cpu.enable()
    from megatron.core import parallel_state, tensor_parallel

    parallel = parallel or {}
    tensor = int(parallel.get("tensor_model_parallel_size") or 1)
    pipeline = int(parallel.get("pipeline_model_parallel_size") or 1)
    context = int(parallel.get("context_parallel_size") or 1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % (tensor * pipeline * context):
        raise FlextronError(
            f"{world} process(es) cannot hold model.tensor_model_parallel_size={tensor} x "
            f"model.pipeline_model_parallel_size={pipeline} x model.context_parallel_size={context}: "
            f"start a multiple of {tensor * pipeline * context} with torchrun --nproc-per-node"
        )
    if not torch.distributed.is_initialized():
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        os.environ.setdefault("LOCAL_RANK", "0")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in os.environ:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                os.environ["MASTER_PORT"] = str(free.getsockname()[1])
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor, pipeline, parallel.get("virtual_pipeline_model_parallel_size"), context_parallel_size=context
        )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown() -> None:
    """Tear the process groups down; safe to call when nothing was started."""
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
