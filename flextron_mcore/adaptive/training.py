"""Training of adaptive routers by `flextron router kind=adaptive`, and with the model by `flextron joint`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from flextron_mcore.adaptive.assessment import Evaluator
from flextron_mcore.adaptive.learner import AdaptiveLearner
from flextron_mcore.adaptive.routers import AdaptiveRouters
from flextron_mcore.adaptive.store import AdaptiveInfo, read_adaptive_routers
from flextron_mcore.adaptive.table import RoutedTable, token_cost, warn_of_routed
from flextron_mcore.checkpoint.store import CheckpointInfo, list_checkpoints, open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import PreparedData, train_dataset, valid_datasets
from flextron_mcore.model import loaded_model
from flextron_mcore.routers.store import read_routers
from flextron_mcore.runs.choice import available_costs, check_table, latency_table
from flextron_mcore.runs.opened import check_not_modulated
from flextron_mcore.runs.output import discard, write_metrics
from flextron_mcore.runs.resume import resumable_output
from flextron_mcore.runs.routers import validation_targets
from flextron_mcore.runs.terminal import print_table, say, warn
from flextron_mcore.runtime.distributed import device
from flextron_mcore.settings.sections import KV_POLICIES, DistillationSettings
from flextron_mcore.settings.training import JointSettings, RouterStageSettings
from flextron_mcore.training.checks import check
from flextron_mcore.training.loop import Phase, train
from flextron_mcore.training.teacher import open_teacher


def train_adaptive(settings: RouterStageSettings | JointSettings, info: CheckpointInfo, data: PreparedData) -> dict[str, Any]:
    """Train adaptive routers, and write checkpoints and metrics.json. Call on all ranks.

    After the last step the routers are calibrated: the average cost of a token is measured at targets from 0 (cost of the
    smallest network) to 1 (full model). Then they are compared with the static routers at several budgets.
    Raises FlextronError for a checkpoint with modulation (gains of blocks that depend on the size of one network for all tokens)
    or without the routers to start from, and the errors of `train`.

    Args:
        settings: settings of the stage; `stage=joint` trains the model too.
        info: checkpoint to start from, with static routers (`router`) or adaptive routers (`joint`).
        data: prepared data set.

    Returns:
        Content of metrics.json: the results of `train`, "routers": {"kind", "costs": names, "kv_policy": keys and values that a
        token writes, "full" of all KV groups or "own" of those it uses}, "calibration": points (target, average cost as a share
        of the full model's), "adaptive_budgets": rows of `Evaluator.budgets`, "full_loss": {domain: loss of the full model},
        "token_costs": rows of `Evaluator.token_costs`.
    """
    check_not_modulated(info)
    learner = _learner(settings, info)
    cost, policy = learner.costs[0], learner.info.kv_policy
    targets = validation_targets(settings.validation_targets, cost, learner.info.ranges[0])
    joint = isinstance(settings, JointSettings)
    teacher = open_teacher(settings, info, data) if joint else None
    seq_length = check(settings, info, data, 1 + settings.targets_per_step + (teacher is not None))
    with resumable_output(settings, info, data) as out:
        cache, samples = out / "cache", settings.adaptive.calibration_samples
        training = train_dataset(data, seq_length, samples, settings.seed, cache, settings.data_weights)
        limit = settings.trainer.limit_val_batches
        evaluator = Evaluator(
            learner,
            {"train": training},
            samples,
            valid_datasets(data, seq_length, settings.seed, cache),
            limit and limit * settings.model.global_batch_size,
            seq_length,
            settings.model.micro_batch_size,
        )
        phase = Phase(
            networks=lambda step: [None, *learner.networks(step)],
            validation=lambda step: {"full": None, **{f"adaptive {s:g}": learner.routing(learner.target(s)) for s in targets}},
            teach=settings.distillation if joint else DistillationSettings(),
            teacher=teacher,
            learner=learner,
            frozen=not joint,
            after={settings.trainer.max_steps: evaluator.calibrate},
        )
        figures = train(settings, out, info, data, phase, seq_length)
        model = loaded_model(settings.model, open_checkpoint(list_checkpoints(out)[-1]), settings.trainer.precision)
        rows = evaluator.budgets(model, targets)
        more = {
            "full_loss": evaluator.losses(model, None),
            "token_costs": evaluator.token_costs(model, rows[len(rows) // 2]["target"], data),
        }
        discard(cache)
        _print(rows, cost.name)
        if learner.token_costs[policy][0].overhead and all(better(row, policy) < 0 for row in rows):
            say(f"{settings.stage}: at these budgets token routing costs more than it saves: prefer static sub-networks")
        described = {"kind": "adaptive", "costs": list(learner.info.costs), "kv_policy": policy}
        found = {"routers": described, "calibration": learner.info.calibration, "adaptive_budgets": rows}
        return write_metrics(out, settings.stage, {**figures, **found, **more})


def better(row: Mapping[str, Any], kv_policy: str) -> float:
    """Loss of the sub-network that the static routers choose minus the loss of token routing, in nats per token.

    Args:
        row: results at one budget (`Evaluator.budgets`).
        kv_policy: keys and values that a token writes: `full`: of all KV groups, `own`: of those it uses.
    """
    return row["static"]["mean_loss"] - row["adaptive"][kv_policy]["mean_loss"]


def _print(rows: list[dict[str, Any]], cost: str) -> None:
    """Print a table of the results at each budget (`Evaluator.budgets`). cost: name of the cost that budgets limit."""
    kinds = ["static", *rows[0]["adaptive"]]
    print_table(
        f"validation loss (nats per token), and the average share of the full model's {cost} that was spent",
        ["budget", *(text for kind in kinds for text in (kind, "share")), "better by"],
        [
            [f"{row['target']:g}", *(x for part in (row["static"], *row["adaptive"].values()) for x in _pair(part))]
            + [better(row, kinds[1])]
            for row in rows
        ],
    )


def _pair(row: Mapping[str, Any]) -> tuple[float, float]:
    """(mean loss in nats per token, average cost as a share of the full model's) of a result in metrics.json."""
    return row["mean_loss"], row["share"]


def _learner(settings: RouterStageSettings | JointSettings, info: CheckpointInfo) -> AdaptiveLearner:
    """Learner with new routers that start from the checkpoint's static ones, or for stage=joint with its adaptive routers.

    Raises FlextronError if the checkpoint lacks these routers, or a cost that they were trained for is not available.
    """
    choices, table = Choices(info.model, info.space), latency_table(settings, info)
    check_table(table)
    available = available_costs(settings, info, table)
    if settings.stage == "joint":
        described, routers = read_adaptive_routers(info.path, choices)
        described, surrogate = replace(described, evaluated=()), None  # stale: the model's losses change with its training
    else:
        described, routers = _new_routers(settings, info, choices)
        surrogate = settings.surrogate if settings.adaptive.surrogate else None
        routed = RoutedTable.read(table, described.kv_policy) if table else None
        if routed and routed.hidden_size != described.hidden_size:
            warn(
                f"the latency table was measured with routers of {routed.hidden_size} hidden units, "
                f"not adaptive.hidden_size={described.hidden_size}"
            )
    if missing := [name for name in described.costs if name not in available]:
        raise FlextronError(
            f"checkpoint={info.path}: its routers were trained for {missing[0]}: give {missing[0]}=DIR, the directory of a "
            f"`flextron {missing[0]}` run"
        )
    costs = [available[name] for name in described.costs]
    warn_of_routed(table, costs, described.kv_policy, warn)
    return AdaptiveLearner(
        choices,
        costs,
        described,
        settings.adaptive,
        settings.targets_per_step,
        settings.seed,
        settings.trainer.max_steps,
        routers.to(device()),
        settings.model.sequence_parallel,
        {policy: [token_cost(cost, table, policy) for cost in costs] for policy in KV_POLICIES},
        table.to_dict() if table else None,
        surrogate,
    )


def _new_routers(
    settings: RouterStageSettings | JointSettings, info: CheckpointInfo, choices: Choices
) -> tuple[AdaptiveInfo, AdaptiveRouters]:
    """Description and new adaptive routers, which start from the checkpoint's static ones. settings.seed draws their weights."""
    hidden_size = settings.adaptive.hidden_size
    static, start = read_routers(info.path, choices)
    described = AdaptiveInfo(
        static.costs, static.ranges, hidden_size, static.memory, evaluated=static.evaluated, kv_policy=settings.kv_policy
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return described, AdaptiveRouters(choices, len(static.costs), hidden_size, start)
