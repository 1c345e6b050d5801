"""Directory of a training run: made by a command, and continued by the same command after an interruption."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flextron_mcore import digests
from flextron_mcore.checkpoint.store import INFO_FILE, CheckpointInfo, list_checkpoints, open_checkpoint
from flextron_mcore.checkpoint.unpickling import check_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import PreparedData
from flextron_mcore.data.epochs import reading, repeated
from flextron_mcore.data.tokenizer import read_vocabulary
from flextron_mcore.files import explain, read_yaml
from flextron_mcore.runs.memory import memory_line
from flextron_mcore.runs.output import CONFIG_FILE, METRICS_FILE, check_output, claimed, new_directory
from flextron_mcore.runs.terminal import say, warn
from flextron_mcore.runs.tokenizers import copy_tokenizer, tokenizer_directories
from flextron_mcore.runtime.disk import disk_errors, write_aside, write_whole
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.settings.compose import as_yaml, to_dict
from flextron_mcore.settings.schema import show
from flextron_mcore.settings.training import LoopSettings
from flextron_mcore.training.rampup import BatchSizes

# Keys, and sections of keys, that may differ between a run and its continuation: they do not change what is computed.
# model.ddp.use_distributed_optimizer may not: the form of the optimizer's state on disk depends on it.
_FREE_KEYS = (
    *("out", "overwrite", "debug", "exp_manager", "verify_weights"),
    *("trainer.num_nodes", "trainer.devices", "trainer.log_every_n_steps", "trainer.max_time", "trainer.val_at_start"),
    *("model.tensor_model_parallel_size", "model.pipeline_model_parallel_size", "model.virtual_pipeline_model_parallel_size"),
    *("model.num_layers_in_first_pipeline_stage", "model.num_layers_in_last_pipeline_stage"),
    *("model.context_parallel_size", "model.sequence_parallel", "model.micro_batch_size"),
    *("model.recompute_granularity", "model.recompute_method", "model.recompute_num_layers", "model.recompute_modules"),
    *("model.ddp.overlap_grad_reduce", "model.ddp.overlap_param_gather", "model.ddp.bucket_size"),
)


@contextlib.contextmanager
def resumable_output(settings: LoopSettings, info: CheckpointInfo, data: PreparedData) -> Iterator[Path]:
    """Context with the directory settings.out of a training run, which no other process writes to within the block.

    The directory is new, or it holds this run, unfinished. It is this run if all of these are the same: the configuration, except
    for keys of speed, logging and parallel layout; the training tokens, the tokenizer and the teacher, whose fingerprints
    config.yaml keeps; and model, elastic space and order of heads and neurons of the checkpoint that the run starts from. Step,
    dtype and weights of that checkpoint may have changed: a continuation takes its weights from the run's own newest checkpoint,
    and a run that has none yet starts from the beginning.

    With overwrite=true a new run replaces any output of a stage in settings.out. Call on all ranks.

    Args:
        settings: settings of the training stage.
        info: checkpoint that the run starts from; its `path` is None for a random initialisation.
        data: training data.

    Raises:
        FlextronError: on every rank, if `out` holds another run, a complete or damaged run, or something else, if another
            process writes to it, or if this machine has too little memory.
    """
    out = Path(settings.out)
    memory = memory_line(settings, info)
    if info.path:
        check_checkpoint(info.path)
    with claimed(out):
        on_main_process(lambda: _open_run(out, settings, info, data))
        say(memory)
        _say_reading(settings, info, data)
        yield out


def _say_reading(settings: LoopSettings, info: CheckpointInfo, data: PreparedData) -> None:
    """Print how often a training reads each domain of its data, and a warning if it is more than MOST_EPOCHS times."""
    steps, length = settings.trainer.max_steps, settings.model.seq_length or info.model.default_length
    tokens = BatchSizes(settings.model, steps).start(steps) * length
    say(f"{settings.stage}: {reading(data, settings.data_weights, tokens)}")
    if found := repeated(data, settings.data_weights, tokens):
        warn(found)


def _open_run(out: Path, settings: LoopSettings, info: CheckpointInfo, data: PreparedData) -> None:
    """Make the directory of a new run with config.yaml and the tokenizer, or check that it holds this run, unfinished.

    Raises FlextronError if it holds anything else. Call on the main process.

    Args:
        out: directory of the run.
        settings: settings of the training stage.
        info: checkpoint that the run starts from.
        data: training data.
    """
    vocabulary = read_vocabulary(data.tokenizer)
    values = to_dict(settings)
    values["fingerprints"] = {"data": data.fingerprint, "tokenizer": vocabulary and vocabulary.fingerprint}
    if teacher := getattr(settings, "teacher", None):  # its description has digests of its weights
        values["fingerprints"]["teacher"] = digests.hash_of((open_checkpoint(teacher, "teacher").path / INFO_FILE).read_bytes())
    tokenizer = tokenizer_directories(info, data)
    with disk_errors(out):
        check_output(out, overwrite=True)
        if settings.overwrite or not (out / CONFIG_FILE).is_file():
            with new_directory(out) as folder:
                write_whole(folder / CONFIG_FILE, as_yaml(values))
                copy_tokenizer(info, data, folder / "tokenizer")
                digests.write_digests(folder)
            return
        if not settings.exp_manager.resume_if_exists:
            raise FlextronError(
                f"exp_manager.resume_if_exists=false: out={out} holds an unfinished run: choose another out, leave the key out "
                "to continue it, or overwrite=true"
            )
        _check_same(out, values, info)
        if tokenizer and not (out / "tokenizer").is_dir():  # removed by hand, or never written by an earlier version
            with write_aside(out / "tokenizer") as folder:
                copy_tokenizer(info, data, folder)
        digests.write_digests(out, only=(CONFIG_FILE, "tokenizer"))  # others still change


def _check_same(out: Path, values: Mapping[str, Any], info: CheckpointInfo) -> None:
    """Raise FlextronError unless `out` holds the unfinished run of this configuration, started from a checkpoint like `info`.

    Args:
        out: directory of the run.
        values: configuration of the run that is to continue, with the fingerprints of data and tokenizer.
        info: checkpoint that it starts from; model, space, order of units and imported config.json are compared with those of the
            run's newest checkpoint, if it has one.
    """
    before, now = _read_config(out / CONFIG_FILE), _flat(values)
    advice = "choose another out, or overwrite=true"
    for name, what in (("tokenizer", "data of another tokenizer than that of"), ("data", "other data than is now in")):
        found = now.pop(f"fingerprints.{name}")
        if before.get(f"fingerprints.{name}", found) != found:
            raise FlextronError(f"out={out}: holds a run on {what} data={now['data']}: {advice}")
    if before.pop("fingerprints.data", None):
        before["data"] = now["data"]  # equal fingerprints: the data may have moved
    before.pop("fingerprints.tokenizer", None)
    taught = before.pop("fingerprints.teacher", None), now.pop("fingerprints.teacher", None)
    if all(taught):
        if taught[0] != taught[1]:
            raise FlextronError(f"out={out}: holds a run with another teacher than is now in teacher={now['teacher']}: {advice}")
        before["teacher"] = now["teacher"]  # it may have moved
    if _beside(before) == _beside(now):
        before["checkpoint"] = now.get("checkpoint")  # run and checkpoint moved together
    if list_checkpoints(out):
        before |= _source(open_checkpoint(out))
        now |= _source(info)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not _is_free(key):
            raise FlextronError(f"out={out}: holds a run with {key}={show(before.get(key))}, not {show(now.get(key))}: {advice}")
    if (out / METRICS_FILE).is_file():
        raise FlextronError(f"out={out}: this run is complete; choose another out, or overwrite=true to run it again")


def _source(info: CheckpointInfo) -> dict[str, Any]:
    """Model, space, order of units and imported config.json of a checkpoint, as {"checkpoint.KEY": value}.

    Every checkpoint of a run has them in common with the checkpoint that the run started from.
    """
    values = info.to_dict()
    return _flat({"checkpoint": {name: values[name] for name in ("model", "space", "sorted", "hf_config")}})


def _beside(values: Mapping[str, Any]) -> str:
    """Path of the checkpoint that a run starts from, relative to the run's directory."""
    return os.path.relpath(str(values.get("checkpoint")), str(values.get("out")))


def _read_config(file: Path) -> dict[str, Any]:
    """Content of a run's config.yaml as {"a.b": value}. Raises FlextronError if the file is damaged."""
    try:
        values = read_yaml(file)
        if isinstance(values, dict) and "seed" in values:  # the last key of every stage
            digests.check_file(file)
            return _flat(values)
        why = "not a configuration"
    except (OSError, ValueError) as error:
        why = explain(error)
    raise FlextronError(f"{file}: is damaged ({why}): bring it back from a copy, choose another out, or overwrite=true")


def _is_free(key: str) -> bool:
    """True for a key, such as "model.micro_batch_size", that may differ between a run and its continuation (_FREE_KEYS)."""
    return any(key == free or key.startswith(f"{free}.") for free in _FREE_KEYS)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert nested mappings {"a": {"b": value}} to {"a.b": value}. prefix: start of every key."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            values.update(_flat(value, f"{prefix}{name}."))
        else:
            values[f"{prefix}{name}"] = value
    return values
