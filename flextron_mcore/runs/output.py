"""Output shared by all stages: the output directory, figures, tables on the terminal."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime.disk import disk_errors, write_aside, write_whole
from flextron_mcore.runtime.ranks import is_main_process, on_main_process, wait_for_all
from flextron_mcore.settings.compose import to_yaml
from flextron_mcore.settings.training import StageSettings

CONFIG_FILE, METRICS_FILE = "config.yaml", "metrics.json"


@contextlib.contextmanager
def serial_output(settings: StageSettings) -> Iterator[Path]:
    """A directory to write results into, which becomes `settings.out` when the stage succeeds and leaves nothing when it fails.

    For a stage that the main process runs alone. Raises FlextronError when `out` exists and overwrite=true is not given.
    """
    out = Path(settings.out)
    check_output(out, settings.overwrite)
    make_parent(out)
    with write_aside(out) as folder:
        yield folder
        write_config(folder, settings)


@contextlib.contextmanager
def new_output(settings: StageSettings) -> Iterator[Path]:
    """`serial_output` for a stage that all ranks run: the directory is whole when all are done, which a rank that fails never is.

    Raises what `serial_output` does, on every rank the same.
    """
    with disk_errors(Path(settings.out)), contextlib.ExitStack() as main_process:
        folder = on_main_process(lambda: main_process.enter_context(serial_output(settings)))
        yield folder
        wait_for_all()
    wait_for_all()


def check_output(out: Path, overwrite: bool) -> None:
    """Raise FlextronError when `out` is there already and may not be replaced, or is a file.

    overwrite replaces what a stage wrote, never another directory.
    """
    if out.is_file():
        raise FlextronError(f"out={out}: is a file, not a directory")
    if out.exists() and any(out.iterdir()):
        if not (out / CONFIG_FILE).is_file():
            raise FlextronError(f"out={out}: exists already and was not written by flextron; choose another")
        if not overwrite:
            raise FlextronError(f"out={out}: exists already; choose another, or replace it with overwrite=true")


def check_file(out: Path | None, overwrite: bool) -> None:
    """Raise FlextronError when a result that is one file cannot be written to `out`; None: it is only printed."""
    if out and (out.is_dir() or (out.exists() and not overwrite)):
        reason = "is a directory; name a file" if out.is_dir() else "exists already; choose another, or overwrite=true"
        raise FlextronError(f"out={out}: {reason}")


def write_file(out: Path | None, text: str) -> None:
    """Write a result that is one file, on the main process."""
    if out and is_main_process():
        make_parent(out)
        with disk_errors(out):
            write_whole(out, text)


def make_parent(out: Path) -> None:
    """Make the directory that will hold `out`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlextronError(f"out={out}: cannot be written: {error.strerror}") from None


def write_config(folder: Path, settings: StageSettings) -> None:
    """The resolved configuration as config.yaml."""
    (folder / CONFIG_FILE).write_text(to_yaml(settings), encoding="utf-8")


def write_metrics(folder: Path, stage: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """metrics.json, whose presence means that the stage is complete."""
    metrics = {"stage": stage, **figures}
    if is_main_process():
        write_whole(folder / METRICS_FILE, json.dumps(metrics, indent=1) + "\n")
    return metrics


def discard(folder: Path) -> None:
    """Remove a directory that the stage used, when every rank is done with it."""
    wait_for_all()
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
