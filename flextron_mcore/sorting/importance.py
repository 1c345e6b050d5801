"""Importance scores, accumulated over calibration samples in one pass of the full model.

A unit (KV group, head, neuron) has activations a_u [c], its part of the input of the projection that follows it (output
projection, fc2), and the weight columns W_u [C, c] that they are multiplied with. Its score is one of

    activation          sum_X |a_u|_1                (Flextron, eq. 3 for heads, eq. 4 for neurons; gated MLP: gate times up)
    activation_weight   sum_X |a_u|_1 |W_u|_2
    energy              sum_X |W_u a_u|_2^2          squared norm of what the unit adds to the residual stream

The energy equals tr(W_u C_u W_u^T), with the second moment C_u of the activations. The energy of a KV group is not the sum of its
heads' energies, because it includes the products of different heads. Channels are scored by |activation|_1 (`activation`) or its
square (`energy`) after each norm, summed over norms; layers by the block influence 1 - cos(input, output), or by the error of the
final hidden states without the layer. Channels and layers follow LLaMaFlex.

For query heads `compensated` also computes a compensation of the heads that are dropped (sorting/compensation.py). A head's score
is the error of its group's output without this head and all less important ones.

Shape suffixes: S sequence (of this rank's tokens), B batch, C hidden channels, U units of an axis times the channels of each, N
units, c channels of a unit, L layers, G KV groups, Q query heads of a group, K channels of all heads of a group.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from megatron.core import parallel_state
from torch import Tensor

from flextron_mcore.axes import HEADS, Axis, layer_axes
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.pipeline.networks import Batch, run_networks
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.sorting.compensation import HeadCompensation, head_compensation, second_moments
from flextron_mcore.space import SKIPPED, ElasticSpace, SubNetwork

SCORES = ("energy", "activation", "activation_weight")
COMPENSATED = "compensated"


@dataclass
class LayerScores:
    """Importance scores of one layer, for the heads and neurons of all tensor-parallel ranks, in the order of the checkpoint.

    Attributes:
        units: {name of a layer axis: float64 scores of its units, `unit_shape`}: neurons [F]; KV groups [G], or heads [G, query
            heads of a group].
        influence: influence of the whole layer: 1 - cos(input of the layer, output of the layer), mean over tokens.
        compensation: order and compensation of the query heads, with the score `compensated`; else None.
    """

    units: dict[str, Tensor]
    influence: float = 0.0
    compensation: HeadCompensation | None = None


@dataclass
class Scores:
    """Importance scores of the layers and the hidden channels of a model.

    Attributes:
        layers: {index of the layer: scores of the layer}, for the layers of this pipeline stage; after `collect` for all layers.
        channels: score of each channel of the residual stream [C], float64.
    """

    layers: dict[int, LayerScores]
    channels: Tensor


def importance(
    model: Sequence[torch.nn.Module],
    batches: Callable[[], Iterator[Batch]],
    num_batches: int,
    seq_length: int,
    micro_batch_size: int,
    space: ElasticSpace | None = None,
    scores: Mapping[str, str] = types.MappingProxyType({}),
) -> Scores:
    """Compute importance scores of this pipeline stage's layers, over all data- and tensor-parallel ranks. Call on all ranks.

    Channels are scored after each norm, summed over the norms of all pipeline stages. Tokens count where the loss_mask is 1.
    Raises FlextronError for an unknown score.

    An energy needs [c, c] products of weight columns for each unit of c channels, in fp32 while the pass runs. Together they have
    the share c / C of the elements of the projection's weight. For KV groups that is about 1 / (number of KV groups). The score
    `compensated` needs [K, K] second moments for each KV group, in float64.

    Args:
        model: this rank's virtual-pipeline chunks.
        batches: function that returns an iterator over this rank's micro-batches.
        num_batches: number of micro-batches.
        seq_length: tokens of a sample.
        micro_batch_size: samples of a micro-batch.
        space: space to score for, whose attention unit decides between KV groups and query heads; None for the model's.
        scores: {name of a layer axis: one of SCORES}, for query heads also `compensated`, for `hidden_size` activation or energy;
            others are scored by `activation`.
    """
    for axis in layer_axes():
        score = scores.get(axis.name, "activation")
        if score not in SCORES and (axis is not HEADS or score != COMPENSATED):
            raise FlextronError(f"score of {axis.name}: {score!r} is not known: use one of {', '.join(SCORES)}")
    layers = [layer for chunk in model for layer in unwrap(chunk).decoder.layers]
    arch: ModelConfig = unwrap(model[0]).architecture
    current = Tokens()

    with contextlib.ExitStack() as stack, torch.no_grad():
        sums = {}
        for layer in layers:
            unit = (space or layer.mlp.space).attention_unit
            sums[layer.layer_number - 1] = stack.enter_context(_observed(layer, arch, unit, scores, current))
        channels_C = stack.enter_context(_observed_norms(model, scores.get("hidden_size", "activation"), current))
        for chunk in model:
            chunk.eval()
        total = run_networks(
            model, lambda: current.of(batches()), num_batches, [None], seq_length, micro_batch_size, forward_only=True
        )
        groups = [parallel_state.get_data_parallel_group()]
        if layers[0].config.sequence_parallel:
            groups.append(parallel_state.get_tensor_model_parallel_group())
        found = {}
        for layer in layers:
            of_layer = sums[layer.layer_number - 1]
            for tensor in of_layer.units.values():
                torch.distributed.all_reduce(tensor, group=groups[0])
            influence = torch.as_tensor(of_layer.influence, dtype=torch.float64, device=device())
            for group in groups:
                torch.distributed.all_reduce(influence, group=group)
            units = {axis.name: _gathered_scores(axis, of_layer.units[axis.name], arch, layer.mlp.space) for axis in layer_axes()}
            compensation = None
            if of_layer.moments_GKK is not None:
                torch.distributed.all_reduce(of_layer.moments_GKK, group=groups[0])
                compensation = _gathered_compensation(layer, arch, of_layer.moments_GKK)
                units[HEADS.name] = compensation.errors_GQ
            found[layer.layer_number - 1] = LayerScores(units, influence.item() / total[0, 1].item(), compensation)
        for group in (*groups, parallel_state.get_pipeline_model_parallel_group()):
            torch.distributed.all_reduce(channels_C, group=group)
    return Scores(found, channels_C)


def unit_shape(axis: Axis, arch: ModelConfig, attention_unit: str) -> tuple[int, ...]:
    """Shape of the scores of a layer axis's units in the full model: neurons (F,); KV groups (G,), query heads (G, Q).

    Args:
        axis: layer axis.
        arch: architecture of the full model.
        attention_unit: unit of heads, kv_group or query_head.
    """
    fields = list(axis.fields)
    return axis.whole(arch)[: fields.index(axis.unit_field(arch, attention_unit)) + 1]


def random_scores(arch: ModelConfig, space: ElasticSpace, seed: int) -> Scores:
    """Scores drawn uniformly at random, to compare an order with. They depend on the arguments only, so ranks agree.

    Args:
        arch: architecture of the full model.
        space: elastic space, whose attention unit decides between KV groups and query heads.
        seed: seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    layers = {}
    for i in range(arch.num_layers):
        units = {axis.name: draw(*unit_shape(axis, arch, space.attention_unit)) for axis in space.layer_axes}
        layers[i] = LayerScores(units, draw(1).item())
    return Scores(layers, draw(arch.hidden_size))


class Tokens:
    """Mask of the counted tokens of the current micro-batch."""

    mask_SB1: Tensor

    def of(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Micro-batches, each of which becomes the current one when the schedule takes it, right before its forward pass."""
        for batch in batches:
            self.mask_SB1 = batch["loss_mask"].to(device()).T.unsqueeze(-1)
            yield batch

    def of_rank(self, length: int) -> Tensor:
        """Mask for activations of `length` positions: all, or with sequence parallelism this rank's part."""
        if length == len(self.mask_SB1):
            return self.mask_SB1
        return self.mask_SB1.narrow(0, parallel_state.get_tensor_model_parallel_rank() * length, length)


@contextlib.contextmanager
def _observed_norms(model: Sequence[torch.nn.Module], score: str, tokens: Tokens) -> Iterator[Tensor]:
    """Context with the sum of |activation| or its square [C] after all norms of this rank, over the tokens of passes within it.

    Args:
        model: this rank's virtual-pipeline chunks.
        score: activation or energy.
        tokens: tokens that count.
    """
    decoders = [unwrap(chunk).decoder for chunk in model]
    sums_C = torch.zeros(decoders[0].config.hidden_size, dtype=torch.float64, device=device())

    def channels(module: torch.nn.Module, args: tuple, out_SBC: Tensor) -> None:
        value_SBC = out_SBC.float().square() if score == "energy" else out_SBC.abs()
        counted_SBC = value_SBC * tokens.of_rank(len(out_SBC))
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


@dataclass
class _LayerSums(LayerScores):
    """Sums over tokens of this rank's units of a layer, and with the score `compensated` the second moments of its heads."""

    moments_GKK: Tensor | None = None


@contextlib.contextmanager
def _observed(
    layer: torch.nn.Module, arch: ModelConfig, attention_unit: str, scores: Mapping[str, str], tokens: Tokens
) -> Iterator[_LayerSums]:
    """Context with the scores of this rank's units of a layer, to which every forward pass within it adds its counted tokens.

    Args:
        layer: the layer; its block influence is summed, too.
        arch: architecture of the full model.
        attention_unit: unit of heads, kv_group or query_head.
        scores: {name of a layer axis: its score}; others are scored by `activation`.
        tokens: mask of the tokens that count.
    """
    sums = _LayerSums({})

    def observe(name: str, value: Callable[[Tensor], Tensor], factor_N: Tensor, units_SBU: Tensor) -> Tensor:
        units_SBNc = units_SBU.float().unflatten(-1, (len(factor_N), -1))
        counted_N = (value(units_SBNc) * tokens.mask_SB1).sum((0, 1), dtype=torch.float32).double()
        sums.units[name] += (factor_N * counted_N).view_as(sums.units[name])
        return units_SBU

    def observe_heads(shape_GQ: tuple[int, ...], heads_SBU: Tensor) -> Tensor:
        moments_GKK = second_moments(heads_SBU.unflatten(-1, (*shape_GQ, -1)), tokens.mask_SB1)
        sums.moments_GKK = moments_GKK if sums.moments_GKK is None else sums.moments_GKK.add_(moments_GKK)
        return heads_SBU

    def influence(module: torch.nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        before_SBC, after_SBC = kwargs["hidden_states"].float(), output[0].float()
        turned_SB = 1 - torch.nn.functional.cosine_similarity(before_SBC, after_SBC, dim=-1)
        sums.influence += (turned_SB * tokens.of_rank(len(turned_SB)).squeeze(-1)).sum().double()

    observed = []
    for axis in layer_axes():
        first, *others = unit_shape(axis, arch, attention_unit)
        first //= parallel_state.get_tensor_model_parallel_world_size() if axis.parallel else 1
        units = sums.units[axis.name] = torch.zeros(first, *others, dtype=torch.float64, device=device())
        observed.append(layer.get_submodule(axis.observed))
        if scores.get(axis.name) == COMPENSATED:
            observed[-1].observe = partial(observe_heads, units.shape)
            continue
        weight_CNc = layer.get_parameter(axis.followed_by).detach().unflatten(1, (units.numel(), -1))
        observed[-1].observe = partial(observe, axis.name, *_contribution(scores.get(axis.name, "activation"), weight_CNc))
    handle = layer.register_forward_hook(influence, with_kwargs=True)
    try:
        yield sums
    finally:
        for module in observed:
            del module.observe
        handle.remove()


def _contribution(score: str, weight_CNc: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Function (activations [S, B, N, c]) that returns each unit's value on each token [S, B, N], and a factor [N] of its sums.

    Args:
        score: one of SCORES.
        weight_CNc: weight columns that the units' activations are multiplied with.
    """
    ones_N = torch.ones(weight_CNc.shape[1], dtype=torch.float64, device=weight_CNc.device)
    if score == "activation":
        return lambda units_SBNc: units_SBNc.abs().sum(-1), ones_N
    weight_CNc = weight_CNc.float()
    square_N = weight_CNc.square().sum((0, 2), dtype=torch.float64)
    if score == "activation_weight":
        return lambda units_SBNc: units_SBNc.abs().sum(-1), square_N.sqrt()
    if weight_CNc.shape[2] == 1:
        return lambda units_SBNc: units_SBNc.squeeze(-1).square(), square_N
    products_Ncc = torch.einsum("Cni,Cnj->nij", weight_CNc, weight_CNc)
    transformed = partial(torch.einsum, "nij,sbni->sbnj", products_Ncc)
    return lambda units_SBNc: (transformed(units_SBNc) * units_SBNc).sum(-1), ones_N


def removal_errors(
    model: Sequence[torch.nn.Module],
    batches: Callable[[], Iterator[Batch]],
    num_batches: int,
    arch: ModelConfig,
    seq_length: int,
    micro_batch_size: int,
) -> list[float]:
    """Error of the final hidden states without each layer, in the order of the layers, equal on all ranks.

    The error is ||h_without - h_full||^2 / ||h_full||^2, both summed over the tokens that count in the loss. Every micro-batch
    goes through the full model and, for each layer, the network that skips it. Call on all ranks.

    Args:
        model: this rank's virtual-pipeline chunks.
        batches: function that returns an iterator over this rank's micro-batches.
        num_batches: number of micro-batches.
        arch: architecture of the full model.
        seq_length: tokens of a sample.
        micro_batch_size: samples of a micro-batch.
    """
    whole = SubNetwork.full(arch)
    networks = [
        None,
        *(replace(whole, layers=(*whole.layers[:i], SKIPPED, *whole.layers[i + 1 :])) for i in range(arch.num_layers)),
    ]
    masks: dict[int, Tensor] = {}
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    sums_L = torch.zeros(arch.num_layers + 1, dtype=torch.float64, device=device())  # first ||h_full||^2, then each layer's error
    full: list[Tensor] = []

    def masked_batches() -> Iterator[Batch]:
        for number, batch in enumerate(batches()):
            masks[number * ranks + rank] = batch["loss_mask"].to(device()).T.unsqueeze(-1)
            yield batch

    def watch(index: int, number: int, loss_BS: Tensor, states_SBC: Tensor) -> None:
        tokens = Tokens()
        tokens.mask_SB1 = masks[number]
        if index == 0:
            full[:] = [states_SBC.float()]
        difference_SBC = full[0] if index == 0 else states_SBC.float() - full[0]
        sums_L[index] += (difference_SBC.square() * tokens.of_rank(len(difference_SBC))).sum().double()

    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        run_networks(model, masked_batches, num_batches, networks, seq_length, micro_batch_size, forward_only=True, watch=watch)
    groups = [parallel_state.get_data_parallel_group(), parallel_state.get_pipeline_model_parallel_group()]
    if unwrap(model[0]).config.sequence_parallel:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    for group in groups:
        torch.distributed.all_reduce(sums_L, group=group)
    return (sums_L[1:] / sums_L[0]).tolist()


def _gathered_scores(axis: Axis, local: Tensor, arch: ModelConfig, space: ElasticSpace) -> Tensor:
    """Gather the scores of an axis's units from all tensor-parallel ranks, in the order of the checkpoint.

    Args:
        axis: layer axis.
        local: scores of this rank's units, `unit_shape`.
        arch: architecture of the full model.
        space: elastic space, whose granularity and attention unit decide on the order of units on the ranks.
    """
    if not axis.parallel:
        return local
    gathered, ranks = _gather(local), parallel_state.get_tensor_model_parallel_world_size()
    dealt = axis.unit_field(arch, space.attention_unit) == next(iter(axis.fields))
    return undeal(gathered, ranks, space.granularity) if dealt else gathered


def _gathered_compensation(layer: torch.nn.Module, arch: ModelConfig, moments_GKK: Tensor) -> HeadCompensation:
    """Compute the compensation of this rank's query heads of a layer, and gather those of all tensor-parallel ranks.

    Args:
        layer: the layer.
        arch: architecture of the full model.
        moments_GKK: second moments of the outputs of this rank's heads.
    """
    weight_CGQH = layer.self_attention.linear_proj.weight.unflatten(1, (len(moments_GKK), arch.query_heads_per_group, -1))
    local = head_compensation(weight_CGQH, moments_GKK)
    return HeadCompensation(*(_gather(getattr(local, each.name).to(device())) for each in fields(local)))


def _gather(local: Tensor) -> Tensor:
    """Concatenate the parts of all tensor-parallel ranks along the first dimension."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts)


def undeal(gathered: Tensor, ranks: int, granularity: int) -> Tensor:
    """Undo the dealt order (checkpoint/sharding.py) of the first dimension of concatenated ranks.

    With n = G / ranks buckets a rank, unit a*n + k of rank r is unit a*G + r*n + k of the checkpoint.

    Args:
        gathered: units of rank 0, then those of rank 1, and so on.
        ranks: number of tensor-parallel ranks.
        granularity: number of buckets G of all ranks.
    """
    buckets = granularity // ranks
    split = gathered.unflatten(0, (ranks, -1, buckets))
    return split.transpose(0, 1).flatten(0, 2)


def _on_cpu(scores: LayerScores) -> LayerScores:
    """Scores of a layer with all tensors on the CPU."""
    found = scores.compensation
    if found is not None:
        found = HeadCompensation(*(getattr(found, each.name).cpu() for each in fields(found)))
    return replace(scores, units={name: tensor.cpu() for name, tensor in scores.units.items()}, compensation=found)


def collect(scores: Scores, num_layers: int) -> Scores:
    """Gather the scores of all layers from all pipeline stages, on the CPU of every rank. Call on all ranks.

    All ranks get the main process's scores.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    parts: list[dict[int, LayerScores]] = [{} for _ in range(group.size())]
    mine = {i: _on_cpu(s) for i, s in scores.layers.items()}
    torch.distributed.all_gather_object(parts, mine, group=group)
    merged = {i: s for part in parts for i, s in part.items()}
    # Ranks sort different tensors, so they must agree on every bit. Sums over ranks do not guarantee that.
    return on_main_process(lambda: Scores({i: merged[i] for i in range(num_layers)}, scores.channels.cpu()))
