"""Writing a checkpoint tensor by tensor, by any number of ranks, without a model in memory."""

from __future__ import annotations

import contextlib
import io
import os
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
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from flextron_mcore.checkpoint.sharding import dealt_axis, to_disk_order
from flextron_mcore.checkpoint.store import CheckpointInfo, write_info
from flextron_mcore.config import FlextronError
from flextron_mcore.runtime.disk import check_space, forget
from flextron_mcore.runtime.ranks import place, wait_for_all


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written: shape, dtype, and how.

    buckets: how many its units lie in (checkpoint/sharding.py); 1: they are in sorted order.
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
    """Write a model's checkpoint into the empty `directory`, a tensor at a time; meanwhile the next ones are made, by a thread.

    Call on all ranks, with the same arguments: each makes and writes its share of the tensors. progress is called with the bytes
    of each tensor written, scaled to the share. common: plain values that every load returns beside the tensors. elsewhere: it is
    not for a stage that follows here, so the page cache need not keep it. The result is what Megatron-Core's own save of the
    model gives: the same keys, shapes and order, loadable at any layout.
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
    """`write_streaming` of tensors in the order in which they come, and without `flextron.json`."""
    rank, ranks = place()
    sizes = {key: t.dtype.itemsize * torch.Size(t.shape).numel() for key, t in tensors.items()}
    need = sum(sizes.values())
    check_space(directory, need)
    mine = share_out(sizes, ranks)[rank]
    state: dict[str, Any] = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors.items() if key in mine}
    for key in tensors if rank == 0 else ():
        if key.endswith((".linear_qkv.weight", ".linear_proj.weight", ".linear_fc1.weight", ".linear_fc2.weight")):
            # Megatron-Core's linear layers carry an empty "extra state" that every load asks for.
            extra = ShardedObject(key.removesuffix("weight") + "_extra_state", None, (1,), (0,))
            payload = io.BytesIO()
            torch.save([None], payload)
            state[extra.unique_key] = payload
    share = sum(sizes[key] for key in mine)
    planner = _StreamingPlanner(tensors, progress and (lambda size: progress(size * need // share)))
    # A file a tensor: torch's writer keeps the tensors of a file until the file is finished. Nothing passes through a GPU.
    writer = dcp.FileSystemWriter(directory, single_file_per_rank=False, thread_count=1, per_thread_copy_ahead=0)
    if elsewhere:
        writer.fs = _ForgottenFiles()
    with planner.ahead, _without_crc():
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=ranks == 1)
    if rank == 0:
        torch.save(dict(common or {}), directory / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    wait_for_all()


def _checked(key: str, lazy: LazyTensor) -> torch.Tensor:
    """The tensor, of the shape and dtype that it was announced with."""
    tensor = lazy.load()
    if tuple(tensor.shape) != tuple(lazy.shape) or tensor.dtype != lazy.dtype:
        raise FlextronError(f"tensor {key}: {tuple(tensor.shape)} {tensor.dtype} instead of {tuple(lazy.shape)} {lazy.dtype}")
    return tensor


def share_out(sizes: Mapping[str, int], ranks: int) -> list[set[str]]:
    """The names of `sizes`, for each rank about the same sum: the largest first, to the rank with the least so far."""
    shares: list[set[str]] = [set() for _ in range(ranks)]
    loads = [0] * ranks
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        rank = loads.index(min(loads))
        shares[rank].add(name)
        loads[rank] += sizes[name]
    return shares


class _ForgottenFiles(FileSystem):
    """Files that leave the page cache when they are written."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IO[bytes]]:
        with super().create_stream(path, mode) as stream:
            yield stream
        if "w" in mode:
            forget(path)


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """torch.save without the checksums of a zip file, which torch.load does not look at: they cost as much as the writing."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _StreamingPlanner(dcp.DefaultSavePlanner):
    """Makes the next two tensors while one is written, since sizes alternate; use within `ahead`."""

    def __init__(self, tensors: Mapping[str, LazyTensor], progress: Callable[[int], None] | None) -> None:
        super().__init__(flatten_state_dict=False)
        self._lazy, self._progress = tensors, progress
        self.ahead = ThreadPoolExecutor(1)
        self._keys: list[str] = []  # yet to be made, in the order of writing
        self._made: dict[str, Future[torch.Tensor]] = {}

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        self._keys = [item.index.fqn for item in plan.items if item.type != WriteItemType.BYTE_IO]
        for _ in range(2):
            self._make_next()
        return plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return self.lookup_object(write_item.index)  # serialised already
        tensor = self._made.pop(write_item.index.fqn).result()
        self._make_next()
        if self._progress:
            self._progress(tensor.nbytes)
        return tensor

    def _make_next(self) -> None:
        if self._keys:
            key = self._keys.pop(0)
            self._made[key] = self.ahead.submit(lambda: _checked(key, self._lazy[key]).contiguous())
