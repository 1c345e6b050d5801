"""Passes of one optimizer step: every micro-batch through every network, in one flush of the pipeline (Flextron, eq. 5)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from flextron_mcore.choosing import Network, set_subnetwork
from flextron_mcore.layers.distillation import Lesson
from flextron_mcore.layers.weighted import WeightedNetwork
from flextron_mcore.pipeline.losses import masked_sum
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.space import SubNetwork

Batch = Mapping[str, Tensor]  # tokens, labels, loss_mask and position_ids, [B, S] each
# Arguments: index of the network, number of the micro-batch, its losses [B, S], this rank's final hidden states [S, B, C].
Watch = Callable[[int, int, Tensor, Tensor], None]
TEACHER = -1  # index of the frozen teacher's pass among a micro-batch's passes, before those of the networks


@dataclass(frozen=True)
class Teaching:
    """Distillation into the networks of a training step.

    Attributes:
        weight: share of the divergence from the teacher in a network's loss, 0 to 1.
        temperature: divisor of both models' logits in the divergence.
        parent: this rank's chunks of a frozen model, which teaches all networks; None: the first network of the step teaches the
            others.
    """

    weight: float
    temperature: float = 1.0
    parent: Sequence[GPTModel] | None = None


def run_networks(
    model: Sequence[torch.nn.Module],
    batches: Callable[[], Iterator[Batch]],
    num_batches: int,
    networks: Sequence[Network],
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool = False,
    teach: Teaching | None = None,
    gates: Sequence[Sequence[Tensor] | None] | None = None,
    watch: Watch | None = None,
    drop: Callable[[], bool] | None = None,
    full_weight: float = 1.0,
) -> Tensor:
    """Run every micro-batch through every network, and accumulate gradients in the model unless `forward_only`.

    The gradients are those of sum_j L(M_j(x), y), with L the mean loss of a token (Flextron, eq. 5). Megatron-Core divides by the
    number of tokens that it is told, so only the full model's tokens are counted. Call on all ranks. Afterwards the model
    computes the full model.

    Args:
        model: this rank's virtual-pipeline chunks (usually one).
        batches: function () that returns a new iterator over this rank's micro-batches.
        num_batches: number of this rank's micro-batches, the same on all ranks.
        networks: networks to run. In training the first is the full model (None).
        seq_length: tokens of a sample.
        micro_batch_size: samples of a micro-batch.
        forward_only: evaluate without gradients.
        teach: distillation; None: none.
        gates: for each network a router gate, a scalar that multiplies the output, for each block, or None for a network without
            gates; None: no gates. `gate_gradients` gets their gradients afterwards.
        watch: function (index of the network, number of the micro-batch over all data-parallel ranks, its losses [B, S], this
            rank's final hidden states [S, B, C]) called on the last pipeline stage for each; None: none.
        drop: function () called before each micro-batch of each network, equal on tensor-parallel ranks. Once it returns True,
            the micro-batches that remain are not computed (in training the very last one is), so that this call ends soon, and
            its results are void; None: never.
        full_weight: factor of the first network's loss in the sum that is minimised.

    Returns:
        [networks, 3] in float64 on the CPU, the same on all ranks: sum of the language-model loss in nats, number of tokens
        that the loss mask counts, and sum of the divergence from the teacher, over all micro-batches of all data-parallel ranks.
    """
    per_batch = len(networks)
    parent = teach.parent if teach else None
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()

    def items() -> Iterator[tuple[Batch, int, int, bool]]:
        for number, batch in enumerate(batches()):
            on_device = {name: tensor.to(device(), non_blocking=True) for name, tensor in batch.items()}
            # All networks of a micro-batch in a row, so one teacher's logits are alive at a time.
            for index in range(TEACHER if parent else 0, per_batch):
                # The last backward pass starts the reduction of gradients over data-parallel ranks: others may not drop it.
                needed = not forward_only and number == num_batches - 1 and index == per_batch - 1
                yield on_device, index, number * ranks + rank, needed

    lesson: list[Lesson] = []  # of the micro-batch whose networks pass through the last pipeline stage
    chunk_of = {id(unwrap(chunk)): number for number, chunk in enumerate(model)}

    def forward_step(iterator: Iterator[tuple[Batch, int, int, bool]], chunk: torch.nn.Module) -> tuple[Tensor, Callable]:
        batch, index, number, needed = next(iterator)
        gpt = unwrap(chunk)
        dropped = drop is not None and drop()
        if dropped and not needed:
            return _no_output(gpt, seq_length, micro_batch_size), partial(no_loss, batch, True)
        if index == TEACHER:
            return _teach(parent[chunk_of[id(gpt)]], gpt, batch), partial(no_loss, batch, False)
        network = networks[index]
        if not isinstance(network, SubNetwork | WeightedNetwork | None):
            network.begin(number, batch["loss_mask"])
        set_subnetwork(chunk, network, gates[index] if gates else None)
        options: dict[str, Any] = {}
        if teach and gpt.post_process and not dropped:
            if index == 0 and not parent:
                lesson[:] = [Lesson(teach.temperature)]
            options = {"lesson": lesson[0]}
        with _final_states(gpt) if watch else contextlib.nullcontext([]) as final:
            output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **options)
        return output, partial(loss_function, batch, index, number, final)

    def _teach(teacher: GPTModel, gpt: GPTModel, batch: Batch) -> Tensor:
        """Run a chunk of the frozen teacher; the last pipeline stage keeps its logits. Returns the output for the next stage.

        Args:
            teacher: this rank's chunk of the teacher.
            gpt: this rank's chunk of the model that it teaches.
            batch: micro-batch.
        """
        if gpt.post_process:
            lesson.clear()  # frees the logits of the micro-batch before
        teacher.set_input_tensor(None if gpt.pre_process else gpt.decoder.input_tensor)
        output = _no_output(gpt, seq_length, micro_batch_size)
        with torch.no_grad():
            found = teacher(batch["tokens"], batch["position_ids"], None)
        if not gpt.post_process:
            return output + found
        lesson[:] = [Lesson(teach.temperature, found.transpose(0, 1))]
        return output

    def loss_function(
        batch: Batch, index: int, number: int, final: list[Tensor], output: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask = batch["loss_mask"]
        loss_BS, divergence_BS = output if output.dim() == 3 else (output, None)
        if watch:
            watch(index, number, loss_BS.detach(), final[0])
        total = language = masked_sum(loss_BS, mask)
        tokens = mask.sum()
        report = torch.zeros(per_batch, 3, dtype=torch.float64, device=output.device)
        if divergence_BS is not None:
            divergence = masked_sum(divergence_BS, mask)
            total = (1 - teach.weight) * language + teach.weight * divergence
            report[index, 2] = divergence.detach().double()
        exact = (loss_BS.detach().double() * mask.double()).sum() if forward_only else language.detach().double()
        report[index, 0], report[index, 1] = exact, tokens.double()
        counted = tokens if index == 0 else torch.zeros_like(tokens)
        return total * full_weight if index == 0 else total, counted.int(), report

    def no_loss(batch: Batch, counted: bool, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        report = torch.zeros(per_batch, 3, dtype=torch.float64, device=output.device)
        tokens = batch["loss_mask"].sum().int()
        return output.sum(), tokens if counted else torch.zeros_like(tokens), report

    iterators = [items() for _ in model]
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=list(model) if len(model) > 1 else model[0],
        num_microbatches=num_batches * (per_batch + (parent is not None)),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    for chunk in model:
        set_subnetwork(chunk, None)
    total = torch.zeros(per_batch, 3, dtype=torch.float64, device=device())
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        total += torch.stack(reports).sum(0)
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return from_last_stage(total).cpu()


def from_last_stage(tensor: Tensor) -> Tensor:
    """Broadcast the last pipeline stage's tensor to all stages, in place, and return it. Call on all pipeline stages."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last, group = parallel_state.get_pipeline_model_parallel_last_rank(), parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.broadcast(tensor, last, group=group)
    return tensor


def _no_output(gpt: GPTModel, seq_length: int, micro_batch_size: int) -> Tensor:
    """Zeros [S, B, C] to send to the next pipeline stage for a pass that is not computed; stages before get a zero gradient.

    Args:
        gpt: this rank's chunk of the model.
        seq_length: tokens of a sample.
        micro_batch_size: samples of a micro-batch.
    """
    if not gpt.pre_process:
        return gpt.decoder.input_tensor * 0
    config = gpt.config
    length = seq_length // config.tensor_model_parallel_size if config.sequence_parallel else seq_length
    dtype = config.pipeline_dtype or config.params_dtype
    zeros_SBC = torch.zeros(length, micro_batch_size, config.hidden_size, dtype=dtype, device=device(), requires_grad=True)
    return zeros_SBC * 1  # Megatron-Core frees a stage's output, which a tensor without an operation behind it does not survive


@contextlib.contextmanager
def _final_states(gpt: GPTModel) -> Iterator[list[Tensor]]:
    """Context with a list that gets the decoder's output [S, B, C] of each forward pass, detached."""
    found: list[Tensor] = []
    handle = gpt.decoder.register_forward_hook(lambda module, args, output: found.append(output.detach()))
    try:
        yield found
    finally:
        handle.remove()


def gate_gradients(gates: Sequence[Sequence[Tensor]], tokens: float, sequence_parallel: bool) -> Tensor:
    """Gradients of each network's mean loss with respect to its router gates, after `run_networks`: float64 [networks, blocks].

    The result is on the CPU and the same on all ranks: gradients are summed over data- and pipeline-parallel ranks. Call on all
    ranks.

    Args:
        gates: for each network a router gate, a scalar that multiplied the output, for each block.
        tokens: number of tokens in the mean loss.
        sequence_parallel: True if tensor-parallel ranks hold different positions, whose gradients are then summed, too.
    """
    zero = torch.zeros((), device=device())
    found = torch.stack([torch.stack([zero if gate.grad is None else gate.grad for gate in row]) for row in gates]).double()
    groups = [parallel_state.get_data_parallel_group(), parallel_state.get_pipeline_model_parallel_group()]
    if sequence_parallel:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    for group in groups:
        torch.distributed.all_reduce(found, group=group)
    return (found / tokens).cpu()
