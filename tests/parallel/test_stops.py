"""Ranks stop, and save, at the same step: where their clocks differ, and where SIGTERM reaches one of them within a step."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from flextron_mcore.checkpoint.store import CheckpointInfo, list_checkpoints
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.parallel.worker import chosen, run_jobs
from tests.stages.conftest import assert_same_files, log_rows, stage

LAYOUTS = {
    "data": (2, ["model.ddp.overlap_grad_reduce=true"]),
    "distributed optimizer": (
        2,
        [f"model.ddp.{key}=true" for key in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")],
    ),
    "sequence": (2, ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"]),
    "pipeline": (2, ["model.pipeline_model_parallel_size=2", "distillation.weight=0.5"]),
    "virtual taught": (2, ["model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"]),
    "tensor x pipeline": (4, ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"]),
}
LAYOUTS = chosen(LAYOUTS, {"distributed optimizer", "virtual taught"})
# Number of the micro-batch of a network, from the first step on, before which the signal comes: in the midst of a step, in a
# validation or a later step; then the first of all, and the last of a step.
MOMENTS = (12, 36, 1, 16) if "FLEXTRON_FAULTS" in os.environ else (12, 36)


def decisions() -> dict[str, tuple[int, bool]]:
    """Decisions of this rank where only rank 1 wants to save, needs long to do so, or is late. Call on all ranks."""
    from torch import distributed

    from flextron_mcore.runtime import signals
    from flextron_mcore.runtime.distributed import stop_agreed

    here = distributed.get_rank() == 1
    signals.defer(True)
    signals.limit(None, None, time.time() + 1e6)
    found = {"none": stop_agreed(), "due": stop_agreed(save=here), "slow": stop_agreed(needed=2e6 if here else 1.0)}
    signals.limit(None, time.time() - 1 if here else None)
    found["late"] = stop_agreed()
    signals.limit(None)
    signals.defer(False)
    return found


def test_ranks_agree(tmp_path):
    from flextron_mcore.runtime.signals import JOB_ENDS

    ((first, second),) = run_jobs(2, [{"call": "tests.parallel.test_stops:decisions"}], tmp_path)
    expected = {"none": [0, False], "due": [0, True], "slow": [JOB_ENDS, False], "late": [JOB_ENDS, False]}
    assert first["result"] == second["result"] == expected


def stopped(keys: list[str], rank: int, moment: int) -> str:
    """Train until SIGTERM reaches one rank before micro-batch `moment`; return the line for the user. Call on all ranks."""
    from torch import distributed

    from flextron_mcore.runs.start import run_stage
    from flextron_mcore.runtime import signals
    from flextron_mcore.settings.compose import compose

    calls, urgent, ignore = 0, signals.urgent, signals.ignore
    here = None

    def signal_arrives() -> bool:
        nonlocal calls, here
        here = distributed.get_rank() == rank if here is None else here
        calls += signals._deferred  # before the first step, a signal ends the process at once
        return here and calls >= moment

    signals.urgent, signals.ignore = signal_arrives, lambda: None
    try:
        run_stage(compose("elastic", keys))
    except signals.Stopped as stop:
        return str(stop)
    finally:
        signals.urgent, signals.ignore = urgent, ignore
    return "not stopped"


@pytest.fixture(scope="module")
def start(tmp_path_factory, text) -> Path:
    run = tmp_path_factory.mktemp("stops")
    stage("prepare", f"input=[{text}/code]", "vocab_size=300", "valid_fraction=0.2", f"out={run}/data")
    arch = toy.config(num_layers=4, num_attention_heads=8, num_query_groups=4, kv_channels=8, vocab_size=301)
    space = ElasticSpace.build(arch, granularity=2, heads=[0.5, 1.0], ffn_hidden_size=[0.25, 0.5, 1.0], depth=[2, 4])
    toy.write(toy.model(arch, space), CheckpointInfo(arch, space), run / "start")
    return run


@pytest.mark.parametrize("processes", sorted({size for size, _ in LAYOUTS.values()}))
def test_sigterm_at_one_rank_drops_the_step_on_all(start, tmp_path, processes):
    """Ranks that have dropped micro-batches end the step together with the others, and the run continues as if undisturbed."""
    train = [f"checkpoint={start}/start", f"data={start}/data", "model.micro_batch_size=2", "model.global_batch_size=8"]
    train += ["trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.limit_val_batches=2"]
    train += ["exp_manager.create_tensorboard_logger=false", "exp_manager.checkpoint_callback_params.async_save=false"]
    jobs, cases = [], []
    for name, (size, keys) in LAYOUTS.items():
        if size != processes:
            continue
        keys = [*keys, f"teacher={start}/start", "distillation.weight=0.5"] if "taught" in name else keys
        common = {"layout": name}
        jobs.append({"stage": "elastic", "keys": [*train, *keys, f"out={tmp_path}/{name}"], **common})
        for moment in MOMENTS:
            rank = moment % size
            out = [*train, *keys, f"out={tmp_path}/{name} {moment}"]
            arguments = {"keys": out, "rank": rank, "moment": moment}
            cases.append((name, moment, len(jobs)))
            jobs.append({"call": "tests.parallel.test_stops:stopped", "arguments": arguments, **common})
            jobs.append({"stage": "elastic", "keys": out, **common})
    (tmp_path / "jobs").mkdir()
    results = run_jobs(processes, jobs, tmp_path / "jobs")
    assert [rank.get("error") for job in results for rank in job if "error" in rank] == []
    for name, moment, number in cases:
        lines = {rank["result"] for rank in results[number]}
        assert len(lines) == 1 and lines.pop().startswith("elastic: stopped by SIGTERM"), (name, moment)
        before, after = tmp_path / name, tmp_path / f"{name} {moment}"
        assert log_rows(before) == log_rows(after), (name, moment)
        assert_same_files(list_checkpoints(before)[-1], list_checkpoints(after)[-1])
