"""Adaptive routers of a checkpoint at one budget, for the commands `evaluate` and `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flextron_mcore.adaptive.assessment import levels_by_domain
from flextron_mcore.adaptive.calibration import target_for
from flextron_mcore.adaptive.evaluation import evaluate_routed
from flextron_mcore.adaptive.routers import AdaptiveRouters
from flextron_mcore.adaptive.routing import AdaptiveRouting
from flextron_mcore.adaptive.store import read_adaptive_routers
from flextron_mcore.adaptive.table import token_cost, warn_of_routed
from flextron_mcore.adaptive.usage import TokenCost
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Budget
from flextron_mcore.data.blend import PreparedData, valid_datasets
from flextron_mcore.evaluation.perplexity import mean, perplexity
from flextron_mcore.model import loaded_model
from flextron_mcore.runs.choice import available_costs, budgets, latency_table
from flextron_mcore.runs.output import discard, new_output, write_metrics
from flextron_mcore.runs.terminal import print_table, progress_bar, warn
from flextron_mcore.runtime.distributed import device
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


def routers_at_budget(settings: EvaluateSettings | GenerateSettings, info: CheckpointInfo) -> RoutersAtBudget:
    """Adaptive routers of a checkpoint, set for settings.budget.

    Raises FlextronError for a checkpoint without adaptive routers, without a budget or with settings.subnetwork, and unless the
    budget is a single one, of the routers' first cost and within their calibration.
    """
    choices, table = Choices(info.model, info.space), latency_table(settings, info)
    described, routers = read_adaptive_routers(info.path, choices)
    if settings.budget is None or getattr(settings, "subnetwork", None) is not None:
        raise FlextronError("selector=adaptive: needs a budget (budget=...), and no subnetwork=")
    policy = settings.kv_policy or described.kv_policy
    budget, *others = budgets(settings.budget, available_costs(settings, info, table))
    if others or budget.cost.name != described.costs[0]:
        raise FlextronError(
            f"budget={settings.budget}: the checkpoint's adaptive routers serve one budget, of {described.costs[0]}, such as "
            f'"0.6 {described.costs[0]}"'
        )
    target_C = torch.ones(len(described.costs))
    target_C[0] = target_for(described.calibration, budget.limit / budget.cost.full)
    warn_of_routed(table, [budget.cost], policy, warn)
    cost = token_cost(budget.cost, table, policy)
    return RoutersAtBudget(choices, routers.to(device()).eval(), target_C, policy, budget, cost)


def evaluate_adaptive(
    settings: EvaluateSettings | GenerateSettings, info: CheckpointInfo, data: PreparedData, computed: str, seq_length: int
) -> dict[str, Any]:
    """Evaluate a checkpoint's adaptive routers at a budget, and write metrics.json. Call on all ranks.

    Returns the content of metrics.json: `loss` (nats per token), `perplexity`, `shares` (average cost of a token as a share of
    the full model's) and `levels` by domain, their means as `mean` and `share`, and the budget. Raises FlextronError as
    `routers_at_budget`.

    Args:
        settings: settings of the stage, with the budget.
        info: checkpoint with adaptive routers.
        data: prepared data set, whose validation part is used.
        computed: precision to compute in, fp32 or bf16.
        seq_length: tokens of a sample.
    """
    at = routers_at_budget(settings, info)
    with new_output(settings) as out:
        datasets = valid_datasets(data, seq_length, settings.seed, out / "cache")
        model, size = loaded_model(settings.model, info, computed), settings.model.micro_batch_size
        samples = settings.limit_val_batches and settings.limit_val_batches * size
        with progress_bar(total=len(datasets), desc="evaluate") as bar:
            found = evaluate_routed(model, datasets, at.routing, seq_length, size, samples, lambda done: bar.update())
        discard(out / "cache")
        losses = {domain: row.loss for domain, row in found.items()}
        shares = {domain: at.share(row.share_NK) for domain, row in found.items()}
        metrics = write_metrics(
            out,
            "evaluate",
            {
                "loss": losses,
                "perplexity": {domain: perplexity(loss) for domain, loss in losses.items()},
                "mean": {"loss": mean(losses), "perplexity": perplexity(mean(losses))},
                "cost": at.budget.cost.name,
                "full_cost": at.budget.cost.full,
                "budget": at.budget_share,
                "kv_policy": at.kv_policy,
                "shares": shares,
                "share": mean(shares),
                "levels": levels_by_domain(at.choices, found),
                "dtype": settings.trainer.precision or info.dtype,
                "model": info.model.to_dict(),
                "space": info.space.to_dict(),
            },
        )
    print_table(
        f"validation loss (nats per token) and the average share of the full model's {at.budget.cost.name}, at a budget of "
        f"{at.budget_share:.3f}",
        ["", *datasets, "mean"],
        [["loss", *losses.values(), mean(losses)], ["share", *shares.values(), mean(shares)]],
    )
    return metrics
