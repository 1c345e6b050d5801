"""A loss computed in chunks of the sequence has the gradients of the loss in one piece, on tensor-parallel ranks too."""

from __future__ import annotations

from tests.parallel.worker import run_jobs


def test_gradients_on_tensor_parallel_ranks(tmp_path):
    jobs = [
        {
            "call": "tests.parallel.probe:chunked_loss",
            "arguments": {"layout": {"tensor_model_parallel_size": 2, "sequence_parallel": parallel}, "tied": tied},
        }
        for parallel in (False, True)
        for tied in (False, True)
    ]
    for job, ranks in zip(jobs, run_jobs(2, jobs, tmp_path), strict=True):
        assert all(0 < rank.get("result", 1) < 1e-5 or rank.get("result") == 0 for rank in ranks), (job, ranks)
