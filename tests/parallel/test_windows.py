"""Sliding windows in some layers only: every layer has its own at each tensor and pipeline parallel size."""

from __future__ import annotations

import torch

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.space import ElasticSpace
from tests import hf_toy, toy
from tests.parallel.worker import run_jobs


def test_logits_are_those_of_one_process(tmp_path):
    """Two pipeline stages have a windowed layer each, at different places."""
    arch = toy.config(num_layers=4, num_attention_heads=8, sliding_window=3, window_attn_skip_freq=[1, 0, 0, 1])
    info = CheckpointInfo(arch, ElasticSpace.build(arch, granularity=2))
    model = toy.model(arch, info.space)
    toy.write(model, info, tmp_path / "start")
    tokens, positions = toy.inputs(batch=3, vocab=arch.vocab_size)
    with torch.no_grad():
        expected = model.eval()(tokens, positions, None)
    layouts = ({"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2})
    jobs = [
        {
            "call": "tests.parallel.probe:logits",
            "layout": str(number),
            "arguments": {"checkpoint": f"{tmp_path}/start", "layout": layout, "out": f"{tmp_path}/{number}"},
        }
        for number, layout in enumerate(layouts)
    ]
    (tmp_path / "jobs").mkdir()
    run_jobs(2, jobs, tmp_path / "jobs")
    for number in range(len(layouts)):
        found = torch.load(f"{tmp_path}/{number}.0")
        torch.testing.assert_close(found, expected, atol=hf_toy.ATOL, rtol=0)
