"""One optimizer step: every micro-batch through every network, in one flush of the pipeline (Flextron, eq. 5)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from flextron_mcore.choosing import Network, set_subnetwork
from flextron_mcore.layers.gpt import mask_padding
from flextron_mcore.layers.weighted import WeightedNetwork
from flextron_mcore.pipeline.losses import distillation, masked_sum
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.settings.sections import DistillationSettings
from flextron_mcore.space import SubNetwork

Batch = Mapping[str, Tensor]
# (index of the network, number of the micro-batch, losses of its tokens [B, S], final hidden states [S, B, C] of this rank)
Watch = Callable[[int, int, Tensor, Tensor], None]


def run_networks(
    model: Sequence[torch.nn.Module],
    batches: Callable[[], Iterator[Batch]],
    num_batches: int,
    networks: Sequence[Network],
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool = False,
    teach: DistillationSettings | None = None,
    gates: Sequence[Sequence[Tensor] | None] | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Run `num_batches` micro-batches through each of `networks`, of which the first is the full model when training.

    Returns [len(networks), 2] float64, the same on all ranks: sums of the language-model loss and of tokens over the
    data-parallel group. Unless forward_only, leaves the gradients of eq. 5 in the model: of the sum over networks of their mean
    losses. Megatron-Core divides by the number of tokens that it is passed, which is the full model's alone.

    model: this rank's virtual-pipeline chunks (usually one). batches: makes an iterator of this rank's micro-batches. teach:
    distillation of the networks from the first one. gates: one for each block of each network, or None for a network without;
    `gate_gradients` collects their gradients. watch: called with every micro-batch, on the last pipeline stage.
    """
    per_batch = len(networks)
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()

    def items() -> Iterator[tuple[Batch, int, int]]:
        for number, batch in enumerate(batches()):
            on_device = {name: tensor.to(device(), non_blocking=True) for name, tensor in batch.items()}
            for index in range(per_batch):  # the networks of a micro-batch follow each other: its teacher lives briefly
                yield on_device, index, number * ranks + rank

    teacher: list[Tensor] = []

    def forward_step(iterator: Iterator[tuple[Batch, int, int]], chunk: torch.nn.Module) -> tuple[Tensor, Callable]:
        batch, index, number = next(iterator)
        network = networks[index]
        if not isinstance(network, SubNetwork | WeightedNetwork | None):
            network.begin(number, batch["loss_mask"])
        set_subnetwork(chunk, network, gates[index] if gates else None)
        gpt = unwrap(chunk)
        with _final_states(gpt) if watch else contextlib.nullcontext([]) as final:
            output = chunk(batch["tokens"], batch["position_ids"], None, labels=None if teach else batch["labels"])
        return output, partial(loss_function, batch, index, number, gpt, final)

    def loss_function(
        batch: Batch, index: int, number: int, gpt: GPTModel, final: list[Tensor], output: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask = batch["loss_mask"]
        if teach:
            output = mask_padding(output, gpt.real_vocab_size)
            # The loss wants the logits [B, S, V] sequence first, and works in place.
            logits_SBV = output.transpose(0, 1).clone(memory_format=torch.contiguous_format)
            loss_BS = gpt.compute_language_model_loss(batch["labels"], logits_SBV)
        else:
            loss_BS = output
        if watch:
            watch(index, number, loss_BS.detach(), final[0])
        total = language = masked_sum(loss_BS, mask)
        if teach and index == 0:
            teacher[:] = [output.detach()]
        elif teach:
            divergence = masked_sum(distillation(output, teacher[0], teach.temperature), mask)
            total = (1 - teach.weight) * language + teach.weight * divergence
        tokens = mask.sum()
        report = torch.zeros(per_batch, 2, dtype=torch.float64, device=output.device)
        exact = (loss_BS.detach().double() * mask.double()).sum() if forward_only else language.detach().double()
        report[index, 0], report[index, 1] = exact, tokens.double()
        counted = tokens if index == 0 else torch.zeros_like(tokens)
        return total, counted.int(), report

    iterators = [items() for _ in model]
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=list(model) if len(model) > 1 else model[0],
        num_microbatches=num_batches * per_batch,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    for chunk in model:
        set_subnetwork(chunk, None)
    total = torch.zeros(per_batch, 2, dtype=torch.float64, device=device())
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        total += torch.stack(reports).sum(0)
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return from_last_stage(total).cpu()


def from_last_stage(tensor: Tensor) -> Tensor:
    """The tensor of the last pipeline stage, on all stages, in place of theirs."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last, group = parallel_state.get_pipeline_model_parallel_last_rank(), parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.broadcast(tensor, last, group=group)
    return tensor


@contextlib.contextmanager
def _final_states(gpt: GPTModel) -> Iterator[list[Tensor]]:
    """Context that collects the final hidden states of forward passes in a list."""
    found: list[Tensor] = []
    handle = gpt.decoder.register_forward_hook(lambda module, args, output: found.append(output.detach()))
    try:
        yield found
    finally:
        handle.remove()


def gate_gradients(gates: Sequence[Sequence[Tensor]], tokens: float, sequence_parallel: bool) -> Tensor:
    """Gradients of each network's mean loss by its gates after `run_networks`: [networks, blocks], the same on all ranks.

    tokens: number that the loss is the mean over. Gates of a rank gather over its layers, its samples and, with sequence
    parallelism, its positions.
    """
    zero = torch.zeros((), device=device())
    found = torch.stack([torch.stack([zero if gate.grad is None else gate.grad for gate in row]) for row in gates]).double()
    groups = [parallel_state.get_data_parallel_group(), parallel_state.get_pipeline_model_parallel_group()]
    if sequence_parallel:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    for group in groups:
        torch.distributed.all_reduce(found, group=group)
    return (found / tokens).cpu()
