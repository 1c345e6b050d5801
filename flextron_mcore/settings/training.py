"""Schemas of the stages that train. No torch import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flextron_mcore.settings.schema import MISSING, path, section, setting
from flextron_mcore.settings.sections import (
    DTYPES,
    KV_POLICIES,
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
    """Keys of every stage."""

    stage: ClassVar[str]
    recipes: ClassVar[dict[str, str | None]] = {}  # groups of conf/ whose options may be chosen, and those that are by default

    out: str = path(MISSING, "directory to write")
    overwrite: bool = setting(False, "replace an existing out")
    debug: bool = setting(False, "show tracebacks")
    seed: int = setting(1234, "seed of every random number", at_least=0)


@dataclass
class LoopSettings(StageSettings):
    """Keys of every stage with a training loop."""

    recipes: ClassVar[dict[str, str | None]] = {"model": None, "space": None}

    data: str = path(MISSING, "directory of `flextron prepare`")
    data_weights: dict[str, float] | None = setting(None, "{domain: weight}; null: equal weights", at_least=0)
    trainer: TrainerSettings = section(TrainerSettings)
    exp_manager: ExperimentSettings = section(ExperimentSettings)
    space: SpaceSettings = section(SpaceSettings)


@dataclass
class PretrainSettings(LoopSettings):
    """Train a parent model from scratch."""

    stage: ClassVar[str] = "pretrain"
    recipes: ClassVar[dict[str, str | None]] = {"model": "tiny", "space": "default"}

    model: PretrainModelSettings = section(PretrainModelSettings)


@dataclass
class ElasticSettings(LoopSettings):
    """Elastic continued training: the full model and random sub-networks together."""

    stage: ClassVar[str] = "elastic"

    checkpoint: str = path(MISSING, "sorted checkpoint, of `flextron importance`")
    mode: str = setting(
        "flextron",
        "what sub-networks vary: heads and neurons layer by layer, or neurons only, as many in all layers",
        choices=("flextron", "matformer"),
    )
    num_subnetworks: int = setting(3, "random sub-networks a step, beside the full model", at_least=0)
    validation_subnetworks: int = setting(4, "random sub-networks a validation", at_least=0)
    distillation: DistillationSettings = section(DistillationSettings)
    model: TrainingModelSettings = section(TrainingModelSettings, optim=OptimizerSettings(lr=5e-4, min_lr=5e-5))


def _candidate_samples(default: int) -> int:
    text = "training samples on which the networks that trained routers may choose are evaluated; 0: none"
    return setting(default, text, unit="samples", at_least=0)


@dataclass
class CostSettings(LoopSettings):
    """Keys of every stage that trains routers: what budgets are of."""

    checkpoint: str = path(MISSING, "checkpoint to start from")
    latency: str | None = path(None, "table of `flextron latency`; null: the one beside the routers")
    targets_per_step: int = setting(3, "budgets, and so networks, a step, beside the full model", at_least=1)
    candidate_samples: int = _candidate_samples(64)
    validation_targets: list[float] | None = setting(
        None, "shares of the (first) cost to validate at; null: five over the range", above=0, at_most=1
    )
    kv_cache: CacheSettings = section(CacheSettings)
    dtype: str | None = setting(None, "precision that a memory cost counts; null: as stored", choices=DTYPES)


@dataclass
class NewRouterSettings(CostSettings):
    """Keys of every stage that makes new routers."""

    costs: list[str] | None = setting(
        None, "costs that budgets will be of: latency, parameters, memory; null: latency where there is a table, else parameters"
    )
    targets: TargetSettings = section(TargetSettings)


@dataclass
class RouterStageSettings(NewRouterSettings):
    """Train routers, which choose the sub-network for a budget."""

    stage: ClassVar[str] = "router"

    kind: str = setting("static", "one network for a budget, or a choice for every token", choices=("static", "adaptive"))
    kv_policy: str = setting(
        "full",
        "keys and values that a token of adaptive routers writes: all, or those of the KV groups it uses",
        choices=KV_POLICIES,
    )
    targets_per_step: int = setting(4, "budgets, and so networks, a step", at_least=1)
    router: RouterSettings = section(RouterSettings)
    adaptive: AdaptiveSettings = section(AdaptiveSettings)
    surrogate: SurrogateSettings = section(SurrogateSettings)
    model: FrozenModelSettings = section(FrozenModelSettings)


@dataclass
class JointSettings(CostSettings):
    """Tune routers and model together."""

    stage: ClassVar[str] = "joint"

    candidate_samples: int = _candidate_samples(0)
    router: JointRouterSettings = section(JointRouterSettings)
    adaptive: JointAdaptiveSettings = section(JointAdaptiveSettings)
    model: TrainingModelSettings = section(TrainingModelSettings, optim=OptimizerSettings(lr=1e-4, min_lr=1e-5))


@dataclass
class GumbelStageSettings(NewRouterSettings):
    """Train the model and one router for all axes together."""

    stage: ClassVar[str] = "gumbel"

    modulation: bool | None = setting(
        None, "add a small learned gain on every block's output, by how large the network is; null: as the checkpoint"
    )
    distillation: DistillationSettings = section(DistillationSettings)
    router: GumbelSettings = section(GumbelSettings)
    model: TrainingModelSettings = section(TrainingModelSettings)
