"""Stateless seeds: random numbers of a training step are a function of seed, step, pipeline rank and data-parallel rank."""

from __future__ import annotations

import numpy as np
import torch


def seed_step(seed: int, step: int) -> None:
    """Seed the random number generators of this rank for one training step, so that a resumed run needs no stored random state.

    Tensor-parallel ranks get equal seeds in the default generator and different seeds in Megatron-Core's tensor-parallel tracker,
    which Megatron-Core's dropout layers require.
    """
    from megatron.core import parallel_state, tensor_parallel

    place = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    value = int(np.random.SeedSequence([seed, step, *place]).generate_state(1)[0]) >> 1
    torch.manual_seed(value)
    tensor_parallel.model_parallel_cuda_manual_seed(value, force_reset_rng=True)
