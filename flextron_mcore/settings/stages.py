"""Schemas of the stages that do not train, and the table of all stages. No torch import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from flextron_mcore.settings.formats import GgufSettings, HfElasticSettings, HfSettings, TrtllmSettings
from flextron_mcore.settings.latency import LatencySettings
from flextron_mcore.settings.launch import LaunchSettings
from flextron_mcore.settings.schema import MISSING, path, section, setting
from flextron_mcore.settings.sections import (
    ALL_SELECTORS,
    DTYPES,
    KV_POLICIES,
    MEMORY_DTYPE,
    MOST_NETWORKS,
    MOST_SAMPLES,
    SELECTORS,
    SEVERAL_BUDGETS,
    BatchSettings,
    CacheSettings,
    DeviceSettings,
    EvaluationModelSettings,
    EvaluationTrainerSettings,
    LayoutSettings,
    PrecisionSettings,
    ScoreSettings,
    SpaceSettings,
)
from flextron_mcore.settings.training import (
    ElasticSettings,
    GumbelStageSettings,
    JointSettings,
    PretrainSettings,
    RouterStageSettings,
    StageSettings,
    WeightsSettings,
)
from flextron_mcore.settings.verify import VerifySettings
from flextron_mcore.space import ATTENTION_UNITS

# Help texts of keys that several stages have.
BUDGET = (
    "budget to choose a network for, instead of subnetwork: 0.6 (of the full model's latency), 25ms, 3.4B (parameters), 8GiB "
    '(memory), "0.6 parameters", or several that hold together: [25ms,8GiB]'
)
ANY_SELECTOR = "selector that chooses the network for budget; adaptive: each token chooses, by adaptive routers"
ADD_BOS = "true: put the BOS token in front of every text; false: do not; null: as the tokenizer does"
PARSE_SPECIAL_TOKENS = "true: encode special tokens spelled out in a text as tokens; false: as text; null: as the tokenizer does"
AUTO = "auto"  # attention unit that importance chooses
COMPENSATE = (
    "true: refit by least squares, on training text, output projections and fc2 of layers with fewer heads or neurons; false: "
    "plain slices"
)
CALIBRATION = "calibration samples for compensate=true, from the training text"
KV_POLICY = (
    "keys and values that a token writes, full: of all KV groups, own: of the KV groups that it uses; "
    "null: as the routers were trained"
)


@dataclass
class PrepareSettings(StageSettings):
    """Tokenize text into Megatron datasets."""

    stage: ClassVar[str] = "prepare"
    one_of: ClassVar[tuple[str, ...]] = ("input", "paths")

    input: Any = path(
        None,
        "text: a file, a directory, a list of them, {domain: path or list}, or builtin (sources of this Python installation)",
        accepts=(str, list, dict),
    )
    paths: Any = path(
        None,
        "Megatron corpora to describe in place of input, not to copy, as NeMo and Megatron-LM name them: [weight, prefix, ...], "
        "[prefix, ...], or {train: list, validation: list}; a prefix is a path without .bin and .idx",
        accepts=(str, list, dict),
    )
    split: Any = setting(
        "99,1,0", "shares of training, validation and test documents of a list of paths", accepts=(str, list), unit="99,1,0"
    )
    text_key: str = setting("text", "field of a JSON line, or column of a Parquet file, that holds the text")
    skip_bad: bool = setting(False, "true: skip files and lines that cannot be read, and list them; false: stop at the first")
    valid_fraction: float = setting(0.05, "share of each domain's text that is held out for validation", above=0, at_most=0.5)
    tokenizer: str | None = path(None, "Hugging Face tokenizer directory; null: train a byte-level BPE on the training text")
    vocab_size: int = setting(4096, "vocabulary of the trained BPE; unused with tokenizer=DIR", unit="tokens", at_least=1)
    add_bos: bool | None = setting(None, ADD_BOS)
    parse_special_tokens: bool | None = setting(None, PARSE_SPECIAL_TOKENS)
    workers: int = setting(
        1,
        "processes that tokenize, each 32 million characters at a time; 1: this process, on all cores",
        unit="processes",
        at_least=1,
    )


@dataclass
class ImportSettings(WeightsSettings):
    """Convert a Hugging Face checkpoint to an elastic checkpoint."""

    stage: ClassVar[str] = "import"
    recipes: ClassVar[dict[str, str | None]] = {"space": "default"}

    hf: str = path(MISSING, "Hugging Face directory with config.json and safetensors files of a supported architecture")
    dtype: str | None = setting(None, "precision to write; null: as most weights are stored", choices=("fp32", "bf16"))
    resize_vocabulary: bool = setting(
        False, "true: add a row, the mean of all rows, to embedding and output layer for each token that only the tokenizer has"
    )
    verify: bool = setting(
        False, "true: compare the result with transformers on 128 random tokens in fp32, layer by layer where memory is small"
    )
    space: SpaceSettings = section(SpaceSettings)


@dataclass
class ForwardSettings(WeightsSettings):
    """Keys of every stage that runs a checkpoint on data."""

    recipes: ClassVar[dict[str, str | None]] = {"model": None, "space": None}

    checkpoint: str = path(MISSING, "checkpoint directory: the out of another stage")
    data: str = path(MISSING, "directory that `flextron prepare` wrote")
    trainer: EvaluationTrainerSettings = section(EvaluationTrainerSettings)
    model: EvaluationModelSettings = section(EvaluationModelSettings)
    space: SpaceSettings = section(SpaceSettings)


@dataclass
class ImportanceSpaceSettings(SpaceSettings):
    """Section `space` of `importance`, which can choose the unit of attention."""

    attention_unit: str | None = setting(
        None,
        "unit that attention is made smaller by, kv_group: whole KV groups, query_head: query heads of every KV group, auto: the "
        "one whose sorted sub-networks lose less at the same numbers of heads; null: the checkpoint's",
        choices=(*ATTENTION_UNITS, AUTO),
    )


@dataclass
class ImportanceSettings(ForwardSettings):
    """Rank neurons and heads by importance and write a checkpoint with sorted weights."""

    stage: ClassVar[str] = "importance"
    recipes: ClassVar[dict[str, str | None]] = {**ForwardSettings.recipes, "score": None}
    replaced: ClassVar[dict[str, str]] = {
        "score": "set score.heads, score.kv_groups and score.ffn_hidden_size, or all with `flextron importance score=paper`",
        "layer_score": "set score.depth",
    }

    data_weights: dict[str, float] | None = setting(
        None, "share of each domain in the calibration samples, {domain: weight}; null: equal shares", at_least=0
    )
    samples: int = setting(512, "calibration samples, from the training text", unit="samples", at_least=1, ceiling=MOST_SAMPLES)
    layer_samples: int = setting(64, "calibration samples for score.depth=mse", unit="samples", at_least=1, ceiling=MOST_SAMPLES)
    ablation_batches: int = setting(
        16,
        "validation data for the table that compares losses of sub-networks with and without sorting; 0: no table",
        unit="micro-batches a domain",
        at_least=0,
    )
    ablation_random: bool = setting(True, "compare with a random order too in this table; false: do not")
    space: ImportanceSpaceSettings = section(ImportanceSpaceSettings)
    score: ScoreSettings = section(ScoreSettings)


@dataclass
class SelectorSettings(WeightsSettings):
    """Keys of every stage that chooses networks: inputs of the costs and of the selectors."""

    latency: str | None = path(
        None, "latency table (the out of `flextron latency`); null: the table that the routers were trained with"
    )
    sensitivity: str | None = path(None, "directory that `flextron sensitivity` wrote, for selector sensitivity")
    kv_cache: CacheSettings = section(CacheSettings)


@dataclass
class EvaluationSettings(SelectorSettings, ForwardSettings):
    """Keys of every stage that evaluates networks."""

    limit_val_batches: int | None = setting(
        None, "validation data that each network is evaluated on; null: all", unit="micro-batches a domain", at_least=1
    )


@dataclass
class CompareSettings(EvaluationSettings):
    """Compare selectors with each other and with random sub-networks of equal cost."""

    stage: ClassVar[str] = "compare"

    cost: str | None = setting(
        None,
        "cost that targets are shares of; null: latency if there is a latency table, else parameters",
        choices=("latency", "parameters", "memory"),
    )
    targets: list[float] | None = setting(
        None,
        "budgets, as shares of the full model's cost; null: five, evenly from the smallest network's cost to the full model's",
        above=0,
        at_most=1,
        filled=True,
    )
    selectors: list[str] = setting(list(SELECTORS), "selectors to compare", choices=ALL_SELECTORS, filled=True)
    random_at_target: int = setting(
        40,
        "random networks for each target, at most 1 % of the full model's cost below it, further if none is that near; 0: none",
        at_least=0,
        ceiling=MOST_NETWORKS,
    )
    random_networks: int = setting(
        32,
        "random networks that selector random evaluates for a budget; it takes the one with the lowest loss",
        at_least=1,
        ceiling=MOST_NETWORKS,
        only="selectors=random",
    )
    dense: list[str] = path([], "checkpoints of separately trained smaller models to compare with; []: none")
    dtype: str | None = setting(None, MEMORY_DTYPE, choices=DTYPES)


@dataclass
class EvaluateSettings(EvaluationSettings):
    """Measure loss and perplexity of each domain, for one sub-network or all uniform ones."""

    stage: ClassVar[str] = "evaluate"

    subnetwork: list[str] | None = path(
        None,
        "JSON file of a sub-network (`flextron select` writes one), or several; null, without budget: the full model and all "
        "uniform sub-networks",
        filled=True,
    )
    budget: Any = setting(None, BUDGET, accepts=SEVERAL_BUDGETS)
    selector: str = setting("router", ANY_SELECTOR, choices=(*ALL_SELECTORS, "adaptive"))
    budgets: list[Any] | None = setting(None, "budgets as in budget, a row of the table for each, instead of budget", filled=True)
    kv_policy: str | None = setting(None, KV_POLICY, choices=KV_POLICIES, only="selector=adaptive")
    random: int = setting(0, "number of random sub-networks to evaluate as well", at_least=0, ceiling=MOST_NETWORKS)
    tasks: list[str] = setting(
        [],
        "tasks to score with lm-evaluation-harness: heldout_last_word, heldout_continuation, heldout_minimal_pairs (made from "
        "the validation text), or tasks of lm_eval such as hellaswag, whose data this machine must have",
    )
    tasks_dir: str | None = path(None, "directory with task files (YAML) of lm_eval, whose tasks can then be named in tasks")
    tasks_trust_code: bool = setting(False, "true: run Python code that task files of tasks_dir name; false: refuse such files")
    num_fewshot: int | None = setting(
        None, "solved examples in front of each question of the tasks; null: as each task defines", at_least=0, ceiling=1000
    )
    limit: int | None = setting(None, "questions of each task, the first ones; null: all", at_least=1)
    apply_chat_template: bool = setting(False, "true: ask the tasks' questions in the tokenizer's chat template")


@dataclass
class SensitivitySettings(ForwardSettings):
    """Measure the loss when one block at a time is made smaller."""

    stage: ClassVar[str] = "sensitivity"

    limit_val_batches: int | None = setting(
        None, "validation data that each network is evaluated on; null: all", unit="micro-batches a domain", at_least=1
    )


@dataclass
class BudgetSettings(SelectorSettings):
    """Keys of every stage that takes one network of a checkpoint."""

    checkpoint: str = path(MISSING, "checkpoint directory: the out of another stage")
    subnetwork: str | None = path(
        None, "JSON file of a sub-network (`flextron select` writes one); null, without budget: the full model"
    )
    budget: Any = setting(None, BUDGET, accepts=SEVERAL_BUDGETS)
    selector: str = setting("router", "selector that chooses the network for budget", choices=SELECTORS)


@dataclass
class GenerateSettings(BudgetSettings):
    """Generate text with a sub-network, or with token-by-token routing."""

    stage: ClassVar[str] = "generate"
    recipes: ClassVar[dict[str, str | None]] = {"model": None}

    out: str | None = path(None, "JSON file to write texts and timings to; null: only print them", role="output")
    prompt: list[str] | None = setting(None, "text to continue, or a list of texts, continued as one batch")
    prompts: str | None = path(None, "file with one prompt a line, instead of prompt")
    max_new_tokens: int = setting(64, "maximum number of tokens to generate for a prompt", unit="tokens", at_least=1)
    temperature: float = setting(
        0.0, "sampling temperature, which divides the logits; 0: greedy decoding, always the most likely token", at_least=0
    )
    top_k: int = setting(0, "number of most likely tokens that sampling draws from; 0: all", at_least=0)
    selector: str = setting("router", ANY_SELECTOR, choices=(*ALL_SELECTORS, "adaptive"))
    kv_policy: str | None = setting(None, KV_POLICY, choices=KV_POLICIES, only="selector=adaptive")
    tokenizer: str | None = path(None, "Hugging Face tokenizer directory; null: the tokenizer stored with the checkpoint")
    add_bos: bool | None = setting(None, ADD_BOS)
    parse_special_tokens: bool | None = setting(None, PARSE_SPECIAL_TOKENS)
    trainer: EvaluationTrainerSettings = section(EvaluationTrainerSettings)
    model: LayoutSettings = section(LayoutSettings)


@dataclass
class ExportSettings(BudgetSettings):
    """Write a sub-network as a directory that other software loads."""

    stage: ClassVar[str] = "export"
    recipes: ClassVar[dict[str, str | None]] = {"model": None}

    format: str = setting(
        "hf",
        "hf: transformers; hf_elastic: transformers, all sub-networks in one directory; trtllm: TensorRT-LLM; gguf: llama.cpp; "
        "megatron: Megatron-Core",
        choices=("hf", "hf_elastic", "trtllm", "gguf", "megatron"),
    )
    dtype: str | None = setting(None, "precision of the exported weights; null: as stored", choices=DTYPES)
    compensate: bool = setting(False, COMPENSATE)
    data: str | None = path(
        None, "directory that `flextron prepare` wrote, whose training text is calibrated on", only="compensate=true"
    )
    samples: int = setting(512, CALIBRATION, unit="samples", at_least=1, ceiling=MOST_SAMPLES, only="compensate=true")
    limit_val_batches: int | None = setting(
        16,
        "validation data on which the loss is measured before and after; null: all",
        unit="micro-batches a domain",
        at_least=1,
        only="compensate=true",
    )
    max_shard_size: int = setting(1_000_000_000, "largest size of one safetensors file", unit="bytes", at_least=1)
    hf: HfSettings = section(HfSettings)
    trtllm: TrtllmSettings = section(TrtllmSettings)
    gguf: GgufSettings = section(GgufSettings)
    hf_elastic: HfElasticSettings = section(HfElasticSettings)
    verify: bool = setting(
        True, "read the directory back and compare its logits with the checkpoint's; needs memory for both models in fp32"
    )
    trainer: DeviceSettings = section(DeviceSettings)
    model: EvaluationModelSettings = section(EvaluationModelSettings)


@dataclass
class FamilySettings(SelectorSettings):
    """Choose, evaluate and export a model for each of several budgets."""

    stage: ClassVar[str] = "family"

    checkpoint: str = path(MISSING, "checkpoint directory; selector router needs one with routers")
    budgets: list[Any] = setting(
        MISSING,
        "budgets, one model each: a share of the full model's latency (0.4), a latency (25ms), parameters (3.4B), memory (8GiB) "
        'or a share of another cost ("0.5 parameters")',
    )
    data: str | None = path(None, "directory that `flextron prepare` wrote, to evaluate on; null: no evaluation")
    selector: str = setting("router", "selector that chooses the networks for the budgets", choices=SELECTORS)
    formats: list[str] = setting(
        ["hf"], "formats that each model is exported to; []: no export", choices=("hf", "trtllm", "gguf", "megatron")
    )
    dtype: str | None = setting(None, "precision of the exported weights; null: as stored", choices=DTYPES)
    compensate: bool = setting(False, COMPENSATE)
    samples: int = setting(512, CALIBRATION, unit="samples", at_least=1, ceiling=MOST_SAMPLES, only="compensate=true")
    verify: bool = setting(True, "read every export back and compare its logits with the checkpoint's")
    limit_val_batches: int | None = setting(
        None, "validation data that each network is evaluated on; null: all", unit="micro-batches a domain", at_least=1
    )
    model: BatchSettings = section(BatchSettings)


@dataclass
class SelectSettings(SelectorSettings):
    """Choose the sub-network for a budget, such as 0.6, 25ms, 3.4B or 8GiB."""

    stage: ClassVar[str] = "select"

    out: str | None = path(
        None,
        "JSON file to write the sub-network to, which subnetwork= of other stages reads; null: only print it",
        role="output",
    )
    checkpoint: str = path(MISSING, "checkpoint directory: the out of another stage")
    budget: Any = setting(
        MISSING,
        "share of the full model's latency (0.6), latency (25ms), parameters (3.4B), memory (8GiB), share of another cost "
        '("0.6 parameters"), or several that hold together ([25ms,8GiB])',
        accepts=SEVERAL_BUDGETS,
    )
    selector: str = setting("router", "selector that chooses the network for budget", choices=ALL_SELECTORS)
    data: str | None = path(
        None, "directory that `flextron prepare` wrote, on which the random networks are evaluated", only="selector=random"
    )
    random_networks: int = setting(
        32,
        "random networks that selector random evaluates; it takes the one with the lowest loss",
        at_least=1,
        ceiling=MOST_NETWORKS,
        only="selector=random",
    )
    limit_val_batches: int | None = setting(
        4,
        "validation data that the random networks are evaluated on; null: all",
        unit="micro-batches a domain",
        at_least=1,
        only="selector=random",
    )
    measure: bool = setting(True, "time the network and the full model on this device, with the workload of the latency table")
    rounds: int = setting(5, "repetitions of the timing", at_least=1, ceiling=10**6, only="measure=true")
    dtype: str | None = setting(None, MEMORY_DTYPE, choices=DTYPES)
    trainer: PrecisionSettings = section(PrecisionSettings)
    model: BatchSettings = section(BatchSettings)


@dataclass
class ReportSettings(StageSettings):
    """Write the results of a run as one HTML page."""

    stage: ClassVar[str] = "report"

    run: str = path(MISSING, "directory that holds the out directories of the run's stages", role="collection")


@dataclass
class QuickstartSettings(StageSettings):
    """Run the whole chain on this machine, on real text."""

    stage: ClassVar[str] = "quickstart"
    recipes: ClassVar[dict[str, str | None]] = {"recipe": "quickstart"}

    input: str = path("builtin", "text: a file, a directory, or builtin (sources of this Python installation)")
    model: str = setting("tiny", "architecture of the parent model: the name of a recipe in conf/model")
    pretrain_steps: int = setting(380, "length of the parent model's training", unit="steps", at_least=1)
    elastic_steps: int = setting(130, "length of elastic training", unit="steps", at_least=1)
    router_steps: int = setting(300, "length of the routers' training", unit="steps", at_least=1)
    joint_steps: int = setting(40, "length of joint tuning", unit="steps", at_least=1)
    adaptive_steps: int = setting(60, "length of the training of adaptive routers", unit="steps", at_least=1)
    gumbel_steps: int = setting(60, "length of the training over four axes with one router", unit="steps", at_least=1)
    chain: dict[str, Any] = setting(
        {}, "commands in order, {name: {stage: STAGE, keys: [key=value, ...]}}; {out} in a value is the quickstart's out"
    )


@dataclass
class StatusSettings(StageSettings):
    """Show the state of the jobs that `flextron launch` submitted."""

    stage: ClassVar[str] = "status"

    out: str | None = path(None, "not used: status writes nothing", role="output")
    run: str = path(MISSING, "run.results_dir of the launch")
    logs: str | None = setting(None, "job whose newest log is printed, such as elastic; null: none")
    lines: int | None = setting(40, "last lines of the log to print; null: all", at_least=1)
    watch: bool = setting(False, "true: report changes until all jobs have ended")


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
        VerifySettings,
        QuickstartSettings,
        LaunchSettings,
        StatusSettings,
    )
}
