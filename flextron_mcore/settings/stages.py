"""Schemas of the stages that do not train, and the list of all stages. No torch import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from flextron_mcore.settings.launch import LaunchSettings
from flextron_mcore.settings.schema import MISSING, path, section, setting
from flextron_mcore.settings.sections import (
    ALL_SELECTORS,
    DTYPES,
    KV_POLICIES,
    SELECTORS,
    SEVERAL_BUDGETS,
    BatchSettings,
    CacheSettings,
    DeviceSettings,
    EvaluationModelSettings,
    EvaluationTrainerSettings,
    LayoutSettings,
    PrecisionSettings,
    SpaceSettings,
)
from flextron_mcore.settings.training import (
    ElasticSettings,
    GumbelStageSettings,
    JointSettings,
    PretrainSettings,
    RouterStageSettings,
    StageSettings,
)


@dataclass
class PrepareSettings(StageSettings):
    """Text to Megatron datasets with a tokenizer."""

    stage: ClassVar[str] = "prepare"

    input: Any = path(
        MISSING,
        "file or directory, a list of them, {domain: path or list}, or builtin (text of this Python)",
        accepts=(str, list, dict),
    )
    text_key: str = setting("text", "field of .jsonl and .jsonl.gz that holds the text")
    skip_bad: bool = setting(False, "skip (and list) files that cannot be read")
    valid_fraction: float = setting(0.05, "share of the text for validation", above=0, at_most=0.5)
    tokenizer: str | None = path(None, "Hugging Face tokenizer directory; null: train a BPE")
    vocab_size: int = setting(4096, "tokens of the BPE that is trained", unit="tokens", at_least=1)


@dataclass
class ImportSettings(StageSettings):
    """A Hugging Face checkpoint to an elastic checkpoint."""

    stage: ClassVar[str] = "import"
    recipes: ClassVar[dict[str, str | None]] = {"space": "default"}

    hf: str = path(MISSING, "directory with config.json and safetensors (LlamaForCausalLM, GPT2LMHeadModel)")
    dtype: str | None = setting(None, "precision of the weights; null: as stored", choices=("fp32", "bf16"))
    space: SpaceSettings = section(SpaceSettings)


@dataclass
class ForwardSettings(StageSettings):
    """Keys of every stage that runs a checkpoint on data."""

    recipes: ClassVar[dict[str, str | None]] = {"model": None, "space": None}

    checkpoint: str = path(MISSING, "checkpoint directory")
    data: str = path(MISSING, "directory of `flextron prepare`")
    trainer: EvaluationTrainerSettings = section(EvaluationTrainerSettings)
    model: EvaluationModelSettings = section(EvaluationModelSettings)
    space: SpaceSettings = section(SpaceSettings)


@dataclass
class ImportanceSettings(ForwardSettings):
    """Rank neurons and heads, sort them, show what sorting gains."""

    stage: ClassVar[str] = "importance"

    data_weights: dict[str, float] | None = setting(None, "{domain: weight}; null: equal weights", at_least=0)
    samples: int = setting(512, "calibration sequences", at_least=1)
    score: str = setting(
        "activation",
        "eq. 3 and 4, or that times the norm of the columns that follow",
        choices=("activation", "activation_weight"),
    )
    layer_score: str = setting(
        "mse",
        "error of the final hidden states without the layer, or how far the layer turns them",
        choices=("mse", "block_influence"),
    )
    layer_samples: int = setting(64, "calibration sequences for layer_score", at_least=1)
    ablation_batches: int = setting(16, "micro-batches a domain for the table of sorting on and off; 0: no table", at_least=0)


@dataclass
class SelectorSettings(StageSettings):
    """Keys of every stage that chooses networks: how costs are counted, and what blocks lose."""

    latency: str | None = path(None, "table of `flextron latency`; null: the one beside the routers")
    sensitivity: str | None = path(None, "directory of `flextron sensitivity`, for selector sensitivity")
    kv_cache: CacheSettings = section(CacheSettings)


@dataclass
class EvaluationSettings(SelectorSettings, ForwardSettings):
    """Keys of every stage that evaluates networks."""

    limit_val_batches: int | None = setting(None, "micro-batches a domain; null: all", at_least=1)


@dataclass
class CompareSettings(EvaluationSettings):
    """Selectors side by side, and random sub-networks of equal cost."""

    stage: ClassVar[str] = "compare"

    cost: str | None = setting(
        None,
        "what targets are shares of; null: latency where there is a table, else parameters",
        choices=("latency", "parameters", "memory"),
    )
    targets: list[float] | None = setting(
        None, "shares of the full model's cost; null: five over what networks can cost", above=0, at_most=1
    )
    selectors: list[str] = setting(list(SELECTORS), "selectors to compare", choices=ALL_SELECTORS)
    random_at_target: int = setting(40, "random networks within 1 % of the full model's cost below each target", at_least=0)
    random_networks: int = setting(32, "networks of which selector random takes the best: the bound that luck gives", at_least=1)
    dense: list[str] = path([], "checkpoints of dense models of smaller size, to compare with")
    dtype: str | None = setting(None, "precision that a memory cost counts; null: as stored", choices=DTYPES)


@dataclass
class EvaluateSettings(EvaluationSettings):
    """Loss and perplexity a domain, of one sub-network or of the uniform family."""

    stage: ClassVar[str] = "evaluate"

    subnetwork: list[str] | None = path(
        None, "JSON file of a sub-network, or several; null: the full model and all uniform sub-networks"
    )
    budget: Any = setting(None, "budget, as for select, in place of subnetwork: 0.6, 25ms, 3.4B, 8GiB", accepts=SEVERAL_BUDGETS)
    selector: str = setting("router", "selector that answers a budget", choices=(*ALL_SELECTORS, "adaptive"))
    kv_policy: str | None = setting(None, "KV policy of selector adaptive; null: as trained", choices=KV_POLICIES)
    random: int = setting(0, "random sub-networks on top", at_least=0)


@dataclass
class SensitivitySettings(ForwardSettings):
    """Loss of each block when it alone is made smaller."""

    stage: ClassVar[str] = "sensitivity"

    limit_val_batches: int | None = setting(None, "micro-batches a domain; null: all", at_least=1)


@dataclass
class BudgetSettings(SelectorSettings):
    """Keys of every stage that takes one network of a checkpoint."""

    checkpoint: str = path(MISSING, "checkpoint directory")
    subnetwork: str | None = path(None, "JSON file of a sub-network; null: the full model")
    budget: Any = setting(None, "budget, as for select, in place of subnetwork: 0.6, 25ms, 3.4B, 8GiB", accepts=SEVERAL_BUDGETS)
    selector: str = setting("router", "selector that answers a budget", choices=SELECTORS)


@dataclass
class GenerateSettings(BudgetSettings):
    """Text from a sub-network, or with a choice for every token."""

    stage: ClassVar[str] = "generate"
    recipes: ClassVar[dict[str, str | None]] = {"model": None}

    out: str | None = path(None, "file for texts and figures (JSON); null: only print them")
    prompt: list[str] | None = setting(None, "text, or list of texts, which are continued together")
    prompts: str | None = path(None, "file with one prompt a line, in place of prompt")
    max_new_tokens: int = setting(64, "less where a text ends", unit="tokens", at_least=1)
    temperature: float = setting(0.0, "0: the likeliest token; above: drawn", at_least=0)
    top_k: int = setting(0, "draw from so many likeliest tokens; 0: from all", at_least=0)
    selector: str = setting("router", "selector that answers a budget", choices=(*ALL_SELECTORS, "adaptive"))
    kv_policy: str | None = setting(None, "KV policy of selector adaptive; null: as trained", choices=KV_POLICIES)
    tokenizer: str | None = path(None, "tokenizer directory; null: the one beside the checkpoint")
    trainer: EvaluationTrainerSettings = section(EvaluationTrainerSettings)
    model: LayoutSettings = section(LayoutSettings)


@dataclass
class TrtllmSettings:
    """The checkpoint for the engine-building releases of TensorRT-LLM (up to 1.2)."""

    style: str = setting(
        "padded", "every layer as the widest, or each as it is, where the family is Llama", choices=("padded", "deci")
    )
    tensor_parallel_size: int = setting(1, "tensor-parallel ranks of the engine", at_least=1)
    pipeline_parallel_size: int = setting(1, "pipeline-parallel ranks of the engine", at_least=1)


@dataclass
class GgufSettings:
    """The file for llama.cpp."""

    type: str | None = setting(
        None, "type of the weight matrices; null: f32 where dtype is fp32, else f16", choices=("f32", "f16", "q8_0")
    )


@dataclass
class HfElasticSettings:
    """Every sub-network in one directory, chosen at run time."""

    networks: list[str] = path([], "files of networks that may answer budgets, beside those of selector")
    selector: str = setting("${selector}", "selector that answers budgets; uniform where there are no routers", choices=SELECTORS)
    latency: str | None = path("${latency}", "table of `flextron latency`")
    kv_cache: CacheSettings = section(CacheSettings, batch_size="${kv_cache.batch_size}", length="${kv_cache.length}")


@dataclass
class ExportSettings(BudgetSettings):
    """A sub-network as a directory that loads elsewhere."""

    stage: ClassVar[str] = "export"
    recipes: ClassVar[dict[str, str | None]] = {"model": None}

    format: str = setting("hf", "format of the directory", choices=("hf", "hf_elastic", "trtllm", "gguf", "megatron"))
    dtype: str | None = setting(None, "precision of the weights; null: as stored", choices=DTYPES)
    max_shard_size: int = setting(1_000_000_000, "size of one safetensors file at most", unit="bytes", at_least=1)
    trtllm: TrtllmSettings = section(TrtllmSettings)
    gguf: GgufSettings = section(GgufSettings)
    hf_elastic: HfElasticSettings = section(HfElasticSettings)
    verify: bool = setting(True, "read the directory back and compare logits; needs memory for both models in fp32")
    trainer: DeviceSettings = section(DeviceSettings)
    model: LayoutSettings = section(LayoutSettings)


@dataclass
class FamilyModelSettings:
    """The `model` section of `flextron family`."""

    micro_batch_size: int = setting(8, "samples of a forward pass", unit="samples", at_least=1)


@dataclass
class FamilySettings(SelectorSettings):
    """A model for each of several budgets: chosen, evaluated, exported."""

    stage: ClassVar[str] = "family"

    checkpoint: str = path(MISSING, "checkpoint with routers, or any with another selector")
    budgets: list[Any] = setting(MISSING, 'budgets, each as for select: [0.4, 0.6, 25ms, "0.5 parameters"]')
    data: str | None = path(None, "directory of `flextron prepare`, to evaluate on; null: no losses")
    selector: str = setting("router", "selector that answers the budgets", choices=SELECTORS)
    formats: list[str] = setting(["hf"], "formats of the exports; []: none", choices=("hf", "trtllm", "gguf", "megatron"))
    dtype: str | None = setting(None, "precision of the exports; null: as stored", choices=DTYPES)
    verify: bool = setting(True, "read every export back and compare logits")
    limit_val_batches: int | None = setting(None, "micro-batches a domain; null: all", at_least=1)
    model: FamilyModelSettings = section(FamilyModelSettings)


@dataclass
class WorkloadSettings:
    """Workload whose latency is measured."""

    kind: str = setting(
        "prefill", "one forward pass, or a prompt and then a token at a time with a KV cache", choices=("prefill", "generation")
    )
    batch_size: int = setting(2, "sequences", at_least=1)
    prompt_length: int | None = setting(
        None, "null: the model's positions, for generation half of them", unit="tokens", at_least=1
    )
    generated_tokens: int = setting(64, "tokens that a generation adds", unit="tokens", at_least=1)


@dataclass
class RoutedLatencySettings:
    """Blocks whose tokens choose for themselves (adaptive routers)."""

    enabled: bool = setting(False, "measure them too")
    hidden_size: int = setting(64, "hidden units of the routers", at_least=1)
    rounds: int = setting(10, "times that every network is measured", at_least=1)


@dataclass
class LatencySettings(StageSettings):
    """Latency of every candidate of every block on this device, measured or fitted."""

    stage: ClassVar[str] = "latency"

    checkpoint: str = path(MISSING, "checkpoint directory")
    measurements: str | None = path(
        None, 'JSON list of {"subnetwork": {...} or a file, "ms": 12.3} measured elsewhere; null: measure here'
    )
    rounds: int = setting(20, "times that every candidate is measured in every layer", at_least=1)
    check_networks: int = setting(20, "random networks that are timed whole and compared with their sums", at_least=0)
    routed: RoutedLatencySettings = section(RoutedLatencySettings)
    trainer: PrecisionSettings = section(PrecisionSettings)
    setting: WorkloadSettings = section(WorkloadSettings)  # the last: from here the name is the field's


@dataclass
class SelectSettings(SelectorSettings):
    """The sub-network for a budget: 0.6, 25ms, 3.4B, 8GiB."""

    stage: ClassVar[str] = "select"

    out: str | None = path(None, "file for the sub-network (JSON), for subnetwork= elsewhere; null: only print it")
    checkpoint: str = path(MISSING, "checkpoint directory")
    budget: Any = setting(
        MISSING,
        '0.6 (of the full model\'s latency), 25ms, 3.4B, 8GiB, "0.6 parameters", or several: [25ms,8GiB]',
        accepts=SEVERAL_BUDGETS,
    )
    selector: str = setting("router", "selector that answers the budget", choices=ALL_SELECTORS)
    data: str | None = path(None, "directory of `flextron prepare`, for selector random, which evaluates networks")
    random_networks: int = setting(32, "networks of which selector random takes the best", at_least=1)
    limit_val_batches: int | None = setting(4, "micro-batches a domain for selector random", at_least=1)
    measure: bool = setting(True, "time the network and the full model on this device, in the table's setting")
    rounds: int = setting(5, "times that they are timed", at_least=1)
    dtype: str | None = setting(None, "precision that a memory cost counts; null: as stored", choices=DTYPES)
    trainer: PrecisionSettings = section(PrecisionSettings)
    model: BatchSettings = section(BatchSettings)


@dataclass
class ReportSettings(StageSettings):
    """One HTML page of a run, and family.json."""

    stage: ClassVar[str] = "report"

    run: str = path(MISSING, "directory that holds the stages' directories")


@dataclass
class QuickstartSettings(StageSettings):
    """The whole chain on this machine, on real text."""

    stage: ClassVar[str] = "quickstart"
    recipes: ClassVar[dict[str, str | None]] = {"recipe": "quickstart"}

    input: str = path("builtin", "text, as for prepare")
    model: str = setting("tiny", "the parent's architecture: a recipe of conf/model")
    pretrain_steps: int = setting(380, "steps of the parent's training", unit="steps", at_least=1)
    elastic_steps: int = setting(130, "steps of elastic training", unit="steps", at_least=1)
    router_steps: int = setting(300, "steps of the routers' training", unit="steps", at_least=1)
    joint_steps: int = setting(40, "steps of joint tuning", unit="steps", at_least=1)
    chain: dict[str, Any] = setting({}, "{name: {stage, keys}}: the commands; {out} is the quickstart's directory")


@dataclass
class StatusSettings(StageSettings):
    """State of the jobs that were launched."""

    stage: ClassVar[str] = "status"

    out: str | None = path(None, "not used")
    run: str = path(MISSING, "run.results_dir of the launch")
    logs: str | None = setting(None, "stage whose newest log is printed")
    lines: int | None = setting(40, "lines of the log to print; null: all", at_least=1)


STAGES: dict[str, type[StageSettings]] = {
    schema.stage: schema
    for schema in (  # in the order of the usage
        PrepareSettings,
        PretrainSettings,
        ImportSettings,
        ImportanceSettings,
        ElasticSettings,
        LatencySettings,
        RouterStageSettings,
        JointSettings,
        GumbelStageSettings,
        SensitivitySettings,
        FamilySettings,
        SelectSettings,
        CompareSettings,
        EvaluateSettings,
        GenerateSettings,
        ExportSettings,
        ReportSettings,
        QuickstartSettings,
        LaunchSettings,
        StatusSettings,
    )
}
