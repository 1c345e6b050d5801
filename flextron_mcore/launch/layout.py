"""How a stage is laid out over ranks, and what one rank holds of the model. No torch import."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from flextron_mcore.axes import added_tensors
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families.tensors import of_model
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.settings.stages import WorkloadSettings
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.space import DTYPE_BYTES, ElasticSpace, SubNetwork

TRAINED = ("pretrain", "elastic", "joint", "gumbel")  # weights that learn: gradients and optimizer state
LOOPED = (*TRAINED, "router")  # stages of training/loop.py


@dataclass(frozen=True)
class Layout:
    """How a stage is laid out over ranks. layers: of each pipeline rank; chunks: of each, the virtual stages."""

    tensor: int
    pipeline: int
    chunks: int
    data: int
    sequence_parallel: bool
    layers: tuple[int, ...]
    micro_batch: int
    length: int
    dtype: int  # bytes of an element
    recompute: tuple[str, int]  # "", "uniform", "block", "mlp", and layers
    cuda: bool

    @classmethod
    def read(
        cls, model: ModelConfig, space: ElasticSpace, settings: StageSettings, world: int, stored_dtype: str, cuda: bool
    ) -> Layout:
        """Raises FlextronError, naming the key, where sizes do not divide."""
        if settings.stage == "latency":  # one process, the whole model
            options: LayoutSettings | SimpleNamespace = SimpleNamespace(micro_batch_size=settings.setting.batch_size)
            length, world = prompt_length(model, settings.setting), 1
        else:
            options = settings.model
            length = getattr(options, "seq_length", None) or model.max_position_embeddings
        tensor, pipeline = (getattr(options, f"{kind}_model_parallel_size", 1) for kind in ("tensor", "pipeline"))
        if world % (tensor * pipeline):
            raise FlextronError(
                f"model.tensor_model_parallel_size={tensor} x model.pipeline_model_parallel_size={pipeline} "
                f"does not divide the {world} rank(s)"
            )
        for name, value in (("space.granularity", space.granularity), ("model.num_query_groups", model.num_query_groups)):
            if value % tensor:
                raise FlextronError(f"model.tensor_model_parallel_size={tensor} does not divide {name}={value}")
        data, size = world // (tensor * pipeline), options.micro_batch_size
        if (settings.stage in LOOPED) and options.global_batch_size % (size * data):
            raise FlextronError(
                f"model.global_batch_size={options.global_batch_size} is not a multiple of model.micro_batch_size={size} "
                f"x {data} data-parallel rank(s)"
            )
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


def prompt_length(model: ModelConfig, setting: WorkloadSettings) -> int:
    """Tokens that one forward pass of `flextron latency` reads of a sequence, at most."""
    positions = model.max_position_embeddings
    return setting.prompt_length or (positions if setting.kind == "prefill" else positions // 2)


def _layers(model: ModelConfig, options: LayoutSettings | SimpleNamespace, pipeline: int) -> tuple[int, ...]:
    """Layers of each pipeline rank."""
    first, last = (getattr(options, f"num_layers_in_{end}_pipeline_stage", None) for end in ("first", "last"))
    ends = [n for n in (first, last) if n is not None]
    middle, left = pipeline - len(ends), model.num_layers - sum(ends)
    chunks = getattr(options, "virtual_pipeline_model_parallel_size", None) or 1
    each = left // middle if middle > 0 else 0
    if middle < 0 or left != each * middle or any(n % chunks for n in (*ends, each)):
        raise FlextronError(
            f"model.pipeline_model_parallel_size={pipeline}: does not divide the model's {model.num_layers} layers"
            + (f" into {chunks} chunks a stage" if chunks > 1 else "")
        )
    layers = [each] * pipeline
    layers[0] = each if first is None else first
    layers[-1] = layers[-1] if last is None else last
    return tuple(layers)


def _recompute(options: LayoutSettings | SimpleNamespace) -> tuple[str, int]:
    kind = getattr(options, "recompute_granularity", None)
    if kind == "full":
        return options.recompute_method, options.recompute_num_layers
    return ("mlp" if kind == "selective" and "mlp" in (options.recompute_modules or ()) else ""), 1


@dataclass(frozen=True)
class Rank:
    """One rank of pipeline stage `index`; of its tensor-parallel group the last, which holds what pads the vocabulary."""

    model: ModelConfig
    layout: Layout
    index: int

    @property
    def first(self) -> bool:
        """True if it holds the embedding."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """True if it holds the output layer."""
        return self.index == self.layout.pipeline - 1

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return -(-self.model.vocab_size // self.layout.tensor)

    @property
    def padded(self) -> bool:
        """True if some rows only fill it up."""
        return self.model.vocab_size % self.layout.tensor > 0

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Channels, and this rank's query, key, fc1 and fc2 sides: h, q, k, f1, f2."""
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
        """Parameters of this rank. Tensor-parallel ranks share units and tokens; what has none is on each of them."""
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

    @property
    def tokens(self) -> int:
        """Number of tokens of a micro-batch."""
        return self.layout.micro_batch * self.layout.length

    @property
    def stream(self) -> int:
        """Bytes of a micro-batch's hidden states between layers: a part of the sequence with sequence parallelism."""
        return self.rows * self.model.hidden_size * self.layout.dtype

    @property
    def rows(self) -> int:
        """Tokens of a micro-batch between layers."""
        return self.tokens // (self.layout.tensor if self.layout.sequence_parallel else 1)
