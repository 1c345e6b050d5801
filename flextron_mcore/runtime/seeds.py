"""Random state without a state: what a step draws is a function of (seed, step) and the rank's place."""

from __future__ import annotations

import numpy as np
import torch


def seed_step(seed: int, step: int) -> None:
    """Seed what a training step draws on this rank (dropout), so that a resumed run draws the same without a stored state.

    Tensor-parallel ranks share the default generator and differ in Megatron-Core's tracker, as its dropouts expect.
    """
    from megatron.core import parallel_state, tensor_parallel

    place = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    value = int(np.random.SeedSequence([seed, step, *place]).generate_state(1)[0]) >> 1
    torch.manual_seed(value)
    tensor_parallel.model_parallel_cuda_manual_seed(value, force_reset_rng=True)
