"""Training state on disk: model, optimizer, schedule; saved in the background, resumed exactly, at any layout.

There is no more: samples, sub-networks and random numbers of a step are functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from flextron_mcore.checkpoint.store import INFO_FILE, CheckpointInfo, iteration_path, list_checkpoints, write_info
from flextron_mcore.config import FlextronError
from flextron_mcore.model import unwrap
from flextron_mcore.runtime.compat import save_options
from flextron_mcore.runtime.disk import check_space, disk_errors, plain_errors, publish
from flextron_mcore.runtime.ranks import is_main_process

KEPT = "the last whole checkpoint is kept"
# One key a layer; optimizer state stored so that any layout can read it.
_METADATA = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class Extra:
    """What a phase keeps beside the model's state: small, written into the checkpoint by the main process, read by all."""

    write: Callable[[Path], None] = lambda folder: None
    read: Callable[[Path], None] = lambda folder: None


class TrainingCheckpointer:
    """Saves and loads the state of one training run."""

    def __init__(
        self,
        run: Path,
        model: Sequence[torch.nn.Module],
        optimizer: Any,
        scheduler: Any,
        keep_last: int,
        async_save: bool,
        extra: Extra,
    ) -> None:
        self.run, self.model, self.optimizer, self.scheduler, self.extra = run, model, optimizer, scheduler, extra
        self.keep_last, self.async_save = max(1, keep_last), async_save
        self.queue = AsyncCallsQueue()

    def save(self, info: CheckpointInfo) -> None:
        """Start (or with async_save=False, do) the writing of `RUN/checkpoints/iter_<step>`. Call on all ranks."""
        self.finish()
        target = iteration_path(self.run, info.step)
        aside = target.parent / f".{target.name}.tmp"
        with disk_errors(target, KEPT):
            if is_main_process():
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                check_space(aside, self._bytes())
            torch.distributed.barrier()
            try:
                request = dist_checkpointing.save(
                    self._state(is_loading=False), str(aside), async_sharded_save=self.async_save, **save_options()
                )
                if is_main_process():
                    self.extra.write(aside)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
        if request is None:
            self._publish(aside, target, info)
        else:
            request.add_finalize_fn(lambda: self._publish(aside, target, info))
            self.queue.schedule_async_request(request)

    def poll(self) -> None:
        """Publish a background save that has finished. Call on all ranks."""
        self.queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for the background save. Call on all ranks."""
        with disk_errors(self.run, KEPT):
            self.queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        """Finish and release the background workers."""
        self.finish()
        self.queue.close()

    def load(self, info: CheckpointInfo) -> None:
        """Continue from a checkpoint of this run. Call on all ranks."""
        try:
            with plain_errors():
                state = dist_checkpointing.load(self._state(is_loading=True), str(info.path))
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise FlextronError(f"{info.path}: cannot be resumed from, damaged or of another run ({first})") from error
        for name, chunk in self._chunks().items():
            unwrap(chunk).load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.extra.read(info.path)

    def _chunks(self) -> dict[str, torch.nn.Module]:
        return {"model" if len(self.model) == 1 else f"model{i}": chunk for i, chunk in enumerate(self.model)}

    def _bytes(self) -> int:
        """About what a checkpoint takes: weights in their dtype, and two moments (with bf16 also the weights) in fp32."""
        local = 0
        for chunk in self.model:
            for parameter in chunk.parameters():
                local += parameter.numel() * (8 if parameter.dtype == torch.float32 else 12) + parameter.nbytes
        return local

    def _state(self, is_loading: bool) -> dict[str, Any]:
        state: dict[str, Any] = {
            name: unwrap(c).sharded_state_dict(metadata=dict(_METADATA)) for name, c in self._chunks().items()
        }
        # The optimizer looks its parameters up in the state dict it is given.
        state["optimizer"] = self.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=dict(_METADATA))
        state["scheduler"] = self.scheduler.state_dict()
        return state

    def _publish(self, aside: Path, target: Path, info: CheckpointInfo) -> None:
        if is_main_process():
            _publish(self.run, aside, target, info, self.keep_last)


class FrozenCheckpointer:
    """The same for a phase that leaves the model as it is: checkpoints share the files of the one that it started from."""

    def __init__(self, run: Path, source: CheckpointInfo, keep_last: int, extra: Extra) -> None:
        self.run, self.source, self.keep_last, self.extra = run, source, max(1, keep_last), extra

    def save(self, info: CheckpointInfo) -> None:
        """Write `RUN/checkpoints/iter_<step>`. Call on all ranks."""
        target = iteration_path(self.run, info.step)
        aside = target.parent / f".{target.name}.tmp"
        with disk_errors(target, KEPT):
            if is_main_process():
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                self.extra.write(aside)  # first: written over a link, it would change the source's file too
                written = {INFO_FILE, *(file.name for file in aside.iterdir())}
                for file in sorted(self.source.path.iterdir()):
                    if file.is_file() and file.name not in written:
                        _link(file, aside / file.name)
                _publish(self.run, aside, target, info, self.keep_last)
            torch.distributed.barrier()
        self.source = replace(info, path=target)  # that which a run was continued from is not kept for ever

    def load(self, info: CheckpointInfo) -> None:
        """Continue from a checkpoint of this run."""
        self.extra.read(info.path)
        self.source = info

    def poll(self) -> None:
        """Nothing is written in the background."""

    def finish(self) -> None:
        """Nothing is written in the background."""

    def close(self) -> None:
        """Nothing is held."""


def _link(file: Path, target: Path) -> None:
    """The same file under another name, or a copy where that cannot be. Checkpoints are never changed in place."""
    with contextlib.suppress(OSError):
        os.link(file, target)
        return
    shutil.copyfile(file, target)


def _publish(run: Path, aside: Path, target: Path, info: CheckpointInfo, keep_last: int) -> None:
    with disk_errors(target, KEPT):
        write_info(aside, info)
        publish(aside, target)
    for old in list_checkpoints(run)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)


def remove_unfinished(run: Path) -> None:
    """Remove what a killed run left half written."""
    for folder in (run / "checkpoints").glob(".iter_*"):
        shutil.rmtree(folder, ignore_errors=True)
