"""Importance scores (Flextron, eq. 3 and 4; channels and layers as in LLaMaFlex), accumulated over calibration samples in one
pass of the full model.

Shape suffixes: S sequence (of this rank's tokens), B batch, C hidden channels, U units of an axis with each its own channels,
L layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core import parallel_state
from torch import Tensor

from flextron_mcore.axes import Axis, layer_axes
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.pipeline.networks import Batch, run_networks
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.space import SKIPPED, ElasticSpace, SubNetwork

SCORES = ("activation", "activation_weight")
LAYER_SCORES = ("mse", "block_influence")


@dataclass
class LayerScores:
    """Scores of one layer in the order of the checkpoint, of the whole layer.

    units: {axis: float64, a dimension for each of its fields}: neurons [F], query heads [KV groups, heads of each].
    """

    units: dict[str, Tensor]
    influence: float = 0.0  # 1 - cos(what enters the layer, what leaves it), mean over tokens


@dataclass
class Scores:
    """Scores of the layers of this rank, or after `collect` of all, and of the residual stream's channels [C], float64."""

    layers: dict[int, LayerScores]
    channels: Tensor


def importance(
    model: Sequence[torch.nn.Module],
    batches: Callable[[], Iterator[Batch]],
    num_batches: int,
    seq_length: int,
    micro_batch_size: int,
    score: str = "activation",
) -> Scores:
    """Scores by global layer index of this rank's layers, summed over data-parallel ranks, gathered over tensor-parallel ones.

    score "activation": |activation|_1 where an axis is observed: eq. 3, output of the head, and eq. 4, input of fc2 of the neuron
    (for gated MLPs the product of gate and up). Channels: |activation|_1 after each norm, summed over norms. "activation_weight"
    multiplies each by the norm of the columns that follow it (output projection, fc2). Tokens count where the loss_mask of their
    micro-batch is 1.
    """
    if score not in SCORES:
        raise FlextronError(f"score={score!r} is not known: use one of {', '.join(SCORES)}")
    layers = [layer for chunk in model for layer in unwrap(chunk).decoder.layers]
    arch: ModelConfig = unwrap(model[0]).architecture
    current = _Tokens()

    def noted() -> Iterator[Batch]:
        for batch in batches():  # each is taken right before it goes through the layers
            current.mask_SB1 = batch["loss_mask"].to(device()).T.unsqueeze(-1)
            yield batch

    with contextlib.ExitStack() as stack, torch.no_grad():
        sums = {layer.layer_number - 1: stack.enter_context(_observed(layer, arch, current)) for layer in layers}
        channels_C = stack.enter_context(_observed_norms(model, current))
        for chunk in model:
            chunk.eval()
        total = run_networks(model, noted, num_batches, [None], seq_length, micro_batch_size, forward_only=True)
        groups = [parallel_state.get_data_parallel_group()]
        if layers[0].config.sequence_parallel:
            groups.append(parallel_state.get_tensor_model_parallel_group())
        scores = {}
        for layer in layers:
            found = sums[layer.layer_number - 1]
            if score == "activation_weight":
                _weigh(layer, found)
            for tensor in found.units.values():
                torch.distributed.all_reduce(tensor, group=groups[0])
            influence = torch.as_tensor(found.influence, dtype=torch.float64, device=device())
            for group in groups:
                torch.distributed.all_reduce(influence, group=group)
            units = {axis.name: _whole(axis, found.units[axis.name], arch, layer.mlp.space) for axis in layer_axes()}
            scores[layer.layer_number - 1] = LayerScores(units, influence.item() / total[0, 1].item())
        for group in (*groups, parallel_state.get_pipeline_model_parallel_group()):
            torch.distributed.all_reduce(channels_C, group=group)
    return Scores(scores, channels_C)


class _Tokens:
    """Which tokens of the micro-batch in the layers count."""

    mask_SB1: Tensor

    def of_rank(self, length: int) -> Tensor:
        """For activations of `length` positions, which with sequence parallelism are this rank's part."""
        if length == len(self.mask_SB1):
            return self.mask_SB1
        return self.mask_SB1.narrow(0, parallel_state.get_tensor_model_parallel_rank() * length, length)


@contextlib.contextmanager
def _observed_norms(model: Sequence[torch.nn.Module], tokens: _Tokens) -> Iterator[Tensor]:
    """Accumulate |activation| of the channels [C] after each norm of this rank while the context is open."""
    decoders = [unwrap(chunk).decoder for chunk in model]
    sums_C = torch.zeros(decoders[0].config.hidden_size, dtype=torch.float64, device=device())

    def channels(module: torch.nn.Module, args: tuple, out_SBC: Tensor) -> None:
        counted_SBC = out_SBC.abs() * tokens.of_rank(len(out_SBC))
        sums_C.add_(counted_SBC.sum((0, 1), dtype=torch.float32).double())

    norms = [
        norm for decoder in decoders for layer in decoder.layers for norm in (layer.input_layernorm, layer.pre_mlp_layernorm)
    ]
    norms += [decoder.final_layernorm for decoder in decoders if decoder.final_layernorm is not None]
    handles = [norm.register_forward_hook(channels) for norm in norms]
    try:
        yield sums_C
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _observed(layer: torch.nn.Module, arch: ModelConfig, tokens: _Tokens) -> Iterator[LayerScores]:
    """Accumulate |activation| of a layer's units, and its influence, while the context is open."""
    sums = LayerScores({})

    def observe(name: str, units_SBU: Tensor) -> Tensor:
        counted_SBU = (units_SBU.abs() * tokens.mask_SB1).unflatten(-1, (*sums.units[name].shape, -1))
        sums.units[name] += counted_SBU.sum((0, 1, -1), dtype=torch.float32).double()
        return units_SBU

    def influence(module: torch.nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        before_SBC, after_SBC = kwargs["hidden_states"].float(), output[0].float()
        turned_SB = 1 - torch.nn.functional.cosine_similarity(before_SBC, after_SBC, dim=-1)
        sums.influence += (turned_SB * tokens.of_rank(len(turned_SB)).squeeze(-1)).sum().double()

    observed = []
    for axis in layer_axes():
        first, *others = axis.whole(arch)
        first //= parallel_state.get_tensor_model_parallel_world_size() if axis.parallel else 1
        sums.units[axis.name] = torch.zeros(first, *others, dtype=torch.float64, device=device())
        observed.append(layer.get_submodule(axis.observed))
        observed[-1].observe = partial(observe, axis.name)
    handle = layer.register_forward_hook(influence, with_kwargs=True)
    try:
        yield sums
    finally:
        for module in observed:
            del module.observe
        handle.remove()


def removal_errors(
    model: Sequence[torch.nn.Module],
    batches: Callable[[], Iterator[Batch]],
    num_batches: int,
    arch: ModelConfig,
    seq_length: int,
    micro_batch_size: int,
) -> list[float]:
    """For each layer, how far the final hidden states are from the full model's without it: ||difference||^2 / ||states||^2.

    Every layer is left out once, so a micro-batch goes through one network more than there are layers. The same on all ranks.
    """
    whole = SubNetwork.full(arch)
    networks = [
        None,
        *(replace(whole, layers=(*whole.layers[:i], SKIPPED, *whole.layers[i + 1 :])) for i in range(arch.num_layers)),
    ]
    masks: dict[int, Tensor] = {}
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    sums_L = torch.zeros(arch.num_layers + 1, dtype=torch.float64, device=device())  # the full model's squares first
    full: list[Tensor] = []

    def noted() -> Iterator[Batch]:
        for number, batch in enumerate(batches()):
            masks[number * ranks + rank] = batch["loss_mask"].to(device()).T.unsqueeze(-1)
            yield batch

    def watch(index: int, number: int, loss_BS: Tensor, states_SBC: Tensor) -> None:
        tokens = _Tokens()
        tokens.mask_SB1 = masks[number]
        if index == 0:
            full[:] = [states_SBC.float()]
        difference_SBC = full[0] if index == 0 else states_SBC.float() - full[0]
        sums_L[index] += (difference_SBC.square() * tokens.of_rank(len(difference_SBC))).sum().double()

    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        run_networks(model, noted, num_batches, networks, seq_length, micro_batch_size, forward_only=True, watch=watch)
    groups = [parallel_state.get_data_parallel_group(), parallel_state.get_pipeline_model_parallel_group()]
    if unwrap(model[0]).config.sequence_parallel:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    for group in groups:
        torch.distributed.all_reduce(sums_L, group=group)
    return (sums_L[1:] / sums_L[0]).tolist()


def _weigh(layer: torch.nn.Module, sums: LayerScores) -> None:
    for axis in layer_axes():
        units = sums.units[axis.name]
        columns = layer.get_parameter(axis.followed_by).double().unflatten(1, (*units.shape, -1))
        units *= columns.square().sum((0, -1)).sqrt()


def _whole(axis: Axis, local: Tensor, arch: ModelConfig, space: ElasticSpace) -> Tensor:
    """Scores of all tensor-parallel ranks, in sorted order, of those of this rank."""
    if not axis.parallel:
        return local
    gathered, ranks = _gather(local), parallel_state.get_tensor_model_parallel_world_size()
    dealt = axis.unit_field(arch, space.attention_unit) == next(iter(axis.fields))
    return _undeal(gathered, ranks, space.granularity) if dealt else gathered


def _gather(local: Tensor) -> Tensor:
    """The parts of all tensor-parallel ranks, one after another along the first dimension."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)


def _undeal(gathered: Tensor, ranks: int, granularity: int) -> Tensor:
    """Ranks one after another -> sorted order: unit a*n + k of rank r is sorted unit a*G + r*n + k."""
    buckets = granularity // ranks
    split = gathered.unflatten(0, (ranks, -1, buckets))
    return split.transpose(0, 1).flatten(0, 2)


def collect(scores: Scores, num_layers: int) -> Scores:
    """Scores of all layers, in order, from the pipeline stages that hold them; on every rank those that the main process has."""
    group = parallel_state.get_pipeline_model_parallel_group()
    parts: list[dict[int, LayerScores]] = [{} for _ in range(group.size())]
    mine = {i: replace(s, units={name: t.cpu() for name, t in s.units.items()}) for i, s in scores.layers.items()}
    torch.distributed.all_gather_object(parts, mine, group=group)
    merged = {i: s for part in parts for i, s in part.items()}
    # Sorting is shared out over the ranks: they must agree on the last bit, which sums over ranks do not promise.
    return on_main_process(lambda: Scores({i: merged[i] for i in range(num_layers)}, scores.channels.cpu()))
