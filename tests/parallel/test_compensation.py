"""Compensation of query heads at several layouts: the matrices, the weights and the losses of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flextron_mcore.checkpoint.reader import TensorReader
from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.layers.compensation import TENSOR
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.parallel.worker import run_jobs
from tests.stages.conftest import stage

TP2, PP2 = "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "data parallel": (2, []),
    "tensor": (2, [TP2]),
    "sequence": (2, [TP2, "model.sequence_parallel=true"]),
    "pipeline": (2, [PP2]),
    "tensor x pipeline": (4, [TP2, PP2]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, text) -> Path:
    """Directory with `one` and for each layout the results `sorted`, and `losses` of the checkpoint `one/sorted`."""
    run = tmp_path_factory.mktemp("layouts")
    stage("prepare", f"input=[{text}/code,{text}/prose]", "vocab_size=300", "valid_fraction=0.2", f"out={run}/data")
    arch = toy.config(num_layers=4, num_attention_heads=12, num_query_groups=4, kv_channels=8, vocab_size=301)
    space = ElasticSpace.build(arch, granularity=2, attention_unit="query_head", heads=[4, 8, 12], ffn_hidden_size=[1.0])
    toy.write(toy.model(arch, space), CheckpointInfo(arch, space), run / "start")
    sort = [f"checkpoint={run}/start", f"data={run}/data", "samples=12", "model.micro_batch_size=2", "ablation_batches=0"]
    sort.append("score.heads=compensated")
    evaluate = [f"checkpoint={run}/one/sorted", f"data={run}/data", "limit_val_batches=2", "model.micro_batch_size=2"]

    def jobs(name: str, layout: list[str]) -> list[dict[str, Any]]:
        """Jobs of `importance` and `evaluate` at a layout."""
        named = [("importance", sort, "sorted"), ("evaluate", evaluate, "losses")]
        return [{"stage": s, "keys": [*keys, *layout, f"out={run}/{name}/{out}"], "layout": name} for s, keys, out in named]

    for job in jobs("one", []):
        stage(job["stage"], *job["keys"])
    for processes in (2, 4):
        found = [job for name, (needed, keys) in LAYOUTS.items() if needed == processes for job in jobs(name, keys)]
        for job in run_jobs(processes, found, tmp_path_factory.mktemp("jobs")):
            assert all("error" not in rank for rank in job), job
    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_sorting_is_that_of_one_process(run, name):
    """Orders are equal, and so are all tensors but the matrices and output projections, whose sums over tokens are rounded."""
    scores, expected = (load_file(run / folder / "sorted" / "scores.safetensors") for folder in (name, "one"))
    for key, values in expected.items():
        torch.testing.assert_close(scores[key], values, rtol=1e-5, atol=0, msg=key)
    found, one = (TensorReader(open_checkpoint(run / folder / "sorted")) for folder in (name, "one"))
    assert set(found.keys()) == set(one.keys()) and open_checkpoint(run / name / "sorted") == open_checkpoint(
        run / "one" / "sorted"
    )
    for key in one.keys():
        if "linear_proj" not in key:
            assert torch.equal(found.read(key), one.read(key)), key
        torch.testing.assert_close(found.read(key), one.read(key), atol=1e-5, rtol=1e-5, msg=key)
    matrices_GQQ = [one.read(f"decoder.layers.{i}.{TENSOR}") for i in range(4)]
    assert all(matrix.shape == (4, 3, 3) and (matrix.tril(-1) != 0).sum() == 12 for matrix in matrices_GQQ)


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_are_those_of_one_process(run, name):
    """Losses with every number of heads. Each rank has the compensation matrices of its own KV groups alone."""
    found, expected = (json.loads((run / folder / "losses" / "metrics.json").read_text())["networks"] for folder in (name, "one"))
    assert len(expected) == len(found) == 3
    for row, other in zip(expected, found, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-6) and other["name"] == row["name"]
