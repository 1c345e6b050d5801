"""Batch sizes of steps: Megatron-LM's own counting, and a rampup that continues exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from megatron.core import num_microbatches_calculator as megatron

from flextron_mcore.config import FlextronError
from flextron_mcore.settings.sections import TrainingModelSettings
from flextron_mcore.training.rampup import BatchSizes
from tests.stages.conftest import TRAIN, stage


@pytest.mark.skipif(not hasattr(megatron, "RampupBatchsizeNumMicroBatchesCalculator"), reason="Megatron-Core 0.19 has no rampup")
@pytest.mark.parametrize("rampup", [[8, 8, 200], [32, 16, 1], [4, 12, 1000], [56, 8, 10_000]])
def test_sizes_are_those_of_megatron(rampup: list[int]) -> None:
    """Each step begins at the number of consumed samples that Megatron-LM's training loop counts."""
    steps, found = 120, BatchSizes(TrainingModelSettings(global_batch_size=64, rampup_batch_size=rampup), 120)
    megatron.init_num_microbatches_calculator(1, rampup, 64, 2, 2)
    try:
        consumed = 0
        for step in range(steps):
            megatron.update_num_microbatches(consumed)
            size = megatron.get_num_microbatches() * 2 * 2
            assert (found.start(step), found.of(step)) == (consumed, size)
            assert size in found.sizes
            consumed += size
    finally:
        megatron.destroy_num_microbatches_calculator()


def test_without_rampup_all_steps_are_alike() -> None:
    found = BatchSizes(TrainingModelSettings(global_batch_size=16), 10)
    assert [found.start(step) for step in (0, 1, 7)] == [0, 16, 112]
    assert found.sizes == [16]


@pytest.mark.parametrize("rampup", [[64, 8, 100], [80, 8, 100], [8, 10, 100]])
def test_a_rampup_that_misses_the_size_is_refused(rampup: list[int]) -> None:
    with pytest.raises(FlextronError, match=r"model.rampup_batch_size=\[.*global_batch_size=64"):
        BatchSizes(TrainingModelSettings(global_batch_size=64, rampup_batch_size=rampup), 10)


def keys(chain: Path, out: Path, *more: str) -> list[str]:
    sizes = ["model.micro_batch_size=4", "model.global_batch_size=16", "model.rampup_batch_size=[4,4,24]", "trainer.max_steps=6"]
    return [f"checkpoint={chain}/sorted", f"data={chain}/data", *sizes, *TRAIN, f"out={out}", *more]


def rows(run: Path) -> list[list[float]]:
    logged = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [[row["loss"], *row["subnetwork_losses"], row["grad_norm"]] for row in logged if row["event"] == "train"]


def test_a_rampup_continues_exactly(chain: Path, tmp_path: Path, capsys) -> None:
    """Elastic training that is stopped within a rampup ends with the losses of an undisturbed run. Keys have NeMo's names."""
    nemo = ("trainer.precision=32", "exp_manager.resume_if_exists=true")
    metrics = stage("elastic", *keys(chain, tmp_path / "whole", *nemo))
    assert metrics["tokens"] == 32 * (4 + 4 + 8 + 12 + 16 + 16)
    assert "elastic: reads 1,920 tokens from " in capsys.readouterr().out
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "iter_0000006")
    (tmp_path / "again" / "metrics.json").unlink()
    with pytest.raises(FlextronError, match="resume_if_exists=false: out=.* unfinished run"):
        stage("elastic", *keys(chain, tmp_path / "again", "exp_manager.resume_if_exists=false"))
    with pytest.raises(FlextronError, match=r"model.rampup_batch_size=\[4,4,24\], not null"):
        stage("elastic", *keys(chain, tmp_path / "again", "model.rampup_batch_size=null"))
    stage("elastic", *keys(chain, tmp_path / "again", "trainer.precision=fp32"))
    assert rows(tmp_path / "again") == rows(tmp_path / "whole")
    assert len(rows(tmp_path / "whole")) == 6


def test_sizes_that_micro_batches_do_not_divide_are_refused(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(FlextronError, match="global batch size of 2,.* multiples of 4"):
        stage("elastic", *keys(chain, tmp_path / "out", "model.rampup_batch_size=[2,2,24]"))
    assert not (tmp_path / "out").exists()
