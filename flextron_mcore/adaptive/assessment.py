"""Evaluation of trained adaptive routers: calibration on training data, and validation beside the static routers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from flextron_mcore.adaptive.calibration import calibrate, target_for
from flextron_mcore.adaptive.evaluation import RoutedEvaluation, evaluate_routed, levels_of_text
from flextron_mcore.adaptive.learner import AdaptiveLearner
from flextron_mcore.choices import Choices
from flextron_mcore.cost import Budget
from flextron_mcore.data.blend import PreparedData, batch
from flextron_mcore.data.tokenizer import open_tokenizer
from flextron_mcore.evaluation.perplexity import evaluate, mean
from flextron_mcore.routers.static import log_probabilities
from flextron_mcore.runs.terminal import progress_bar, warn
from flextron_mcore.runtime.distributed import device
from flextron_mcore.selection.router import RouterSelector
from flextron_mcore.settings.sections import KV_POLICIES
from flextron_mcore.space import SubNetwork

_SHOWN = 128  # tokens of each domain's text whose costs are written to metrics.json

Model = list[torch.nn.Module]


@dataclass
class Evaluator:
    """Evaluation of trained adaptive routers. Call the methods on all ranks.

    Attributes:
        learner: learner that trained the routers, with their costs and their description.
        training: {"train": dataset} for the calibration.
        training_samples: number of samples of the calibration.
        validation: {domain: dataset}.
        validation_samples: number of samples of each domain; None for all.
        seq_length: tokens of a sample.
        micro_batch_size: samples of a micro-batch.
    """

    learner: AdaptiveLearner
    training: Mapping[str, torch.utils.data.Dataset]
    training_samples: int
    validation: Mapping[str, torch.utils.data.Dataset]
    validation_samples: int | None
    seq_length: int
    micro_batch_size: int

    def calibrate(self, model: Model) -> None:
        """Evaluate the average cost that the routers spend at targets from 0 to 1, and store it as `learner.info.calibration`.

        A target is 0 for the smallest network's cost, 1 for the full model's. model: this rank's virtual-pipeline chunks.
        """
        learner = self.learner

        def spent(target: float) -> float:
            make = lambda: learner.routing(target)  # noqa: E731
            sizes = self.seq_length, self.micro_batch_size, self.training_samples
            return learner.share(evaluate_routed(model, self.training, make, *sizes)["train"].share_NK)

        with progress_bar(desc="calibration", unit="target") as bar:
            learner.info = replace(learner.info, calibration=tuple(calibrate(spent, bar.update)))

    def budgets(self, model: Model, shares: list[float]) -> list[dict[str, Any]]:
        """Evaluate the static and the adaptive routers at some budgets on the validation data. Call on all ranks.

        Returns a row of metrics.json for each budget: {"target": budget, "static": result of the sub-network that the static
        routers choose, "adaptive": {KV policy: result of token routing}}, with the KV policy of the training first. A result has
        `loss` by domain, `mean_loss`, and `share`, the cost as a share of the full model's. For a budget outside of the
        calibration the adaptive routers take its nearest point, with a warning.

        Args:
            model: this rank's virtual-pipeline chunks.
            shares: budgets, as shares of the full model's cost.
        """
        learner = self.learner
        cost, policies = learner.costs[0], [learner.info.kv_policy]
        if learner.choices.space.attention_unit == "kv_group":  # with query heads as units both policies are the same
            policies += [policy for policy in KV_POLICIES if policy not in policies]
        rows = []
        low, high = (pick(share for _, share in learner.info.calibration) for pick in (min, max))
        if low > min(shares) + 0.005 or high < max(shares) - 0.005:
            warn(
                f"the adaptive routers serve {low:.3f} to {high:.3f} of the full model's {cost.name}; other budgets get "
                "the nearest of these"
            )
        static = learner.routers.static.to("cpu")
        picks = RouterSelector(
            learner.choices,
            {cost.name: cost for cost in learner.costs},
            log_probabilities(static),
            evaluated=learner.info.losses(learner.choices),
        )
        networks = {share: picks.select([Budget(cost, share * cost.full)]) for share in shares}
        static.to(device())
        with progress_bar(total=len(shares), desc="budgets", unit="budget") as bar:
            for share, net in networks.items():
                losses = self.losses(model, net)
                asked = target_for(learner.info.calibration, share, nearest=True)
                static_row = {"loss": losses, "mean_loss": mean(losses), "share": cost.of(net) / cost.full}
                rows.append(
                    {
                        "target": share,
                        "static": {**static_row, "subnetwork": net.to_dict()},
                        "adaptive": {policy: self._row(model, asked, policy) for policy in policies},
                    }
                )
                bar.update()
        return rows

    def losses(self, model: Model, net: SubNetwork | None) -> dict[str, float]:
        """Validation loss of a sub-network (None: the full model), {domain: loss in nats per token}. Call on all ranks."""
        sizes = self.seq_length, self.micro_batch_size, self.validation_samples
        return evaluate(model, self.validation, {"": net}, *sizes)[""]

    def token_costs(self, model: Model, share: float, data: PreparedData) -> list[dict[str, Any]]:
        """Evaluate the cost of each of the first _SHOWN tokens of each domain's first text. Call on all ranks.

        Returns a row of metrics.json for each domain: {"domain", "budget", "texts" and "shares": text of each token, and its cost
        as a share of the full model's}.

        Args:
            model: this rank's virtual-pipeline chunks.
            share: budget, as a share of the full model's cost.
            data: data set, whose tokenizer is used.
        """
        learner, tokenizer = self.learner, open_tokenizer(data.tokenizer)
        cost, target = learner.token_costs[learner.info.kv_policy][0], target_for(learner.info.calibration, share, nearest=True)
        found = []
        for domain, dataset in self.validation.items():
            ids = batch(dataset, [0])["tokens"]
            levels_NS = levels_of_text(model, learner.routing(target), ids)[:, :_SHOWN]
            spent = (cost.by_token(learner.choices, levels_NS) / learner.costs[0].full).tolist()
            texts = [tokenizer.decode([i]) for i in ids[0, : len(spent)].tolist()]
            found.append({"domain": domain, "budget": share, "texts": texts, "shares": spent})
        return found

    def _row(self, model: Model, target: float, kv_policy: str) -> dict[str, Any]:
        """Result of token routing at a target on the validation data, as plain types for metrics.json. Call on all ranks.

        {"loss", "shares" and "levels" by domain, "mean_loss", "share"}: costs are shares of the full model's, `levels` the result
        of `levels_by_domain`.

        Args:
            model: this rank's virtual-pipeline chunks.
            target: target of the first cost, 0 (smallest network) to 1 (full model).
            kv_policy: keys and values that a token writes: `full`: of all KV groups, `own`: of those it uses.
        """
        make = lambda: self.learner.routing(target, kv_policy)  # noqa: E731
        sizes = self.seq_length, self.micro_batch_size, self.validation_samples
        found = evaluate_routed(model, self.validation, make, *sizes)
        losses = {domain: row.loss for domain, row in found.items()}
        shares = {domain: self.learner.share(row.share_NK, kv_policy) for domain, row in found.items()}
        levels = levels_by_domain(self.learner.choices, found)
        return {"loss": losses, "mean_loss": mean(losses), "shares": shares, "share": mean(shares), "levels": levels}


def levels_by_domain(choices: Choices, found: Mapping[str, RoutedEvaluation]) -> dict[str, list[list[float]]]:
    """Convert {domain: RoutedEvaluation} for metrics.json: {domain: [[share of tokens at each level] of each block]}.

    A level is the index of a block's candidate, 0 the smallest.
    """
    return {
        domain: [shares[: len(sizes)].tolist() for shares, sizes in zip(row.share_NK, choices.sizes, strict=True)]
        for domain, row in found.items()
    }
