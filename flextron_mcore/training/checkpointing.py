"""Training state on disk: model, optimizer, schedule; saved in the background, resumed exactly, at any layout.

There is no more: samples, sub-networks and random numbers of a step are functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from flextron_mcore.checkpoint.store import INFO_FILE, CheckpointInfo, iteration_path, list_checkpoints, write_info
from flextron_mcore.config import FlextronError
from flextron_mcore.runtime.compat import save_options
from flextron_mcore.runtime.disk import check_space, disk_errors, first_line, plain_errors, publish
from flextron_mcore.runtime.ranks import is_main_process
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.training.build import TrainedModel
from flextron_mcore.training.learner import Learner

KEPT = "the last whole checkpoint is kept"
# One key a layer; optimizer state stored so that any layout can read it.
_METADATA = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}


class Checkpointer:
    """The last `keep_last` checkpoints of a run, RUN/checkpoints/iter_<step>. Call all methods on all ranks."""

    def __init__(self, run: Path, keep_last: int, learner: Learner | None) -> None:
        self.run, self.keep_last, self.learner = run, max(1, keep_last), learner

    def save(self, info: CheckpointInfo) -> None:
        """Write the checkpoint of `info.step`, or start to."""
        raise NotImplementedError

    def load(self, info: CheckpointInfo) -> None:
        """Continue from a checkpoint of this run."""
        if self.learner:
            self.learner.read(info.path)

    def poll(self) -> None:
        """Publish a background save that has finished."""

    def finish(self) -> None:
        """Wait for the background save."""

    def close(self) -> None:
        """Finish and release the background workers."""

    @contextlib.contextmanager
    def _aside(self, target: Path) -> Iterator[Path]:
        """An empty directory beside `target`, with what the learner keeps at the end; removed on an error."""
        aside = target.parent / f".{target.name}.tmp"
        with disk_errors(target, KEPT):
            if is_main_process():
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            try:
                yield aside
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise

    def _write_learner(self, aside: Path) -> None:
        if self.learner and is_main_process():
            self.learner.write(aside)

    def _publish(self, aside: Path, target: Path, info: CheckpointInfo) -> None:
        """Make the directory the checkpoint, and remove those that are too many."""
        if not is_main_process():
            return
        with disk_errors(target, KEPT):
            write_info(aside, info)
            publish(aside, target)
        for old in list_checkpoints(self.run)[: -self.keep_last]:
            shutil.rmtree(old, ignore_errors=True)


class TrainingCheckpointer(Checkpointer):
    """Saves and loads a model in training, with async_save in the background."""

    def __init__(self, run: Path, keep_last: int, learner: Learner | None, trained: TrainedModel, async_save: bool) -> None:
        super().__init__(run, keep_last, learner)
        self.trained, self.async_save = trained, async_save
        names = ["model"] if len(trained.chunks) == 1 else [f"model{i}" for i in range(len(trained.chunks))]
        self.chunks = {name: unwrap(chunk) for name, chunk in zip(names, trained.chunks, strict=True)}
        self.queue = AsyncCallsQueue()

    def save(self, info: CheckpointInfo) -> None:
        self.finish()
        target = iteration_path(self.run, info.step)
        with self._aside(target) as aside:
            if is_main_process():
                check_space(aside, self._bytes())
            torch.distributed.barrier()
            request = dist_checkpointing.save(
                self._state(is_loading=False), str(aside), async_sharded_save=self.async_save, **save_options()
            )
            self._write_learner(aside)
        if request is None:
            self._publish(aside, target, info)
        else:
            request.add_finalize_fn(lambda: self._publish(aside, target, info))
            self.queue.schedule_async_request(request)

    def load(self, info: CheckpointInfo) -> None:
        try:
            with plain_errors():
                state = dist_checkpointing.load(self._state(is_loading=True), str(info.path))
        except Exception as error:
            message = f"{info.path}: cannot be resumed from, damaged or of another run ({first_line(error)})"
            raise FlextronError(message) from error
        for name, gpt in self.chunks.items():
            gpt.load_state_dict(state[name])
        self.trained.optimizer.load_state_dict(state["optimizer"])
        self.trained.scheduler.load_state_dict(state["scheduler"])
        super().load(info)

    def poll(self) -> None:
        self.queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        with disk_errors(self.run, KEPT):
            self.queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        self.finish()
        self.queue.close()

    def _bytes(self) -> int:
        """About what a checkpoint takes: weights in their dtype, and two moments (with bf16 also the weights) in fp32."""
        parameters = [parameter for gpt in self.chunks.values() for parameter in gpt.parameters()]
        return sum(p.numel() * (8 if p.dtype == torch.float32 else 12) + p.nbytes for p in parameters)

    def _state(self, is_loading: bool) -> dict[str, Any]:
        state: dict[str, Any] = {name: gpt.sharded_state_dict(metadata=dict(_METADATA)) for name, gpt in self.chunks.items()}
        # The optimizer looks its parameters up in the state dict it is given.
        optimizer = self.trained.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=dict(_METADATA))
        return {**state, "optimizer": optimizer, "scheduler": self.trained.scheduler.state_dict()}


class FrozenCheckpointer(Checkpointer):
    """Checkpoints of a phase that leaves the model as it is: they share the files of the one that it started from, `source`."""

    def __init__(self, run: Path, keep_last: int, learner: Learner | None, source: CheckpointInfo) -> None:
        super().__init__(run, keep_last, learner)
        self.source = source

    def save(self, info: CheckpointInfo) -> None:
        target = iteration_path(self.run, info.step)
        with self._aside(target) as aside:
            self._write_learner(aside)  # first: written over a link, it would change the source's file too
            if is_main_process():
                written = {INFO_FILE, *(file.name for file in aside.iterdir())}
                for file in sorted(self.source.path.iterdir()):
                    if file.is_file() and file.name not in written:
                        _link(file, aside / file.name)
            self._publish(aside, target, info)
            torch.distributed.barrier()
        self.source = replace(info, path=target)  # the checkpoint that a run was continued from is not kept for ever

    def load(self, info: CheckpointInfo) -> None:
        super().load(info)
        self.source = info


def _link(file: Path, target: Path) -> None:
    """Hard-link `file` as `target`, or copy it where that cannot be. Checkpoints are never changed in place."""
    with contextlib.suppress(OSError):
        os.link(file, target)
        return
    shutil.copyfile(file, target)


def remove_unfinished(run: Path) -> None:
    """Remove what a killed run left half written."""
    for folder in (run / "checkpoints").glob(".iter_*"):
        shutil.rmtree(folder, ignore_errors=True)
