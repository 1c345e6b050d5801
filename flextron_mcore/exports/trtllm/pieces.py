"""Tensors of a TensorRT-LLM checkpoint: a sub-network's tensors, padded with zeros to the widths of its class, for each rank."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import pad

from flextron_mcore.axes import added_tensors
from flextron_mcore.checkpoint.safetensor_files import TensorFile
from flextron_mcore.checkpoint.writer import LazyTensor
from flextron_mcore.exports.trtllm.plan import Plan
from flextron_mcore.families.family import Mapped, Names
from flextron_mcore.families.tensors import QKV, Placed, of_network
from flextron_mcore.runtime.ranks import place, wait_for_all
from flextron_mcore.space import SubNetwork

_MODULES = {
    "embedding.word_embeddings": "transformer.vocab_embedding",
    "embedding.position_embeddings": "transformer.position_embedding",
    "self_attention.linear_qkv.layer_norm": "input_layernorm",
    "self_attention.linear_qkv": "attention.qkv",
    "self_attention.linear_proj": "attention.dense",
    "mlp.linear_fc1.layer_norm": "post_layernorm",
    "mlp.linear_fc1": ("{mlp}.fc", "{mlp}.gate"),  # TensorRT-LLM calls the gate projection `fc` and the up projection `gate`
    "mlp.linear_fc2": "{mlp}.proj",
    "decoder.final_layernorm": "transformer.ln_f",
    "output_layer": "lm_head",
}


@dataclass(frozen=True)
class Piece:
    """One Megatron-Core tensor of a sub-network, and the TensorRT-LLM tensors that it becomes.

    Attributes:
        source: name of the Megatron-Core tensor.
        shapes: {TensorRT-LLM's name: shape on a rank}.
        mapped: names and shapes in TensorRT-LLM's form before the tensor is divided over ranks.
        tp: number of tensor-parallel ranks.
    """

    source: str
    shapes: dict[str, tuple[int, ...]]
    mapped: Mapped
    tp: int

    def split(self, tensor: torch.Tensor) -> list[Sequence[torch.Tensor]]:
        """TensorRT-LLM tensors for each name in `shapes`, each a sequence with one tensor for each tensor-parallel rank."""
        return _split(self.mapped, tensor, self.tp)


def stage_pieces(plan: Plan, stage: int) -> Iterator[Piece]:
    """Pieces in the files of one of TensorRT-LLM's pipeline stages; the stage's layers are numbered from 0."""
    model, numbers = plan.model, plan.stage(stage)
    tied = model.share_embeddings_and_output_weights
    own, padded = (SubNetwork(plan.hidden_size, tuple(each[i] for i in numbers)) for each in (plan.layers, plan.slots))
    # A tied output layer is written too, because some releases of TensorRT-LLM do not copy a missing one.
    untied = replace(model, share_embeddings_and_output_weights=False)
    placed = of_network(untied, own, padded, added_tensors())
    ends = {"before": stage == 0, "layer": True, "after": stage == plan.pp - 1}
    for mapped in _names(plan.style).map((each for each in placed if ends[each.tensor.place]), "format=trtllm"):
        each = mapped.placed
        source = each.tensor.key(None if each.number is None else numbers[each.number])
        if source == "output_layer.weight":
            mapped = replace(mapped, placed=replace(each, whole=((plan.vocabulary,), each.whole[1])))
            source = "embedding.word_embeddings.weight" if tied else source
        ranks = _split(mapped, torch.empty(each.shape, device="meta"), plan.tp)
        yield Piece(source, {n: tuple(r[0].shape) for n, r in zip(mapped.shapes, ranks, strict=True)}, mapped, plan.tp)


def write_ranks(
    out: Path,
    plan: Plan,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    progress: Callable[[int], None] | None,
) -> None:
    """Write the files of all TensorRT-LLM ranks. Call on all processes, which share the files.

    One tensor of the checkpoint and its padded copy are in memory at a time.

    Args:
        out: directory to write into.
        plan: plan of the checkpoint.
        tensors: {Megatron-Core's name: tensor} of the sub-network.
        dtype: dtype of the files.
        progress: function (bytes) called for each tensor that this process writes. Bytes are scaled, so that one process's calls
            add up to all bytes. None: none.
    """
    process, processes = place()
    mine = range(plan.tp * plan.pp)[process::processes]
    for stage in range(plan.pp):
        ranks = [rank for rank in mine if rank // plan.tp == stage]
        if not ranks:
            continue
        todo = list(stage_pieces(plan, stage))
        shapes = {name: shape for piece in todo for name, shape in piece.shapes.items()}
        with contextlib.ExitStack() as stack:
            files = {rank: stack.enter_context(TensorFile(out / f"rank{rank}.safetensors", shapes, dtype)) for rank in ranks}
            for piece in todo:
                split = piece.split(tensors[piece.source].load())
                for rank, file in files.items():
                    file.write({name: parts[rank % plan.tp] for name, parts in zip(piece.shapes, split, strict=True)})
                if progress:
                    written = len(ranks) * dtype.itemsize * sum(map(math.prod, piece.shapes.values()))
                    progress(written * plan.tp * plan.pp // len(mine))
    wait_for_all()


def _names(style: str) -> Names:
    """Names of tensors in TensorRT-LLM's checkpoints. style: `padded` or `deci`, of TrtllmSettings."""
    mlp = "ffn" if style == "deci" else "mlp"
    modules = {
        ours: theirs.format(mlp=mlp) if isinstance(theirs, str) else tuple(name.format(mlp=mlp) for name in theirs)
        for ours, theirs in _MODULES.items()
    }
    return Names(modules, layers="transformer.layers.{}.")


def _split(mapped: Mapped, tensor: torch.Tensor, tp: int) -> list[Sequence[torch.Tensor]]:
    """Tensors of `tp` ranks, for each name of `mapped`. Parts under one name are split by rank first, then joined."""
    placed, first = mapped.placed, mapped.placed.tensor.sides[0]
    for axis in reversed(range(tensor.dim())):
        tensor = tensor.unflatten(axis, placed.sizes[axis])
    parts = [tensor] if first.parts is None else tensor.split(mapped.counts, first.parts)
    shares = [
        _shares(placed, part, number, count, tp)
        for number, (part, count) in enumerate(zip(parts, first.counts(placed.whole[0]), strict=True))
    ]
    return shares if len(mapped.shapes) == len(parts) else [[torch.cat(each) for each in zip(*shares, strict=True)]]


def _shares(placed: Placed, part: torch.Tensor, number: int, count: int, tp: int) -> Sequence[torch.Tensor]:
    """Shares of all ranks of one part of a tensor (query, key or value; gate or up), padded to `placed.whole`.

    Args:
        placed: the tensor.
        part: the part, with a dimension for each factor of the tensor's sides.
        number: index of the part.
        count: entries of the part along the factor that is split into parts.
        tp: tensor-parallel ranks.
    """
    first, sides = placed.tensor.sides[0], placed.tensor.sides
    wide = [list(sizes) for sizes in placed.whole]
    if first.parts is not None:
        wide[0][first.parts] = count
    for axis, size in enumerate([size for sizes in wide for size in sizes]):
        missing = size - part.shape[axis]
        part = pad(part, (0, 0) * (part.dim() - 1 - axis) + (0, missing)) if missing else part
    if first == QKV and number > 0:  # with fewer KV heads than ranks, each head goes to several ranks
        part = part.repeat_interleave(max(tp // part.shape[0], 1), 0)
    part = part.flatten(0, len(wide[0]) - 1)
    part = part.flatten(1) if len(sides) > 1 else part
    shared = [axis for axis, side in enumerate(sides) if any(factor.parallel for factor in side.factors)]
    # Every rank has the whole embedding.
    return part.chunk(tp, shared[0]) if shared and placed.tensor.place != "before" else [part] * tp
