"""Common work of a run's processes, whatever the layout. One process, with or without process groups, does it alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from flextron_mcore.config import FlextronError

T = TypeVar("T")


def place() -> tuple[int, int]:
    """(number of this process, how many there are); without process groups (0, 1)."""
    import torch

    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def is_main_process() -> bool:
    """True on the process that writes and prints; works before there are process groups."""
    import torch

    if torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Let every rank reach this point."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def on_main_process(action: Callable[[], T]) -> T:
    """Run `action` on the main process and return its result on every rank; a FlextronError is raised on every rank too.

    For decisions that must be the same everywhere: ranks that look at the disk one after another may see different things.
    """
    import torch

    rank, ranks = place()
    outcome: list = [None, None]
    if rank == 0:
        try:
            outcome[0] = action()
        except FlextronError as error:
            outcome[1] = error
    if ranks > 1:
        torch.distributed.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextlib.contextmanager
def processes_on_cpu() -> Iterator[None]:
    """Process groups for work that no GPU does, if torchrun started several processes and they have none yet."""
    import torch

    if torch.distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
