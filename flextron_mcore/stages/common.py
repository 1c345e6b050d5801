"""What all stages share: the output directory, figures, tables on the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flextron_mcore.config import FlextronError

CONFIG_FILE, METRICS_FILE = "config.yaml", "metrics.json"
# Keys that may differ between a run and its continuation: they do not change what is computed.
_FREE_KEYS = (
    "out",
    "overwrite",
    "debug",
    "trainer.num_nodes",
    "trainer.devices",
    "trainer.log_every_n_steps",
    "exp_manager",
    "model.ddp",
)
_LAYOUT_KEYS = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "context_parallel_size",
    "sequence_parallel", "recompute_granularity", "recompute_method", "recompute_num_layers", "micro_batch_size",
)  # fmt: skip


@contextlib.contextmanager
def new_output(config: DictConfig) -> Iterator[Path]:
    """A directory to write results into, which becomes `config.out` when the stage succeeds and leaves nothing when it fails.

    Raises FlextronError when `out` exists and overwrite=true is not given.
    """
    from flextron_mcore.checkpoint.store import write_aside

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise FlextronError(f"{config.stage}: runs as one process; pretrain and elastic run as many")
    out = Path(config.out)
    check_output(out, config.overwrite)
    make_parent(out)
    with write_aside(out) as folder:
        yield folder
        write_config(folder, config)


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


def make_parent(out: Path) -> None:
    """Make the directory that will hold `out`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlextronError(f"out={out}: cannot be written: {error.strerror}") from None


def resumable_output(config: DictConfig) -> Path:
    """The directory of a training run: made, or continued when it holds the same run unfinished.

    Raises FlextronError when it is complete, another run's, or no run's; overwrite=true replaces any.
    """
    out = Path(config.out)
    if config.overwrite and out.is_dir():
        check_output(out, overwrite=True)
        shutil.rmtree(out)
    if not (out / CONFIG_FILE).is_file():
        check_output(out, overwrite=False)
        make_parent(out)
        out.mkdir(exist_ok=True)
        write_config(out, config)
        return out
    before = flat(OmegaConf.load(out / CONFIG_FILE))
    now = flat(OmegaConf.create(OmegaConf.to_container(config, resolve=True)))
    for key in sorted(before.keys() | now.keys()):
        if _is_free(key) or before.get(key) == now.get(key):
            continue
        raise FlextronError(
            f"out={out}: holds a run with {key}={before.get(key)}, not {now.get(key)}: choose another out, or overwrite=true"
        )
    if (out / METRICS_FILE).is_file():
        raise FlextronError(f"out={out}: this run is complete; choose another out, or overwrite=true to run it again")
    return out


def _is_free(key: str) -> bool:
    return key.startswith(_FREE_KEYS) or key in [f"model.{name}" for name in _LAYOUT_KEYS]


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested mappings."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            values.update(flat(value, f"{prefix}{name}."))
        else:
            values[f"{prefix}{name}"] = value
    return values


def write_config(folder: Path, config: DictConfig) -> None:
    """The resolved configuration as config.yaml."""
    (folder / CONFIG_FILE).write_text(OmegaConf.to_yaml(config, resolve=True), encoding="utf-8")


def write_metrics(folder: Path, stage: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """metrics.json, whose presence means that the stage is complete."""
    from flextron_mcore.runtime.distributed import is_main_process

    metrics = {"stage": stage, **figures}
    if is_main_process():
        aside = folder / f".{METRICS_FILE}"
        aside.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        aside.rename(folder / METRICS_FILE)
    return metrics


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on standard output; numbers are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        numeric = all(isinstance(row[i], int | float) or str(row[i])[:1].isdigit() for row in rows) and rows
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(
            *(
                f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
                for value in row
            )
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a log has no width to fit into
    console.print(table)


def start(config: DictConfig) -> None:
    """Start the process groups with the layout of `config`. Raises FlextronError where processes and layout do not fit."""
    from flextron_mcore.runtime import distributed

    trainer = config.trainer
    wanted = (trainer.num_nodes or 1) * trainer.devices if trainer.devices else None
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted is not None and wanted != world:
        raise FlextronError(
            f"trainer.num_nodes x trainer.devices = {wanted}, but {world} process(es) were started: "
            f"use torchrun --nproc-per-node={trainer.devices}"
        )
    distributed.initialize(config.model, config.seed)


def wait_for_all() -> None:
    """Let every rank reach this point."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
