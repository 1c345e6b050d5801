"""Schemas of the stages that train. No torch import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flextron_mcore.settings.schema import MISSING, path, section, setting
from flextron_mcore.settings.sections import (
    DTYPES,
    KV_POLICIES,
    MEMORY_DTYPE,
    MOST_SAMPLES,
    AdaptiveSettings,
    CacheSettings,
    DistillationSettings,
    ExperimentSettings,
    FrozenModelSettings,
    GumbelSettings,
    JointAdaptiveSettings,
    JointRouterSettings,
    OptimizerSettings,
    PretrainModelSettings,
    RouterSettings,
    SpaceSettings,
    SurrogateSettings,
    TargetSettings,
    TrainerSettings,
    TrainingModelSettings,
)


@dataclass
class StageSettings:
    """Base class of the settings of stages, with the keys that every stage has.

    `recipes` maps each directory of conf/ that the stage uses to the recipe used by default, or None for no recipe. `one_of`
    names keys of which at least one is required. `replaced` maps keys of earlier versions to what a user sets now.
    """

    stage: ClassVar[str]
    one_of: ClassVar[tuple[str, ...]] = ()
    recipes: ClassVar[dict[str, str | None]] = {}
    replaced: ClassVar[dict[str, str]] = {}

    out: str = path(MISSING, "directory to write the result to", role="output")
    overwrite: bool = setting(False, "true: replace an existing out")
    debug: bool = setting(False, "true: show the traceback of an error")
    seed: int = setting(1234, "seed of all random numbers", at_least=0, ceiling=2**32 - 1)


@dataclass
class WeightsSettings(StageSettings):
    """Keys of every stage that reads weights of a checkpoint."""

    verify_weights: bool = setting(
        False,
        "true: check the content of all files of checkpoint and data against their digests before use; false: for weights and "
        "tokens, check the size only",
    )


@dataclass
class LoopSettings(WeightsSettings):
    """Keys of every stage with a training loop."""

    recipes: ClassVar[dict[str, str | None]] = {"model": None, "space": None}

    data: str = path(MISSING, "directory that `flextron prepare` wrote")
    data_weights: dict[str, float] | None = setting(
        None, "share of each domain in the training samples, {domain: weight}; null: equal shares", at_least=0
    )
    trainer: TrainerSettings = section(TrainerSettings)
    exp_manager: ExperimentSettings = section(ExperimentSettings)
    space: SpaceSettings = section(SpaceSettings)


@dataclass
class PretrainSettings(LoopSettings):
    """Train a dense parent model from scratch."""

    stage: ClassVar[str] = "pretrain"
    recipes: ClassVar[dict[str, str | None]] = {"model": "tiny", "space": "default"}

    model: PretrainModelSettings = section(PretrainModelSettings)


def _teacher() -> str | None:
    text = (
        "checkpoint of a frozen model, such as the parent, that teaches all networks (distillation); null: the full model of the "
        "same step teaches its sub-networks"
    )
    return path(None, text)


@dataclass
class ElasticSettings(LoopSettings):
    """Train the full model together with random sub-networks (elastic continued training)."""

    stage: ClassVar[str] = "elastic"

    checkpoint: str = path(MISSING, "sorted checkpoint, the out of `flextron importance`")
    mode: str = setting(
        "flextron",
        "random sub-networks, flextron: every elastic axis varies, layer by layer; matformer: only MLP neurons vary, with the "
        "same number in all layers",
        choices=("flextron", "matformer"),
    )
    num_subnetworks: int = setting(
        3, "random sub-networks trained in each step, beside the full model", at_least=0, ceiling=10_000
    )
    budget_weights: dict[str, float] | None = setting(
        None,
        "how often random sub-networks of each size are drawn, {share of the full model's parameters: weight}; sizes vary around "
        "these budgets; null: all candidates of an axis are equally likely",
        at_least=0,
        only="mode=flextron",
    )
    validation_subnetworks: int = setting(
        4,
        "random sub-networks evaluated in each validation, beside the full model and the uniform sub-networks",
        at_least=0,
        ceiling=10_000,
    )
    teacher: str | None = _teacher()
    distillation: DistillationSettings = section(DistillationSettings)
    full_weight: float = setting(1.0, "factor of the full model's loss in the sum of the losses of a step's networks", at_least=0)
    model: TrainingModelSettings = section(TrainingModelSettings, optim=OptimizerSettings(lr=5e-4, min_lr=5e-5))


def _candidate_samples(default: int) -> int:
    text = (
        "training samples on which networks that the routers propose are evaluated after training, so that selector router can "
        "take the best of them; 0: no evaluation"
    )
    return setting(default, text, unit="samples", at_least=0, ceiling=MOST_SAMPLES)


@dataclass
class CostSettings(LoopSettings):
    """Keys of every stage that trains routers: checkpoint, what the costs count, and the budgets of steps and validations."""

    checkpoint: str = path(MISSING, "checkpoint directory to start from: the out of another stage")
    latency: str | None = path(
        None, "latency table (the out of `flextron latency`); null: the table that the checkpoint's routers were trained with"
    )
    targets_per_step: int = setting(
        3, "budgets drawn in each step, one network each, beside the full model", at_least=1, ceiling=10_000
    )
    candidate_samples: int = _candidate_samples(64)
    validation_targets: list[float] | None = setting(
        None,
        "budgets of the networks that a validation evaluates, as shares of the full model's cost (the first of costs); null: "
        "five, spread over the range of training",
        above=0,
        at_most=1,
        filled=True,
    )
    kv_cache: CacheSettings = section(CacheSettings)
    dtype: str | None = setting(None, MEMORY_DTYPE, choices=DTYPES)


@dataclass
class NewRouterSettings(CostSettings):
    """Keys of every stage that makes new routers."""

    costs: list[str] | None = setting(
        None,
        "costs that budgets limit, one or several of latency, parameters, memory; null: latency if there is a latency table, "
        "else parameters",
        filled=True,
    )
    targets: TargetSettings = section(TargetSettings)


@dataclass
class RouterStageSettings(NewRouterSettings):
    """Train routers, which choose the sub-network for a budget."""

    stage: ClassVar[str] = "router"

    kind: str = setting(
        "static",
        "static: routers choose one network for a budget; adaptive: routers choose for every token",
        choices=("static", "adaptive"),
    )
    kv_policy: str = setting(
        "full",
        "keys and values that a token writes, full: of all KV groups, own: of the KV groups that it uses",
        choices=KV_POLICIES,
        only="kind=adaptive",
    )
    targets_per_step: int = setting(4, "budgets drawn in each step, one network each", at_least=1, ceiling=10_000)
    router: RouterSettings = section(RouterSettings)
    adaptive: AdaptiveSettings = section(AdaptiveSettings)
    surrogate: SurrogateSettings = section(SurrogateSettings)
    model: FrozenModelSettings = section(FrozenModelSettings)


@dataclass
class JointSettings(CostSettings):
    """Train routers and model together (joint tuning)."""

    stage: ClassVar[str] = "joint"

    candidate_samples: int = _candidate_samples(0)
    teacher: str | None = _teacher()
    distillation: DistillationSettings = section(DistillationSettings)
    router: JointRouterSettings = section(JointRouterSettings)
    adaptive: JointAdaptiveSettings = section(JointAdaptiveSettings)
    model: TrainingModelSettings = section(TrainingModelSettings, optim=OptimizerSettings(lr=1e-4, min_lr=1e-5))


@dataclass
class GumbelStageSettings(NewRouterSettings):
    """Train the model together with one router for all axes (LLaMaFlex)."""

    stage: ClassVar[str] = "gumbel"

    modulation: bool | None = setting(
        None,
        "true: multiply every block's output by a learned gain that depends on the network's size; null: as in the checkpoint",
    )
    teacher: str | None = _teacher()
    distillation: DistillationSettings = section(DistillationSettings)
    router: GumbelSettings = section(GumbelSettings)
    model: TrainingModelSettings = section(TrainingModelSettings)
