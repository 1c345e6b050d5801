"""Ranks of launches on 1,024 GPUs, built on the meta device: bytes as in the plan, and every stored tensor written exactly once.

FLEXTRON_SCALE=1 builds all ranks that differ (every tensor-parallel rank of every pipeline stage), which takes many minutes;
without it a sample is built. docs/results/scale.md has the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from math import prod
from typing import Any

import pytest
from transformers import LlamaConfig

from flextron_mcore.launch.estimate import memory_of
from flextron_mcore.launch.layout import Layout, Rank
from flextron_mcore.launch.plan import Plan, plan
from flextron_mcore.launch.resources import job_estimate
from flextron_mcore.settings.schema import show
from flextron_mcore.space import count_parameters
from tests.launch.conftest import launch  # noqa: F401

WORLD = 1024
ALL = bool(os.environ.get("FLEXTRON_SCALE"))
SIZES = {
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "405B": dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128),
}
STAGES = {
    "70B": {"pipeline_model_parallel_size": 8},
    "405B": {
        "pipeline_model_parallel_size": 16,
        "num_layers_in_first_pipeline_stage": 7,
        "num_layers_in_last_pipeline_stage": 7,
    },
}
SPACE = {"granularity": 8, "attention_unit": "query_head"}


@pytest.fixture(params=SIZES)
def planned(launch, tmp_path, request) -> tuple[Plan, dict[str, Any]]:  # noqa: F811
    """Plan of `elastic` on 1,024 GPUs from the config.json of a Llama 3, and the keys of its layout."""
    config = LlamaConfig(**SIZES[request.param], num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    keys = {"tensor_model_parallel_size": 8, **STAGES[request.param], "sequence_parallel": True, "micro_batch_size": 1}
    layout = {"trainer": {"num_nodes": 128, "devices": 8}, "model": keys}
    space = [f"importance.space.{name}={value}" for name, value in SPACE.items()]
    arguments = [f"hf={tmp_path}", f"gpus={WORLD}", f"layouts={show({WORLD: layout})}", "stages=[importance,elastic]"]
    return plan(launch("cluster=slurm", "cluster.account=a", "model=hf", "gpu=h100", *arguments, *space)), keys


def built(found: Plan, keys: dict[str, Any], ranks: list[int]) -> list[dict[str, Any]]:
    """Result of tests.scale.ranks.measure for each rank. A new process computes it, because it needs its own process groups."""
    options = [f"model.{name}={json.dumps(value)}" for name, value in keys.items()]
    options += [f"model.ddp.{name}=true" for name in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")]
    job = {"model": found.model.to_dict(), "space": SPACE, "world": WORLD, "ranks": ranks}
    command = [sys.executable, "-m", "tests.scale.ranks", json.dumps({**job, "keys": ["trainer.precision=bf16", *options]})]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_ranks_are_as_planned_and_write_every_tensor_once(planned):
    found, keys = planned
    job = found.jobs[1]
    layout = Layout.read(found.model, found.space, job.settings, WORLD, "bf16", cuda=True)
    assert (layout.tensor, layout.data, layout.pipeline * layout.data) == (8, layout.data, WORLD // 8)
    stages = range(layout.pipeline) if ALL else (0, layout.pipeline // 2, layout.pipeline - 1)
    tensors = range(8) if ALL else (0, 7)
    # Megatron-Core's order of ranks: tensor, data, pipeline.
    first = [tensor + 8 * layout.data * stage for stage in stages for tensor in tensors]
    last = [8 * (layout.data - 1) + 7, WORLD - 1]  # two ranks of the last data-parallel replica, which write no weights
    results = {each["rank"]: each for each in built(found, keys, [*first, *last])}
    for rank, each in results.items():
        expected = memory_of(Rank(found.model, layout, rank // (8 * layout.data)), job.settings)
        assert (each["weights"], each["gradients"]) == expected[:2]
        assert each["optimizer"] == pytest.approx(expected[2], rel=1e-3)  # shards end at multiples of 128 bytes
    table = job_estimate(found, job)
    fullest = max(range(layout.pipeline), key=lambda i: sum(memory_of(Rank(found.model, layout, i), job.settings)))
    assert table.memory == sum(memory_of(Rank(found.model, layout, fullest), job.settings))
    if fullest in stages:
        one = results[8 * layout.data * fullest]
        assert (table.weights, table.gradients) == (one["weights"], one["gradients"])
    assert not any(piece[-1] for rank in last for piece in results[rank]["pieces"])
    whole = covered([piece for rank in first for piece in results[rank]["pieces"]])
    if ALL:
        assert sum(whole.values()) == count_parameters(found.model)


def covered(pieces: list[list[Any]]) -> dict[str, int]:
    """{key: elements of the whole tensor}, checked: pieces that are written do not overlap, and together are the tensor.

    Of a sample of ranks, copies lie where a piece is written that other ranks hold, and only a part is there.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    written: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = defaultdict(dict)
    for key, whole, offset, shape, main in pieces:
        assert shapes.setdefault(key, tuple(whole)) == tuple(whole)
        assert all(0 <= o and o + n <= w and o % n == 0 for o, n, w in zip(offset, shape, whole, strict=True)), key
        if main:
            assert tuple(offset) not in written[key], f"{key}: written twice at {offset}"
            written[key][tuple(offset)] = tuple(shape)
    for key, whole in shapes.items():
        parts = written[key]
        assert len(set(parts.values())) <= 1  # equal pieces at multiples of their shape: different offsets do not overlap
        there = sum(map(prod, parts.values()))
        assert there == prod(whole) if ALL else there <= prod(whole), f"{key}: {there} of {prod(whole)} elements are written"
    return {key: prod(whole) for key, whole in shapes.items()}


def test_a_tensor_that_is_written_twice_or_not_at_all_is_found(monkeypatch):
    monkeypatch.setitem(globals(), "ALL", True)
    pieces = [["w", [4, 2], [0, 0], [2, 2], True], ["w", [4, 2], [2, 0], [2, 2], True], ["w", [4, 2], [2, 0], [2, 2], False]]
    assert covered(pieces) == {"w": 8}
    for wrong in (pieces[1:], [*pieces, pieces[0]]):
        with pytest.raises(AssertionError, match="w: "):
            covered(wrong)
