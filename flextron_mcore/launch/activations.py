"""Bytes that a stage needs on a rank beside weights, gradients and optimizer state. No torch import.

In training: what autograd keeps from the forward passes in flight, and what the loss or a backward pass works with at the peak.
Counted for the full model. Letters as in layout.py: n tokens of a micro-batch; h, q, k, f1, f2 sides of the weights of a rank.
"""

from __future__ import annotations

from flextron_mcore.launch.layout import TRAINED, Rank
from flextron_mcore.settings.stages import WorkloadSettings
from flextron_mcore.settings.training import StageSettings

TAUGHT = 40  # bytes a logit: with distillation ten tensors of logits in fp32 are there at the same time (measured)


def activations(rank: Rank, settings: StageSettings) -> int:
    """The peak above weights, gradients and optimizer state."""
    stage = settings.stage
    gathered = rank.tokens * rank.model.hidden_size * rank.layout.dtype if rank.layout.sequence_parallel else 0
    gates = (
        stage == "joint" or (stage == "router" and not settings.surrogate.enabled) or bool(getattr(settings, "modulation", False))
    )
    if stage not in TRAINED and not gates:
        return gathered + _forward(rank) + (_kv_cache(rank, settings.setting) if stage == "latency" else 0)
    micro_batches = settings.model.global_batch_size // (rank.layout.micro_batch * rank.layout.data)
    teach = stage in ("elastic", "gumbel") and settings.distillation.weight > 0
    step = networks(settings)
    weighted = _most(in_flight(rank, micro_batches * step), step, settings) if stage == "gumbel" else 0
    return gathered + _backward(rank, micro_batches * step, stage not in TRAINED, gates, teach, weighted)


def networks(settings: StageSettings) -> int:
    """Networks of a training step."""
    more = {"elastic": "num_subnetworks", **dict.fromkeys(("router", "joint", "gumbel"), "targets_per_step")}
    return 1 + (getattr(settings, more[settings.stage]) if settings.stage in more else 0)


def _most(flights: int, step: int, settings: StageSettings) -> int:
    """The most networks with weights (layers/weighted.py) among the passes in flight, where `step` networks take turns."""
    weighted, chunks = settings.router.weighted_per_step, settings.model.virtual_pipeline_model_parallel_size or 1
    return min(flights, chunks * (flights // step * weighted + min(flights % step, weighted)))


def saved_layer(rank: Rank, frozen: bool = False, gates: bool = False, weighted: bool = False) -> tuple[int, int]:
    """Bytes that autograd keeps of a layer's attention block, and of its MLP, for the backward pass of a micro-batch.

    frozen: no weight wants a gradient. gates: blocks' outputs are multiplied with gates, or modulation, that do. weighted: so are
    channels, heads and neurons too.
    """
    model, layout, n, e = rank.model, rank.layout, rank.tokens, rank.layout.dtype
    h, q, k, f1, f2 = rank.sizes
    inputs = 0 if frozen else rank.stream
    shared = norm(rank, frozen, weighted) + (rank.stream if gates or weighted else 0) + _dropout_mask(rank)
    fused = q + 2 * k  # values are a view of the fused product, and keep it
    if model.position_embedding_type == "rope":
        attention = n * (fused + q + k) * e + 4 * layout.length * model.kv_channels * e
    else:
        attention = n * (fused + (q if model.query_heads_per_group > 1 else 0)) * e
    attention += n * q * e + 4 * n * (q // model.kv_channels)  # output, and the logarithm of each softmax's sum
    if model.gated:
        # Gate and up projection share their input, which is gathered once for both.
        mlp = n * 3 * f2 * e + (0 if frozen else n * h * e)
    else:
        mlp = inputs + (0 if model.activation == "relu" and not frozen else n * f2 * e)
    mlp += 0 if frozen else n * f2 * e
    if weighted:  # what the masks are multiplied with
        attention, mlp = attention + n * q * e, mlp + n * f2 * e
    return shared + inputs + attention, shared + mlp


def norm(rank: Rank, frozen: bool = False, weighted: bool = False) -> int:
    """Bytes that a norm keeps: input and statistics; without CUDA, RMSNorm is several fp32 operations, and weighted all are."""
    rows, h = rank.rows, rank.model.hidden_size
    if weighted:
        return rows * (4 * h * (4 if rank.model.normalization == "rmsnorm" else 5) + 8)
    if rank.model.normalization != "rmsnorm":
        return rank.stream + 8 * rows
    if rank.layout.cuda:
        return rank.stream + 4 * rows
    return rows * (4 * h * (1 if frozen else 2) + 4)


def saved_head(rank: Rank, frozen: bool = False, weighted: bool = False) -> int:
    """Bytes that autograd keeps of the final norm, the output layer and the cross entropy (softmax in fp32, targets)."""
    return norm(rank, frozen, weighted) + (0 if frozen else rank.stream) + rank.tokens * (4 * rank.vocabulary + 9)


def in_flight(rank: Rank, micro_batches: int) -> int:
    """Forward passes, each of a chunk, that wait for their backward pass at the same time: 1F1B, or interleaved."""
    stages, chunks = rank.layout.pipeline, rank.layout.chunks
    if chunks == 1:
        return min(stages - rank.index, micro_batches)
    return min(2 * (stages - rank.index - 1) + (chunks - 1) * stages + 1, chunks * micro_batches)


def _backward(rank: Rank, micro_batches: int, frozen: bool, gates: bool, teach: bool, weighted: int) -> int:
    """weighted: of the passes in flight, those of networks with weights."""
    layout = rank.layout
    layers = layout.layers[rank.index] // layout.chunks
    kept, work = saved_chunk(rank, layers, *saved_layer(rank, frozen, gates))
    more, weighted_work = saved_chunk(rank, layers, *saved_layer(rank, weighted=True))
    work = _layer_work(rank, frozen) + (weighted_work + _mask_work(rank) if weighted else work)
    flights = in_flight(rank, micro_batches)
    total = (flights - weighted) * kept + weighted * more
    if layout.pipeline > 1:  # a stage keeps its outputs until their gradients arrive
        total += (flights - 1 if rank.last else flights) * rank.stream
    # The loss's part is gone when the layers' backward passes begin.
    return total + (max(_head(rank, frozen, teach, weighted > 0), work) if rank.last else work)


def saved_chunk(rank: Rank, layers: int, attention: int, mlp: int) -> tuple[int, int]:
    """Bytes kept of a chunk of `layers`, and bytes that its backward pass computes again on top of that."""
    (method, number), layer = rank.layout.recompute, attention + mlp
    if method == "uniform":
        return layers // number * rank.stream, number * layer - rank.stream
    if method == "block":  # the first ones: when their turn comes, what was kept of the others is gone
        again = min(number, layers)
        kept = (layers - again) * layer
        return again * rank.stream + kept, max(layer - rank.stream - kept, 0) if again else 0
    if method == "mlp":
        given = norm(rank) + rank.stream
        return layers * (attention + given), mlp - given
    return layers * layer, 0


def _head(rank: Rank, frozen: bool, teach: bool, weighted: bool) -> int:
    """The output layer and the loss at their peak."""
    n, e, h = rank.tokens, rank.layout.dtype, rank.model.hidden_size
    logits = n * rank.vocabulary
    if teach:
        return saved_head(rank, frozen, weighted) + (TAUGHT - 4) * logits + (8 * logits if rank.padded else 0)
    copies = (2 * logits if e == 2 else 0) + (e * logits if rank.padded else 0)  # before the softmax in fp32
    gradients = (-2 * logits if e == 2 else 0) + n * h * e  # the softmax becomes its own gradient
    gradients += 0 if frozen else rank.vocabulary * h * e
    return saved_head(rank, frozen, weighted) + max(copies, gradients)


def _layer_work(rank: Rank, frozen: bool) -> int:
    """Bytes that the MLP's backward pass, the first of a layer, works with: gradients of activations and of weights.

    A weight's gradient is there twice (layers/linear.py: the part, and a tensor that DDP's hook wants to see).
    """
    n, e, h = rank.tokens, rank.layout.dtype, rank.model.hidden_size
    _, _, _, f1, f2 = rank.sizes
    weights = 0 if frozen else 2 * h * e
    second = 2 * rank.stream + e * n * f2 + weights * f2
    first = 3 * rank.stream - e * n * f1 + weights * f1  # most of what was kept of the MLP is gone
    tied = rank.first and rank.last and rank.model.share_embeddings_and_output_weights and not frozen
    return max(second, first) + (rank.vocabulary * h * e if tied else 0)  # which waits for the embedding's part


def _mask_work(rank: Rank) -> int:
    """Bytes that the MLP's backward pass works with on top where neurons are weighed: their gradients, and the weights'."""
    return rank.layout.dtype * rank.tokens * rank.sizes[4]


def _forward(rank: Rank) -> int:
    n, e = rank.tokens, rank.layout.dtype
    h, q, k, f1, f2 = rank.sizes
    layer = 2 * rank.stream + e * n * max(h + f1 + 2 * f2, 3 * q + 4 * k)
    logits = (6 if e == 2 else 4) + (e if rank.padded else 0)
    return max(layer, n * rank.vocabulary * logits + 2 * rank.stream if rank.last else 0)


def _kv_cache(rank: Rank, setting: WorkloadSettings) -> int:
    if setting.kind != "generation":
        return 0
    length = rank.layout.length + setting.generated_tokens - 1
    return 2 * rank.model.num_layers * rank.sizes[2] * rank.layout.micro_batch * length * rank.layout.dtype


def _dropout_mask(rank: Rank) -> int:
    return rank.rows * rank.model.hidden_size * (1 if rank.layout.cuda else rank.layout.dtype) * (rank.model.hidden_dropout > 0)
