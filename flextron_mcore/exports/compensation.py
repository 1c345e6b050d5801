"""Compensation of removed units: the projections that follow them are refitted by least squares on calibration text.

A projection W [C, U] (output projection, fc2) is multiplied with the activations a [U] of the full model's units. A sub-network
has the units K and lacks the units R. With the second moments M = E[a a^T] over calibration tokens, its weight

    W' = W_K + W_R M_RK (M_KK + ridge)^-1

minimises E|W a - W' a_K|^2. The ridge pulls W' towards the plain slice W_K. A projection with a bias has an intercept: M holds
centred moments, and b' = b + W E[a] - W' E[a_K]. A cut hidden size keeps the first rows of W' and b', whose least squares are
independent of each other.

Moments are those of the full model, so one pass serves all layers. Each tensor-parallel rank sums the rows of M of its own units.

Shape suffixes: S sequence, B batch, n counted tokens, C hidden channels of the sub-network, U channels of this rank's units, of
which the sub-network keeps K and lacks R; k channels that it keeps on all tensor-parallel ranks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from flextron_mcore.axes import Axis, layer_axes
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.pipeline.networks import Batch, run_networks
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.sorting.importance import Tokens, undeal
from flextron_mcore.space import ElasticSpace, SubNetwork

RIDGE = 1e-4  # ridge of each unit, as a share of its second moment


def narrowed(model: ModelConfig, net: SubNetwork) -> list[tuple[int, Axis]]:
    """(index of the layer, layer axis) of every block of a sub-network that has fewer units than the full model's."""
    return [
        (number, axis)
        for number, layer in enumerate(net.layers)
        for axis in layer_axes()
        if layer.executed and axis.size(layer) < axis.full(model)
    ]


def moment_bytes(model: ModelConfig, net: SubNetwork, ranks: int) -> dict[int, int]:
    """{index of a layer: bytes of its second moments on a tensor-parallel rank}, for the layers with narrowed blocks.

    Args:
        model: architecture of the full model.
        net: sub-network.
        ranks: number of tensor-parallel ranks.
    """
    found: dict[int, int] = {}
    for number, axis in narrowed(model, net):
        channels = model.kv_channels if axis.block == "attention" else 1
        units = axis.full(model) // (ranks if axis.parallel else 1)
        size = 8 if model.bias else 4
        found[number] = found.get(number, 0) + size * units * axis.size(net.layers[number]) * channels**2
    return found


def passes(model: Sequence[torch.nn.Module], net: SubNetwork, most_bytes: float = math.inf) -> list[list[int]]:
    """Layers of this pipeline stage to refit in each pass over the calibration text, as lists of indices.

    All ranks make the same number of passes; lists may be empty. Call on all ranks.

    Args:
        model: this rank's virtual-pipeline chunks of the full model.
        net: sub-network.
        most_bytes: most bytes of second moments that a rank holds at a time; a layer is never divided.
    """
    mine = {layer.layer_number - 1 for chunk in model for layer in unwrap(chunk).decoder.layers}
    sizes = moment_bytes(unwrap(model[0]).architecture, net, parallel_state.get_tensor_model_parallel_world_size())
    parts: list[list[int]] = []
    filled = 0
    for number, size in sizes.items():
        if number in mine:
            if not parts or filled + size > most_bytes:
                parts.append([])
                filled = 0
            parts[-1].append(number)
            filled += size
    count = torch.tensor(len(parts), device=device())
    torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
    return parts + [[]] * (int(count) - len(parts))


def refit(
    model: Sequence[torch.nn.Module],
    net: SubNetwork,
    parts: Sequence[Sequence[int]],
    batches: Callable[[], Iterator[Batch]],
    num_batches: int,
    seq_length: int,
    micro_batch_size: int,
) -> tuple[dict[str, Tensor], int]:
    """Refit by least squares the projections behind removed units: ({name in the full model: fp32 tensor on the CPU}, tokens).

    They are the attention's output projection and fc2 of each block that has fewer units than in the full model. The refitted
    weight times the kept units comes closest to the full model's weight times all units. Tensors have the sub-network's shape,
    with heads and neurons in order, not dealt into buckets (checkpoint/sharding.py), and are equal on all ranks up to rounding.
    The second result is the number of tokens with loss_mask 1, on which they were fitted. Call on all ranks. Raises FlextronError
    for activations that are not finite.

    Args:
        model: this rank's virtual-pipeline chunks of the full model.
        net: sub-network.
        parts: indices of the layers to refit in each pass over the batches, from `passes`.
        batches: function that returns an iterator over this rank's micro-batches.
        num_batches: number of micro-batches.
        seq_length: tokens of a sample.
        micro_batch_size: samples of a micro-batch.
    """
    gpt = unwrap(model[0])
    arch: ModelConfig = gpt.architecture
    layers = {layer.layer_number - 1: layer for chunk in model for layer in unwrap(chunk).decoder.layers}
    found: dict[str, Tensor] = {}
    tokens, space = 0.0, gpt.decoder.layers[0].mlp.space
    for chunk in model:
        chunk.eval()
    current = Tokens()
    for part in parts:
        with contextlib.ExitStack() as stack, torch.no_grad():
            blocks = [
                stack.enter_context(_observed(layers[number], axis, arch, net, current))
                for number, axis in narrowed(arch, net)
                if number in part
            ]
            total = run_networks(
                model, lambda: current.of(batches()), num_batches, [None], seq_length, micro_batch_size, forward_only=True
            )
            tokens = total[0, 1].item()
            for block in blocks:
                found |= block.solved(space)
            del blocks
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        every: list[dict[str, Tensor]] = [{} for _ in range(group.size())]
        torch.distributed.all_gather_object(every, found, group=group)
        found = {name: tensor for each in every for name, tensor in each.items()}
    return found, round(tokens)


def install(model: Sequence[torch.nn.Module], net: SubNetwork, refitted: Mapping[str, Tensor]) -> None:
    """Write refitted tensors over the slices that a sub-network uses. Other networks of this model are wrong from then on.

    Args:
        model: this rank's virtual-pipeline chunks.
        net: sub-network that the tensors were refitted for.
        refitted: result of `refit`.
    """
    for chunk in model:
        gpt = unwrap(chunk)
        for layer in gpt.decoder.layers:
            for number, axis in narrowed(gpt.architecture, net):
                if number == layer.layer_number - 1:
                    _Block(layer, axis, gpt.architecture, net).replace(refitted, layer.mlp.space)


class _Block:
    """Block of a layer of which a sub-network has only some units: moments of its activations, and its refitted projection.

    Args:
        layer: the layer.
        axis: layer axis of the block.
        arch: architecture of the full model.
        net: sub-network.
    """

    def __init__(self, layer: torch.nn.Module, axis: Axis, arch: ModelConfig, net: SubNetwork) -> None:
        number = layer.layer_number - 1
        self.axis, self.arch, self.channels = axis, arch, net.hidden_size
        parameters = dict(layer.named_parameters())
        self.name = f"decoder.layers.{number}.{axis.followed_by}"
        self.weight = parameters[axis.followed_by]
        bias = axis.followed_by.removesuffix(".weight") + ".bias"
        self.bias, self.bias_name = parameters.get(bias), f"decoder.layers.{number}.{bias}"
        self.ranks = parallel_state.get_tensor_model_parallel_world_size() if axis.parallel else 1
        units = self.weight.shape[1]
        first, *others = axis.whole(arch)
        chosen = [getattr(net.layers[number], name) for name in axis.fields]
        self.first = chosen[0]  # kept units of the first field, on all ranks
        grid = torch.arange(units, device=self.weight.device).view(first // self.ranks, *others, -1)
        index = tuple(slice(size) for size in (chosen[0] // self.ranks, *chosen[1:]))
        self.kept_K = grid[index].flatten()  # of this rank
        removed = torch.ones(units, dtype=torch.bool, device=self.weight.device)
        removed[self.kept_K] = False
        self.removed_R = removed.nonzero().squeeze(1)

    def start(self) -> None:
        """Set the moments to 0, before the first micro-batch."""
        units, where = self.weight.shape[1], self.weight.device
        # In fp32, subtracting the product of means would cancel most digits.
        dtype = torch.float32 if self.bias is None else torch.float64
        self.moments_Uk = torch.zeros(units, len(self.kept_K) * self.ranks, dtype=dtype, device=where)
        self.sums_U = torch.zeros(units, dtype=torch.float64, device=where)
        self.count = torch.zeros((), dtype=torch.float64, device=where)

    def add(self, units_nU: Tensor) -> None:
        """Add the activations [n, U] of counted tokens to the moments."""
        units_nU = units_nU.to(self.moments_Uk.dtype)
        self.moments_Uk.addmm_(units_nU.T, self._gathered(units_nU[:, self.kept_K]))
        self.sums_U += units_nU.sum(0, dtype=torch.float64)
        self.count += len(units_nU)

    def solved(self, space: ElasticSpace) -> dict[str, Tensor]:
        """Refitted weight and bias of the block's projection, {name in the full model: fp32 tensor on the CPU}.

        They are computed from the moments of all data-parallel ranks. Raises FlextronError for moments that are not finite.

        Args:
            space: elastic space, whose granularity and attention unit decide on the order of the units.
        """
        for tensor in (self.moments_Uk, self.sums_U, self.count):
            torch.distributed.all_reduce(tensor, group=parallel_state.get_data_parallel_group())
        moments_Uk, mean_U = self.moments_Uk.double() / self.count, self.sums_U / self.count
        del self.moments_Uk
        mean_k = self._gathered(mean_U[self.kept_K])
        if self.bias is not None:
            moments_Uk -= torch.outer(mean_U, mean_k)
        gram_kk = self._gathered(moments_Uk[self.kept_K].T.contiguous())
        if not gram_kk.isfinite().all():
            raise FlextronError(
                f"compensate=true: inputs of {self.name} are not finite on the calibration text: leave compensate=true out"
            )
        weight_CU = self.weight[: self.channels].double()
        slice_Ck = self._gathered(weight_CU[:, self.kept_K])
        lost_CR = weight_CU[:, self.removed_R]
        cross_Ck = self._reduced(lost_CR @ moments_Uk[self.removed_R])
        refitted_Ck = slice_Ck + torch.cholesky_solve(cross_Ck.T, _factor(gram_kk)).T
        found = {self.name: refitted_Ck[:, self._order(space)].float().cpu()}
        if self.bias is not None:
            lost_C = self._reduced(lost_CR @ mean_U[self.removed_R])
            bias_C = self.bias[: self.channels].double() + lost_C + (slice_Ck - refitted_Ck) @ mean_k
            found[self.bias_name] = bias_C.float().cpu()
        return found

    def replace(self, refitted: Mapping[str, Tensor], space: ElasticSpace) -> None:
        """Write the refitted weight and bias over the slices that the sub-network uses.

        Args:
            refitted: {name in the full model: tensor of the sub-network}, from `refit`.
            space: elastic space, whose granularity and attention unit decide on the order.
        """
        weight_Ck = torch.empty_like(refitted[self.name])
        weight_Ck[:, self._order(space).cpu()] = refitted[self.name]
        rank = parallel_state.get_tensor_model_parallel_rank() if self.ranks > 1 else 0
        local_Ck = weight_Ck.chunk(self.ranks, 1)[rank].to(self.weight)
        with torch.no_grad():
            self.weight[: self.channels, self.kept_K] = local_Ck
            if self.bias is not None:
                self.bias[: self.channels] = refitted[self.bias_name].to(self.bias)

    def _order(self, space: ElasticSpace) -> Tensor:
        """Permutation [k] of the kept units of all ranks, concatenated, to units in order, not dealt into buckets."""
        places = torch.arange(len(self.kept_K) * self.ranks, device=self.kept_K.device)
        dealt = self.axis.unit_field(self.arch, space.attention_unit) == next(iter(self.axis.fields))
        if not (self.axis.parallel and dealt):
            return places
        return undeal(places.view(self.first, -1), self.ranks, space.granularity).flatten()

    def _gathered(self, local: Tensor) -> Tensor:
        """Concatenate the parts of all tensor-parallel ranks along the last dimension."""
        return gather_from_tensor_model_parallel_region(local) if self.ranks > 1 else local

    def _reduced(self, local: Tensor) -> Tensor:
        """Sum over the tensor-parallel ranks."""
        return reduce_from_tensor_model_parallel_region(local) if self.ranks > 1 else local


@contextlib.contextmanager
def _observed(layer: torch.nn.Module, axis: Axis, arch: ModelConfig, net: SubNetwork, tokens: Tokens) -> Iterator[_Block]:
    """Context with a block to whose moments every forward pass within it adds the activations of the tokens that count.

    Args:
        layer: layer of the block.
        axis: layer axis of the block.
        arch: architecture of the full model.
        net: sub-network.
        tokens: mask of the tokens that count.
    """
    block = _Block(layer, axis, arch, net)
    block.start()

    def observe(units_SBU: Tensor) -> Tensor:
        block.add(units_SBU[tokens.mask_SB1.squeeze(-1) > 0])
        return units_SBU

    module = layer.get_submodule(axis.observed)
    module.observe = observe
    try:
        yield block
    finally:
        del module.observe


def _factor(gram_kk: Tensor) -> Tensor:
    """Cholesky factor [k, k] of second moments plus the ridge, which is multiplied by 10 until the factorization succeeds."""
    ridge_k, share = gram_kk.diagonal().clone(), RIDGE
    ridge_k.clamp_(min=max(ridge_k.mean().item(), 1e-30) * 1e-6)  # units that are never active
    while True:
        factor_kk, failed = torch.linalg.cholesky_ex(gram_kk + torch.diag(share * ridge_k))
        if not failed:
            return factor_kk
        share *= 10
