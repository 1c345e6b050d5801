"""At any number of ranks, micro-batch size and schedule, every sample counts once, padding of the last micro-batches never."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from megatron.core import parallel_state

from flextron_mcore.pipeline.batches import count_batches, share


class Samples(torch.utils.data.Dataset):
    """Dataset whose sample i has the value i in every field."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        token = torch.full((3,), i)
        return {"tokens": token, "labels": token, "loss_mask": torch.ones(3), "position_ids": token}


@pytest.mark.parametrize("samples", [1, 5, 11, 20])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_every_sample_counts_once(samples, size, ranks, stages, monkeypatch):
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: ranks)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: stages)
    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: 2 if stages > 1 else None)
    counted: Counter[int] = Counter()
    for rank in range(ranks):
        monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda rank=rank: rank)
        batches = list(share(Samples(), samples, size))
        assert len(batches) == count_batches(samples, size)
        for batch in batches:
            assert batch["tokens"].shape == (size, 3) and batch["tokens"].max() < samples
            counted.update(batch["tokens"][batch["loss_mask"] == 1].tolist())
    assert counted == dict.fromkeys(range(samples), 3)


def test_no_more_micro_batches_than_the_schedule_needs(monkeypatch):
    assert count_batches(11, 4) == 3
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 2)
    assert count_batches(11, 4) == 3  # without virtual pipeline stages, any number of micro-batches is allowed
    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: 2)
    assert count_batches(11, 4) == 4 and count_batches(16, 4) == 4
