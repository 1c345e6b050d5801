"""Logits of a network, computed in any parallel layout.

Shape suffixes: B batch, S sequence, V vocabulary (of this rank, before it is gathered).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.pipeline.networks import from_last_stage
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.space import SubNetwork


@torch.no_grad()
def forward_logits(chunks: Sequence[torch.nn.Module], net: SubNetwork | None, tokens_BS: Tensor) -> Tensor:
    """Compute logits [B, S, vocabulary] in float32, on the device and the same on every rank. Call on all ranks, same tokens.

    Args:
        chunks: this rank's virtual-pipeline chunks (usually one), wrapped or not.
        net: sub-network, None for the full model.
        tokens_BS: token ids, on any device.
    """
    gpt = unwrap(chunks[0])
    batch, length = tokens_BS.shape
    tokens_BS = tokens_BS.to(device())
    positions_BS = torch.arange(length, device=device()).expand(batch, -1)

    def gathered(output_BSV: Tensor, non_loss_data: bool) -> Tensor:
        return gather_from_tensor_model_parallel_region(output_BSV).float()

    def forward_step(_, chunk: torch.nn.Module) -> tuple[Tensor, Callable]:
        return chunk(tokens_BS, positions_BS, None), gathered

    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    interleaved = len(chunks) > 1
    with contextlib.ExitStack() as stack:
        for chunk in chunks:
            stack.enter_context(use_subnetwork(chunk, net))
        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(chunks) if interleaved else None,
            model=list(chunks) if interleaved else chunks[0],
            num_microbatches=pipeline if interleaved else 1,  # the interleaved schedule needs at least one for each stage
            seq_length=length,
            micro_batch_size=batch,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        logits_BSV = found[0].contiguous()
    else:
        logits_BSV = torch.empty(batch, length, gpt.vocab_size, device=device())
    return from_last_stage(logits_BSV)[..., : gpt.real_vocab_size]  # without the padding of the vocabulary
