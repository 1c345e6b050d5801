"""Writing a checkpoint a few tensors at a time, on any number of ranks, without a model in memory."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from flextron_mcore import digests
from flextron_mcore.checkpoint.sharding import dealt_axis, to_disk_order
from flextron_mcore.checkpoint.store import CheckpointInfo, write_info
from flextron_mcore.config import FlextronError
from flextron_mcore.runtime.disk import check_space, forget
from flextron_mcore.runtime.ranks import gather, place, wait_for_all

_THREADS = 2  # that write files; one more computes tensors


@dataclass(frozen=True)
class LazyTensor:
    """Tensor that is computed when it is written.

    A checkpoint stores heads and neurons dealt into buckets, unit i into bucket i mod space.granularity (checkpoint/sharding.py).

    Attributes:
        shape, dtype: shape and dtype of the whole tensor.
        load: function () that returns the tensor, computed on the CPU.
        buckets: number of buckets that `load` has dealt the heads or neurons into; 1: not dealt, heads and neurons in order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    buckets: int = 1


def write_streaming(
    directory: Path,
    info: CheckpointInfo,
    tensors: Mapping[str, LazyTensor],
    progress: Callable[[int], None] | None = None,
    common: Mapping[str, Any] | None = None,
    elsewhere: bool = False,
) -> None:
    """Write a model's checkpoint, two tensors at a time, while a thread computes the next ones.

    The result has the keys, shapes and order of Megatron-Core's own save of the model, and loads in any layout. Call on all ranks
    with the same arguments: each computes and writes a share of the tensors. Raises FlextronError if the disk has too little
    space, and for a tensor whose shape or dtype is not the one that its LazyTensor has.

    Args:
        directory: empty directory to write into.
        info: description of the checkpoint.
        tensors: {name: tensor} with heads and neurons in order. They are dealt into info.space.granularity buckets when they are
            written (checkpoint/sharding.py), unless `LazyTensor.buckets` says that they already are.
        progress: function (bytes) called for each tensor that this rank writes. Bytes are scaled, so that one rank's calls add up
            to all bytes. None: none.
        common: plain values that Megatron-Core stores beside the tensors (common.pt).
        elsewhere: True if no stage on this machine will read the checkpoint soon: its files are dropped from the page cache.
    """

    def dealt(key: str, lazy: LazyTensor) -> LazyTensor:
        order = dealt_axis(info.model, info.space, key)
        if order is None or order[2] == lazy.buckets:
            return lazy
        return replace(lazy, load=lambda: to_disk_order(_checked(key, lazy), *order))

    write_torch_dist(directory, {key: dealt(key, lazy) for key, lazy in tensors.items()}, progress, common, elsewhere)
    if place()[0] == 0:
        write_info(directory, info)
    wait_for_all()


def write_torch_dist(
    directory: Path,
    tensors: Mapping[str, LazyTensor],
    progress: Callable[[int], None] | None = None,
    common: Mapping[str, Any] | None = None,
    elsewhere: bool = False,
) -> None:
    """Write tensors in Megatron-Core's torch_dist format: heads and neurons as `load` returns them, and no flextron.json.

    Call on all ranks with the same arguments. Raises FlextronError if the disk has too little space, and for a tensor whose shape
    or dtype is not the one that its LazyTensor has.

    Args:
        directory: empty directory to write into.
        tensors: {name: tensor}.
        progress: function (bytes) called for each tensor that this rank writes. Bytes are scaled, so that one rank's calls add up
            to all bytes. None: none.
        common: plain values that Megatron-Core stores beside the tensors (common.pt).
        elsewhere: True if no stage on this machine will read the files soon: they are dropped from the page cache.
    """
    rank, ranks = place()
    sizes = {key: t.dtype.itemsize * torch.Size(t.shape).numel() for key, t in tensors.items()}
    need = sum(sizes.values())
    check_space(directory, need)
    mine = share_out(sizes, ranks)[rank]
    state: dict[str, Any] = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors.items() if key in mine}
    for key in tensors if rank == 0 else ():
        if key.endswith((".linear_qkv.weight", ".linear_proj.weight", ".linear_fc1.weight", ".linear_fc2.weight")):
            # Megatron-Core's linear layers have an empty extra state, and loading fails without it.
            extra = ShardedObject(key.removesuffix("weight") + "_extra_state", None, (1,), (0,))
            payload = io.BytesIO()
            torch.save([None], payload)
            state[extra.unique_key] = payload
    share = sum(sizes[key] for key in mine)
    planner = _StreamingPlanner(tensors, progress and (lambda size: progress(size * need // share)))
    with planner.ahead, _without_crc():
        dcp.save(state, storage_writer=_Writer(directory, elsewhere), planner=planner, no_dist=ranks == 1)
    if rank == 0:
        torch.save(dict(common or {}), directory / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))
        canonical_metadata(directory)
    for others in gather(digests.remembered()):
        digests.learn(others)
    wait_for_all()


def canonical_metadata(directory: Path) -> None:
    """Write .metadata of a finished save again, with sorted entries and without the random id that torch gives each save.

    Equal checkpoints then have equal files, and equal digests. directory: the checkpoint. Call on the main process.
    """
    found: Any = dcp.FileSystemReader(directory).read_metadata()
    found.storage_meta = None
    for name in ("state_dict_metadata", "storage_data", "planner_data"):
        if isinstance(part := getattr(found, name), dict):
            setattr(found, name, dict(sorted(part.items(), key=lambda entry: repr(entry[0]))))
    # pickle writes a reference for an object that it has written before. Whether equal values are one object depends on how they
    # were made, so the first pickle has no references; the second one has them again for classes, which saves space.
    unshared = io.BytesIO()
    pickler = pickle.Pickler(unshared)
    pickler.fast = True
    pickler.dump(found)
    (directory / ".metadata").write_bytes(pickle.dumps(pickle.loads(unshared.getvalue())))


def _checked(key: str, lazy: LazyTensor) -> torch.Tensor:
    """Compute a tensor. Raises FlextronError if its shape or dtype is not the one that its LazyTensor has."""
    tensor = lazy.load()
    if tuple(tensor.shape) != tuple(lazy.shape) or tensor.dtype != lazy.dtype:
        raise FlextronError(f"tensor {key}: {tuple(tensor.shape)} {tensor.dtype} instead of {tuple(lazy.shape)} {lazy.dtype}")
    return tensor


def share_out(sizes: Mapping[str, int], ranks: int) -> list[set[str]]:
    """Divide tensors among ranks so that sums of bytes are about equal, the largest first: a set of names for each rank.

    sizes: {name: bytes}.
    """
    shares: list[set[str]] = [set() for _ in range(ranks)]
    loads = [0] * ranks
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        rank = loads.index(min(loads))
        shares[rank].add(name)
        loads[rank] += sizes[name]
    return shares


class _Writer(dcp.FileSystemWriter):
    """Writer of torch.distributed.checkpoint with two threads: half of a file's writing is the kernel's time on one core.

    One file a tensor, because torch's writer keeps all tensors of a file in memory until the file is finished. torch's writer
    loses errors of all threads but the main one. This one raises the first error of any thread, after the others have stopped.

    Args:
        directory: empty directory to write into.
        forgotten: True drops each finished file from the page cache (`runtime.disk.forget`).
    """

    def __init__(self, directory: Path, forgotten: bool) -> None:
        super().__init__(directory, single_file_per_rank=False, thread_count=_THREADS, per_thread_copy_ahead=0)
        self._forgotten = forgotten

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write the tensors of a rank. planner: a `_StreamingPlanner`. Raises the first error of computing or writing one."""
        assert isinstance(planner, _StreamingPlanner)
        self.fs = files = _HashedFiles(self._forgotten, planner.failed)
        try:
            written = super().write_data(plan, planner)
        except BaseException as error:  # an interruption: only the main thread notices it
            planner.failed.append(error)
            files.wait()
            raise
        finally:
            self.fs = FileSystem()  # for what `finish` writes
        if planner.failed:
            raise planner.failed[0]
        return written


class _HashedFiles(FileSystem):
    """File system that hashes each file while it is written: `digests.entry_of` has its digest without reading it again.

    Args:
        forgotten: True drops each finished file from the page cache (`runtime.disk.forget`).
        failed: errors of all threads, to which errors are added. Once it has one, no file is made any more.
    """

    def __init__(self, forgotten: bool, failed: list[BaseException]) -> None:
        self._forgotten, self._failed = forgotten, failed
        self._writing = threading.Semaphore(_THREADS)

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IO[bytes]]:
        """Make a file in a thread of the writer. Errors within the context are kept instead of raised."""
        assert mode == "wb"
        try:
            with self._writing, _without_crc():  # here too: torch's options are those of a thread
                if self._failed:
                    yield io.BytesIO()
                    return
                with digests.HashingFile(path) as stream:
                    yield stream
                if self._forgotten:
                    forget(path)
        except Exception as error:
            self._failed.append(error)

    def wait(self) -> None:
        """Wait until no thread writes a file. Call when `failed` has an error."""
        for _ in range(_THREADS):
            self._writing.acquire()
        self._writing.release(_THREADS)  # threads that wait for their next file go on, and end


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """Context in which torch.save writes no zip checksums: they take as long as the writing, and torch.load checks none."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _StreamingPlanner(dcp.DefaultSavePlanner):
    """Save planner for torch.distributed.checkpoint that computes the next tensors in a thread while others are written.

    Use it in `with planner.ahead:`, which ends the thread. Computing a tensor raises FlextronError if its shape or dtype is not
    the one that its LazyTensor has.

    Args:
        tensors: {name: tensor}.
        progress: function (bytes) called for each tensor when it is written; None: none.

    Attributes:
        failed: errors of all threads of the writer, the first one first. Once it has one, no tensor is computed any more.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], progress: Callable[[int], None] | None) -> None:
        super().__init__(flatten_state_dict=False)
        self._lazy, self._progress = tensors, progress
        self.ahead = ThreadPoolExecutor(1)
        self.failed: list[BaseException] = []
        self._lock = threading.Lock()
        self._keys: list[str] = []  # tensors still to be computed, in the order of writing
        self._made: dict[str, Future[torch.Tensor]] = {}

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        self._keys = [item.index.fqn for item in plan.items if item.type != WriteItemType.BYTE_IO]
        for _ in range(1 + _THREADS):
            self._make_next()
        return plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if self.failed:
            raise RuntimeError("an error in another thread of the writer")
        if write_item.type == WriteItemType.BYTE_IO:
            return self.lookup_object(write_item.index)  # already serialized
        tensor = self._made.pop(write_item.index.fqn).result()
        with self._lock:
            self._make_next()
            if self._progress:
                self._progress(tensor.nbytes)
        return tensor

    def _make_next(self) -> None:
        if self._keys:
            key = self._keys.pop(0)
            self._made[key] = self.ahead.submit(lambda: _checked(key, self._lazy[key]).contiguous())
