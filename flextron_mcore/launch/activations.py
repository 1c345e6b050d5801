"""Estimate of the bytes that a stage needs on a rank beside weights, gradients and optimizer state. No torch import.

In training these are the tensors that autograd saves in the forward passes in flight, and the working memory of the loss or of a
backward pass at its peak. All counts are for the full model.

Letters: n tokens of a micro-batch, e bytes of an element; h hidden size; on one rank q query channels, k key channels, f1 fc1
outputs and f2 fc2 inputs (`Rank.sizes`, layout.py).
"""

from __future__ import annotations

from flextron_mcore.launch.layout import LOOPED, TRAINED, Rank
from flextron_mcore.settings.latency import WorkloadSettings
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.training.rampup import BatchSizes

TAUGHT = 16  # bytes per logit of the loss with distillation: four fp32 tensors (measured); the teacher's logits are counted apart


def activations(rank: Rank, settings: StageSettings) -> int:
    """Peak bytes that a stage needs on a rank in addition to weights, gradients and optimizer state.

    Where gradients are computed, these are the tensors that autograd saves; elsewhere the largest tensors of one forward pass,
    and for `latency` also a KV cache.
    """
    stage = settings.stage
    gathered = rank.tokens * rank.model.hidden_size * rank.layout.dtype if rank.layout.sequence_parallel else 0
    gates = (
        stage == "joint" or (stage == "router" and not settings.surrogate.enabled) or bool(getattr(settings, "modulation", False))
    )
    if stage not in TRAINED and not gates:
        if stage == "latency":
            return inference(rank, settings.setting.kind) + _kv_cache(rank, settings.setting)
        return gathered + _forward(rank)
    largest = BatchSizes(settings.model, settings.trainer.max_steps).largest if stage in LOOPED else 0
    micro_batches = (largest or settings.model.global_batch_size) // (rank.layout.micro_batch * rank.layout.data)
    teach = stage in ("elastic", "joint", "gumbel") and settings.distillation.weight > 0
    teacher = rank.teacher(settings)
    step = networks(settings) + (teacher is not None)
    weighted = _most(in_flight(rank, micro_batches * step), step, settings) if stage == "gumbel" else 0
    needed = _backward(rank, micro_batches * step, stage not in TRAINED, gates, teach, weighted)
    return gathered + max(needed, needed - _head(rank, False, teach, weighted > 0) + _forward(teacher) if teacher else 0)


def networks(settings: StageSettings) -> int:
    """Number of networks that a training step runs, the full model included; 1 for a stage that runs no sub-networks."""
    more = {"elastic": "num_subnetworks", **dict.fromkeys(("router", "joint", "gumbel"), "targets_per_step")}
    return 1 + (getattr(settings, more[settings.stage]) if settings.stage in more else 0)


def _most(flights: int, step: int, settings: StageSettings) -> int:
    """Largest number of weighted networks (with a weight for every candidate, as `gumbel` trains) among the passes in flight.

    Args:
        flights: forward passes of a chunk of layers that wait for their backward passes.
        step: networks of a training step, which run one after another for each micro-batch.
        settings: settings of `gumbel`.
    """
    weighted, chunks = settings.router.weighted_per_step, settings.model.virtual_pipeline_model_parallel_size or 1
    return min(flights, chunks * (flights // step * weighted + min(flights % step, weighted)))


def saved_layer(rank: Rank, frozen: bool = False, gates: bool = False, weighted: bool = False) -> tuple[int, int]:
    """Bytes that autograd saves in the forward pass of a micro-batch through one layer: (attention block, MLP).

    Args:
        rank: rank that holds the layer.
        frozen: True if weights get no gradients.
        gates: True if outputs of blocks are multiplied with router gates or modulation gains, which get gradients.
        weighted: True in a weighted network (layers/weighted.py), whose channels, heads and neurons are multiplied with masks
            that get gradients.
    """
    model, layout, n, e = rank.model, rank.layout, rank.tokens, rank.layout.dtype
    h, q, k, f1, f2 = rank.sizes
    inputs = 0 if frozen else rank.stream
    shared = norm(rank, frozen, weighted) + (rank.stream if gates or weighted else 0) + _dropout_mask(rank)
    fused = q + 2 * k  # values are a view of the fused QKV product, so all of it stays alive
    turned = n * (fused + q + k) * e + 4 * layout.length * model.rotary_channels * e
    plain = n * (fused + (q if model.query_heads_per_group > 1 else 0)) * e
    mine = rank.numbers  # layers may differ in windows and RoPE: attention's bytes are a mean over the rank
    layers, skipped = len(mine), sum((model.no_rope_freq or (0,) * model.num_layers)[number] for number in mine)
    attention = ((layers - skipped) * turned + skipped * plain) // layers if model.position_embedding_type == "rope" else plain
    if model.qk_layernorm:
        attention += _head_norms(rank, frozen)
    windowed = sum((model.windows[number] or layout.length) < layout.length for number in mine)
    attention += windowed * layout.length**2 * e // layers  # masks
    attention += n * q * e + 4 * n * (q // model.kv_channels)  # output, and log-sum-exp of each softmax in fp32
    if model.gated:
        # Gate and up projection share one gathered input.
        mlp = n * 3 * f2 * e + (0 if frozen else n * h * e)
    else:
        mlp = inputs + (0 if model.activation == "relu" and not frozen else n * f2 * e)
    mlp += 0 if frozen else n * f2 * e
    if weighted:  # the unmasked activations, for the gradients of the masks
        attention, mlp = attention + n * q * e, mlp + n * f2 * e
    return shared + inputs + attention, shared + mlp


def _head_norms(rank: Rank, frozen: bool) -> int:
    """Bytes that autograd saves in the norms of queries and keys (qk_layernorm) of a layer, for a micro-batch.

    On a GPU and in fp32 the norm of the keys saves no input of its own: its input is a view of the fused QKV product, which is
    counted with the attention block.
    """
    n, e, size = rank.tokens, rank.layout.dtype, rank.model.kv_channels
    _, q, k, _, _ = rank.sizes
    statistics = 4 * n * (q + k) // size
    if rank.layout.cuda:
        return n * q * e + statistics
    inputs = q * e if e == 4 else 4 * (q + k)
    return n * (inputs + (0 if frozen else 4 * (q + k))) + statistics


def norm(rank: Rank, frozen: bool = False, weighted: bool = False) -> int:
    """Bytes that autograd saves of one norm (LayerNorm, RMSNorm) for a micro-batch: its input and statistics.

    RMSNorm on a CPU, and every norm of a weighted network, consist of several fp32 operations, which save more.

    Args:
        rank: rank that holds the norm.
        frozen: True if the norm's weight gets no gradient.
        weighted: True in a weighted network (layers/weighted.py), whose channels, heads and neurons are multiplied with masks
            that get gradients.
    """
    rows, h = rank.rows, rank.model.hidden_size
    if weighted:
        return rows * (4 * h * (4 if rank.model.normalization == "rmsnorm" else 5) + 8)
    if rank.model.normalization != "rmsnorm":
        return rank.stream + 8 * rows
    if rank.layout.cuda:
        return rank.stream + 4 * rows
    return rows * (4 * h * (1 if frozen else 2) + 4)


def saved_head(rank: Rank, frozen: bool = False, weighted: bool = False) -> int:
    """Bytes that autograd saves of a micro-batch in final norm, output layer and cross entropy (softmax in fp32, targets).

    Args:
        rank: rank that holds the output layer.
        frozen: True if weights get no gradients.
        weighted: True in a weighted network (layers/weighted.py, with a weight for every candidate), whose norm saves more.
    """
    return norm(rank, frozen, weighted) + (0 if frozen else rank.stream) + 4 * rank.logits + 9 * rank.tokens


def in_flight(rank: Rank, micro_batches: int) -> int:
    """Largest number of forward passes of a chunk of layers that wait for their backward passes at once (1F1B or interleaved).

    Args:
        rank: rank that holds the chunk.
        micro_batches: forward passes of a step on this rank: micro-batches times networks.
    """
    stages, chunks = rank.layout.pipeline, rank.layout.chunks
    if chunks == 1:
        return min(stages - rank.index, micro_batches)
    return min(2 * (stages - rank.index - 1) + (chunks - 1) * stages + 1, chunks * micro_batches)


def _backward(rank: Rank, micro_batches: int, frozen: bool, gates: bool, teach: bool, weighted: int) -> int:
    """Peak bytes of training on a rank in addition to weights, gradients and optimizer state.

    Args:
        rank: the rank.
        micro_batches: forward passes of a step on this rank: micro-batches times networks.
        frozen: True if weights get no gradients.
        gates: True if outputs of blocks are multiplied with router gates or modulation gains, which get gradients.
        teach: True for distillation, whose loss also needs the teacher's logits.
        weighted: number of weighted networks among the passes in flight.
    """
    layout = rank.layout
    layers = layout.layers[rank.index] // layout.chunks
    kept, work = saved_chunk(rank, layers, *saved_layer(rank, frozen, gates))
    more, weighted_work = saved_chunk(rank, layers, *saved_layer(rank, weighted=True))
    work = _layer_work(rank, frozen) + (weighted_work + _mask_work(rank) if weighted else work)
    flights = in_flight(rank, micro_batches)
    total = (flights - weighted) * kept + weighted * more
    if layout.pipeline > 1:  # a stage keeps its outputs until their gradients arrive
        total += (flights - 1 if rank.last else flights) * rank.stream
    # The loss has freed its tensors when the backward passes of the layers begin.
    return total + (max(_head(rank, frozen, teach, weighted > 0), work) if rank.last else work)


def saved_chunk(rank: Rank, layers: int, attention: int, mlp: int) -> tuple[int, int]:
    """Bytes of a chunk of layers for one micro-batch: (saved by autograd, recomputed by the backward pass on top of these).

    Args:
        rank: rank that holds the chunk.
        layers: number of layers in the chunk.
        attention: bytes that one attention block saves without recomputation.
        mlp: bytes that one MLP saves without recomputation.
    """
    (method, number), layer = rank.layout.recompute, attention + mlp
    if method == "uniform":
        return layers // number * rank.stream, number * layer - rank.stream
    if method == "block":  # the first layers: their backward passes come last, when the others' tensors are freed
        again = min(number, layers)
        kept = (layers - again) * layer
        return again * rank.stream + kept, max(layer - rank.stream - kept, 0) if again else 0
    if method == "mlp":
        given = norm(rank) + rank.stream
        return layers * (attention + given), mlp - given
    return layers * layer, 0


def _head(rank: Rank, frozen: bool, teach: bool, weighted: bool) -> int:
    """Peak bytes of the output layer and the loss for a micro-batch, in the forward or the backward pass.

    Args:
        rank: rank that holds the output layer.
        frozen: True if weights get no gradients.
        teach: True for distillation, whose loss also needs the teacher's logits.
        weighted: True if one of the networks is weighted (layers/weighted.py).
    """
    n, e, h = rank.tokens, rank.layout.dtype, rank.model.hidden_size
    logits = rank.logits
    if teach:
        pieces = (TAUGHT + (e + e if rank.padded else 0)) * logits
        if logits < n * rank.vocabulary:  # loss in chunks: hidden states and the weight's gradient are kept until the last chunk
            pieces += (rank.vocabulary + n) * h * e
        return saved_head(rank, frozen, weighted) - 4 * logits + e * n * rank.vocabulary + pieces
    copies = (2 * logits if e == 2 else 0) + (e * logits if rank.padded else 0)  # before the softmax in fp32
    gradients = (-2 * logits if e == 2 else 0) + n * h * e  # the softmax becomes its own gradient
    chunked = logits < n * rank.vocabulary  # then hidden states and the weight's gradient are kept until the last chunk
    gradients += 0 if frozen else rank.vocabulary * h * e * (2 if chunked else 1)
    gradients += n * h * e if chunked else 0
    return saved_head(rank, frozen, weighted) + max(copies, gradients)


def _layer_work(rank: Rank, frozen: bool) -> int:
    """Peak working memory of an MLP's backward pass, in bytes in addition to the tensors that autograd saved.

    The MLP is the first block in a layer's backward pass. The peak is the larger of fc2's and fc1's gradients of activations and
    of weights. A weight's gradient exists twice: the gradient of the slice, and a tensor for DDP's hook (layers/linear.py). With
    tied embeddings, a rank that holds embedding and output layer also keeps the output layer's gradient.

    Args:
        rank: rank that holds the layer.
        frozen: True if weights get no gradients.
    """
    n, e, h = rank.tokens, rank.layout.dtype, rank.model.hidden_size
    _, _, _, f1, f2 = rank.sizes
    weights = 0 if frozen else 2 * h * e
    second = 2 * rank.stream + e * n * f2 + weights * f2
    first = 3 * rank.stream - e * n * f1 + weights * f1  # most saved tensors of the MLP are freed by now
    tied = rank.first and rank.last and rank.model.share_embeddings_and_output_weights and not frozen
    return max(second, first) + (rank.vocabulary * h * e if tied else 0)  # tied: output gradient waits for the embedding's


def _mask_work(rank: Rank) -> int:
    """Additional working memory of the MLP's backward pass in a weighted network: gradients of the masked neurons, in bytes."""
    return rank.layout.dtype * rank.tokens * rank.sizes[4]


def inference(rank: Rank, kind: str) -> int:
    """Peak bytes of a pass without loss and KV cache: the larger of one layer's tensors and the logits.

    Args:
        rank: rank that computes.
        kind: prefill: logits of all tokens, which are copied to put several samples side by side; generation: logits of the last
            token of each sample.
    """
    samples, row = rank.layout.micro_batch, rank.vocabulary * rank.layout.dtype
    if kind == "generation":  # Megatron-Core drops the embedding's output when the first layer has read it
        return _forward(rank, samples * row, held=0)
    return _forward(rank, rank.tokens * row * (2 if samples > 1 else 1))


def _forward(rank: Rank, logits: int | None = None, held: int = 1) -> int:
    """Peak bytes of a forward pass without gradients: the larger of one layer's tensors and the logits.

    Args:
        rank: rank that computes.
        logits: bytes of the logits; None for those of the loss, with the loss.
        held: 1 if the stage's input is held to the end of the pass, else 0.
    """
    n, e = rank.tokens, rank.layout.dtype
    h, q, k, f1, f2 = rank.sizes
    kept = 2 + held * (len(rank.numbers) > 1)  # a layer's input, its norm's output, and the first layer's input
    layer = kept * rank.stream + e * n * max(h + f1 + 2 * f2, 3 * q + 4 * k)
    if logits is None:
        logits = rank.logits * ((6 if e == 2 else 4) + (e if rank.padded else 0))
    return max(layer, logits + 2 * rank.stream if rank.last else 0)


def _kv_cache(rank: Rank, setting: WorkloadSettings) -> int:
    """Bytes of the keys and values of all layers at the end of a generation; 0 for a workload without generation."""
    if setting.kind != "generation":
        return 0
    length = rank.layout.length + setting.generated_tokens - 1
    return 2 * rank.model.num_layers * rank.sizes[2] * rank.layout.micro_batch * length * rank.layout.dtype


def _dropout_mask(rank: Rank) -> int:
    return rank.rows * rank.model.hidden_size * (1 if rank.layout.cuda else rank.layout.dtype) * (rank.model.hidden_dropout > 0)
