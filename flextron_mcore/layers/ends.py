"""Elastic ends of a GPTModel: word embedding, position embedding and output layer, for the first c hidden channels.

GPTModel takes no spec for these modules. Each elastic module is therefore built around the parameter of the stock module that it
replaces. A second initialisation would draw other random numbers.

Shape suffixes: S sequence, B batch, C hidden channels, c channels in use, V vocabulary of this rank.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from flextron_mcore.layers.linear import Selection, accumulated, product, take
from flextron_mcore.layers.state import LayerState, StateReader


def make_ends_elastic(gpt: GPTModel) -> None:
    """Replace embeddings and output layer of a newly built GPTModel by elastic ones, in place; its parameters stay."""
    if gpt.pre_process:
        embedding = gpt.embedding
        embedding.word_embeddings = ElasticEmbedding(embedding.word_embeddings, gpt.config)
        embedding.word_embeddings.weight.zero_out_wgrad = False  # with tied weights the returned gradient is never read
        if embedding.add_position_embedding:
            embedding.position_embeddings = ElasticPositions(embedding.position_embeddings)
    if gpt.post_process:
        gpt.output_layer = ElasticOutputLayer(gpt.output_layer)


class ElasticEmbedding(StateReader, VocabParallelEmbedding):
    """Word embedding of the first c hidden channels; the cost of look-up and gradient is proportional to tokens times c.

    Args:
        stock: embedding to replace, whose weight is taken over.
        config: TransformerConfig.
    """

    def __init__(self, stock: VocabParallelEmbedding, config: TransformerConfig) -> None:
        super().__init__(
            stock.num_embeddings,
            stock.embedding_dim,
            init_method=config.embedding_init_method,
            reduce_scatter_embeddings=stock.reduce_scatter_embeddings,
            config=_uninitialised(config),
            tp_group=stock.tp_group,
        )
        self.weight = stock.weight

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """Token ids [B, S] -> [B, S, c], or with `reduce_scatter_embeddings` this rank's part of [S, B, c].

        Megatron-Core sets it for sequence parallelism without learned positions.
        """
        if self.tp_group.size() == 1:  # an id without a row is an error, as in Megatron-Core
            out_BSc = _Rows.apply(self.weight, input_, _channels(self.state))
        else:
            rows = input_ - self.vocab_start_index
            elsewhere = (rows < 0) | (rows >= self.num_embeddings_per_partition)
            out_BSc = _Rows.apply(self.weight, rows.masked_fill(elsewhere, 0), _channels(self.state))
            out_BSc = out_BSc.masked_fill(elsewhere.unsqueeze(-1), 0)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(out_BSc.transpose(0, 1).contiguous(), group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(out_BSc, group=self.tp_group)


class ElasticPositions(StateReader, torch.nn.Embedding):
    """Learned position embedding of the first c hidden channels. stock: embedding to replace, whose weight is taken over."""

    def __init__(self, stock: torch.nn.Embedding) -> None:
        super().__init__(stock.num_embeddings, stock.embedding_dim, _weight=stock.weight.detach())  # draws no random numbers
        self.weight = stock.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Positions [B, S] -> [B, S, c]."""
        return _Rows.apply(self.weight, input, _channels(self.state))


class ElasticOutputLayer(ColumnParallelLinear):
    """Output layer that uses the first c columns of its weight, c being the number of channels of its input.

    A tied weight must belong to an ElasticEmbedding. stock: output layer to replace, whose weight is taken over.

    Attributes:
        deferred: True makes `forward` return hidden states instead of logits, for a loss that computes the logits in chunks with
            `prepared` and `project`.
    """

    def __init__(self, stock: ColumnParallelLinear) -> None:
        super().__init__(
            stock.input_size,
            stock.output_size,
            config=_uninitialised(stock.config),
            init_method=stock.config.init_method,
            bias=False,
            gather_output=stock.gather_output,
            skip_weight_param_allocation=stock.weight is None,
            tp_group=stock.tp_group,
        )
        self.config, self.weight = stock.config, stock.weight
        self.deferred = False
        self._tied: torch.Tensor | None = None  # the weight that a deferred `forward` was called with

    def forward(  # type: ignore[override]
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        """Hidden states [S, B, c] -> (logits [S, B, V], None), or with the logits of the whole vocabulary if they are gathered.

        If `deferred` is set, the result is (`input_`, None).

        Args:
            input_: hidden states; with sequence parallelism this rank's positions, while logits have all positions.
            weight: the embedding's weight [V, C] if it is tied, else None.
            runtime_gather_output: gather the logits over tensor-parallel ranks; None for the constructor's `gather_output`.
        """
        if self.deferred:
            self._tied = weight
            return input_, None
        used = self._used(weight, input_.shape[-1])
        logits_SBV = product(input_, used, None, self, self.allreduce_dgrad, self.sequence_parallel)
        gather = self.gather_output if runtime_gather_output is None else runtime_gather_output
        return gather_from_tensor_model_parallel_region(logits_SBV, group=self.tp_group) if gather else logits_SBV, None

    def _used(self, weight: torch.Tensor | None, channels: int) -> torch.Tensor:
        """First `channels` columns of the weight, [V, c]. weight: the embedding's weight if it is tied, else None."""
        weight = self.weight if weight is None else weight
        part = Selection(tuple(weight.shape), ((slice(None), slice(channels)),), (len(weight), channels))
        return take(weight, part, embedded=self.weight is None)

    def prepared(self, states_SBc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states of all positions [S, B, c], weight [V, c]), the arguments of `project`, after a deferred `forward`.

        states_SBc: result of that `forward`; with sequence parallelism this rank's positions, which are gathered here.
        """
        weight, self._tied = self._used(self._tied, states_SBc.shape[-1]), None
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(states_SBc, tensor_parallel_output_grad=True, group=self.tp_group), weight
        return copy_to_tensor_model_parallel_region(states_SBc, group=self.tp_group), weight

    def project(self, states_SBc: torch.Tensor, weight_Vc: torch.Tensor) -> torch.Tensor:
        """Logits [s, B, V] of s of the positions.

        Args:
            states_SBc: hidden states of these positions [s, B, c], from `prepared`.
            weight_Vc: weight from `prepared`.
        """
        return product(states_SBc, weight_Vc, None, self)


def _channels(state: LayerState) -> int | None:
    """Number of an embedding's channels in use; None for all."""
    return state.channels[0] if state.channels else None


def _uninitialised(config: TransformerConfig) -> TransformerConfig:
    """Copy of a configuration with which Megatron-Core draws no random weights."""
    config = copy.copy(config)
    config.perform_initialization = False
    return config


class _Rows(torch.autograd.Function):
    """Look-up of embedding rows, first `channels` channels only, whose gradient is added to DDP's `main_grad`.

    Autograd's own gradient would have the size of the whole weight (`linear.accumulated`). An output layer that shares the weight
    adds its gradient to the same `main_grad`.
    """

    @staticmethod
    def forward(ctx, weight: torch.Tensor, rows: torch.Tensor, channels: int | None):  # type: ignore[override]
        ctx.weight, ctx.channels = weight, channels
        ctx.save_for_backward(rows)
        return F.embedding(rows, weight[:, :channels])

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]
        (rows,) = ctx.saved_tensors

        def add(full: torch.Tensor) -> None:
            full[:, : ctx.channels].index_add_(0, rows.flatten(), grad.flatten(0, -2).to(full.dtype))

        return accumulated(ctx.weight, add), None, None
