"""Conversion of a Megatron-Core tensor to and from the tensors of another format.

A `Mapped` (families/family.py) says which tensors of the other format one Megatron-Core tensor consists of.
"""

from __future__ import annotations

import torch

from flextron_mcore.families.family import Mapped


def split(mapped: Mapped, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Split a Megatron-Core tensor into the tensors that another format has for it, in the order of `mapped.shapes`."""
    parts = split_parts(mapped, tensor)
    if len(mapped.shapes) < len(parts):
        parts = [torch.cat(parts)]
    return [part.t() for part in parts] if mapped.transposed else parts


def split_parts(mapped: Mapped, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Parts of a Megatron-Core tensor along its first dimension: [query, key, value], [gate, up], or the tensor itself in a list.

    Each part has its heads or neurons in order; in the fused QKV they alternate by KV group.
    """
    sizes, where = mapped.placed.sizes[0], mapped.placed.tensor.sides[0].parts
    if where is None:
        return [tensor]
    parts = tensor.unflatten(0, sizes).split(mapped.counts, where)
    return [part.flatten(0, len(sizes) - 1) for part in parts]


def join(mapped: Mapped, *tensors: torch.Tensor) -> torch.Tensor:
    """Join the tensors that another format has for one Megatron-Core tensor, and return it: the inverse of `split`.

    tensors: tensors in the order of `mapped.shapes`.
    """
    parts = [tensor.t() for tensor in tensors] if mapped.transposed else list(tensors)
    sizes, where = mapped.placed.sizes[0], mapped.placed.tensor.sides[0].parts
    if where is None:
        return parts[0]
    if len(parts) < len(mapped.counts):
        each = parts[0].shape[0] // sum(mapped.counts)
        parts = parts[0].split([each * count for count in mapped.counts])
    grouped = [
        part.unflatten(0, (*sizes[:where], count, *sizes[where + 1 :])) for part, count in zip(parts, mapped.counts, strict=True)
    ]
    return torch.cat(grouped, where).flatten(0, len(sizes) - 1)
