"""A tiny chain of real stages, run once for all tests of commands, and comparisons of runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flextron_mcore.checkpoint.store import list_checkpoints
from flextron_mcore.runs.start import run_stage
from flextron_mcore.runs.verification import verify
from flextron_mcore.runtime import signals
from flextron_mcore.settings.compose import compose
from flextron_mcore.training.speed import MEASURED

TINY = [
    "num_layers=2",
    "hidden_size=32",
    "num_attention_heads=4",
    "ffn_hidden_size=64",
    "max_position_embeddings=32",
    "micro_batch_size=4",
    "global_batch_size=8",
]
TRAIN = [
    "trainer.val_check_interval=4",
    "trainer.limit_val_batches=2",
    "model.optim.sched.warmup_steps=2",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=3",
]


def stage(name: str, *keys: str) -> dict:
    return run_stage(compose(name, keys))


def pretrain_keys(data: Path) -> list[str]:
    return [f"data={data}", *(f"model.{key}" for key in TINY), *TRAIN]


def finish_again(run: Path, copy: Path, name: str, *keys: str) -> None:
    """Copy a complete run without its metrics.json, as if killed before it, let the command finish it, and compare all files.

    Args:
        run: complete run.
        copy: directory for the copy.
        name, keys: stage, and its keys.
    """
    shutil.copytree(run, copy)
    (copy / "metrics.json").unlink()
    stage(name, *keys, f"out={copy}")
    assert_same_files(run, copy)


def stop_within(run: Path, again: Path, monkeypatch: pytest.MonkeyPatch, moment: int, name: str, *keys: str) -> None:
    """Stop a training by SIGTERM, continue it, and compare its newest checkpoint and its log with those of `run`.

    Args:
        run: undisturbed run.
        again: out of the interrupted run.
        monkeypatch: pytest's.
        moment: number of the micro-batch of a network, counted over training and validation from the first step on, before
            which the signal arrives.
        name, keys: stage, and its keys.
    """
    calls = 0

    def urgent() -> bool:
        nonlocal calls
        calls += signals._deferred  # before the first step, a signal ends the process at once
        return calls >= moment

    with monkeypatch.context() as patch:
        patch.setattr(signals, "ignore", lambda: None)  # it would ignore signals in the tests' process
        patch.setattr(signals, "urgent", urgent)
        with pytest.raises(signals.Stopped, match=f"{name}: stopped by SIGTERM (after step|before the first)"):
            stage(name, *keys, f"out={again}")
    stage(name, *keys, f"out={again}")
    assert_same_files(list_checkpoints(run)[-1], list_checkpoints(again)[-1])
    assert log_rows(run) == log_rows(again)


def log_rows(run: Path) -> list[dict]:
    """Rows of the log of a training, without the figures that a clock decides."""
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def assert_same_files(before: Path, after: Path) -> None:
    """Compare two directories byte for byte, except for what clocks decide."""

    def files(folder: Path) -> dict[str, object]:
        found: dict[str, object] = {}
        for path in folder.rglob("*"):
            if path.is_file() and "tensorboard" not in path.parts:
                found[str(path.relative_to(folder))] = path.read_bytes()
        if "metrics.json" in found:
            assert not verify(folder).faults
            found["digests.json"] = set(json.loads(found["digests.json"])["files"])  # digests of files with times differ
            figures = json.loads(found["metrics.json"])
            found["metrics.json"] = {k: v for k, v in figures.items() if k not in ("seconds", "tokens_per_second")}
        return found

    one, other = files(before), files(after)
    assert [file for file in one.keys() | other.keys() if one.get(file) != other.get(file)] == []


@pytest.fixture(scope="session")
def chain(tmp_path_factory, text) -> Path:
    """Run directory with the stages data, parent, sorted and elastic."""
    run = tmp_path_factory.mktemp("run")
    stage("prepare", f"input=[{text}/code,{text}/prose]", "vocab_size=300", "valid_fraction=0.2", f"out={run}/data")
    stage("pretrain", *pretrain_keys(run / "data"), "trainer.max_steps=6", f"out={run}/parent")
    stage("importance", f"checkpoint={run}/parent", f"data={run}/data", "samples=16", "ablation_batches=1", f"out={run}/sorted")
    stage(
        "elastic",
        f"checkpoint={run}/sorted",
        f"data={run}/data",
        "model.micro_batch_size=4",
        "model.global_batch_size=8",
        *TRAIN,
        "trainer.max_steps=6",
        f"out={run}/elastic",
    )
    return run
