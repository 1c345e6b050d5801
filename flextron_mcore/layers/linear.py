"""Products with a part of a weight, on Megatron-Core's column- and row-parallel functions.

Shape suffixes: S sequence, B batch, C hidden channels, c the part of them in use, D output rows of this rank, d the part of them
in use, V vocabulary of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from flextron_mcore.layers.norm import first
from flextron_mcore.layers.rows import PrefixRows, RowIndex

_FEW = 512  # tokens: for so few, copying a part of a weight that lies apart is slower than multiplying piece by piece


@dataclass(frozen=True)
class Selection:
    """A part of a weight: view it as `shape`, take each of `indices` (basic slices), join along `dim`, reshape to `result`.

    With dim=0 each is reshaped before it is joined. With one index the part is a view of the weight wherever its strides allow;
    with several it is copied.
    """

    shape: tuple[int, ...]
    indices: tuple[tuple[Any, ...], ...]
    result: tuple[int, ...]
    dim: int = 0

    def parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Views of `tensor`, one an index."""
        viewed = tensor.view(self.shape)
        return [viewed[index] for index in self.indices]

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The selected part of `tensor`, of shape `result`."""
        parts = self.parts(tensor)
        if len(parts) == 1:
            return parts[0].reshape(self.result)
        out = tensor.new_empty(self.result)
        for piece, part in zip(self._pieces(out, parts), parts, strict=True):
            piece.copy_(part)
        return out

    def add(self, tensor: torch.Tensor, part: torch.Tensor) -> None:
        """Add `part` (of shape `result`) to the selected part of `tensor`, in place."""
        targets = self.parts(tensor)
        for target, piece in zip(targets, self._pieces(part, targets), strict=True):
            target.add_(piece)

    def _pieces(self, joined: torch.Tensor, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The places of `parts` in a tensor of shape `result`, each of its part's shape."""
        if self.dim == 0:
            flat = joined.flatten().split([part.numel() for part in parts])
            return [piece.view(part.shape) for piece, part in zip(flat, parts, strict=True)]
        shape, sizes = list(parts[0].shape), [part.shape[self.dim] for part in parts]
        shape[self.dim] = sum(sizes)
        return list(joined.reshape(shape).split(sizes, self.dim))


class _Take(torch.autograd.Function):
    """The selected part of a parameter; the gradient goes straight to the same part of where it accumulates.

    Megatron-Core's DDP accumulates in `main_grad`. Adding there in place, and saying so with `grad_added_to_main_grad` as its own
    fused weight gradients do, costs what the part costs: autograd would pad it with zeros to the full size. A parameter that is
    ever sliced must always come through here: the flag holds for all micro-batches of a step.
    """

    @staticmethod
    def forward(ctx, weight: torch.Tensor, embedded: bool, *selections: Selection):  # type: ignore[override]
        ctx.weight, ctx.embedded, ctx.selections = weight, embedded, selections
        return tuple(selection.take(weight) for selection in selections)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):  # type: ignore[override]
        def add(full: torch.Tensor) -> None:
            for selection, grad in zip(ctx.selections, grads, strict=True):
                selection.add(full, grad)

        return accumulated(ctx.weight, add, ctx.embedded), None, *(None for _ in ctx.selections)


def accumulated(weight: torch.Tensor, add: Callable[[torch.Tensor], object], another: bool = False) -> torch.Tensor | None:
    """Result of a backward pass for a parameter whose gradient `add` adds to a full-size tensor.

    another: True if another use of the parameter in the same backward pass returns something, too.
    """
    if not hasattr(weight, "grad_added_to_main_grad") or getattr(weight, "main_grad", None) is None:
        full = torch.zeros_like(weight)
        add(full)
        return full
    add(weight.main_grad)
    weight.grad_added_to_main_grad = True
    # DDP's hook must still fire. The values are never read, so the pages of this tensor are never touched.
    return None if another else torch.empty_like(weight)


def take(weight: torch.Tensor, selection: Selection, embedded: bool = False) -> torch.Tensor:
    """The selected part of a parameter, differentiable. embedded: the parameter is an embedding's, too."""
    return take_all(weight, selection, embedded=embedded)[0]


def take_all(weight: torch.Tensor | None, *selections: Selection, embedded: bool = False) -> tuple[torch.Tensor | None, ...]:
    """Several parts of one parameter (None for an absent one). Taken apart, autograd would add up full-size gradients."""
    if weight is None:
        return (None,) * len(selections)
    if torch.is_grad_enabled():
        return _Take.apply(weight, embedded, *selections)
    return tuple(selection.take(weight) for selection in selections)


class ElasticColumnParallelLinear(ColumnParallelLinear):
    """Megatron-Core's column-parallel layer, multiplying with parts of its weight.

    The parts are arguments of forward: Megatron-Core's DDP waits for gathered parameters in a module's forward pre-hook, so a
    weight must be used inside the forward pass of the module that owns it.
    """

    def forward(  # type: ignore[override]
        self, input_: torch.Tensor, *parts: tuple[Selection, Selection], rows: RowIndex | PrefixRows | None = None
    ) -> list[torch.Tensor]:
        """x @ weight.T + bias for each of `parts` (selections of weight and bias): [S, B, C] -> [S, B, d], split over ranks.

        rows: which of the S*B tokens each part is for: [n, d].
        """
        biases = take_all(self.bias, *(bias for _, bias in parts))
        if not torch.is_grad_enabled() and not self.sequence_parallel and input_.shape[:-1].numel() <= _FEW:
            inputs = [input_] * len(parts) if rows is None else rows.take(input_.flatten(0, 1))
            return [_of_few(x, self.weight, part, bias) for x, (part, _), bias in zip(inputs, parts, biases, strict=True)]
        weights = take_all(self.weight, *(weight for weight, _ in parts))
        if len(parts) == 1 and rows is None:
            return [product(input_, weights[0], biases[0], self, self.allreduce_dgrad, self.sequence_parallel)]
        # Gathered, or marked for the gradient's all-reduce, once for all products.
        if self.sequence_parallel:
            x_SBC = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            x_SBC = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        inputs = [x_SBC] * len(parts) if rows is None else rows.take(x_SBC.flatten(0, 1))
        return [product(x, weight, bias, self) for x, weight, bias in zip(inputs, weights, biases, strict=True)]


class ElasticRowParallelLinear(RowParallelLinear):
    """Megatron-Core's row-parallel layer, multiplying with a part of its weight."""

    def forward(  # type: ignore[override]
        self,
        input_: torch.Tensor | Sequence[torch.Tensor],
        part: Selection | Sequence[Selection],
        rows: PrefixRows | None = None,
        shape: torch.Size | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B, d] -> ([S, B, c] summed, and with sequence parallelism scattered, over tensor-parallel ranks; bias or None).

        For parts of the weight that some tokens have: rows are those of the S*B tokens of `shape` [S, B] that each part is for,
        and input_ is [n, d] for each. A token gets the sum over the parts that it has.
        """
        if rows is None:
            return self._reduce(product(input_, take(self.weight, part), None, self))
        weights = take_all(self.weight, *part)
        if torch.is_grad_enabled():
            products = [product(x, weight, None, self) for x, weight in zip(input_, weights, strict=True)]
        else:  # what a product adds is added where the sum lies
            lowest, *others = zip(input_, weights, strict=True)
            products = [F.linear(*lowest)]
            for x, weight in others:
                products[0][: len(x)].addmm_(x, weight.mT)
        return self._reduce(rows.add(products, shape.numel()).view(*shape, len(self.weight)))

    def _reduce(self, out_SBc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sum over tensor-parallel ranks, and the bias."""
        bias = first(self.bias, out_SBc.shape[-1])
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(out_SBc, group=self.tp_group), bias
        return reduce_from_tensor_model_parallel_region(out_SBc, group=self.tp_group), bias


def _of_few(x: torch.Tensor, weight: torch.Tensor, selection: Selection, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., C] @ part.T + bias for few tokens, without a gradient; the part's pieces [g, d, C] stay where they lie."""
    pieces = [piece.flatten(1, -2) for piece in selection.parts(weight)]
    first = pieces[0]
    if len(pieces) == 1 and (len(first) == 1 or first.stride(0) == first.shape[1] * first.stride(1)):  # no copy
        return F.linear(x, first.reshape(selection.result), bias)
    products = [torch.matmul(x.flatten(0, -2), piece.mT).transpose(0, 1) for piece in pieces]  # [n, g, d]
    if len(products) > 1 and selection.dim == 0:
        products = [product.flatten(1) for product in products]
    joined = products[0] if len(products) == 1 else torch.cat(products, -1)
    out = joined.reshape(*x.shape[:-1], selection.result[0])
    return out if bias is None else out + bias


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    layer: torch.nn.Module,
    allreduce_dgrad: bool = False,
    sequence_parallel: bool = False,
) -> torch.Tensor:
    """x @ weight.T + bias, with Megatron-Core's communication of the tensor-parallel `layer`."""
    if not torch.is_grad_enabled() and not sequence_parallel:
        return F.linear(x, weight, bias)
    function = linear_with_grad_accumulation_and_async_allreduce if weight.requires_grad else linear_with_frozen_weight
    return function(
        input=x,
        weight=weight,
        bias=bias,
        gradient_accumulation_fusion=False,  # _Take accumulates
        allreduce_dgrad=allreduce_dgrad,
        sequence_parallel=sequence_parallel,
        grad_output_buffer=None,
        wgrad_deferral_limit=None,
        tp_group=layer.tp_group,
    )
