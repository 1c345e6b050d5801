"""Layout of a stage over ranks, and the part of the model on one rank, as the estimates need them. No torch import."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from types import SimpleNamespace

from flextron_mcore.axes import added_tensors
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError, ModelConfig, loss_chunk
from flextron_mcore.families.tensors import of_model
from flextron_mcore.settings.latency import WorkloadSettings
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.space import DTYPE_BYTES, ElasticSpace, SubNetwork
from flextron_mcore.training.rampup import BatchSizes

TRAINED = ("pretrain", "elastic", "joint", "gumbel")  # stages that train the weights: gradients and optimizer state
LOOPED = (*TRAINED, "router")  # stages with a training loop (training/loop.py)


@dataclass(frozen=True)
class Layout:
    """Layout of a stage over ranks, for the estimates of memory and FLOPs.

    Attributes:
        tensor: number of tensor-parallel ranks.
        pipeline: number of pipeline ranks.
        chunks: virtual pipeline stages (chunks of layers) of a rank.
        data: number of data-parallel ranks.
        sequence_parallel: True if tensor-parallel ranks split the sequence between layers.
        layers: number of layers on each pipeline rank.
        micro_batch: samples of a forward pass.
        length: tokens of a sample.
        dtype: bytes of an element.
        recompute: (method of recomputation, recompute_num_layers); the method is "uniform", "block", "mlp" (MLPs only) or ""
            (none).
        cuda: True for a GPU.
    """

    tensor: int
    pipeline: int
    chunks: int
    data: int
    sequence_parallel: bool
    layers: tuple[int, ...]
    micro_batch: int
    length: int
    dtype: int
    recompute: tuple[str, int]
    cuda: bool

    @classmethod
    def read(
        cls, model: ModelConfig, space: ElasticSpace, settings: StageSettings, world: int, stored_dtype: str, cuda: bool
    ) -> Layout:
        """Read the layout from the settings of a stage.

        Args:
            model: architecture.
            space: elastic space.
            settings: settings of the stage; `latency` is one process, whatever `world` is.
            world: number of ranks.
            stored_dtype: precision of the checkpoint, used where trainer.precision is null.
            cuda: False for a CPU.

        Raises:
            FlextronError: parallel sizes do not fit ranks, layers, KV groups, granularity or batch; the message names the key.
        """
        if settings.stage == "latency":  # one process, the whole model
            options: LayoutSettings | SimpleNamespace = SimpleNamespace(micro_batch_size=settings.setting.batch_size)
            length, world = prompt_length(model, settings.setting), 1
        else:
            options = settings.model
            length = getattr(options, "seq_length", None) or model.default_length
        tensor, pipeline = (getattr(options, f"{kind}_model_parallel_size", 1) for kind in ("tensor", "pipeline"))
        if world % (tensor * pipeline):
            raise FlextronError(
                f"model.tensor_model_parallel_size={tensor} x model.pipeline_model_parallel_size={pipeline} "
                f"does not divide the {world} rank(s): choose sizes whose product divides {world}"
            )
        for name, value in (("space.granularity", space.granularity), ("model.num_query_groups", model.num_query_groups)):
            if value % tensor:
                raise FlextronError(
                    f"model.tensor_model_parallel_size={tensor} does not divide {name}={value}: choose one that does"
                )
        data, size = world // (tensor * pipeline), options.micro_batch_size
        if (settings.stage in LOOPED) and options.global_batch_size % (size * data):
            raise FlextronError(
                f"model.global_batch_size={options.global_batch_size} is not a multiple of model.micro_batch_size={size} "
                f"x {data} data-parallel rank(s): set it to a multiple"
            )
        if settings.stage in LOOPED:
            BatchSizes(options, settings.trainer.max_steps).check(size, data)
        precision = getattr(getattr(settings, "trainer", None), "precision", None) or stored_dtype
        return cls(
            tensor,
            pipeline,
            getattr(options, "virtual_pipeline_model_parallel_size", None) or 1,
            data,
            getattr(options, "sequence_parallel", False) and tensor > 1,
            _layers(model, options, pipeline),
            size,
            length,
            DTYPE_BYTES["bf16" if precision == "bf16" else "fp32"],
            _recompute(options),
            cuda,
        )


def teacher_of(settings: StageSettings, model: ModelConfig) -> ModelConfig | None:
    """Architecture of a training's frozen teacher, None without one.

    A checkpoint that cannot be read, such as the result of a job that has not run yet, counts as the student.

    Args:
        settings: settings of the stage.
        model: architecture of the student.
    """
    if getattr(settings, "teacher", None) is None:
        return None
    with contextlib.suppress(FlextronError):
        return open_checkpoint(settings.teacher).model
    return model


def prompt_length(model: ModelConfig, setting: WorkloadSettings) -> int:
    """Tokens of a prompt in `flextron latency`: setting.prompt_length; by default model.default_length, half for a generation."""
    length = model.default_length
    return setting.prompt_length or (length if setting.kind == "prefill" else max(1, length // 2))


def _layers(model: ModelConfig, options: LayoutSettings | SimpleNamespace, pipeline: int) -> tuple[int, ...]:
    """Number of layers of each pipeline rank. Raises FlextronError if the layers cannot be divided."""
    first, last = (getattr(options, f"num_layers_in_{end}_pipeline_stage", None) for end in ("first", "last"))
    ends = [n for n in (first, last) if n is not None]
    middle, left = pipeline - len(ends), model.num_layers - sum(ends)
    chunks = getattr(options, "virtual_pipeline_model_parallel_size", None) or 1
    each = left // middle if middle > 0 else 0
    if middle < 0 or left != each * middle or any(n % chunks for n in (*ends, each)):
        raise FlextronError(
            f"model.pipeline_model_parallel_size={pipeline}: does not divide the model's {model.num_layers} layers"
            + (f" into {chunks} chunks a stage" if chunks > 1 else "")
            + ": choose one that does, or set model.num_layers_in_first_pipeline_stage or model.num_layers_in_last_pipeline_stage"
        )
    layers = [each] * pipeline
    layers[0] = each if first is None else first
    layers[-1] = layers[-1] if last is None else last
    return tuple(layers)


def _recompute(options: LayoutSettings | SimpleNamespace) -> tuple[str, int]:
    """Recomputation in the form of `Layout.recompute`: (method, number of layers)."""
    kind = getattr(options, "recompute_granularity", None)
    if kind == "full":
        return options.recompute_method, options.recompute_num_layers
    return ("mlp" if kind == "selective" and "mlp" in (options.recompute_modules or ()) else ""), 1


@dataclass(frozen=True)
class Rank:
    """Rank whose memory is estimated: the last tensor-parallel rank, which holds the vocabulary's padding, of one pipeline stage.

    Attributes:
        model: architecture of the full model.
        layout: layout of the stage over ranks.
        index: index of the pipeline stage.
    """

    model: ModelConfig
    layout: Layout
    index: int

    @property
    def first(self) -> bool:
        """True if the rank holds the embedding."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """True if the rank holds the output layer."""
        return self.index == self.layout.pipeline - 1

    @property
    def numbers(self) -> list[int]:
        """Indices of the rank's layers in the model, those of all its virtual pipeline stages."""
        layout, found, start = self.layout, [], 0
        for _ in range(layout.chunks):
            for index, layers in enumerate(layout.layers):
                found += range(start, start + layers // layout.chunks) if index == self.index else ()
                start += layers // layout.chunks
        return found

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding on this rank, padding included."""
        return -(-self.model.vocab_size // self.layout.tensor)

    @property
    def logits(self) -> int:
        """Number of logits of a micro-batch that this rank holds at once when it computes the loss."""
        layout = self.layout
        return loss_chunk(layout.length, layout.micro_batch, self.vocabulary) * layout.micro_batch * self.vocabulary

    @property
    def padded(self) -> bool:
        """True if some of this rank's rows of the embedding pad the vocabulary to a multiple of the tensor-parallel size."""
        return self.model.vocab_size % self.layout.tensor > 0

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(h, q, k, f1, f2): hidden size of the model, and query channels, key channels, fc1 outputs, fc2 inputs of this rank."""
        model, t = self.model, self.layout.tensor
        width = model.ffn_hidden_size // t
        return (
            model.hidden_size,
            model.num_attention_heads * model.kv_channels // t,
            model.num_query_groups * model.kv_channels // t,
            width * (2 if model.gated else 1),
            width,
        )

    @property
    def parameters(self) -> int:
        """Number of parameters on this rank.

        Heads, neurons and vocabulary are split over tensor-parallel ranks; other parameters are repeated on each.
        """
        full, ranks = SubNetwork.full(self.model), self.layout.tensor

        def count(place: str) -> int:
            layer = full.layers[0] if place == "layer" else None
            return sum(
                tensor.numel(self.model, full.hidden_size, layer, ranks)
                for tensor in of_model(self.model, place, added_tensors())
            )

        total = self.layout.layers[self.index] * count("layer")
        total += count("before") if self.first else 0
        total += count("after") if self.last else 0
        tied = self.last and not self.first and self.model.share_embeddings_and_output_weights  # the last stage has a copy
        return total + (self.vocabulary * full.hidden_size if tied else 0)

    def teacher(self, settings: StageSettings) -> Rank | None:
        """Rank with this rank's part of a training's frozen teacher, which may have other layers; None without a teacher."""
        model, layout = teacher_of(settings, self.model), self.layout
        if model is None or model.num_layers == self.model.num_layers:
            return model and replace(self, model=model)
        return replace(self, model=model, layout=replace(layout, layers=_layers(model, settings.model, layout.pipeline)))

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.layout.micro_batch * self.layout.length

    @property
    def stream(self) -> int:
        """Bytes of a micro-batch's hidden states between two layers on this rank, which sequence parallelism divides."""
        return self.rows * self.model.hidden_size * self.layout.dtype

    @property
    def rows(self) -> int:
        """Tokens of a micro-batch whose hidden states this rank holds between two layers; sequence parallelism divides them."""
        return self.tokens // (self.layout.tensor if self.layout.sequence_parallel else 1)
