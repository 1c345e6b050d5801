"""Gumbel-softmax router, trained together with the model (LLaMaFlex): for a budget it chooses hidden size, depth and widths.

A choice is argmax(logits + Gumbel noise), with independent noise for every choice and network. Most networks of a step are
computed with real slices and train the model only. The first few are weighted networks, computed with masks (layers/weighted.py),
whose gradients train the router. Early in training the masks are the relaxed choices softmax((logits + noise) / temperature),
later the hard choices, straight through. The temperature decreases over the training.

Shape suffixes: T targets, C constrained costs, N choices, K candidates, L layers, H hidden sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flextron_mcore.cost import Cost
from flextron_mcore.routers.static import StaticRouters
from flextron_mcore.settings.sections import GumbelSettings
from flextron_mcore.space import SubNetwork, parameter_share
from flextron_mcore.training.learner import Figures, WeightLearner
from flextron_mcore.training.router import DRAW, LEARN, RouterLearner, RouterTraining, Weights


class GumbelLearner(RouterLearner, WeightLearner):
    """Router in training, with its optimizer, that chooses hidden size, depth, and widths of each layer by Gumbel-softmax.

    Args:
        training: choices, costs with a target, seed and length of the training.
        settings: learning rate, temperature, entropy, constraint, number of weighted networks and more.
        routers: a trained router to start from; None for a new one.
    """

    def __init__(self, training: RouterTraining, settings: GumbelSettings, routers: StaticRouters | None = None) -> None:
        super().__init__(training, settings, routers)
        choices = training.choices
        self.scale: float | None = None  # running mean of the sub-networks' loss minus the full model's
        self.drawn: tuple[Tensor, Tensor] | None = None

        def parts(of: Callable[[Cost], float | Sequence[float]]) -> Tensor:
            rows = [
                [np.array(of(cost.at(size))) / span for size in choices.space.hidden_size]
                for cost, span in zip(self.costs, self.targets.spans, strict=True)
            ]
            return torch.tensor(np.array(rows), dtype=torch.float32)

        self.constant_CH = parts(lambda cost: cost.constant)
        self.candidates_CHK = [parts(lambda cost, name=axis.name: cost.candidates[name]) for axis in choices.space.layer_axes]
        smallest = [cost.smallest / span for cost, span in zip(self.costs, self.targets.spans, strict=True)]
        self.constant_CH = self.constant_CH - torch.tensor(smallest)[:, None]
        # has_LK is 1 where the network of the k-th depth executes a layer.
        ranks = {layer: rank for rank, layer in enumerate(choices.space.layer_ranking)}
        has_LK = [[ranks[layer] < depth for depth in choices.space.depth] for layer in range(choices.model.num_layers)]
        self.has_LK = torch.tensor(has_LK, dtype=torch.float32)

    def networks(self, step: int) -> list[SubNetwork | Weights]:
        """Draw `targets_per_step` budgets at random, and for each a network by Gumbel-softmax, without the full model.

        The first `weighted_per_step` are returned as lists of weights, one weight for every candidate (arguments of
        `WeightedNetwork.of`), because their gradients train the router; the others are sub-networks. Call once a step, on the
        main process.
        """
        generator = self._generator(step, DRAW)
        with torch.no_grad():
            targets_TC = self.targets.draw(self.training.targets_per_step, generator)
            targets_TC = targets_TC[torch.randperm(len(targets_TC), generator=generator)]  # else the first would be weighted
            noise_TNK = self._noise(len(targets_TC), generator)
            soft_TNK, hard_TNK = self._relaxed(targets_TC, noise_TNK, step)
        self.drawn = targets_TC, noise_TNK
        weights_TNK = soft_TNK if step < self.settings.soft_until * self.training.max_steps else hard_TNK
        drawn, count = [self.choices.network(row) for row in hard_TNK.argmax(-1).tolist()], self.settings.weighted_per_step
        weighted = [
            [*(part.tolist() for part in self._weights(row)), parameter_share(self.choices.model, net)]
            for row, net in zip(weights_TNK[:count], drawn, strict=False)
        ]
        return [*weighted, *drawn[count:]]

    def learn(self, step: int, losses: Sequence[float], gradients: Sequence[Sequence[Tensor]] = ()) -> Figures:
        targets_TC, noise_TNK = self.drawn
        typical = float(np.mean(losses[1:])) - losses[0]
        self.scale = max(typical if self.scale is None else 0.95 * self.scale + 0.05 * typical, 1e-4)
        soft_TNK, hard_TNK = self._relaxed(targets_TC, noise_TNK, step)
        language = sum(
            (wanted.float() * weights).sum()
            for row, found in zip(soft_TNK, gradients, strict=False)
            for weights, wanted in zip(self._weights(row), found, strict=True)
        )
        generator = self._generator(step, LEARN)
        more_TC = self.targets.draw(self.settings.batch_size, generator)
        more_soft_TNK, more_hard_TNK = self._relaxed(more_TC, self._noise(len(more_TC), generator), step)
        over_TC = self._spent(more_hard_TNK + more_soft_TNK - more_soft_TNK.detach()) - more_TC
        constraint = self.constraint.loss(over_TC, step, dim=-1).mean()
        entropy = self._entropy(self.routers(more_TC), step)
        self._update(language / (self.scale * max(len(gradients), 1)) + self.settings.constraint_weight * constraint - entropy)
        return {
            **self._figures(targets_TC, hard_TNK.argmax(-1)),
            "temperature": self._annealed(self.settings.temperature, step),
            "constraint_loss": constraint.item(),
        }

    def _relaxed(self, targets_TC: Tensor, noise_TNK: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(relaxed, one-hot) choices for each target, [T, N, K] each: softmax((logits + noise) / temperature), and its argmax.

        Args:
            targets_TC: targets of the networks.
            noise_TNK: Gumbel noise.
            step: number of the step, which gives the temperature.
        """
        soft_TNK = ((self.routers(targets_TC) + noise_TNK) / self._annealed(self.settings.temperature, step)).softmax(-1)
        return soft_TNK, torch.nn.functional.one_hot(soft_TNK.argmax(-1), soft_TNK.shape[-1]).float()

    def _weights(self, choice_NK: Tensor) -> tuple[Tensor, ...]:
        """Choices of one network as weights of a WeightedNetwork: of hidden sizes [H], layers [L], and each layer axis [L, K].

        choice_NK: relaxed or one-hot choices.
        """
        space, layers = self.choices.space, self.choices.model.num_layers
        columns = zip(*(self.choices.rows([layer]) for layer in range(layers)), strict=True)
        widths = [
            choice_NK[list(rows), : len(space.sizes[axis.name])] for axis, rows in zip(space.layer_axes, columns, strict=True)
        ]
        return choice_NK[0, : len(space.hidden_size)], self.has_LK @ choice_NK[1, : len(space.depth)], *widths

    def _spent(self, choice_TNK: Tensor) -> Tensor:
        """Costs [T, C] of relaxed or one-hot choices, scaled to 0 at the smallest network's cost and 1 at the full model's."""
        spent = []
        for choice_NK in choice_TNK:
            hidden_H, layers_L, *widths = self._weights(choice_NK)
            layers_CH = sum((layers_L @ w_LK) @ costs.mT for w_LK, costs in zip(widths, self.candidates_CHK, strict=True))
            spent.append(((self.constant_CH + layers_CH) * hidden_H).sum(-1))
        return torch.stack(spent)

    def _noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent Gumbel noise of T = `count` networks, for each candidate k of each choice n: [T, N, K]."""
        shape = (count, *self.routers.exists_NK.shape)
        return -torch.log(-torch.log(torch.rand(shape, generator=generator).clamp(1e-9, 1 - 1e-7)))

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "scale": self.scale}

    def _restore(self, state: Mapping[str, Any]) -> None:
        super()._restore(state)
        self.scale = state["scale"]
