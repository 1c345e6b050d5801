"""Checkpoints of a training run: model, optimizer, schedule and routers, saved in the background, resumed in any layout.

No other state is needed: samples, sub-networks and random numbers of a step depend on (seed, step) only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from flextron_mcore import digests
from flextron_mcore.checkpoint.store import INFO_FILE, CheckpointInfo, files_of, iteration_path, list_checkpoints, write_info
from flextron_mcore.checkpoint.unpickling import check_checkpoint, only_data, reason, without_extra_state
from flextron_mcore.checkpoint.writer import canonical_metadata
from flextron_mcore.config import FlextronError
from flextron_mcore.runtime import signals
from flextron_mcore.runtime.compat import save_options
from flextron_mcore.runtime.disk import check_space, disk_errors, plain_errors, publish, write_whole
from flextron_mcore.runtime.ranks import is_main_process
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.space import ADAM_BYTES, count_parameters
from flextron_mcore.training.build import TrainedModel
from flextron_mcore.training.learner import Learner

KEPT = "the last whole checkpoint is kept"
# One key a layer instead of stacked layers; optimizer state in a form that any parallel layout can read.
_METADATA = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}


class Checkpointer:
    """Base class for writing and reading the checkpoints RUN/checkpoints/iter_<step> of a run. Call all methods on all ranks.

    Args:
        run: directory of the run.
        keep_last: number of checkpoints to keep, at least 1.
        learner: routers whose state is saved with the model, None without.

    Attributes:
        seconds: longest time from the start of a save until its checkpoint was complete; 0 before the first one.
    """

    def __init__(self, run: Path, keep_last: int, learner: Learner | None) -> None:
        self.run, self.keep_last, self.learner = run, max(1, keep_last), learner
        self.seconds = 0.0

    def save(self, info: CheckpointInfo) -> None:
        """Write the checkpoint of step `info.step`, or start writing it in the background. Call on all ranks.

        Raises FlextronError if it cannot be written, such as on a full disk.
        """
        raise NotImplementedError

    def load(self, info: CheckpointInfo) -> None:
        """Restore model, optimizer, schedule and routers from `info`, a checkpoint of this run. Call on all ranks.

        Raises FlextronError if it is damaged or of another run.
        """
        if self.learner:
            self.learner.read(info.path)

    def poll(self) -> None:
        """Give the background save its final name if it has finished; do not wait for it. Call on all ranks."""

    def finish(self) -> None:
        """Wait for the background save, and give it its final name. Call on all ranks.

        Raises FlextronError if the disk refused it.
        """

    def close(self) -> None:
        """Finish the background save, remove the oldest checkpoints beyond `keep_last`, and end the background workers.

        Call on all ranks. Raises FlextronError if the disk refused the save.
        """
        if is_main_process():
            remove_unfinished(self.run)
            self._remove_old()

    def _remove_old(self) -> None:
        """Remove all but the last `keep_last` checkpoints.

        Each is renamed to a hidden name first, so that a kill leaves no incomplete checkpoint under a final name.
        """
        for old in list_checkpoints(self.run)[: -self.keep_last]:
            aside = old.with_name(f".{old.name}.old")
            with contextlib.suppress(OSError):
                old.rename(aside)
                shutil.rmtree(aside)

    @contextlib.contextmanager
    def _aside(self, target: Path) -> Iterator[Path]:
        """Context with a hidden directory, empty at first, beside the checkpoint's final path `target`; removed after an error.

        The main process makes it: others must not write to it before a barrier. `_publish` gives it its final name.
        """
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

    def _publish(self, aside: Path, target: Path, info: CheckpointInfo, begun: float) -> None:
        """Write flextron.json, rename the directory `aside` to `target`, and remove the oldest checkpoints beyond `keep_last`.

        Only the main process does this; all ranks note how long the save took. Call on all ranks.

        begun: `time.monotonic` at the start of the save.
        """
        if is_main_process():
            with disk_errors(target, KEPT):
                write_info(aside, info)
                publish(aside, target)
            self._remove_old()
        self.seconds = max(self.seconds, time.monotonic() - begun)


class TrainingCheckpointer(Checkpointer):
    """Checkpoints of a model in training, with its optimizer and schedule.

    Args:
        run: directory of the run.
        keep_last: number of checkpoints to keep, at least 1.
        learner: routers whose state is saved with the model, None without.
        trained: the model in training.
        async_save: write in the background.
    """

    def __init__(self, run: Path, keep_last: int, learner: Learner | None, trained: TrainedModel, async_save: bool) -> None:
        super().__init__(run, keep_last, learner)
        self.trained, self.async_save = trained, async_save
        names = ["model"] if len(trained.chunks) == 1 else [f"model{i}" for i in range(len(trained.chunks))]
        self.chunks = {name: unwrap(chunk) for name, chunk in zip(names, trained.chunks, strict=True)}
        self.queue = AsyncCallsQueue()

    def save(self, info: CheckpointInfo) -> None:
        begun = time.monotonic()
        self.finish()
        target = iteration_path(self.run, info.step)
        with self._aside(target) as aside:
            if is_main_process():
                check_space(aside, self._bytes(info))
            torch.distributed.barrier()
            request = dist_checkpointing.save(
                self._state(is_loading=False), str(aside), async_sharded_save=self.async_save, **save_options()
            )
            self._write_learner(aside)
            if request is None:
                _write_digests(aside, torch.distributed.get_rank())
                torch.distributed.barrier()
        if request is None:
            self._finish_save(aside, target, info, begun)
        else:
            request.add_finalize_fn(lambda: self._finish_save(aside, target, info, begun))
            if request.async_fn:
                request = request._replace(async_fn=partial(_write_and_digest, request.async_fn, aside))
            self.queue.schedule_async_request(request)

    def load(self, info: CheckpointInfo) -> None:
        check_checkpoint(info.path)
        try:
            with plain_errors(), only_data():
                state = dist_checkpointing.load(self._state(is_loading=True), str(info.path))
        except Exception as error:
            message = (
                f"{info.path}: cannot be resumed from, damaged or of another run ({reason(error)}): remove this directory to "
                "continue from an earlier checkpoint"
            )
            raise FlextronError(message) from error
        for name, gpt in self.chunks.items():
            gpt.load_state_dict(without_extra_state(state[name]))
        self.trained.optimizer.load_state_dict(state["optimizer"])
        self.trained.scheduler.load_state_dict(state["scheduler"])
        super().load(info)

    def _finish_save(self, aside: Path, target: Path, info: CheckpointInfo, begun: float) -> None:
        """Rename a checkpoint that all ranks have written from `aside` to its final path `target`, with digests of its files.

        begun: `time.monotonic` at the start of the save.
        """
        if is_main_process():
            with disk_errors(target, KEPT):
                _take_digests(aside)
                canonical_metadata(aside)
        self._publish(aside, target, info, begun)

    def poll(self) -> None:
        self._finalize(blocking=False)

    def finish(self) -> None:
        with disk_errors(self.run, KEPT):
            self._finalize(blocking=True)

    def _finalize(self, blocking: bool) -> None:
        """Finish background saves that are complete, or with `blocking` wait for them. Raises FlextronError if one failed."""
        try:
            with plain_errors():
                self.queue.maybe_finalize_async_calls(blocking=blocking)
        except RuntimeError as error:
            if "results_queue should not be empty" not in str(error):
                raise
            raise FlextronError(f"{self.run}: {signals.helper_killed()}") from None

    def close(self) -> None:
        try:
            self.finish()
        finally:
            self.queue.close()
            super().close()

    def _bytes(self, info: CheckpointInfo) -> int:
        """Estimated bytes of a checkpoint, which all ranks write together.

        It has the weights, Adam's two moments in fp32 and, with bf16, an fp32 copy of the weights.
        """
        size = next(parameter for gpt in self.chunks.values() for parameter in gpt.parameters()).element_size()
        return count_parameters(info.model) * (size + ADAM_BYTES[size])

    def _state(self, is_loading: bool) -> dict[str, Any]:
        """Sharded state dict of model, optimizer and schedule. is_loading: True to read a checkpoint into it."""
        state: dict[str, Any] = {name: gpt.sharded_state_dict(metadata=dict(_METADATA)) for name, gpt in self.chunks.items()}
        # The optimizer looks its parameters up in the state dict it is given.
        optimizer = self.trained.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=dict(_METADATA))
        return _interned({**state, "optimizer": optimizer, "scheduler": self.trained.scheduler.state_dict()})


def _interned(value: Any) -> Any:
    """Copy of nested dictionaries and lists in which equal keys are one string object.

    pickle writes a reference for a string object that it has written before. Keys loaded from a checkpoint are separate objects,
    so without this function the files of a resumed run would differ from those of an undisturbed run.
    """
    if isinstance(value, dict):
        return {sys.intern(key) if type(key) is str else key: _interned(inner) for key, inner in value.items()}
    return [_interned(inner) for inner in value] if type(value) is list else value


class FrozenCheckpointer(Checkpointer):
    """Checkpoints of a training that does not change the model: model files are hard links to the files of `source`.

    Args:
        run: directory of the run.
        keep_last: number of checkpoints to keep, at least 1.
        learner: routers whose state is saved with the model, None without.
        source: checkpoint that holds the model.
    """

    def __init__(self, run: Path, keep_last: int, learner: Learner | None, source: CheckpointInfo) -> None:
        super().__init__(run, keep_last, learner)
        self.source = source

    def save(self, info: CheckpointInfo) -> None:
        begun, target = time.monotonic(), iteration_path(self.run, info.step)
        with self._aside(target) as aside:
            self._write_learner(aside)  # before linking: writing over a link would change the source's file
            if is_main_process():
                written, known = {INFO_FILE, *(file.name for file in aside.iterdir())}, files_of(self.source)
                for file in sorted(self.source.path.iterdir()):
                    if file.is_file() and file.name not in written:
                        _link(file, aside / file.name)
                        if "xxh128" in (entry := known.get(file.name, {})):
                            digests.remember(aside / file.name, entry)  # reading all weights would take longer than the linking
            self._publish(aside, target, info, begun)
            torch.distributed.barrier()
        self.source = replace(info, path=target)  # the former source may be removed as an old checkpoint

    def load(self, info: CheckpointInfo) -> None:
        super().load(info)
        self.source = info


def _write_and_digest(write: Callable[..., None], aside: Path, rank: int, *arguments: Any, **options: Any) -> None:
    """Write a rank's files of a checkpoint, then their digests, in a background process.

    Args:
        write: Megatron-Core's function that writes the files.
        aside: directory that the files are written to.
        rank: rank whose files are written.
        arguments, options: further arguments of `write`.
    """
    write(rank, *arguments, **options)
    with contextlib.suppress(OSError):  # the main process reports a full disk, and computes digests that are missing
        _write_digests(aside, rank)


def _write_digests(aside: Path, rank: int) -> None:
    """Compute the digests of a rank's files in the directory `aside`, and write them to .digests_RANK.json there.

    `_take_digests` reads this file on the main process. Right after the write the files are still in the page cache, so reading
    them costs no disk access.
    """
    found = {file.name: digests.entry_of(file) for file in aside.glob(f"__{rank}_*.distcp")}
    write_whole(aside / f".digests_{rank}.json", json.dumps(found))


def _take_digests(aside: Path) -> None:
    """Remember the digests in the files .digests_RANK.json of the directory `aside`, and remove these files.

    `digests.entry_of` then returns them without reading the checkpoint's files. Call on the main process.
    """
    for file in aside.glob(".digests_*.json"):
        for name, entry in json.loads(file.read_text(encoding="utf-8")).items():
            digests.remember(aside / name, entry)
        file.unlink()


def _link(file: Path, target: Path) -> None:
    """Hard-link `file` as `target`, or copy it if the file system refuses. A link is safe: no checkpoint is changed in place."""
    with contextlib.suppress(OSError):
        os.link(file, target)
        return
    shutil.copyfile(file, target)


def remove_unfinished(run: Path) -> None:
    """Remove the hidden directories that a killed run left beside its checkpoints in `run`. Call on the main process."""
    for folder in (run / "checkpoints").glob(".iter_*"):
        shutil.rmtree(folder, ignore_errors=True)
