"""Output of a stage: lock, directory or file, config.yaml, metrics.json and digests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flextron_mcore import digests
from flextron_mcore.config import FlextronError
from flextron_mcore.digests import CONFIG_FILE
from flextron_mcore.runs.terminal import warnings_so_far
from flextron_mcore.runtime.disk import disk_errors, recover, write_aside, write_whole
from flextron_mcore.runtime.locks import INSIDE, locked
from flextron_mcore.runtime.ranks import gather, is_main_process, on_main_process, wait_for_all
from flextron_mcore.settings.compose import to_yaml
from flextron_mcore.settings.training import StageSettings

METRICS_FILE = "metrics.json"


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Context in which no other command writes to `out`, a directory or file; the main process holds a lock on it.

    If an earlier command was killed while it replaced `out` (overwrite=true), the replacement is first finished or undone. Call
    on all ranks. Raises FlextronError naming the process that holds the lock.
    """
    with contextlib.ExitStack() as main_process:

        def take() -> None:
            if is_main_process():  # without process groups, `on_main_process` runs this on every rank
                with disk_errors(out):
                    main_process.enter_context(locked(out))
                    recover(out)

        on_main_process(take)
        yield


@contextlib.contextmanager
def serial_output(settings: StageSettings) -> Iterator[Path]:
    """Context with a hidden directory to write results into, for a stage that the main process runs alone.

    At the end config.yaml and digests.json are added, and the directory replaces settings.out; after an error it is removed.
    Raises FlextronError if settings.out may not be written (`check_output`).
    """
    out = Path(settings.out)
    check_output(out, settings.overwrite)
    with write_aside(out) as folder:
        yield folder
        write_config(folder, settings)
        digests.write_digests(folder)


def unfinished(out: Path) -> Path:
    """Path beside `out` for parts of a result that the same command takes over after it was killed."""
    out = out.resolve()
    return out.with_name(f".{out.name}.unfinished")


@contextlib.contextmanager
def new_output(settings: StageSettings) -> Iterator[Path]:
    """Context with a hidden directory to write results into, for a stage that all ranks run. Call on all ranks.

    When every rank has left the block, config.yaml and digests.json are added and the directory replaces settings.out; after an
    error it is removed. Raises FlextronError on every rank if settings.out may not be written (`check_output`).
    """
    with disk_errors(Path(settings.out)), contextlib.ExitStack() as main_process:
        folder = on_main_process(lambda: main_process.enter_context(serial_output(settings)))
        yield folder
        for others in gather(digests.remembered()):
            digests.learn(others)
    wait_for_all()


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Context with an empty directory that replaces `out` at its end, for a stage that writes more into it later.

    If `out` cannot be renamed (a mount, or a directory whose parent cannot be written), it is `out` itself, emptied.
    """
    if not (out.is_dir() and (os.path.ismount(out) or not os.access(out.parent, os.W_OK))):
        with write_aside(out) as folder:
            yield folder
        return
    # metrics.json, the mark of a complete stage, goes first, and config.yaml, the mark of a stage, last.
    for path in sorted(out.iterdir(), key=lambda path: (path.name == CONFIG_FILE) - (path.name == METRICS_FILE)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != INSIDE:
            path.unlink()
    yield out


def is_empty(out: Path) -> bool:
    """True if `out` does not exist, or is a directory that holds nothing but its lock."""
    return not out.exists() or not set(os.listdir(out)) - {INSIDE}


def check_output(out: Path, overwrite: bool) -> None:
    """Raise FlextronError if `out` is a file, or a directory with content that may not be replaced.

    overwrite: True if the output of a stage, a directory with config.yaml, may be replaced. A directory with other content never
    may.
    """
    if out.exists() and not out.is_dir():
        raise FlextronError(f"out={out}: is a file, not a directory; choose another")
    if not is_empty(out):
        if not (out / CONFIG_FILE).is_file():
            raise FlextronError(f"out={out}: exists already and was not written by flextron; choose another")
        if not overwrite:
            raise FlextronError(f"out={out}: exists already; choose another, or replace it with overwrite=true")


def check_file(out: Path | None, overwrite: bool) -> None:
    """Raise FlextronError if the result file `out` cannot be written: it is a directory, or exists and `overwrite` is false.

    out: file; None if the stage writes no file.
    """
    if out and (out.is_dir() or (out.exists() and not overwrite)):
        reason = "is a directory; name a file" if out.is_dir() else "exists already; choose another, or overwrite=true"
        raise FlextronError(f"out={out}: {reason}")


def write_file(out: Path | None, text: str) -> None:
    """Write a result file on the main process, whole or not at all; nothing if `out` is None.

    Raises FlextronError if the disk is full or refuses to write.
    """
    if out and is_main_process():
        with disk_errors(out):
            write_whole(out, text)


def write_config(folder: Path, settings: StageSettings) -> None:
    """Write settings, with the values of all keys, as config.yaml in a directory, whole or not at all."""
    write_whole(folder / CONFIG_FILE, to_yaml(settings))


def write_metrics(folder: Path, stage: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Write metrics.json, which marks the stage as complete, on the main process.

    Args:
        folder: directory to write into. If it has a config.yaml, its digests.json is written too.
        stage: name of the stage.
        figures: results of the stage, plain types.

    Returns:
        Content of the file: `stage`, the results, and `warnings`, a list of texts, if the stage printed any.
    """
    warnings = warnings_so_far()
    metrics = {"stage": stage, **figures, **({"warnings": warnings} if warnings else {})}
    if is_main_process():
        text = json.dumps(metrics, indent=1) + "\n"
        if (folder / CONFIG_FILE).is_file():  # a training wrote in place; `serial_output` writes the others' digests
            digests.write_digests(folder, upcoming={METRICS_FILE: text})
        write_whole(folder / METRICS_FILE, text)
    return metrics


def discard(folder: Path) -> None:
    """Remove a temporary directory when every rank is done with it. Call on all ranks."""
    wait_for_all()
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
