"""Base class of static routers in training: draws of targets, the choices of a step, entropy, optimizer, state on disk.

Shape suffixes: T targets, C constrained costs, N decisions, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flextron_mcore.choices import Choices
from flextron_mcore.choosing import Network
from flextron_mcore.cost import Budget, Cost
from flextron_mcore.layers.weighted import WeightedNetwork
from flextron_mcore.routers.static import StaticRouters, log_probabilities
from flextron_mcore.routers.store import STATE_FILE, RouterInfo, check_same_table, load_state, save_state, write_routers
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.selection.router import RouterSelector, target_of
from flextron_mcore.settings.sections import GumbelSettings, RouterSettings
from flextron_mcore.space import SubNetwork
from flextron_mcore.training.constraint import Constraint, Targets
from flextron_mcore.training.learner import Figures, Learner

Weights = list[list]  # the fields of a WeightedNetwork as plain numbers, which every rank gets
DRAW, LEARN = 0, 1  # streams of random numbers of a step


@dataclass(frozen=True)
class RouterTraining:
    """Routers to be trained: what they choose from, for which costs and how long.

    costs: those of `info`, which are constrained. table: of latencies, kept beside the routers.
    """

    choices: Choices
    costs: Sequence[Cost]
    info: RouterInfo
    targets_per_step: int
    seed: int
    max_steps: int
    table: Mapping[str, Any] | None = None

    def new_routers(self) -> StaticRouters:
        """Routers that have learned nothing, from the current random state."""
        return StaticRouters(self.choices, len(self.costs), self.info.hidden_size)


class RouterLearner(Learner):
    """Static routers and their optimizer. routers: trained ones to start from."""

    def __init__(
        self, training: RouterTraining, settings: RouterSettings | GumbelSettings, routers: StaticRouters | None = None
    ) -> None:
        self.training, self.settings = training, settings
        self.choices, self.costs, self.info = training.choices, list(training.costs), training.info
        self.targets = Targets(self.costs, self.info.ranges)
        self.constraint = Constraint(settings.two_sided_from * training.max_steps)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.routers = routers or training.new_routers()
            self._seeded()
        self.optimizer = torch.optim.Adam(self.routers.parameters(), lr=settings.lr, betas=(0.9, 0.99))

    def _seeded(self) -> None:
        """Make other modules with random weights, if any."""

    # Choices of the routers now, without noise.

    def selector(self) -> RouterSelector:
        """Selector of the routers as they are."""
        costs = {cost.name: cost for cost in self.costs}
        return RouterSelector(self.choices, costs, log_probabilities(self.routers), evaluated=self.info.losses(self.choices))

    def choose(self, share: float) -> SubNetwork:
        """Network for a share of the (first) cost of the full model."""
        cost = self.costs[0]
        return self.selector().select([Budget(cost, share * cost.full)])

    def argmax(self, share: float) -> SubNetwork:
        """Likeliest network for that share, which may miss the budget (eq. 9)."""
        targets = [1.0] * len(self.costs)
        targets[0] = target_of(self.costs[0], share * self.costs[0].full)
        return self.selector().argmax(targets)

    # A step.

    def networks(self, step: int) -> list[SubNetwork | Weights]:
        """Choices for the targets of a step. Call on the main process, once."""
        raise NotImplementedError

    def step_networks(self, step: int) -> list[Network]:
        """`networks` on every rank, after the full model. Call on all ranks."""
        drawn = on_main_process(lambda: self.networks(step))
        return [None, *(WeightedNetwork.of(net, device()) if isinstance(net, list) else net for net in drawn)]

    def _generator(self, step: int, stream: int) -> torch.Generator:
        """Random numbers that are a function of (seed, step, stream)."""
        value = np.random.SeedSequence([self.training.seed, 6, stream, step]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(value))

    def _entropy(self, logits_TNK: Tensor, step: int) -> Tensor:
        """Entropy of the choices, mean over targets and sum over decisions, times a weight that falls over the training.

        It keeps the second-best candidates' probabilities meaningful: in proportion to exp(-loss / weight).
        """
        weight = self._falling(self.settings.entropy, step)
        log_p_TNK = logits_TNK.log_softmax(-1).masked_fill(~self.routers.exists_NK, 0.0)
        return -weight * (log_p_TNK.exp() * log_p_TNK * self.routers.exists_NK).sum((-1, -2)).mean()

    def _falling(self, ends: tuple[float, float], step: int) -> float:
        """Geometric schedule between the first and the last value."""
        first, last = ends
        return first * (last / first) ** (step / self.training.max_steps)

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _figures(self, targets_TC: Tensor, indices_TN: Tensor) -> Figures:
        """Targets and costs of the step's networks, as shares of the full model's."""
        networks = map(self.choices.network, indices_TN.tolist())
        return {
            "targets": self.targets.shares(targets_TC),
            "costs": [[cost.of(net) / cost.full for cost in self.costs] for net in networks],
        }

    # What is kept.

    def write(self, folder: Path) -> None:
        write_routers(folder, self.info, self.routers, self.training.table)
        save_state(folder / STATE_FILE, **self._state())

    def read(self, folder: Path) -> None:
        check_same_table(folder, self.training.table)
        self._restore(load_state(folder / STATE_FILE))

    def _state(self) -> dict[str, Any]:
        """State that training continues from: modules, optimizers and plain values by name."""
        return {"routers": self.routers, "optimizer": self.optimizer}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.routers.load_state_dict(state["routers"])
        self.optimizer.load_state_dict(state["optimizer"])
