"""Matrix products with a slice of a weight, built on Megatron-Core's column- and row-parallel functions.

Shape suffixes: S sequence, B batch, C hidden channels, c channels in use, D output rows of this rank, d output rows in use, n
tokens of one product, g KV groups, V vocabulary of this rank.
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

from flextron_mcore.layers.norm import first_channels
from flextron_mcore.layers.rows import PrefixRows, RowIndex

# Up to this many tokens, a product with each piece of a strided slice is faster than one product with a copy of the slice.
_FEW_TOKENS = 512


@dataclass(frozen=True)
class Selection:
    """Description of a slice of a weight: view as `shape`, take each of `indices`, concatenate along `dim`, reshape to `result`.

    With one index the slice is a view of the weight if its strides allow it. With several indices it is a copy.

    Attributes:
        shape: view of the weight that the indices refer to.
        indices: index of each piece, a tuple of slices.
        result: shape of the slice.
        dim: dimension of `shape` along which pieces are concatenated. With 0 each piece is flattened first.
    """

    shape: tuple[int, ...]
    indices: tuple[tuple[Any, ...], ...]
    result: tuple[int, ...]
    dim: int = 0

    def parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Pieces of `tensor`: a view for each index."""
        viewed = tensor.view(self.shape)
        return [viewed[index] for index in self.indices]

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Slice of `tensor` that this object describes, of shape `result`."""
        parts = self.parts(tensor)
        if len(parts) == 1:
            return parts[0].reshape(self.result)
        out = tensor.new_empty(self.result)
        for piece, part in zip(self._pieces(out, parts), parts, strict=True):
            piece.copy_(part)
        return out

    def add(self, tensor: torch.Tensor, part: torch.Tensor) -> None:
        """Add `part` (of shape `result`) in place to the slice of `tensor` that this object describes."""
        targets = self.parts(tensor)
        for target, piece in zip(targets, self._pieces(part, targets), strict=True):
            target.add_(piece)

    def _pieces(self, joined: torch.Tensor, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Views of `joined` (shape `result`) where each of `parts` belongs, of that part's shape."""
        if self.dim == 0:
            flat = joined.flatten().split([part.numel() for part in parts])
            return [piece.view(part.shape) for piece, part in zip(flat, parts, strict=True)]
        shape, sizes = list(parts[0].shape), [part.shape[self.dim] for part in parts]
        shape[self.dim] = sum(sizes)
        return list(joined.reshape(shape).split(sizes, self.dim))


class _Take(torch.autograd.Function):
    """Selected part of a parameter, whose gradient is added in place to the same part of `main_grad`.

    Autograd would pad the gradient with zeros to the full size. Adding to DDP's `main_grad` costs in proportion to the slice.
    `grad_added_to_main_grad` tells DDP so, as Megatron-Core's fused weight gradients do. The flag holds for all micro-batches of
    a step, so a parameter that is ever sliced must always be used through this function.
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
    """Add a parameter's gradient to DDP's `main_grad`; return what `backward` must return for the parameter.

    Returns an uninitialised tensor, whose values nobody reads, or None with `another`. Without DDP (no `main_grad`) it returns
    the gradient itself.

    Args:
        weight: the parameter.
        add: function that adds the gradient in place to its argument, a tensor of the parameter's shape.
        another: True if another use of the parameter in the same backward pass returns a tensor, too (tied embeddings).
    """
    if not hasattr(weight, "grad_added_to_main_grad") or getattr(weight, "main_grad", None) is None:
        full = torch.zeros_like(weight)
        add(full)
        return full
    add(weight.main_grad)
    weight.grad_added_to_main_grad = True
    # DDP's hook fires only for a returned gradient. Nobody reads its values, so the tensor's memory is never touched.
    return None if another else torch.empty_like(weight)


def take(weight: torch.Tensor, selection: Selection, embedded: bool = False) -> torch.Tensor:
    """Slice of a parameter, of shape `selection.result`, differentiable.

    Args:
        weight: the parameter.
        selection: description of the slice.
        embedded: True if an embedding shares the parameter, and reports the gradient to DDP (`another` of `accumulated`).
    """
    return take_all(weight, selection, embedded=embedded)[0]


def take_all(weight: torch.Tensor | None, *selections: Selection, embedded: bool = False) -> tuple[torch.Tensor | None, ...]:
    """Several slices of one parameter, differentiable; None for each if the parameter is absent.

    One call takes all slices: separate calls would make autograd add full-size gradients.

    Args:
        weight: the parameter, or None.
        selections: descriptions of the slices.
        embedded: True if an embedding shares the parameter, and reports the gradient to DDP (`another` of `accumulated`).
    """
    if weight is None:
        return (None,) * len(selections)
    if torch.is_grad_enabled():
        return _Take.apply(weight, embedded, *selections)
    return tuple(selection.take(weight) for selection in selections)


class ElasticColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel layer of Megatron-Core that multiplies with slices of its weight.

    The slices are arguments of `forward`, because DDP waits for gathered parameters in a module's forward pre-hook: a weight may
    only be used inside the `forward` of the module that owns it.
    """

    def forward(  # type: ignore[override]
        self, input_: torch.Tensor, *parts: tuple[Selection, Selection], rows: RowIndex | PrefixRows | None = None
    ) -> list[torch.Tensor]:
        """Matrix products x @ slice.T + bias, one for each of `parts`: [S, B, C] -> list of [S, B, d], d of this rank.

        Args:
            input_: x [S, B, C]; with sequence parallelism this rank's positions, while results have all positions.
            parts: pairs of a slice of the weight and the same rows of the bias, one pair for each product.
            rows: tokens, out of S*B, of each product, whose result is then [n, d]. None for all tokens.
        """
        biases = take_all(self.bias, *(bias for _, bias in parts))
        if not torch.is_grad_enabled() and not self.sequence_parallel and input_.shape[:-1].numel() <= _FEW_TOKENS:
            inputs = [input_] * len(parts) if rows is None else rows.take(input_.flatten(0, 1))
            return [_few_tokens(x, self.weight, part, bias) for x, (part, _), bias in zip(inputs, parts, biases, strict=True)]
        weights = take_all(self.weight, *(weight for weight, _ in parts))
        if len(parts) == 1 and rows is None:
            return [product(input_, weights[0], biases[0], self, self.allreduce_dgrad, self.sequence_parallel)]
        # One gather (or one all-reduce of the gradient) serves all products.
        if self.sequence_parallel:
            x_SBC = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            x_SBC = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        inputs = [x_SBC] * len(parts) if rows is None else rows.take(x_SBC.flatten(0, 1))
        return [product(x, weight, bias, self) for x, weight, bias in zip(inputs, weights, biases, strict=True)]


class ElasticRowParallelLinear(RowParallelLinear):
    """Row-parallel layer of Megatron-Core that multiplies with slices of its weight."""

    def forward(  # type: ignore[override]
        self,
        input_: torch.Tensor | Sequence[torch.Tensor],
        part: Selection | Sequence[Selection],
        rows: PrefixRows | None = None,
        shape: torch.Size | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Matrix product x @ slice.T, summed over tensor-parallel ranks: ([S, B, c], bias [c] or None). The bias is not added.

        With sequence parallelism the result is this rank's positions. With `rows` there are several products, and a token's
        result is the sum of the products that it takes part in.

        Args:
            input_: x [S, B, d] of this rank; with `rows` a list of [n, d], one for each product.
            part: slice of the weight; with `rows` a list of slices, one for each product, with all hidden channels (c = C).
            rows: tokens, out of S*B, of each product. None for one product of all tokens.
            shape: (S, B), needed with `rows`.
        """
        if rows is None:
            return self._reduce(product(input_, take(self.weight, part), None, self))
        weights = take_all(self.weight, *part)
        if torch.is_grad_enabled():
            products = [product(x, weight, None, self) for x, weight in zip(input_, weights, strict=True)]
        else:  # each product is added in place to the sum
            lowest, *others = zip(input_, weights, strict=True)
            products = [F.linear(*lowest)]
            for x, weight in others:
                products[0][: len(x)].addmm_(x, weight.mT)
        return self._reduce(rows.add(products, shape.numel()).view(*shape, len(self.weight)))

    def _reduce(self, out_SBc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(sum of `out_SBc` over tensor-parallel ranks, bias [c] or None).

        With sequence parallelism the sum has this rank's positions only.
        """
        bias = first_channels(self.bias, out_SBc.shape[-1])
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(out_SBc, group=self.tp_group), bias
        return reduce_from_tensor_model_parallel_region(out_SBc, group=self.tp_group), bias


def _few_tokens(x: torch.Tensor, weight: torch.Tensor, selection: Selection, bias: torch.Tensor | None) -> torch.Tensor:
    """Product x [..., C] @ slice.T + bias for few tokens, without a gradient: [..., d]. Pieces of the weight are not copied."""
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
    """Product x @ weight.T + bias: [..., C] -> [..., d], with the communication of Megatron-Core's linear layers.

    Args:
        x: input [..., C].
        weight: part of a weight, [d, C].
        bias: [d] or None.
        layer: tensor-parallel layer, whose process group is used.
        allreduce_dgrad: sum the input's gradient over tensor-parallel ranks.
        sequence_parallel: gather the input over tensor-parallel ranks, and scatter its gradient.
    """
    if not torch.is_grad_enabled() and not sequence_parallel:
        return F.linear(x, weight, bias)
    function = linear_with_grad_accumulation_and_async_allreduce if weight.requires_grad else linear_with_frozen_weight
    return function(
        input=x,
        weight=weight,
        bias=bias,
        gradient_accumulation_fusion=False,  # _Take accumulates the gradient
        allreduce_dgrad=allreduce_dgrad,
        sequence_parallel=sequence_parallel,
        grad_output_buffer=None,
        wgrad_deferral_limit=None,
        tp_group=layer.tp_group,
    )
