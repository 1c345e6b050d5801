"""Sliding windows in some layers only, and LongRoPE past its original context, at each tensor and pipeline parallel size."""

from __future__ import annotations

import pytest
import torch

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.space import ElasticSpace
from tests import hf_toy, toy
from tests.layers.test_equality import LONGROPE
from tests.parallel.worker import run_jobs

MODELS = {
    "windows": dict(
        sliding_window=3, window_attn_skip_freq=[1, 0, 0, 1]
    ),  # two pipeline stages have one such layer each, at different places
    "longrope": dict(rope_scaling=LONGROPE),
}
LAYOUTS = (
    {"tensor_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_model_parallel_size": 2},
)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_one_process(name, tmp_path):
    arch = toy.config(num_layers=4, num_attention_heads=8, **MODELS[name])
    info = CheckpointInfo(arch, ElasticSpace.build(arch, granularity=2))
    model = toy.model(arch, info.space)
    toy.write(model, info, tmp_path / "start")
    tokens, positions = toy.inputs(batch=3, vocab=arch.vocab_size)
    assert tokens.shape[1] > LONGROPE["original_max_position_embeddings"]
    with torch.no_grad():
        expected = model.eval()(tokens, positions, None)
    jobs = [
        {
            "call": "tests.parallel.probe:logits",
            "layout": str(number),
            "arguments": {"checkpoint": f"{tmp_path}/start", "layout": layout, "out": f"{tmp_path}/{number}"},
        }
        for number, layout in enumerate(LAYOUTS)
    ]
    (tmp_path / "jobs").mkdir()
    run_jobs(2, jobs, tmp_path / "jobs")
    for number in range(len(LAYOUTS)):
        found = torch.load(f"{tmp_path}/{number}.0")
        torch.testing.assert_close(found, expected, atol=hf_toy.ATOL, rtol=0)
