"""Sections of settings that stages share. Rooms take them as they are. No torch import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from flextron_mcore.config import ACTIVATIONS, NORMALIZATIONS, POSITION_EMBEDDINGS
from flextron_mcore.settings.schema import MISSING, section, setting
from flextron_mcore.space import ATTENTION_UNITS

PRECISIONS = ("fp32", "bf16")
DTYPES = ("fp32", "bf16", "fp16")
SelectorName = Literal["router", "uniform", "matformer", "sensitivity", "random"]
ALL_SELECTORS = get_args(SelectorName)
SELECTORS = ALL_SELECTORS[:-1]  # random evaluates networks, for which most commands have no data
KvPolicy = Literal["full", "own"]
KV_POLICIES = get_args(KvPolicy)
SEVERAL_BUDGETS = (float, str, list)  # types of a budget: 0.6, 25ms, or several that hold together


@dataclass
class ArchitectureSettings:
    """Architecture of the model: the fields of `ModelConfig`, which has the rules that join them."""

    num_layers: int = setting(MISSING, "transformer layers", at_least=1)
    hidden_size: int = setting(MISSING, "channels of the residual stream", at_least=1)
    num_attention_heads: int = setting(MISSING, "query heads of a layer", at_least=1)
    vocab_size: int | None = setting(None, "tokens of the vocabulary; null: the tokenizer's", at_least=1)
    max_position_embeddings: int = setting(MISSING, "longest sequence", unit="tokens", at_least=1)
    ffn_hidden_size: int | None = setting(None, "MLP neurons of a layer; null: 4 x hidden_size", at_least=1)
    num_query_groups: int | None = setting(None, "key and value heads of a layer; null: as many as heads", at_least=1)
    kv_channels: int | None = setting(None, "size of one head; null: hidden_size / num_attention_heads", at_least=1)
    activation: str = setting("swiglu", "activation function of the MLP", choices=ACTIVATIONS)
    normalization: str = setting("rmsnorm", "norm before attention, MLP and output", choices=NORMALIZATIONS)
    layernorm_epsilon: float = setting(1e-5, "added to a norm's variance", above=0)
    bias: bool = setting(False, "biases in the linear layers")
    position_embedding_type: str = setting("rope", "how positions enter", choices=POSITION_EMBEDDINGS)
    rotary_base: float = setting(10000.0, "base of the rotary frequencies", above=0)
    rope_scaling: dict[str, Any] | None = setting(None, "{type: linear, factor: F} or {type: llama3, ...}; null: none")
    share_embeddings_and_output_weights: bool = setting(False, "one matrix for embedding and output")
    init_method_std: float = setting(0.02, "standard deviation of initial weights", above=0)
    hidden_dropout: float = setting(0.0, "dropout on the residual stream", at_least=0, at_most=1)
    attention_dropout: float = setting(0.0, "dropout on attention weights", at_least=0, at_most=1)


@dataclass
class LayoutSettings:
    """How a run is laid out over ranks, in Megatron-Core's names."""

    transformer_impl: str = setting(
        "local",
        "norms and attention: PyTorch's, or Transformer Engine's (not run so far)",
        choices=("local", "transformer_engine"),
    )
    tensor_model_parallel_size: int = setting(1, "ranks that share every layer", at_least=1)
    pipeline_model_parallel_size: int = setting(1, "pipeline stages", at_least=1)
    virtual_pipeline_model_parallel_size: int | None = setting(None, "chunks of layers a pipeline stage holds", at_least=1)
    context_parallel_size: int = setting(1, "ranks that share a sequence; more than 1 is not supported", at_least=1)
    sequence_parallel: bool = setting(False, "split norms and residuals over the tensor-parallel ranks")
    recompute_granularity: str | None = setting(None, "activation recomputation", choices=("full", "selective"))
    recompute_method: str | None = setting(
        None, "way of recomputing, with recompute_granularity=full", choices=("uniform", "block")
    )
    recompute_num_layers: int | None = setting(None, "layers of one recomputation", at_least=1)
    recompute_modules: list[str] | None = setting(
        None, "modules to recompute, with selective: core_attn, mlp; layernorm with Transformer Engine"
    )
    num_layers_in_first_pipeline_stage: int | None = setting(
        None, "layers of the first stage, where stages hold different numbers", at_least=0
    )
    num_layers_in_last_pipeline_stage: int | None = setting(
        None, "layers of the last stage, where stages hold different numbers", at_least=0
    )


@dataclass
class BatchSettings:
    """Samples of a forward pass."""

    micro_batch_size: int = setting(8, "samples of a forward pass", unit="samples", at_least=1)
    seq_length: int | None = setting(None, "length of a sample; null: the model's positions", unit="tokens", at_least=1)


@dataclass
class EvaluationModelSettings(LayoutSettings, BatchSettings):
    """The `model` section of a stage that runs the model forward."""


@dataclass
class FrozenModelSettings(EvaluationModelSettings):
    """The `model` section of a stage that trains something beside the model."""

    global_batch_size: int = setting(16, "samples of a step", unit="samples", at_least=1)


@dataclass
class ScheduleSettings:
    """The learning rate over the steps."""

    name: str = setting("cosine", "decay of the learning rate", choices=("cosine", "linear", "constant"))
    warmup_steps: int = setting(50, "over which the learning rate rises", unit="steps", at_least=0)


@dataclass
class OptimizerSettings:
    """AdamW of the model's weights."""

    lr: float = setting(1e-3, "highest learning rate", at_least=0)
    min_lr: float = setting(1e-4, "learning rate at the end", at_least=0)
    weight_decay: float = setting(0.1, "decoupled weight decay", at_least=0)
    betas: list[float] = setting([0.9, 0.95], "decay of the two moments", length=2, at_least=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    clip_grad: float = setting(1.0, "largest norm of the gradient; 0: not clipped", at_least=0)
    sched: ScheduleSettings = section(ScheduleSettings)


@dataclass
class DataParallelSettings:
    """Options of Megatron-Core's DistributedDataParallel."""

    use_distributed_optimizer: bool = setting(False, "split the optimizer's state over the data-parallel ranks")
    overlap_grad_reduce: bool = setting(False, "reduce gradients during the backward pass")
    overlap_param_gather: bool = setting(False, "gather parameters during the forward pass; with the distributed optimizer")
    bucket_size: int | None = setting(
        None, "reduced at a time when overlapping; null: Megatron-Core's", unit="parameters", at_least=1
    )


@dataclass
class TrainingModelSettings(FrozenModelSettings):
    """The `model` section of a stage that trains the model."""

    optim: OptimizerSettings = section(OptimizerSettings)
    ddp: DataParallelSettings = section(DataParallelSettings)


@dataclass
class PretrainModelSettings(TrainingModelSettings, ArchitectureSettings):
    """The `model` section of a stage that makes the model."""


@dataclass
class DeviceSettings:
    """Processes of a run."""

    num_nodes: int | None = setting(None, "machines; null: as many as torchrun started", at_least=1)
    devices: int | None = setting(None, "processes a node; null: as many as torchrun started", at_least=1)


@dataclass
class PrecisionSettings:
    """Precision of a run that takes the checkpoint's otherwise."""

    precision: str | None = setting(None, "precision of the computation; null: as stored", choices=PRECISIONS)


@dataclass
class EvaluationTrainerSettings(PrecisionSettings, DeviceSettings):
    """The `trainer` section of a stage that runs the model forward."""


@dataclass
class TrainerSettings(DeviceSettings):
    """The `trainer` section of a stage that trains."""

    precision: str = setting("fp32", "precision of the computation", choices=PRECISIONS)
    max_steps: int = setting(1000, "length of the whole training", unit="steps", at_least=1)
    max_time: str | None = setting(
        None,
        "run time of this process, after which training stops with a checkpoint",
        unit="days:hours:minutes:seconds, 00:03:30:00 say",
        form=r"\d+:\d\d:\d\d:\d\d",
    )
    val_check_interval: int = setting(100, "distance between validations", unit="steps", at_least=1)
    limit_val_batches: int | None = setting(
        8, "batches of global_batch_size that a validation reads a domain; null: all", unit="batches", at_least=1
    )
    log_every_n_steps: int = setting(
        10, "distance between progress lines where there is no terminal; log.jsonl has every step", unit="steps", at_least=1
    )


@dataclass
class CheckpointSettings:
    """Checkpoints that a training writes and keeps."""

    every_n_train_steps: int = setting(100, "distance between checkpoints", unit="steps", at_least=1)
    keep_last: int = setting(2, "whole checkpoints kept", at_least=1)
    async_save: bool = setting(True, "write while training goes on")


@dataclass
class ExperimentSettings:
    """Logs and checkpoints of a training."""

    create_tensorboard_logger: bool = setting(True, "write TensorBoard's event files")
    checkpoint_callback_params: CheckpointSettings = section(CheckpointSettings)


@dataclass
class SpaceSettings:
    """Elastic space. Candidates are fractions of the full size, or sizes; the full size is always one of them.

    null: as the checkpoint has it, which only `importance` can change.
    """

    granularity: int | None = setting(
        None, "largest tensor-parallel size ever to be used; it must divide every candidate", at_least=1
    )
    attention_unit: str | None = setting(None, "drop whole KV groups, or query heads within every group", choices=ATTENTION_UNITS)
    heads: list[int | float] | None = setting(None, "query heads of a layer", above=0)
    ffn_hidden_size: list[int | float] | None = setting(None, "MLP neurons of a layer", above=0)
    hidden_size: list[int | float] | None = setting(None, "channels of the residual stream, the same in all layers", above=0)
    depth: list[int | float] | None = setting(None, "executed layers", above=0)


@dataclass
class DistillationSettings:
    """Distillation from the full model's output into the sub-networks."""

    weight: float = setting(0.0, "share of the full model's output distribution in their loss", at_least=0, at_most=1)
    temperature: float = setting(1.0, "temperature of both distributions", above=0)


@dataclass
class CacheSettings:
    """The KV cache that a memory cost counts beside the weights."""

    batch_size: int = setting(1, "sequences in the cache; 0: no cache", at_least=0)
    length: int | None = setting(None, "length of each sequence; null: the model's positions", unit="tokens", at_least=1)


@dataclass
class TargetSettings:
    """Range that budgets are drawn from, in shares of the full model's cost."""

    low: float | None = setting(None, "least budget; null: the smallest network's", above=0, at_most=1)
    high: float = setting(1.0, "largest budget", above=0, at_most=1)


@dataclass
class JointRouterSettings:
    """How trained routers go on learning beside the model."""

    lr: float = setting(3e-4, "learning rate of Adam", above=0)
    entropy: list[float] = setting([0.03, 0.03], "first and last weight of the choices' entropy: exploration", length=2, above=0)
    constraint_weight: float = setting(
        16.0, "lambda of eq. 7, in units of a network's typical loss above the full model's", at_least=0
    )


@dataclass
class RouterSettings(JointRouterSettings):
    """How static routers learn."""

    lr: float = setting(3e-3, "learning rate of Adam", above=0)
    entropy: list[float] = setting([0.3, 0.03], "first and last weight of the choices' entropy: exploration", length=2, above=0)
    hidden_size: int = setting(64, "hidden units of a router", at_least=1)
    updates_per_step: int = setting(4, "updates of the routers a step", at_least=1)
    batch_size: int = setting(32, "budgets of an update", at_least=1)
    two_sided_from: float = setting(
        0.5, "share of the steps after which unused budget counts like exceeded budget", at_least=0, at_most=1
    )


@dataclass
class GumbelSettings(JointRouterSettings):
    """How the router of all axes learns."""

    lr: float = setting(1e-2, "learning rate of Adam", above=0)
    entropy: list[float] = setting([0.1, 0.01], "first and last weight of the choices' entropy: exploration", length=2, above=0)
    uniform: bool = setting(False, "one number of heads and of neurons for all layers: every network is a stock dense model")
    hidden_size: int = setting(64, "hidden units of the router", at_least=1)
    weighted_per_step: int = setting(1, "networks computed with masks, which teach the router; others are sliced", at_least=1)
    batch_size: int = setting(32, "budgets that an update sees beside the networks'", at_least=1)
    temperature: list[float] = setting([1.0, 0.1], "first and last of the relaxed choices", length=2, above=0)
    soft_until: float = setting(
        0.7, "share of the steps with relaxed masks; then hard ones, straight through", at_least=0, at_most=1
    )
    two_sided_from: float = setting(
        0.3, "share of the steps after which unused budget counts like exceeded budget", at_least=0, at_most=1
    )


@dataclass
class SurrogateSettings:
    """The surrogate model of the loss, through which routers learn."""

    enabled: bool = setting(True, "false: static routers learn straight through the gates of the model's blocks (an ablation)")
    hidden_size: int = setting(128, "hidden units", at_least=1)
    lr: float = setting(3e-3, "first learning rate; it falls to 0", above=0)
    weight_decay: float = setting(1.0, "decoupled weight decay", at_least=0)
    updates_per_step: int = setting(8, "updates of the surrogate a step", at_least=1)
    batch_size: int = setting(64, "pairs of a choice and its loss an update", at_least=1)
    threshold: float = setting(
        0.2, "routers follow it while its squared error is below this share of the losses' variance", at_least=0
    )


@dataclass
class JointAdaptiveSettings:
    """How trained adaptive routers go on learning beside the model."""

    lr: float = setting(5e-4, "first learning rate; it falls to a tenth", above=0)
    noise: float = setting(0.1, "scale of the Gumbel noise on the logits", at_least=0)
    constraint_weight: float = setting(
        16.0, "lambda of eq. 7, in units of a network's typical loss above the full model's", at_least=0
    )
    calibration_samples: int = setting(
        64, "training samples that show how much is really spent for each target", unit="samples", at_least=1
    )


@dataclass
class AdaptiveSettings(JointAdaptiveSettings):
    """How adaptive routers learn."""

    lr: float = setting(2e-3, "first learning rate; it falls to a tenth", above=0)
    noise: float = setting(0.3, "scale of the Gumbel noise on the logits", at_least=0)
    hidden_size: int = setting(64, "hidden units of a router", at_least=1, at_most=128)
    surrogate: bool = setting(False, "learn through a surrogate of a token's loss, not from the masks' gradients")
