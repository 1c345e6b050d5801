"""Memory, open files, threads, shared memory and helper processes of a long training run, from step to step."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks import print_settings
from flextron_mcore.runs.terminal import print_table

STEPS, EVERY, SAVE_EVERY = 2000, 200, 50
SHARED = Path("/dev/shm")
TEXT = Path(__file__).resolve().parents[1] / "docs"
MODEL = ["num_layers=2", "hidden_size=32", "num_attention_heads=4", "ffn_hidden_size=64", "max_position_embeddings=32"]


def run() -> None:
    """Run the benchmark and print its table."""
    print_settings(
        f"hygiene: {STEPS} steps of `flextron elastic` in one process, a checkpoint in the background every {SAVE_EVERY}, a "
        "validation every 500",
        "2 layers, hidden 32, FFN 64, batches of 4 x 32 tokens, full model and 3 sub-networks a step",
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = _sampled(Path(folder))
    columns = ["step", "resident MiB", "open files", "threads", "helpers", "helpers MiB", "shared memory files", "MiB"]
    print_table("hygiene", columns, [[str(value) for value in row] for row in rows])


def _sampled(folder: Path) -> list[list[int | float]]:
    """Rows of the table: after every EVERY steps, the step and what the training process holds."""
    batch = ["model.micro_batch_size=4", "model.global_batch_size=4"]
    loop = [f"data={folder}/data", *batch, "trainer.limit_val_batches=1"]
    _flextron("prepare", f"input={TEXT}", "vocab_size=300", "valid_fraction=0.2", f"out={folder}/data").wait()
    model = [f"model.{key}" for key in MODEL]
    _flextron("pretrain", *loop, *model, "trainer.max_steps=2", f"out={folder}/parent").wait()
    keys = [f"checkpoint={folder}/parent", f"data={folder}/data", "samples=8", "ablation_batches=0"]
    _flextron("importance", *keys, f"out={folder}/sorted").wait()
    saving = [f"exp_manager.checkpoint_callback_params.{key}" for key in (f"every_n_train_steps={SAVE_EVERY}", "keep_last=2")]
    steps = [f"trainer.max_steps={STEPS + 10}", "trainer.val_check_interval=500"]
    before = _shared()
    run = _flextron("elastic", f"checkpoint={folder}/sorted", *loop, *steps, *saving, f"out={folder}/run")
    process, rows = psutil.Process(run.pid), []
    try:
        for step in range(EVERY, STEPS + 1, EVERY):
            while run.poll() is None and _step(folder / "run" / "log.jsonl") < step:
                time.sleep(0.05)
            rows.append([step, *_held(process, before)])
    finally:
        run.kill()
        run.wait()
    return rows


def _flextron(*argv: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "flextron_mcore", *argv], stdout=subprocess.DEVNULL)


def _step(log: Path) -> int:
    """Last step in a log; 0 before the first."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        found = re.findall(rb'"step": (\d+)', file.read())
        return int(found[-1]) if found else 0
    return 0


def _shared() -> set[str]:
    return set(os.listdir(SHARED))


def _held(process: psutil.Process, before: set[str]) -> list[int | float]:
    """Cells of a row after its step, which say what a process holds; sizes are in MiB.

    Memory, open files and threads of the process; number and memory of its helpers; number and size of the files of /dev/shm
    that were not there `before`.
    """
    new, size, helpers = _shared() - before, 0, []
    for name in new:
        with contextlib.suppress(OSError):
            size += (SHARED / name).stat().st_size
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            helpers.append(child.memory_info().rss)
    resident, files = process.memory_info().rss, process.num_fds()
    return [_mib(resident), files, process.num_threads(), len(helpers), _mib(sum(helpers)), len(new), _mib(size)]


def _mib(size: int) -> float:
    return round(size / 2**20, 1)
