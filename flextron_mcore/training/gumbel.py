"""One router for all axes, trained together with the model (LLaMaFlex): a budget in, a hidden size, a depth and widths out.

A choice is the argmax of logits with Gumbel noise of its own for every axis, layer and network. Most networks of a step are
computed with real slices and teach the model alone. The first few are computed with masks (layers/weighted.py), and their
gradients teach the router: through the relaxed choices, softmax((logits + noise) / temperature), early in training, later through
the hard ones, straight through. The temperature falls over the training.

Shape suffixes: T targets, C constrained costs, N axes, K candidates, L layers, H hidden sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flextron_mcore.blocks import Axes
from flextron_mcore.cost import Cost
from flextron_mcore.routers.static import StaticRouters
from flextron_mcore.routers.store import RouterInfo
from flextron_mcore.space import SubNetwork, parameter_share
from flextron_mcore.training.router import DRAW, LEARN, RouterLearner, RouterSettings

Weights = list[list]  # the fields of a WeightedNetwork as plain numbers


@dataclass(frozen=True)
class GumbelSettings:
    """How the router learns; see conf/stage/gumbel.yaml."""

    targets_per_step: int = 3
    weighted_per_step: int = 1
    lr: float = 1e-2
    batch_size: int = 32
    temperature: tuple[float, float] = (1.0, 0.1)
    soft_until: float = 0.7
    entropy: tuple[float, float] = (0.1, 0.01)
    constraint_weight: float = 16.0
    two_sided_from: float = 0.3


class GumbelLearner(RouterLearner):
    """The router and its optimizer."""

    blocks: Axes

    def __init__(
        self,
        axes: Axes,
        costs: Sequence[Cost],
        info: RouterInfo,
        settings: GumbelSettings,
        seed: int,
        max_steps: int,
        table: Mapping[str, Any] | None = None,
        start: StaticRouters | None = None,
    ) -> None:
        """As RouterLearner's."""
        shared = {field.name: getattr(settings, field.name) for field in fields(settings)}
        own = {name: shared.pop(name) for name in ("weighted_per_step", "temperature", "soft_until")}
        super().__init__(axes, costs, info, RouterSettings(**shared, surrogate=False), seed, max_steps, table, start)
        self.weighted, self.temperatures, self.soft_until = own.values()

    gated = False  # not from gates: from the weights of the networks that have them

    def _prepare(self, spans: Sequence[float]) -> None:
        """What candidates cost, by hidden size, in shares of the span between the smallest and the full network."""

        def parts(name: str) -> Tensor:
            rows = [
                [np.array(getattr(cost.at(size), name)) / span for size in self.blocks.space.hidden_size]
                for cost, span in zip(self.costs, spans, strict=True)
            ]
            return torch.tensor(np.array(rows), dtype=torch.float32)

        self.constant_CH, self.heads_CHK, self.neurons_CHK = parts("constant"), parts("heads"), parts("ffn_hidden_size")
        smallest = [cost.smallest / span for cost, span in zip(self.costs, spans, strict=True)]
        self.constant_CH = self.constant_CH - torch.tensor(smallest)[:, None]
        # A layer is executed by the depths from the first that has it.
        ranks = {layer: rank for rank, layer in enumerate(self.blocks.space.layer_ranking)}
        depths = self.blocks.space.depth
        has_LK = [[ranks[layer] < depth for depth in depths] for layer in range(self.blocks.model.num_layers)]
        self.has_LK = torch.tensor(has_LK, dtype=torch.float32)

    # What a step runs.

    def networks(self, step: int) -> list[SubNetwork | Weights]:
        """The router's choices for this step's targets; as weights of all candidates where it is to learn from them."""
        generator = self._generator(step, DRAW)
        with torch.no_grad():
            targets_TC = self._targets(self.settings.targets_per_step, generator)
            targets_TC = targets_TC[torch.randperm(len(targets_TC), generator=generator)]  # any of them may be weighted
            noise_TNK = self._noise(len(targets_TC), generator)
            soft_TNK, hard_TNK = self._relaxed(targets_TC, noise_TNK, step)
        self.drawn = targets_TC, noise_TNK
        weights_TNK = soft_TNK if step < self.soft_until * self.max_steps else hard_TNK
        drawn = [self.blocks.network(row) for row in hard_TNK.argmax(-1).tolist()]
        weighted = [
            [*(part.tolist() for part in self._weights(row)), parameter_share(self.blocks.model, net)]
            for row, net in zip(weights_TNK[: self.weighted], drawn, strict=False)
        ]
        return [*weighted, *drawn[self.weighted :]]

    # What is learned from it.

    def learn(self, step: int, losses: Sequence[float], gradients: Sequence[Sequence[Tensor]] = ()) -> dict[str, Any]:
        """Update from the losses [nats per token], and the gradients by the weights of each weighted network."""
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
        more_TC = self._targets(self.settings.batch_size, generator)
        more_soft_TNK, more_hard_TNK = self._relaxed(more_TC, self._noise(len(more_TC), generator), step)
        constraint = self._over(more_hard_TNK + more_soft_TNK - more_soft_TNK.detach(), more_TC, step)
        entropy = self._entropy(self.routers(more_TC), step)
        self._update(language / (self.scale * max(len(gradients), 1)) + self.settings.constraint_weight * constraint - entropy)
        chosen = [self.blocks.network(row) for row in hard_TNK.argmax(-1).tolist()]
        return {
            "targets": self._shares(targets_TC).tolist(),
            "costs": [[cost.of(net) / cost.full for cost in self.costs] for net in chosen],
            "temperature": self._temperature(step),
            "constraint_loss": constraint.item(),
        }

    def _relaxed(self, targets_TC: Tensor, noise_TNK: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Choices for targets [T, N, K]: relaxed, and as one-hot vectors of 0 and 1."""
        soft_TNK = ((self.routers(targets_TC) + noise_TNK) / self._temperature(step)).softmax(-1)
        return soft_TNK, torch.nn.functional.one_hot(soft_TNK.argmax(-1), soft_TNK.shape[-1]).float()

    def _weights(self, choice_NK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields of a WeightedNetwork."""
        space, layers = self.blocks.space, self.blocks.model.num_layers
        heads, neurons = choice_NK[2::2, : len(space.heads)], choice_NK[3::2, : len(space.ffn_hidden_size)]
        if self.blocks.uniform:
            heads, neurons = heads.expand(layers, -1), neurons.expand(layers, -1)
        return choice_NK[0, : len(space.hidden_size)], self.has_LK @ choice_NK[1, : len(space.depth)], heads, neurons

    def _over(self, choice_TNK: Tensor, targets_TC: Tensor, step: int) -> Tensor:
        """Eq. 8 of Flextron, two-sided late in training; mean over targets."""
        spent = []
        for choice_NK in choice_TNK:
            hidden_H, layers_L, heads_LK, neurons_LK = self._weights(choice_NK)
            pair_CH = (layers_L @ heads_LK) @ self.heads_CHK.mT + (layers_L @ neurons_LK) @ self.neurons_CHK.mT
            spent.append(((self.constant_CH + pair_CH) * hidden_H).sum(-1))
        over_TC = torch.stack(spent) - targets_TC
        above_T = over_TC.clamp_min(0).sum(-1)
        if step >= self.settings.two_sided_from * self.max_steps:
            above_T = above_T + (-over_TC.amax(-1)).clamp_min(0)
        return above_T.mean()

    def _temperature(self, step: int) -> float:
        first, last = self.temperatures
        return first * (last / first) ** (step / self.max_steps)

    def _noise(self, count: int, generator: torch.Generator) -> Tensor:
        shape = (count, *self.routers.exists_NK.shape)
        return -torch.log(-torch.log(torch.rand(shape, generator=generator).clamp(1e-9, 1 - 1e-7)))
