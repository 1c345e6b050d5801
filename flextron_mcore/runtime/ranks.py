"""Collective operations over all ranks of torch.distributed. All functions also work in a single process without groups."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from flextron_mcore.config import FlextronError

T = TypeVar("T")


def _has_groups() -> bool:
    """True if this process has process groups. Without torch imported it has none, and need not wait for the import."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def place() -> tuple[int, int]:
    """(rank of this process, number of processes); (0, 1) without process groups."""
    if not _has_groups():
        return 0, 1
    import torch

    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def is_main_process() -> bool:
    """True on rank 0, which writes and prints. Before process groups exist, the launcher's environment variable RANK decides."""
    if _has_groups():
        return place()[0] == 0
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Wait until every rank has called this function."""
    if _has_groups():
        import torch

        torch.distributed.barrier()


def on_main_process(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result, or raise its FlextronError, on every rank. Collective: call on all ranks.

    Use for decisions that depend on the disk, because two ranks may see different states of it. The result must be picklable.
    """
    rank, ranks = place()
    outcome: list = [None, None]
    if rank == 0:
        try:
            outcome[0] = action()
        except FlextronError as error:
            outcome[1] = error
    if ranks > 1:
        import torch

        torch.distributed.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def drive(action: Callable[[Callable[[Any], Any]], T], serve: Callable[[Any], Any]) -> T:
    """Run `action(ask)` on rank 0, whose calls `ask(question)` run `serve(question)` on all ranks. Collective: call on all ranks.

    Use for a library that knows nothing of ranks, but calls a function that all of them compute together. `ask` returns what
    `serve` returns on rank 0. Every rank returns the result of `action`, or raises its FlextronError. Questions and the result
    must be picklable.
    """
    rank, ranks = place()

    def send(message: Any = None) -> Any:
        box = [message]
        if ranks > 1:
            import torch

            torch.distributed.broadcast_object_list(box, 0)
        return box[0]

    def ask(question: Any) -> Any:
        send(("ask", question))
        return serve(question)

    if rank == 0:
        try:
            outcome = "result", action(ask)
        except FlextronError as error:
            outcome = "error", error
        send(outcome)
    else:
        while (outcome := send())[0] == "ask":
            with contextlib.suppress(FlextronError):  # rank 0 has it, too, and sends it when `action` has ended
                serve(outcome[1])
    if outcome[0] == "error":
        raise outcome[1]
    return outcome[1]


def gather(value: T) -> list[T]:
    """List of the values of all ranks, by rank, on every rank. Collective: call on all ranks. Values must be picklable."""
    ranks = place()[1]
    found = [value] * ranks
    if ranks > 1:
        import torch

        torch.distributed.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def processes_on_cpu() -> Iterator[None]:
    """Start a gloo process group for the block, for work without a GPU. No effect for one process or if a group exists."""
    import torch

    if torch.distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
