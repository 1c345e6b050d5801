"""Adaptive routers of a checkpoint at one budget, for the commands `evaluate` and `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flextron_mcore.adaptive.assessment import levels_by_domain
from flextron_mcore.adaptive.calibration import target_for
from flextron_mcore.adaptive.evaluation import evaluate_routed, total_counts
from flextron_mcore.adaptive.routers import AdaptiveRouters
from flextron_mcore.adaptive.routing import AdaptiveRouting
from flextron_mcore.adaptive.store import read_adaptive_routers
from flextron_mcore.adaptive.table import token_cost, warn_of_routed
from flextron_mcore.adaptive.usage import TokenCost
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Budget
from flextron_mcore.data.blend import valid_datasets
from flextron_mcore.evaluation.perplexity import mean, perplexity
from flextron_mcore.model import loaded_model
from flextron_mcore.runs.choice import available_costs, budgets, latency_table
from flextron_mcore.runs.opened import Opened
from flextron_mcore.runs.output import discard, new_output, write_metrics
from flextron_mcore.runs.tasks import open_tasks, print_scores
from flextron_mcore.runs.terminal import print_table, progress_bar, say, warn
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.settings.stages import EvaluateSettings, GenerateSettings


@dataclass(frozen=True)
class RoutersAtBudget:
    """Adaptive routers of a checkpoint, set so that tokens cost as much as a budget on average.

    Attributes:
        choices: blocks of the model and candidates of each.
        routers: adaptive routers on this rank's device.
        target_C: target of each cost, 0 (smallest network) to 1 (full model): of the first from the routers' calibration, else 1.
        kv_policy: keys and values that a token writes: `full`, of all KV groups, or `own`, of the groups that it uses.
        budget: average cost of tokens that the routers are set for.
        cost: cost of a pass with token routing.
    """

    choices: Choices
    routers: AdaptiveRouters
    target_C: torch.Tensor
    kv_policy: str
    budget: Budget
    cost: TokenCost

    @property
    def budget_share(self) -> float:
        """Budget as a share of the full model's cost."""
        return self.budget.limit / self.budget.cost.full

    def routing(self) -> AdaptiveRouting:
        """New token routing at the budget, with counts of zero."""
        return AdaptiveRouting(self.routers, self.target_C, self.kv_policy)

    def share(self, share_NK: np.ndarray) -> float:
        """Average cost of a token, as a share of the full model's cost.

        share_NK: share of tokens at each level k (index of the candidate) of each block n.
        """
        return self.cost.average(self.choices, share_NK) / self.budget.cost.full


def routers_at_budget(
    settings: EvaluateSettings | GenerateSettings, info: CheckpointInfo, wanted: float | str | Sequence | None = None
) -> RoutersAtBudget:
    """Adaptive routers of a checkpoint, set for a budget.

    Raises FlextronError for a checkpoint without adaptive routers, without a budget or with settings.subnetwork, and unless the
    budget is a single one, of the routers' first cost and within their calibration.

    Args:
        settings: settings of the stage.
        info: checkpoint.
        wanted: budget as a user types it; None: settings.budget.
    """
    wanted = settings.budget if wanted is None else wanted
    choices, table = Choices(info.model, info.space), latency_table(settings, info)
    described, routers = read_adaptive_routers(info.path, choices)
    if wanted is None or getattr(settings, "subnetwork", None) is not None:
        raise FlextronError("selector=adaptive: needs a budget (budget=...), and no subnetwork=")
    policy = settings.kv_policy or described.kv_policy
    budget, *others = budgets(wanted, available_costs(settings, info, table))
    if others or budget.cost.name != described.costs[0]:
        raise FlextronError(
            f"budget={wanted}: the checkpoint's adaptive routers serve one budget, of {described.costs[0]}, such as "
            f'"0.6 {described.costs[0]}"'
        )
    target_C = torch.ones(len(described.costs))
    target_C[0] = target_for(described.calibration, budget.limit / budget.cost.full)
    warn_of_routed(table, [budget.cost], policy, warn)
    cost = token_cost(budget.cost, table, policy)
    return RoutersAtBudget(choices, routers.to(device()).eval(), target_C, policy, budget, cost)


def evaluate_adaptive(settings: EvaluateSettings, opened: Opened) -> dict[str, Any]:
    """Evaluate a checkpoint's adaptive routers at the budgets, and write metrics.json. Call on all ranks.

    Returns the content of metrics.json: `loss` (nats per token), `perplexity`, `shares` (average cost of a token as a share of
    the full model's) and `levels` by domain, their means as `mean` and `share`, and the budget, all of the first budget; and
    `budgets`, a row for each, with the scores of settings.tasks. Raises the errors of `routers_at_budget` and `open_tasks`.

    Args:
        settings: settings of the stage, with the budgets.
        opened: checkpoint with adaptive routers, and data, whose validation part is used.
    """
    info = opened.info
    every = [routers_at_budget(settings, info, wanted) for wanted in settings.budgets or [settings.budget]]
    tasks = open_tasks(settings, opened)
    with new_output(settings) as out:
        datasets = valid_datasets(opened.data, opened.seq_length, settings.seed, out / "cache")
        model, size = loaded_model(settings.model, info, opened.precision), settings.model.micro_batch_size
        samples = settings.limit_val_batches and settings.limit_val_batches * size
        rows = []
        with progress_bar(total=len(datasets) * len(every), desc="evaluate") as bar:
            for at in every:
                found = evaluate_routed(model, datasets, at.routing, opened.seq_length, size, samples, lambda done: bar.update())
                losses = {domain: row.loss for domain, row in found.items()}
                shares = {domain: at.share(row.share_NK) for domain, row in found.items()}
                rows.append(
                    {
                        "budget": at.budget_share,
                        "loss": losses,
                        "perplexity": {domain: perplexity(loss) for domain, loss in losses.items()},
                        "mean": {"loss": mean(losses), "perplexity": perplexity(mean(losses))},
                        "shares": shares,
                        "share": mean(shares),
                        "levels": levels_by_domain(at.choices, found),
                    }
                )
        discard(out / "cache")
        if tasks:
            say(f"evaluate: scoring {len(settings.tasks)} tasks at {len(every)} budgets")
            with progress_bar(desc="evaluate: tasks", unit="request") as bar:
                harness = tasks.harness(settings, opened, model, bar.update)
                for at, row in zip(every, rows, strict=True):
                    routing = at.routing()
                    row["tasks"] = harness.scores(routing)
                    counts_NK = total_counts(routing.counts_NK)
                    row["tasks_share"] = at.share((counts_NK / counts_NK.sum(-1, keepdim=True).clamp_min(1)).cpu().numpy())
            on_main_process(lambda: tasks.write(out, Path(settings.out)))
        metrics = write_metrics(
            out,
            "evaluate",
            {
                # Figures of the first budget, for readers of a single one.
                **{key: value for key, value in rows[0].items() if not key.startswith("tasks")},
                "cost": every[0].budget.cost.name,
                "full_cost": every[0].budget.cost.full,
                "kv_policy": every[0].kv_policy,
                "dtype": settings.trainer.precision or info.dtype,
                "model": info.model.to_dict(),
                "space": info.space.to_dict(),
                "budgets": rows,
            },
        )
    name = every[0].budget.cost.name
    for row in rows:
        print_table(
            f"validation loss (nats per token) and the average share of the full model's {name}, at a budget of "
            f"{row['budget']:.3f}",
            ["", *datasets, "mean"],
            [["loss", *row["loss"].values(), row["mean"]["loss"]], ["share", *row["shares"].values(), row["share"]]],
        )
    if tasks:
        print_scores([(f"adaptive {row['budget']:.3f}", {"share": row["tasks_share"]}, row["tasks"]) for row in rows])
    return metrics
