"""The ends of a GPTModel: word embedding, positions and output layer, for the channels of the residual stream in use.

GPTModel has no spec for its ends, and a second initialisation would draw other random numbers: each end is constructed over the
parameter of the stock module that it replaces.

Shape suffixes: S sequence, B batch, C hidden channels, c the part of them in use, V vocabulary of this rank.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from flextron_mcore.layers.linear import Selection, accumulated, product, take
from flextron_mcore.layers.state import LayerState, StateReader


def make_ends_elastic(gpt: GPTModel) -> None:
    """Replace the ends of a freshly built GPTModel; its parameters stay."""
    if gpt.pre_process:
        embedding = gpt.embedding
        embedding.word_embeddings = ElasticEmbedding(embedding.word_embeddings, gpt.config)
        embedding.word_embeddings.weight.zero_out_wgrad = False  # nor is it read where the output layer shares the weight
        if embedding.add_position_embedding:
            embedding.position_embeddings = ElasticPositions(embedding.position_embeddings)
    if gpt.post_process:
        gpt.output_layer = ElasticOutputLayer(gpt.output_layer)


class ElasticEmbedding(StateReader, VocabParallelEmbedding):
    """Word embedding whose look-up and gradient cost as much as its tokens and the channels in use."""

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
        """[B, S] -> [B, S, c], or with sequence parallelism this rank's part of [S, B, c]."""
        rows = input_ - self.vocab_start_index
        elsewhere = (rows < 0) | (rows >= self.num_embeddings_per_partition)
        out_BSc = _Rows.apply(self.weight, rows.masked_fill(elsewhere, 0), _channels(self.state))
        if self.tp_group.size() > 1:
            out_BSc = out_BSc.masked_fill(elsewhere.unsqueeze(-1), 0)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(out_BSc.transpose(0, 1).contiguous(), group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(out_BSc, group=self.tp_group)


class ElasticPositions(StateReader, torch.nn.Embedding):
    """Learned position embedding, likewise."""

    def __init__(self, stock: torch.nn.Embedding) -> None:
        super().__init__(stock.num_embeddings, stock.embedding_dim, _weight=stock.weight.detach())  # draws nothing
        self.weight = stock.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [B, S, c]."""
        return _Rows.apply(self.weight, input, _channels(self.state))


class ElasticOutputLayer(ColumnParallelLinear):
    """Output layer for as many channels as reach it. With a tied weight it needs an ElasticEmbedding."""

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

    def forward(  # type: ignore[override]
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        """[S, B, c] -> ([S, B, V], None). weight: the embedding's [V, C], where it is shared."""
        weight, channels = self.weight if weight is None else weight, input_.shape[-1]
        part = Selection(tuple(weight.shape), ((slice(None), slice(channels)),), (len(weight), channels))
        used = take(weight, part, embedded=self.weight is None)
        logits_SBV = product(input_, used, None, self, self.allreduce_dgrad, self.sequence_parallel)
        gather = self.gather_output if runtime_gather_output is None else runtime_gather_output
        return gather_from_tensor_model_parallel_region(logits_SBV, group=self.tp_group) if gather else logits_SBV, None


def _channels(state: LayerState) -> int | None:
    """Channels of an embedding in use, None for all."""
    return state.channels[0] if state.channels else None


def _uninitialised(config: TransformerConfig) -> TransformerConfig:
    config = copy.copy(config)
    config.perform_initialization = False
    return config


class _Rows(torch.autograd.Function):
    """The first channels of rows of an embedding. Their gradient accumulates as in layers/linear.py: tied ends share a weight."""

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
