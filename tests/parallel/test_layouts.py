"""The same training step in two processes: tensor, pipeline and data parallel give the losses of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.stages.conftest import stage

LAYOUTS = {
    "tensor": ["model.tensor_model_parallel_size=2"],
    "tensor with sequence parallelism": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "pipeline": ["model.pipeline_model_parallel_size=2"],
    "data": [],
}


def losses(run: Path) -> list[float]:
    found = []
    for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        found += [row["loss"], *row["subnetwork_losses"]] if row["event"] == "train" else list(row["losses"].values())
    return found


@pytest.fixture(scope="module")
def start(tmp_path_factory, text) -> tuple[Path, list[str]]:
    """A random model at granularity 2, tied embeddings, and the keys of a short training run."""
    run = tmp_path_factory.mktemp("layouts")
    stage("prepare", f"input=[{text}/code,{text}/prose]", "vocab_size=300", "valid_fraction=0.2", f"out={run}/data")
    arch = toy.config(vocab_size=300, share_embeddings_and_output_weights=True)
    space = ElasticSpace.build(arch, granularity=2, heads=[0.5, 1.0], ffn_hidden_size=[0.25, 0.5, 1.0])
    toy.write(toy.model(arch, space), CheckpointInfo(arch, space), run / "start")
    keys = [
        f"checkpoint={run}/start",
        f"data={run}/data",
        "model.micro_batch_size=2",
        "model.global_batch_size=4",
        "trainer.max_steps=4",
        "trainer.val_check_interval=4",
        "trainer.limit_val_batches=3",
        "model.optim.sched.warmup_steps=0",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=4",
        "exp_manager.checkpoint_callback_params.async_save=false",
    ]
    stage("elastic", *keys, f"out={run}/one")
    return run, keys


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes_are_one(start, name, tmp_path):
    run, keys = start
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flextron_mcore"]
    result = subprocess.run(
        [*command, "elastic", *keys, *LAYOUTS[name], f"out={tmp_path}/two", "debug=true"],
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    expected, found = losses(run / "one"), losses(tmp_path / "two")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert open_checkpoint(tmp_path / "two").space == open_checkpoint(run / "one").space
