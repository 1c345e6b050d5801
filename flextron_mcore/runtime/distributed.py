"""Start and end of torch.distributed and Megatron-Core's process groups; device of this process; agreements to stop training."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime import cpu, signals, watch
from flextron_mcore.runtime.memory import collect_again
from flextron_mcore.settings.sections import LayoutSettings

# Timeout of collectives, long because one rank may work alone for minutes. runtime/watch.py finds dead ranks much sooner.
TIMEOUT = timedelta(minutes=30)


def initialize(parallel: LayoutSettings | None = None, seed: int = 1234) -> None:
    """Start torch.distributed and Megatron-Core's process groups, and seed the random number generators.

    Without a launcher such as torchrun, this process is the only rank. May be called again with another layout after
    Megatron-Core's destroy_model_parallel.

    Args:
        parallel: tensor, pipeline and virtual pipeline sizes; None: 1 each.
        seed: seed of torch and of Megatron-Core's tensor-parallel random states.

    Raises:
        FlextronError: the number of processes does not fit the layout or the GPUs, or the launcher's environment variables are
            incomplete.
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
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if torch.cuda.is_available():
            local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= gpus:
                raise FlextronError(
                    f"process {local} of this node (LOCAL_RANK) sees {gpus} GPU(s): start as many processes a node as it has "
                    "GPUs, and let each see all of them"
                )
            torch.cuda.set_device(local)
        # A single process needs no fixed port, and on the CPU no server thread either.
        alone: dict[str, Any] = {}
        if world == 1:
            gpu = torch.cuda.is_available()
            store = torch.distributed.TCPStore("127.0.0.1", 0, 1, True) if gpu else torch.distributed.HashStore()
            alone = {"store": store, "rank": 0, "world_size": 1}
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT, **alone)
    if not parallel_state.model_parallel_is_initialized():
        with cpu.shared_groups():
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
    """Destroy all process groups of torch.distributed and Megatron-Core, whoever started them. Without any, do nothing."""
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def stop_agreed(save: bool = False, needed: float = 0.0) -> tuple[int, bool]:
    """(reason to stop training, True to save a checkpoint), equal on all ranks. Collective: call on every rank.

    The reason is the largest `signals.received` of all ranks, 0 for none.

    Args:
        save: True if this rank wants a checkpoint; the result is True if any rank does.
        needed: seconds that this rank needs for another step and for saving it.
    """
    number = torch.tensor([signals.received(needed), save], dtype=torch.int32, device=device())
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    watch.all_train()
    stop, agreed = number.tolist()
    return stop, bool(agreed)


class Drop:
    """Decision to drop the rest of a step after SIGTERM. Construct, call and ask it on all ranks.

    Tensor-parallel ranks decide together, because their layers wait for each other.

    Attributes:
        dropped: True once this rank has dropped something.
    """

    def __init__(self) -> None:
        from megatron.core import parallel_state

        self.dropped = False
        self.ranks = parallel_state.get_tensor_model_parallel_world_size()
        self.group = parallel_state.get_tensor_model_parallel_group()
        if self.ranks > 1 and torch.cuda.is_available():  # asking the GPU's own group would wait for the GPU
            self.group, _ = torch.distributed.new_subgroups(self.ranks, backend="gloo")

    def __call__(self) -> bool:
        """True if the rest of the step is to be dropped, equal on tensor-parallel ranks. Collective for them."""
        if not self.dropped:
            self.dropped = signals.urgent()
            if self.ranks > 1:
                wanted = torch.tensor(self.dropped, dtype=torch.int32, device="cpu")
                torch.distributed.all_reduce(wanted, op=torch.distributed.ReduceOp.MAX, group=self.group)
                self.dropped = bool(wanted)
        return self.dropped

    def agreed(self) -> bool:
        """True if any rank has dropped something, so that the step is void. Collective: call on every rank."""
        found = torch.tensor(self.dropped, dtype=torch.int32, device=device())
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        return bool(found)


def device() -> torch.device:
    """Device of this process: its current GPU, or the CPU without CUDA."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
