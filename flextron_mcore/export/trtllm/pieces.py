"""The tensors of a TensorRT-LLM checkpoint, cut out of those of the sub-network and padded with zeros to what its class holds.

Shape suffixes: C hidden channels, G KV groups, R query heads of a group followed by its key and its value, Q query heads of a
group, H channels of a head, B gate and up projections (2, or 1 for an ungated MLP), F neurons; .. whatever follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import pad

from flextron_mcore.export.trtllm.plan import Plan, Slot
from flextron_mcore.space import LayerChoice

Split = Callable[[torch.Tensor], Sequence[Sequence[torch.Tensor]]]


@dataclass(frozen=True)
class Piece:
    """One Megatron-Core tensor as TensorRT-LLM's: `shapes` of a rank's by name. split: the tensor -> for each name the ranks'."""

    source: str
    shapes: dict[str, tuple[int, ...]]
    split: Split


def pieces(plan: Plan, stage: int) -> Iterator[Piece]:
    """The tensors of a pipeline stage, which counts its layers from 0."""
    model, tp, c = plan.model, plan.tp, plan.hidden_size
    embedding = "embedding.word_embeddings.weight"
    whole: Split = lambda tensor: [[tensor] * tp]  # noqa: E731
    if stage == 0:
        yield Piece(embedding, {"transformer.vocab_embedding.weight": (model.vocab_size, c)}, whole)
        if model.position_embedding_type == "learned_absolute":
            shape = (model.max_position_embeddings, c)
            yield Piece("embedding.position_embeddings.weight", {"transformer.position_embedding.weight": shape}, whole)
    for new, old in enumerate(plan.stage(stage)):
        yield from _layer(plan, f"decoder.layers.{old}.", f"transformer.layers.{new}.", plan.layers[old], plan.slots[old])
    if stage == plan.pp - 1:
        yield from _norm(plan, "decoder.final_layernorm.", "transformer.ln_f")
        # Written out where it is the embedding too: whether TensorRT-LLM fills a missing one in depends on its release.
        source = embedding if model.share_embeddings_and_output_weights else "output_layer.weight"
        rows = plan.vocabulary
        yield Piece(source, {"lm_head.weight": (rows // tp, c)}, lambda w: [_to_size(w, 0, rows).chunk(tp)])


def _layer(plan: Plan, ours: str, theirs: str, layer: LayerChoice, slot: Slot) -> Iterator[Piece]:
    model, tp, c, size = plan.model, plan.tp, plan.hidden_size, plan.model.kv_channels
    heads, kv_heads, ffn = slot.heads // tp, max(slot.kv_heads // tp, 1), slot.ffn // tp  # of a rank
    kinds = {"weight": (c,), "bias": ()} if model.bias else {"weight": (c,)}
    mlp = theirs + ("ffn" if plan.style == "deci" else "mlp")
    attention = theirs + "attention"
    yield from _norm(plan, ours + "self_attention.linear_qkv.layer_norm_", theirs + "input_layernorm")
    for kind, columns in kinds.items():
        shape = ((heads + 2 * kv_heads) * size, *columns)
        split = partial(_qkv, layer, slot, size, tp)
        yield Piece(f"{ours}self_attention.linear_qkv.{kind}", {f"{attention}.qkv.{kind}": shape}, split)
    split = partial(_dense, layer, slot, size, tp)
    yield Piece(ours + "self_attention.linear_proj.weight", {f"{attention}.dense.weight": (c, heads * size)}, split)
    yield from _norm(plan, ours + "mlp.linear_fc1.layer_norm_", theirs + "post_layernorm")
    for kind, columns in kinds.items():
        names = [f"{mlp}.{name}.{kind}" for name in (("fc", "gate") if model.gated else ("fc",))]
        split = partial(_fc1, len(names), slot, tp)
        yield Piece(f"{ours}mlp.linear_fc1.{kind}", dict.fromkeys(names, (ffn, *columns)), split)
    split = lambda w: [_to_size(w, 1, slot.ffn).chunk(tp, 1)]  # noqa: E731
    yield Piece(ours + "mlp.linear_fc2.weight", {f"{mlp}.proj.weight": (c, ffn)}, split)
    if model.bias:
        for source, name in (("self_attention.linear_proj", f"{attention}.dense"), ("mlp.linear_fc2", f"{mlp}.proj")):
            yield Piece(f"{ours}{source}.bias", {f"{name}.bias": (c,)}, lambda b: [[b] * tp])


def _norm(plan: Plan, ours: str, theirs: str) -> Iterator[Piece]:
    zero_centered = plan.model.normalization == "layernorm1p"  # stored less one

    def scale(weight_C: torch.Tensor) -> list[list[torch.Tensor]]:
        return [[weight_C + 1 if zero_centered else weight_C] * plan.tp]

    yield Piece(f"{ours}weight", {f"{theirs}.weight": (plan.hidden_size,)}, scale)
    if plan.model.normalization != "rmsnorm":
        yield Piece(f"{ours}bias", {f"{theirs}.bias": (plan.hidden_size,)}, lambda b: [[b] * plan.tp])


def _qkv(layer: LayerChoice, slot: Slot, size: int, tp: int, tensor: torch.Tensor) -> list[list[torch.Tensor]]:
    """Each rank's query heads, then its keys, then its values. A KV head that there are too few of goes to several ranks."""
    queries = layer.query_heads_per_group
    parts_GRH = tensor.unflatten(0, (layer.kv_groups, queries + 2, size)).split([queries, 1, 1], dim=1)
    query_GQH, key_G1H, value_G1H = (_to_size(part, 0, slot.kv_heads) for part in parts_GRH)
    copies = max(tp // slot.kv_heads, 1)
    flat = [_to_size(query_GQH, 1, slot.queries), *(part.repeat_interleave(copies, 0) for part in (key_G1H, value_G1H))]
    ranks = [part.flatten(0, 2).chunk(tp) for part in flat]
    return [[torch.cat(parts) for parts in zip(*ranks, strict=True)]]


def _dense(layer: LayerChoice, slot: Slot, size: int, tp: int, weight: torch.Tensor) -> list[Sequence[torch.Tensor]]:
    weight_CGQH = weight.unflatten(1, (layer.kv_groups, layer.query_heads_per_group, size))
    padded_CGQH = _to_size(_to_size(weight_CGQH, 1, slot.kv_heads), 2, slot.queries)
    return [padded_CGQH.flatten(1).chunk(tp, 1)]


def _fc1(projections: int, slot: Slot, tp: int, tensor: torch.Tensor) -> list[Sequence[torch.Tensor]]:
    """The gate's projection is their `fc`, the other their `gate`."""
    padded_BF = _to_size(tensor.unflatten(0, (projections, -1)), 1, slot.ffn)
    return [part_F.chunk(tp) for part_F in padded_BF]


def _to_size(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """With zeros after the last unit of `axis`."""
    missing = size - tensor.shape[axis]
    return pad(tensor, (0, 0) * (tensor.dim() - 1 - axis) + (0, missing)) if missing else tensor
