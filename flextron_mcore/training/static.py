"""Training of static routers (Flextron, section 3.2, eq. 7-10), through a surrogate model or straight through gates.

    loss = sum_t L(M_t) + constraint_weight * constraint(M_t) - weight * entropy        (eq. 7, and an entropy term)

L is the language-model loss of the network M_t that the routers choose for target t, constraint the loss of eq. 8.
Targets and costs are shares of the span from the smallest network's cost (0) to the full model's (1). "Degradation" is a
network's loss minus the full model's loss on the same batch, in nats per token.

Shape suffixes: T targets, C constrained costs, N blocks, K candidates, B pairs of a sub-network and its degradation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flextron_mcore.routers.static import StaticRouters, gates
from flextron_mcore.routers.surrogate import Surrogate
from flextron_mcore.settings.sections import RouterSettings, SurrogateSettings
from flextron_mcore.space import SubNetwork
from flextron_mcore.training.learner import Figures, GateLearner, LossLearner
from flextron_mcore.training.router import DRAW, LEARN, RouterLearner, RouterTraining

# Power of `Targets.draw`: large networks are run more often. Near the full model losses differ less, so it takes more of them to
# tell which blocks matter.
LARGE = 2.0


class StaticLearner(RouterLearner):
    """Base class of learners of static routers, which choose one candidate of each block for all tokens.

    Candidates are drawn from the routers' probabilities. For each block the routers then minimise the expected loss over the
    block's candidates, while all other blocks keep the drawn ones.

    Args:
        training: choices, costs with a target, seed and length of the training.
        settings: learning rate, entropy and constraint weight.
        routers: trained routers to start from; None for new ones.
    """

    def __init__(self, training: RouterTraining, settings: RouterSettings, routers: StaticRouters | None = None) -> None:
        super().__init__(training, settings, routers)
        spent = [self.choices.costs_NK(cost) / span for cost, span in zip(self.costs, self.targets.spans, strict=True)]
        self.spent_CNK = torch.tensor(np.array(spent), dtype=torch.float32)
        starts = [(cost.constant - cost.smallest) / span for cost, span in zip(self.costs, self.targets.spans, strict=True)]
        self.start_C = torch.tensor(starts)
        self.losses: list[Tensor] = []  # degradations [T] of each step
        self.drawn: tuple[Tensor, Tensor] | None = None

    def networks(self, step: int) -> list[SubNetwork]:
        """Draw `targets_per_step` budgets at random, and for each a sub-network from the routers' probabilities.

        Call once a step, on the main process.
        """
        generator = self._generator(step, DRAW)
        with torch.no_grad():
            targets_TC = self.targets.draw(self.training.targets_per_step, generator, LARGE)
            indices_TN = self._choose(self.routers(targets_TC), generator)
        self.drawn = targets_TC, indices_TN
        return [self.choices.network(row) for row in indices_TN.tolist()]

    def _add(self, losses: Sequence[float]) -> Tensor:
        """Store and return the degradations [T] of the drawn networks. losses: nats per token, the full model's first."""
        degradation_T = (torch.tensor(losses[1:], dtype=torch.float64) - losses[0]).float()
        self.losses.append(degradation_T)
        return degradation_T

    def _scale(self) -> float:
        """Mean degradation of the networks of all steps so far, in nats per token, at least 1e-6."""
        return float(torch.cat(self.losses).mean().clamp_min(1e-6))

    def _choose(self, logits_TNK: Tensor, generator: torch.Generator) -> Tensor:
        """Draw candidates [T, N] from softmax(logits), as argmax(logits + Gumbel noise)."""
        uniform_TNK = torch.rand(logits_TNK.shape, generator=generator).clamp_min(1e-9)
        return (logits_TNK - torch.log(-torch.log(uniform_TNK))).argmax(-1)

    def _constraint(self, indices_TN: Tensor, targets_TC: Tensor, step: int) -> Tensor:
        """Constraint loss [T, N, K] (Flextron, eq. 8) of the network with candidate k in block n, the other blocks as drawn.

        Args:
            indices_TN: drawn candidate of each block.
            targets_TC: targets of the networks.
            step: number of the step.
        """
        spent_TCNK = self.spent_CNK.expand(len(indices_TN), -1, -1, -1)
        now_TCN1 = spent_TCNK.gather(-1, indices_TN[:, None, :, None].expand(-1, len(self.costs), -1, -1))
        over_TC = now_TCN1.sum((-1, -2)) + self.start_C - targets_TC
        return self.constraint.loss(over_TC[..., None, None] - now_TCN1 + spent_TCNK, step, dim=1)

    @staticmethod
    def _expected(logits_TNK: Tensor, loss_TNK: Tensor) -> Tensor:
        """Expected loss of the choices: mean_t sum_n sum_k softmax(logits)[t, n, k] * loss[t, n, k].

        t counts targets, n blocks, k the candidates of a block. loss: loss of candidate k in block n, the other blocks as drawn.
        Its gradient is the one that a straight-through one-hot choice estimates, with real differences between candidates
        instead of derivatives.
        """
        return (logits_TNK.softmax(-1) * loss_TNK).sum((-1, -2)).mean()

    @staticmethod
    def _mean_constraint(constraint_TNK: Tensor, indices_TN: Tensor) -> float:
        """Mean over targets of the drawn networks' constraint loss.

        The entries [t, n, k] of the drawn candidates k are equal for all blocks n, because each is the loss of the network as it
        was drawn; so block 0 is read.

        Args:
            constraint_TNK: result of `_constraint`.
            indices_TN: drawn candidate of each block.
        """
        return float(constraint_TNK[:, 0].gather(-1, indices_TN[:, :1]).mean())

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "losses": torch.cat(self.losses) if self.losses else None}

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self.losses = [] if state["losses"] is None else [state["losses"]]


class StraightThroughLearner(StaticLearner, GateLearner):
    """Static routers that learn from gradients of router gates on the blocks of networks.

    A gate multiplies the output of a block with p / stopgrad(p), p being the probability of the drawn candidate.
    """

    def learn(self, step: int, losses: Sequence[float], gradients_TN: Tensor) -> Figures:
        targets_TC, indices_TN = self.drawn
        self._add(losses)
        logits_TNK = self.routers(targets_TC)
        constraint_TNK = self._constraint(indices_TN, targets_TC, step)
        limited = self._expected(logits_TNK, self.settings.constraint_weight * constraint_TNK)
        language = (gates(logits_TNK, indices_TN) * gradients_TN.float() / self._scale()).sum(-1).mean()
        self._update(limited + language - self._entropy(logits_TNK, step))
        constraint = self._mean_constraint(constraint_TNK, indices_TN)
        return {**self._figures(targets_TC, indices_TN), "constraint_loss": constraint}


class SurrogateLearner(StaticLearner, LossLearner):
    """Static routers that learn from a surrogate model of degradation, fitted to all sub-networks drawn so far.

    Degradation is a sub-network's loss minus the full model's loss on the same batch, in nats per token.

    Args:
        training: choices, costs with a target, seed and length of the training.
        settings: learning rate, entropy and constraint weight.
        surrogate: size and training of the surrogate model, and the error below which the routers learn from it.
    """

    def __init__(self, training: RouterTraining, settings: RouterSettings, surrogate: SurrogateSettings) -> None:
        self.surrogate_settings = surrogate
        super().__init__(training, settings)
        self.surrogate_optimizer = torch.optim.AdamW(
            self.surrogate.parameters(), lr=surrogate.lr, weight_decay=surrogate.weight_decay
        )
        self.indices: list[Tensor] = []  # drawn candidates [T, N] for each entry of `losses`
        # Running mean of the surrogate's squared error on new pairs / variance of the degradations.
        self.error: float | None = None
        self.steps_followed = 0

    def _seeded(self) -> None:
        self.surrogate = Surrogate(*self.choices.exists_NK.shape, self.surrogate_settings.hidden_size)

    def learn(self, step: int, losses: Sequence[float]) -> Figures:
        targets_TC, indices_TN = self.drawn
        degradation_T = self._add(losses)
        self.indices.append(indices_TN)
        scale, generator = self._scale(), self._generator(step, LEARN)
        if len(self.losses) == 1:
            self.surrogate.scale.fill_(scale)
        figures = self._fit(step, indices_TN, degradation_T, scale, generator)
        for _ in range(self.settings.updates_per_step):
            constraint = self._follow(step, scale, figures["routers_follow_surrogate"], generator)
        return {**self._figures(targets_TC, indices_TN), **figures, "constraint_loss": constraint}

    def _fit(self, step: int, indices_TN: Tensor, degradation_T: Tensor, scale: float, generator: torch.Generator) -> Figures:
        """Measure the surrogate's error on the networks of this step, then train it on networks drawn from all steps.

        Returns for the log {"surrogate_loss": mean squared error on this step's networks, in nats squared, "surrogate_error":
        running mean of this divided by the variance of all degradations, "routers_follow_surrogate": True if the error is below
        the threshold and enough networks were evaluated}.

        Args:
            step: number of the step.
            indices_TN: candidates of this step's networks.
            degradation_T: their degradations.
            scale: mean degradation so far.
            generator: source of random numbers.
        """
        settings, indices_BN, losses_B = self.surrogate_settings, torch.cat(self.indices), torch.cat(self.losses)
        with torch.no_grad():
            l2 = float(((self.surrogate(self._one_hot(indices_TN)) - degradation_T) ** 2).mean())
        relative = l2 / max(float(losses_B.var(unbiased=False)), 1e-12)
        self.error = relative if self.error is None else 0.9 * self.error + 0.1 * relative
        self.surrogate_optimizer.param_groups[0]["lr"] = settings.lr * (1 - step / self.training.max_steps)
        for _ in range(settings.updates_per_step):
            pick = torch.randint(len(losses_B), (settings.batch_size,), generator=generator)
            found_B = self.surrogate(self._one_hot(indices_BN[pick]))
            loss = (((found_B - losses_B[pick]) / self._typical(found_B, scale)) ** 2).mean()
            self.surrogate_optimizer.zero_grad()
            loss.backward()
            self.surrogate_optimizer.step()
        follow = len(losses_B) > 4 * self.training.targets_per_step and self.error < settings.threshold
        self.steps_followed += follow
        return {"surrogate_loss": l2, "surrogate_error": self.error, "routers_follow_surrogate": follow}

    def _follow(self, step: int, scale: float, follow: bool, generator: torch.Generator) -> float:
        """Take one optimizer step of the routers, on newly drawn budgets and networks, which are not run through the model.

        The loss is the constraint loss, minus the entropy term, and with `follow` plus the degradation that the surrogate model
        predicts. Returns the mean constraint loss of the drawn networks.

        Args:
            step: number of the step.
            scale: mean degradation so far, which sets the unit of predicted degradations.
            follow: True if the surrogate's error is small enough for the routers to learn from it.
            generator: source of random numbers.
        """
        targets_TC = self.targets.draw(self.settings.batch_size, generator)
        logits_TNK = self.routers(targets_TC)
        indices_TN = self._choose(logits_TNK.detach(), generator)
        constraint_TNK = self._constraint(indices_TN, targets_TC, step)
        loss_TNK = self.settings.constraint_weight * constraint_TNK
        if follow:
            with torch.no_grad():
                choices_TNK = self._one_hot(indices_TN)
                typical_T = self._typical(self.surrogate(choices_TNK), scale)
                loss_TNK = loss_TNK + self.surrogate.replaced(choices_TNK) / typical_T[:, None, None]
        self._update(self._expected(logits_TNK, loss_TNK) - self._entropy(logits_TNK, step))
        return self._mean_constraint(constraint_TNK, indices_TN)

    def _one_hot(self, indices_BN: Tensor) -> Tensor:
        """Convert candidate indices [B, N] to one-hot rows [B, N, K], the surrogate's input."""
        return torch.nn.functional.one_hot(indices_BN, self.routers.exists_NK.shape[1]).float()

    @staticmethod
    def _typical(losses_B: Tensor, scale: float) -> Tensor:
        """Size [B] that degradations are divided by in losses: |degradation| + 0.3 * scale, without a gradient.

        Large networks differ less from each other than small ones; divided by this, both count about the same.
        """
        return losses_B.detach().abs() + 0.3 * scale

    def _state(self) -> dict[str, Any]:
        indices = torch.cat(self.indices) if self.indices else None
        plain = {"indices": indices, "error": self.error, "steps_followed": self.steps_followed}
        modules = {"surrogate": self.surrogate, "surrogate_optimizer": self.surrogate_optimizer}
        return {**super()._state(), **plain, **modules}

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self.surrogate.load_state_dict(state["surrogate"])
        self.surrogate_optimizer.load_state_dict(state["surrogate_optimizer"])
        self.indices = [] if state["indices"] is None else [state["indices"]]
        self.error, self.steps_followed = state["error"], state["steps_followed"]
