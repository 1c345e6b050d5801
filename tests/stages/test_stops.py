"""Training in a job that ends: it stops when a further step and checkpoint would not fit, and at SIGTERM within a step."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from flextron_mcore.checkpoint.store import list_checkpoints, open_checkpoint
from flextron_mcore.runtime import signals
from flextron_mcore.training import checkpointing
from tests.stages.conftest import TRAIN, pretrain_keys, stage, stop_within

SAVING = "exp_manager.checkpoint_callback_params"


def losses(run: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if row["event"] == "train"]


@pytest.mark.parametrize("seconds, steps", [(2e6, [3, 4]), (0.0, [3, 6])])
def test_a_training_stops_early_where_saving_takes_long(chain, tmp_path, monkeypatch, seconds, steps):
    """The job has a million seconds left. The save after step 3 is said to take two million: training stops after step 4."""
    publish = checkpointing.Checkpointer._publish

    def slow(self, *arguments) -> None:
        publish(self, *arguments)
        assert self.seconds > 0
        self.seconds = max(self.seconds, seconds)

    monkeypatch.setattr(checkpointing.Checkpointer, "_publish", slow)
    monkeypatch.setattr(signals, "ignore", lambda: None)  # it would ignore signals in the tests' process
    monkeypatch.setenv("FLEXTRON_JOB_END", str(int(time.time() + 1e6)))
    keys = [*pretrain_keys(chain / "data"), "trainer.max_steps=6", f"{SAVING}.async_save=false", f"out={tmp_path}/run"]
    if seconds:
        with pytest.raises(signals.Stopped, match="stopped by the end of its job .run.time_limit. after step 4; its checkpoint"):
            stage("pretrain", *keys)
    else:
        stage("pretrain", *keys)
    assert [open_checkpoint(folder).step for folder in list_checkpoints(tmp_path / "run")] == steps
    monkeypatch.undo()
    if seconds:
        stage("pretrain", *keys)
    assert losses(tmp_path / "run") == losses(chain / "parent")


@pytest.mark.parametrize("moment", [1, 2, 8, 14, 17, 28, 32, 40])
def test_sigterm_drops_the_step_in_progress(chain, tmp_path, monkeypatch, moment):
    """SIGTERM at a micro-batch of the first step, of later steps and of validations: the continued run is the undisturbed one."""
    keys = [f"checkpoint={chain}/sorted", f"data={chain}/data", "model.micro_batch_size=4", "model.global_batch_size=8"]
    stop_within(chain / "elastic", tmp_path / "run", monkeypatch, moment, "elastic", *keys, *TRAIN, "trainer.max_steps=6")


@pytest.mark.parametrize("moment", [6, 12])
def test_sigterm_drops_a_step_of_pretrain(chain, tmp_path, monkeypatch, moment):
    keys = [*pretrain_keys(chain / "data"), "trainer.max_steps=6"]
    stop_within(chain / "parent", tmp_path / "run", monkeypatch, moment, "pretrain", *keys)


@pytest.mark.parametrize("async_save", ["true", "false"])
def test_a_last_validation_that_ends_costs_no_step(chain, tmp_path, monkeypatch, async_save):
    from flextron_mcore.training import loop

    validate = loop._Run._validate
    monkeypatch.setattr(loop._Run, "_validate", lambda run, step, log: 1 / 0 if step == 6 else validate(run, step, log))
    keys = [*pretrain_keys(chain / "data"), "trainer.max_steps=6", f"{SAVING}.async_save={async_save}", f"out={tmp_path}/run"]
    with pytest.raises(ZeroDivisionError):
        stage("pretrain", *keys)
    assert open_checkpoint(tmp_path / "run").step == 6
    monkeypatch.undo()
    monkeypatch.setattr(loop._Run, "_step", None)  # no step is left
    stage("pretrain", *keys)
    assert losses(tmp_path / "run") == losses(chain / "parent")
