"""The directory of a training run: made, or continued by the command that made it, by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from flextron_mcore.checkpoint.store import CheckpointInfo, list_checkpoints, open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import PreparedData
from flextron_mcore.data.tokenizer import read_vocabulary
from flextron_mcore.runs.output import CONFIG_FILE, METRICS_FILE, check_output, make_parent
from flextron_mcore.runtime.disk import disk_errors, write_aside, write_whole
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.settings.compose import as_yaml, to_dict
from flextron_mcore.settings.training import LoopSettings

LOCK_FILE = ".lock"
# Keys, and groups of keys, that may differ between a run and its continuation: they do not change what is computed.
# model.ddp.use_distributed_optimizer is none of them: the form of the optimizer's state on disk depends on it.
_FREE_KEYS = (
    *("out", "overwrite", "debug", "exp_manager"),
    *("trainer.num_nodes", "trainer.devices", "trainer.log_every_n_steps", "trainer.max_time"),
    *("model.tensor_model_parallel_size", "model.pipeline_model_parallel_size", "model.virtual_pipeline_model_parallel_size"),
    *("model.num_layers_in_first_pipeline_stage", "model.num_layers_in_last_pipeline_stage"),
    *("model.context_parallel_size", "model.sequence_parallel", "model.micro_batch_size"),
    *("model.recompute_granularity", "model.recompute_method", "model.recompute_num_layers", "model.recompute_modules"),
    *("model.ddp.overlap_grad_reduce", "model.ddp.overlap_param_gather", "model.ddp.bucket_size"),
)


@contextlib.contextmanager
def resumable_output(settings: LoopSettings, info: CheckpointInfo, data: PreparedData) -> Iterator[Path]:
    """settings.out, made for a new run, or with the unfinished run that it holds; no other process writes to it within the block.

    Only the same run is continued: of the same configuration except for speed and layout, on the same tokens of the same
    tokenizer (config.yaml keeps their fingerprints), from a checkpoint `info` of the same model, space and order of units.
    What may have changed is that checkpoint's step, dtype and weights: a continuation takes its weights from the run's own
    newest checkpoint, and a run that has none yet starts anew from what is there now.

    Call on all ranks. Raises FlextronError, on every rank the same, when `out` holds another run, one that is complete, damaged
    or being written, or something else. overwrite=true replaces what any stage wrote, unless it is being written.
    """
    with contextlib.ExitStack() as main_process:
        on_main_process(lambda: main_process.enter_context(_open_run(settings, info, data)))
        yield Path(settings.out)


@contextlib.contextmanager
def _open_run(settings: LoopSettings, info: CheckpointInfo, data: PreparedData) -> Iterator[None]:
    out, vocabulary = Path(settings.out), read_vocabulary(data.tokenizer)
    values = to_dict(settings)
    values["fingerprints"] = {"data": data.fingerprint, "tokenizer": vocabulary and vocabulary.fingerprint}
    make_parent(out)
    with contextlib.ExitStack() as lock:
        with disk_errors(out):
            made = not out.exists()
            if not (out.is_dir() and os.listdir(out) == [LOCK_FILE]):  # left by a process killed before it wrote more
                check_output(out, overwrite=True)
            out.mkdir(exist_ok=True)
            lock.enter_context(_lock(out))
            new = not (out / CONFIG_FILE).is_file()
            try:
                if settings.overwrite:
                    _clear(out, CONFIG_FILE, LOCK_FILE)  # config.yaml says, until it is replaced, that `out` is a stage's
                elif not new:
                    _check_same(out, values, info)
                _complete(out, values, new or settings.overwrite, info.tokenizer if info.path else data.tokenizer)
            except BaseException:
                if new:
                    _clear(out)
                    out.rmdir() if made else None
                raise
        yield


def _complete(out: Path, values: Mapping[str, Any], new: bool, tokenizer: Path | None) -> None:
    """Write what a run has from its beginning, as far as it is not there."""
    if new:
        write_whole(out / CONFIG_FILE, as_yaml(values))
    if tokenizer and not (out / "tokenizer").is_dir():
        with write_aside(out / "tokenizer") as folder:
            shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Keep other processes from writing to `out`. The lock is the kernel's: it ends with this process, however that ends."""
    file = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(file, 1000).decode(errors="replace") or "another process"
        os.close(file)
        raise FlextronError(f"out={out}: {holder} is writing to it: wait for its end, or choose another out") from None
    except OSError:
        pass  # a file system without locks
    with contextlib.suppress(OSError):  # the name is for the message only
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # helper processes may have inherited the open file
        os.close(file)


def _clear(out: Path, *kept: str) -> None:
    """Empty a directory; the mark of a complete run goes first."""
    for path in sorted(out.iterdir(), key=lambda path: path.name != METRICS_FILE):
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_same(out: Path, values: Mapping[str, Any], info: CheckpointInfo) -> None:
    """Raise FlextronError unless `out` holds the unfinished run of these values and of a source like `info`."""
    before, now = _read_config(out / CONFIG_FILE), _flat(values)
    advice = "choose another out, or overwrite=true"
    for name, what in (("tokenizer", "data of another tokenizer than that of"), ("data", "other data than is now in")):
        found = now.pop(f"fingerprints.{name}")
        if before.get(f"fingerprints.{name}", found) != found:
            raise FlextronError(f"out={out}: holds a run on {what} data={now['data']}: {advice}")
    if before.pop("fingerprints.data", None):
        before["data"] = now["data"]  # the same, wherever it is
    before.pop("fingerprints.tokenizer", None)
    if _beside(before) == _beside(now):
        before["checkpoint"] = now.get("checkpoint")  # moved together
    if list_checkpoints(out):
        before |= _source(open_checkpoint(out))
        now |= _source(info)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not _is_free(key):
            raise FlextronError(f"out={out}: holds a run with {key}={before.get(key)}, not {now.get(key)}: {advice}")
    if (out / METRICS_FILE).is_file():
        raise FlextronError(f"out={out}: this run is complete; choose another out, or overwrite=true to run it again")


def _source(info: CheckpointInfo) -> dict[str, Any]:
    """Facts that every checkpoint of a run shares with the one it started from."""
    values = info.to_dict()
    return _flat({"checkpoint": {name: values[name] for name in ("model", "space", "sorted", "hf_config")}})


def _beside(values: Mapping[str, Any]) -> str:
    """Where the checkpoint that a run starts from is, seen from the run."""
    return os.path.relpath(str(values.get("checkpoint")), str(values.get("out")))


def _read_config(file: Path) -> dict[str, Any]:
    """config.yaml as {"a.b": value}."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(values, dict) and "seed" in values:  # the last key of every stage
            return _flat(values)
        reason = "not a configuration"
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = type(error).__name__
    raise FlextronError(f"{file}: is damaged ({reason}): bring it back from a copy, choose another out, or overwrite=true")


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE_KEYS)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested mappings."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            values.update(_flat(value, f"{prefix}{name}."))
        else:
            values[f"{prefix}{name}"] = value
    return values
