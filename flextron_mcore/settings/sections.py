"""Sections of settings, nested groups of keys that one or several stages have, as typed objects. No torch import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from flextron_mcore.config import ACTIVATIONS, NORMALIZATIONS, POSITION_EMBEDDINGS
from flextron_mcore.settings.schema import MISSING, section, setting
from flextron_mcore.space import ATTENTION_UNITS

PRECISIONS = ("fp32", "bf16")
# Names of NeMo and Lightning. Training in bf16 keeps the optimizer's copy of the weights in fp32, as bf16-mixed does.
PRECISION_NAMES = {"bf16-mixed": "bf16", "32": "fp32", "32-true": "fp32"}
DTYPES = ("fp32", "bf16", "fp16")
SelectorName = Literal["router", "uniform", "matformer", "sensitivity", "random"]
ALL_SELECTORS = get_args(SelectorName)
# Without random, which evaluates networks and so needs data, which most commands do not have.
SELECTORS = tuple(name for name in ALL_SELECTORS if name != "random")
KvPolicy = Literal["full", "own"]
KV_POLICIES = get_args(KvPolicy)
SEVERAL_BUDGETS = (float, str, list)  # types of a budget: 0.6, 25ms, or a list of budgets that must all be met
MOST_SAMPLES = 10**8  # of a key: the dataset's indices of more would not fit into memory
MOST_NETWORKS = 10**6  # of a key: networks that are drawn or evaluated
MEMORY_DTYPE = "precision of weights and KV cache that the cost memory assumes; null: as stored"


# Help texts of keys that several sections have.
CANDIDATES = "candidate sizes, or fractions of the full size; null: the checkpoint's, or a new model's default"
ROUTER_LR = "learning rate of Adam, for the routers"
ENTROPY = "weight of the entropy of the routers' choices at the first and at the last step; higher: more exploration"
CONSTRAINT_WEIGHT = (
    "weight of the constraint loss (lambda in eq. 7 of the Flextron paper), in units of the loss that a typical sub-network has "
    "above the full model"
)
TWO_SIDED_FROM = "share of the steps after which the constraint loss penalizes unused budget like exceeded budget"
ADAPTIVE_LR = "learning rate of the adaptive routers at the first step; it falls to a tenth"
GUMBEL_NOISE = "scale of the Gumbel noise on the routers' logits in training; 0: none"


@dataclass
class ArchitectureSettings:
    """Keys that describe a model's architecture: the fields of `ModelConfig`, which checks them against each other."""

    num_layers: int = setting(MISSING, "number of transformer layers", at_least=1)
    hidden_size: int = setting(MISSING, "channels of the residual stream", at_least=1)
    num_attention_heads: int = setting(MISSING, "query heads of a layer", at_least=1)
    vocab_size: int | None = setting(None, "size of the vocabulary; null: the tokenizer's", unit="tokens", at_least=1)
    max_position_embeddings: int = setting(MISSING, "length of the longest sequence", unit="tokens", at_least=1)
    ffn_hidden_size: int | None = setting(None, "MLP neurons of a layer; null: 4 x hidden_size", at_least=1)
    num_query_groups: int | None = setting(
        None, "KV groups (key and value heads) of a layer; null: num_attention_heads, which is multi-head attention", at_least=1
    )
    kv_channels: int | None = setting(None, "channels of one head; null: hidden_size / num_attention_heads", at_least=1)
    activation: str = setting("swiglu", "activation function of the MLP", choices=ACTIVATIONS)
    normalization: str = setting("rmsnorm", "norm before attention, before the MLP and before the output", choices=NORMALIZATIONS)
    layernorm_epsilon: float = setting(1e-5, "epsilon added to a norm's variance", above=0)
    bias: bool = setting(False, "add biases to the linear layers")
    add_qkv_bias: bool = setting(False, "add biases to the projections of queries, keys and values, as Qwen2 does")
    qk_layernorm: bool = setting(False, "normalise each head's query and key, as Qwen3 does")
    position_embedding_type: str = setting("rope", "kind of position embedding", choices=POSITION_EMBEDDINGS)
    rotary_base: float = setting(10000.0, "base of the rotary frequencies, with position_embedding_type=rope", above=0)
    rotary_percent: float = setting(1.0, "share of a head's channels that are rotated", above=0, at_most=1)
    rope_scaling: dict[str, Any] | None = setting(
        None, "scaling of the rotary frequencies, {type: linear, factor: F}, or of type llama3, yarn or longrope; null: none"
    )
    no_rope_freq: list[int] | None = setting(
        None, "for each layer 1: no rotary embedding, 0: rotary embedding; null: rotary embedding in all layers"
    )
    sliding_window: int | None = setting(None, "keys a query attends to, its own included; null: all", unit="tokens", at_least=1)
    window_attn_skip_freq: list[int] | None = setting(
        None,
        "for each layer 1: with the sliding window, 0: full attention, as which memory budgets then count all layers; null: the "
        "window in all layers",
    )
    share_embeddings_and_output_weights: bool = setting(False, "use one matrix as embedding and output layer")
    init_method_std: float = setting(0.02, "standard deviation of the initial weights", above=0)
    hidden_dropout: float = setting(0.0, "probability of dropout on the residual stream", at_least=0, at_most=1)
    attention_dropout: float = setting(0.0, "probability of dropout on the attention weights", at_least=0, at_most=1)


@dataclass
class LayoutSettings:
    """Keys for parallelism and activation recomputation, under the names of Megatron-Core's TransformerConfig."""

    transformer_impl: str = setting(
        "local",
        "implementation of norms and attention, local: PyTorch, transformer_engine: Transformer Engine (untested)",
        choices=("local", "transformer_engine"),
    )
    tensor_model_parallel_size: int = setting(1, "tensor-parallel ranks; each holds a part of every layer", at_least=1)
    pipeline_model_parallel_size: int = setting(1, "pipeline stages; each holds a part of the layers", at_least=1)
    virtual_pipeline_model_parallel_size: int | None = setting(
        None, "chunks of layers that a pipeline stage holds (interleaved 1F1B); null: one", at_least=1
    )
    context_parallel_size: int = setting(1, "ranks that share a sequence; only 1 is supported", at_least=1)
    sequence_parallel: bool = setting(False, "split norms and residuals along the sequence over the tensor-parallel ranks")
    recompute_granularity: str | None = setting(
        None,
        "activation recomputation, full: whole layers, selective: the modules of recompute_modules; null: none",
        choices=("full", "selective"),
    )
    recompute_method: str | None = setting(
        None,
        "layers to recompute with recompute_granularity=full, uniform: all, in groups of recompute_num_layers, block: the first "
        "recompute_num_layers of a stage",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int | None = setting(
        None, "layers of a group (recompute_method=uniform) or recomputed layers of a stage (block)", at_least=1
    )
    recompute_modules: list[str] | None = setting(
        None, "modules to recompute with recompute_granularity=selective: core_attn, mlp, and with Transformer Engine layernorm"
    )
    num_layers_in_first_pipeline_stage: int | None = setting(
        None, "layers of the first pipeline stage; null: as many as the others", at_least=0
    )
    num_layers_in_last_pipeline_stage: int | None = setting(
        None, "layers of the last pipeline stage; null: as many as the others", at_least=0
    )


@dataclass
class BatchSettings:
    """Keys for the number and length of the samples of one forward pass."""

    micro_batch_size: int = setting(
        8, "samples that a data-parallel rank computes in one forward pass", unit="samples", at_least=1
    )
    seq_length: int | None = setting(
        None, "length of a sample; null: the model's max_position_embeddings, at most 4096", unit="tokens", at_least=1
    )


@dataclass
class EvaluationModelSettings(LayoutSettings, BatchSettings):
    """Section `model` of a stage that runs only forward passes of the model: layout and batch size."""


@dataclass
class FrozenModelSettings(EvaluationModelSettings):
    """Section `model` of a stage that trains routers beside a frozen model: layout and batch sizes."""

    global_batch_size: int = setting(16, "samples of a training step, over all ranks", unit="samples", at_least=1)


@dataclass
class ScheduleSettings:
    """Section `model.optim.sched`: schedule of the learning rate."""

    name: str = setting("cosine", "decay of the learning rate from lr to min_lr", choices=("cosine", "linear", "constant"))
    warmup_steps: int = setting(50, "length of the linear rise from 0 to lr at the start", unit="steps", at_least=0)


@dataclass
class OptimizerSettings:
    """Section `model.optim`: AdamW and the learning rate for the model's weights."""

    lr: float = setting(1e-3, "highest learning rate, after the warm-up", at_least=0)
    min_lr: float = setting(1e-4, "learning rate at the last step", at_least=0)
    weight_decay: float = setting(0.1, "decoupled weight decay of AdamW", at_least=0)
    betas: list[float] = setting([0.9, 0.95], "decay rates of AdamW's first and second moment", length=2, at_least=0, below=1)
    eps: float = setting(1e-8, "epsilon of AdamW, added to the root of the second moment", above=0)
    clip_grad: float = setting(1.0, "maximum norm of the gradient over all parameters (gradient clipping); 0: none", at_least=0)
    sched: ScheduleSettings = section(ScheduleSettings)


@dataclass
class DataParallelSettings:
    """Section `model.ddp`: options of Megatron-Core's DistributedDataParallel and distributed optimizer."""

    use_distributed_optimizer: bool = setting(False, "shard the optimizer's state over the data-parallel ranks")
    overlap_grad_reduce: bool = setting(False, "reduce gradients during the backward pass, not after it")
    overlap_param_gather: bool = setting(
        False, "gather updated parameters during the forward pass; needs use_distributed_optimizer=true"
    )
    bucket_size: int | None = setting(
        None,
        "size of a bucket of gradients, reduced at once with overlap_grad_reduce; null: Megatron-Core's default",
        unit="parameters",
        at_least=1,
    )


@dataclass
class TrainingModelSettings(FrozenModelSettings):
    """Section `model` of a stage that trains the model: layout, batch sizes, optimizer and data parallelism."""

    rampup_batch_size: list[int] | None = setting(
        None,
        "[start, increment, samples]: the global batch size rises from start in steps of increment over so many samples, as in "
        "NeMo and Megatron-LM; null: none",
        length=3,
        at_least=1,
    )
    optim: OptimizerSettings = section(OptimizerSettings)
    ddp: DataParallelSettings = section(DataParallelSettings)


@dataclass
class PretrainModelSettings(TrainingModelSettings, ArchitectureSettings):
    """Section `model` of `pretrain`: architecture of the new model, and the keys of TrainingModelSettings."""


@dataclass
class DeviceSettings:
    """Keys for the number of nodes and of processes on each node."""

    num_nodes: int | None = setting(None, "nodes of the run; null: those that torchrun started", at_least=1)
    devices: int | None = setting(None, "processes on each node, one a GPU; null: those that torchrun started", at_least=1)


@dataclass
class PrecisionSettings:
    """Key for the precision of the computation in a stage that reads a checkpoint."""

    precision: str | None = setting(
        None, "precision of the computation; null: as the weights are stored", choices=PRECISIONS, names=PRECISION_NAMES
    )


@dataclass
class EvaluationTrainerSettings(PrecisionSettings, DeviceSettings):
    """Section `trainer` of a stage that runs only forward passes of the model: processes and precision."""


@dataclass
class TrainerSettings(DeviceSettings):
    """Section `trainer` of a stage that trains: processes, precision, length of training, validation and log."""

    precision: str = setting("fp32", "precision of the computation", choices=PRECISIONS, names=PRECISION_NAMES)
    max_steps: int = setting(
        1000,
        "length of the whole training, resumed runs included; the same when resumed",
        unit="steps",
        at_least=1,
        ceiling=10**8,
    )
    max_time: str | None = setting(
        None,
        "time after which this run stops with a checkpoint, to be continued by the same command; null: no limit",
        unit="days:hours:minutes:seconds, such as 00:03:30:00",
        form=r"\d+:\d\d:\d\d:\d\d",
    )
    val_check_interval: int = setting(100, "steps from one validation to the next", unit="steps", at_least=1)
    val_at_start: bool = setting(True, "validate before the first step, too")
    limit_val_batches: int | None = setting(
        8, "amount of data of one validation; null: all", unit="batches of model.global_batch_size a domain", at_least=1
    )
    log_every_n_steps: int = setting(
        10, "steps between printed progress lines where there is no terminal; log.jsonl has every step", unit="steps", at_least=1
    )


@dataclass
class CheckpointSettings:
    """Section `exp_manager.checkpoint_callback_params`: when training writes checkpoints and how many it keeps."""

    every_n_train_steps: int = setting(100, "steps from one checkpoint to the next", unit="steps", at_least=1)
    every_minutes: float | None = setting(
        30.0, "time after which a checkpoint is written even before every_n_train_steps; null: none", unit="minutes", above=0
    )
    keep_last: int = setting(2, "number of newest checkpoints to keep while training", at_least=1)
    async_save: bool = setting(True, "write checkpoints while training continues")


@dataclass
class ExperimentSettings:
    """Section `exp_manager`: logs and checkpoints of a training run."""

    resume_if_exists: bool = setting(True, "continue an unfinished run in out; false: refuse to")
    create_tensorboard_logger: bool = setting(True, "write event files for TensorBoard")
    create_wandb_logger: bool = setting(False, "log to Weights & Biases (needs the package wandb)")
    wandb_logger_kwargs: dict[str, Any] = setting(
        {}, "arguments of wandb.init, such as {project: flextron, name: NAME}; offline: true writes files only"
    )
    create_mlflow_logger: bool = setting(False, "log to an MLflow server (needs the package mlflow-skinny)")
    mlflow_logger_kwargs: dict[str, Any] = setting(
        {}, "of the MLflow run: tracking_uri (required), experiment_name, run_name, tags"
    )
    checkpoint_callback_params: CheckpointSettings = section(CheckpointSettings)


@dataclass
class SpaceSettings:
    """Section `space`: candidate sizes of each elastic axis, as sizes (whole numbers) or fractions of the full size.

    The full size is always a candidate. null: the candidates in the checkpoint, which only the stage `importance` can change.
    """

    granularity: int | None = setting(
        None,
        "largest tensor-parallel size that the model will ever run with; it must divide every candidate; null: as for candidates",
        at_least=1,
    )
    attention_unit: str | None = setting(
        None,
        "unit that attention is made smaller by, kv_group: whole KV groups, query_head: query heads of every KV group; null: the "
        "checkpoint's",
        choices=ATTENTION_UNITS,
    )
    multiple: int | None = setting(
        None,
        "divisor of every candidate of ffn_hidden_size and hidden_size but the full size, such as 16 for FP8 or 256 for DeciLM; "
        "null: none beside granularity",
        at_least=1,
    )
    heads: list[int | float] | None = setting(None, f"query heads of a layer: {CANDIDATES}", above=0)
    ffn_hidden_size: list[int | float] | None = setting(None, f"MLP neurons of a layer: {CANDIDATES}", above=0)
    hidden_size: list[int | float] | None = setting(
        None, f"channels of the residual stream, the same in all layers: {CANDIDATES}", above=0
    )
    depth: list[int | float] | None = setting(None, f"number of executed layers: {CANDIDATES}", above=0)


UNIT_SCORES = ("energy", "activation", "activation_weight")
MEANING_OF_SCORES = (
    "energy: squared norm of what it adds to the residual stream, summed over tokens, activation: L1 norm of its activations "
    "(eq. 3 and 4 of the Flextron paper), activation_weight: this norm times that of the weight columns it is multiplied with"
)


@dataclass
class ScoreSettings:
    """Section `score` of `importance`: importance of the units of each axis (recipes: conf/score)."""

    heads: str = setting(
        "energy",
        f"importance of a query head in its KV group, with space.attention_unit=query_head; {MEANING_OF_SCORES}, compensated: "
        "error of predicting it from more important heads by least squares, which then stand in for dropped ones (each layer of "
        "the checkpoint gets a tensor for it, which exports multiply into the weights and Megatron-Core's own model lacks)",
        choices=(*UNIT_SCORES, "compensated"),
    )
    kv_groups: str = setting(
        "energy", "importance of a whole KV group, with space.attention_unit=kv_group; as score.heads", choices=UNIT_SCORES
    )
    ffn_hidden_size: str = setting("activation", "importance of a neuron; as score.heads", choices=UNIT_SCORES)
    hidden_size: str = setting(
        "activation",
        "importance of a channel of the residual stream, after all norms, activation: L1 norm, energy: sum of squares",
        choices=("activation", "energy"),
    )
    depth: str = setting(
        "block_influence",
        "importance of a layer, block_influence: 1 - cosine similarity of its input and output, mse: mean squared error of the "
        "final hidden states without it",
        choices=("block_influence", "mse"),
    )


@dataclass
class DistillationSettings:
    """Section `distillation`: knowledge distillation from `teacher`, or from the full model of the same step."""

    weight: float = setting(
        0.0,
        "share of the distillation loss (KL divergence from the teacher's output) in the loss of each network that is taught: "
        "with `teacher` all networks, else the sub-networks, by the full model; 0: none",
        at_least=0,
        at_most=1,
    )
    temperature: float = setting(1.0, "divisor of both models' logits in the distillation loss", above=0)


@dataclass
class CacheSettings:
    """Section `kv_cache`: size of the KV cache that the cost `memory` counts beside the weights."""

    batch_size: int = setting(
        1, "sequences in the KV cache that the cost memory counts; 0: no cache", at_least=0, ceiling=2**31 - 1
    )
    length: int | None = setting(
        None,
        "length of each sequence in the KV cache that is counted; null: the model's max_position_embeddings, at most 4096",
        unit="tokens",
        at_least=1,
        ceiling=2**31 - 1,
    )


@dataclass
class TargetSettings:
    """Section `targets`: range from which training draws budgets, as shares of the full model's cost."""

    low: float | None = setting(
        None,
        "smallest budget that routers are trained for, as a share of the full model's cost; null: the smallest network's cost",
        above=0,
        at_most=1,
    )
    high: float = setting(
        1.0, "largest budget that routers are trained for, as a share of the full model's cost", above=0, at_most=1
    )


@dataclass
class JointRouterSettings:
    """Section `router` of the stage `joint`: training, with the model, of routers from the stage `router` or `gumbel`."""

    lr: float = setting(3e-4, ROUTER_LR, above=0)
    entropy: list[float] = setting([0.03, 0.03], ENTROPY, length=2, above=0)
    constraint_weight: float = setting(16.0, CONSTRAINT_WEIGHT, at_least=0)


@dataclass
class RouterSettings(JointRouterSettings):
    """Section `router` of the stage `router`: size and training of static routers."""

    lr: float = setting(3e-3, ROUTER_LR, above=0)
    entropy: list[float] = setting([0.3, 0.03], ENTROPY, length=2, above=0)
    hidden_size: int = setting(64, "hidden units of a router", at_least=1, ceiling=65_536)
    updates_per_step: int = setting(4, "optimizer updates of the routers a training step", at_least=1)
    batch_size: int = setting(32, "budgets drawn for one update of the routers", at_least=1, ceiling=MOST_NETWORKS)
    two_sided_from: float = setting(0.5, TWO_SIDED_FROM, at_least=0, at_most=1)


@dataclass
class GumbelSettings(JointRouterSettings):
    """Section `router` of the stage `gumbel`: size and training of the one router for all axes (LLaMaFlex).

    An update learns the loss from the networks of the step (`weighted_per_step` of them), and the constraint and the entropy
    from `batch_size` further budgets, which need no forward pass of the model.
    """

    lr: float = setting(1e-2, ROUTER_LR, above=0)
    entropy: list[float] = setting([0.1, 0.01], ENTROPY, length=2, above=0)
    uniform: bool = setting(
        False, "true: all layers of a network get the same number of heads and of neurons, so that it is a standard dense model"
    )
    hidden_size: int = setting(64, "hidden units of the router", at_least=1, ceiling=65_536)
    weighted_per_step: int = setting(
        1, "networks of a step that are computed with masks, whose gradients train the router; the others are sliced", at_least=1
    )
    batch_size: int = setting(
        32, "budgets drawn for one update, beside those of the step's networks", at_least=1, ceiling=MOST_NETWORKS
    )
    temperature: list[float] = setting(
        [1.0, 0.1], "Gumbel-softmax temperature at the first and at the last step", length=2, above=0
    )
    soft_until: float = setting(
        0.7,
        "share of the steps with soft masks (Gumbel-softmax); later ones use hard masks with straight-through gradients",
        at_least=0,
        at_most=1,
    )
    two_sided_from: float = setting(0.3, TWO_SIDED_FROM, at_least=0, at_most=1)


@dataclass
class SurrogateSettings:
    """Section `surrogate`: the surrogate model, which predicts a choice's loss and gives routers gradients (Flextron, eq. 11)."""

    enabled: bool = setting(
        True,
        "true: static routers learn through the surrogate model; false: through straight-through gates of the model's blocks",
    )
    hidden_size: int = setting(128, "hidden units of the surrogate model", at_least=1, ceiling=65_536)
    lr: float = setting(3e-3, "learning rate of the surrogate model at the first step; it falls to 0", above=0)
    weight_decay: float = setting(1.0, "decoupled weight decay of the surrogate model", at_least=0)
    updates_per_step: int = setting(8, "optimizer updates of the surrogate model a training step", at_least=1)
    batch_size: int = setting(
        64, "pairs (choice, measured loss) of one update of the surrogate model", at_least=1, ceiling=MOST_NETWORKS
    )
    threshold: float = setting(
        0.2,
        "routers use the surrogate model's gradient while its squared error is below this share of the losses' variance",
        at_least=0,
    )


@dataclass
class JointAdaptiveSettings:
    """Section `adaptive` of the stage `joint`: training of existing adaptive routers together with the model."""

    lr: float = setting(5e-4, ADAPTIVE_LR, above=0)
    noise: float = setting(0.1, GUMBEL_NOISE, at_least=0)
    constraint_weight: float = setting(16.0, CONSTRAINT_WEIGHT, at_least=0)
    calibration_samples: int = setting(
        64,
        "training samples on which the actual cost of the routers' choices for each budget is measured after training",
        unit="samples",
        at_least=1,
        ceiling=MOST_SAMPLES,
    )


@dataclass
class AdaptiveSettings(JointAdaptiveSettings):
    """Section `adaptive` of the stage `router`: size and training of adaptive routers, which choose for every token."""

    lr: float = setting(2e-3, ADAPTIVE_LR, above=0)
    noise: float = setting(0.3, GUMBEL_NOISE, at_least=0)
    hidden_size: int = setting(64, "hidden units of an adaptive router", at_least=1, at_most=128)
    surrogate: bool = setting(
        False, "true: learn through a surrogate model of a token's loss; false: from the gradients of the masks"
    )
