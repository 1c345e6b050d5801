"""Start and stop the process groups, pick the device, seed every generator."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime import cpu, signals, watch
from flextron_mcore.runtime.memory import collect_again
from flextron_mcore.settings.sections import LayoutSettings

# How long ranks wait for each other. Not a way to find dead ones, which the watch does sooner: one rank may work alone for long.
TIMEOUT = timedelta(minutes=30)


def initialize(parallel: LayoutSettings | None = None, seed: int = 1234) -> None:
    """Start torch.distributed and Megatron-Core's process groups for this process.

    parallel: the tensor, pipeline and virtual pipeline sizes count. May be called again for another layout after Megatron-Core's
    destroy_model_parallel. Without a launcher it is a world of one process.
    Raises FlextronError when the number of processes does not fit the layout or the GPUs, or the launcher tells too little.
    """
    cpu.enable()
    from megatron.core import parallel_state, tensor_parallel

    parallel = parallel or LayoutSettings()
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % (tensor * pipeline):
        raise FlextronError(
            f"{world} process(es) cannot hold model.tensor_model_parallel_size={tensor} x "
            f"model.pipeline_model_parallel_size={pipeline}: "
            f"start a multiple of {tensor * pipeline} with torchrun --nproc-per-node"
        )
    if not torch.distributed.is_initialized():
        if world > 1 and (missing := [name for name in watch.LAUNCH if name not in os.environ]):
            raise FlextronError(
                f"WORLD_SIZE={world}, but {', '.join(missing)} is not set in the environment: start the processes with torchrun, "
                "or set them for each process"
            )
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
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= gpus:
                raise FlextronError(
                    f"process {local} of this node (LOCAL_RANK) sees {gpus} GPU(s): start as many processes a node as it has "
                    "GPUs, and let each see all of them"
                )
            torch.cuda.set_device(local)
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor,
            pipeline,
            parallel.virtual_pipeline_model_parallel_size,
            distributed_timeout_minutes=TIMEOUT.seconds // 60,
        )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    collect_again()


def shutdown() -> None:
    """Tear the process groups down; safe to call when nothing was started."""
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def stop_agreed() -> int:
    """Largest reason to stop that any rank received (`signals.received`); 0 if none did. Call on all ranks."""
    number = torch.tensor([signals.received()], dtype=torch.int32, device=device())
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    watch.all_train()
    return int(number)


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
