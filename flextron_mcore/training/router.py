"""Base class for training static routers: targets and networks of a step, entropy, optimizer, and state on disk.

Shape suffixes: T targets, C constrained costs, N choices, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from flextron_mcore.routers.store import (
    STATE_FILE,
    RouterInfo,
    check_same_table,
    load_state,
    read_routers,
    save_state,
    write_routers,
)
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.selection.router import RouterSelector, target_of
from flextron_mcore.settings.sections import GumbelSettings, RouterSettings
from flextron_mcore.space import SubNetwork
from flextron_mcore.training.constraint import Constraint, Targets
from flextron_mcore.training.learner import Figures, Learner

Weights = list[list]  # fields of a WeightedNetwork as plain numbers, which are sent to all ranks
DRAW, LEARN = 0, 1  # streams of random numbers of a step


@dataclass(frozen=True)
class RouterTraining:
    """Parameters of a training of static routers: choices, costs, seed and number of steps.

    Attributes:
        choices: choices that the routers make.
        costs: costs with a target, in the order of `info.costs`.
        info: description of the routers, stored beside them.
        targets_per_step: number of targets, and so of sub-networks, in a step.
        seed: seed of the run.
        max_steps: length of the training in steps.
        table: latency table as plain types, stored beside the routers; None without.
    """

    choices: Choices
    costs: Sequence[Cost]
    info: RouterInfo
    targets_per_step: int
    seed: int
    max_steps: int
    table: Mapping[str, Any] | None = None

    def new_routers(self) -> StaticRouters:
        """Make untrained routers with random weights from torch's current random state."""
        return StaticRouters(self.choices, len(self.costs), self.info.hidden_size)


class RouterLearner(Learner):
    """Static routers (one network for all tokens) in training, and their optimizer.

    Args:
        training: choices, costs with a target, seed and length of the training.
        settings: learning rate, entropy and constraint of the routers, and further settings of subclasses.
        routers: trained routers to start from; None for new ones.
    """

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
        """Build a subclass's further modules with random weights. The constructor calls it after torch got the run's seed."""

    # Choices of the current routers, without noise.

    def selector(self) -> RouterSelector:
        """Selector that uses the current routers."""
        costs = {cost.name: cost for cost in self.costs}
        return RouterSelector(self.choices, costs, log_probabilities(self.routers), evaluated=self.info.losses(self.choices))

    def choose(self, share: float) -> SubNetwork:
        """Sub-network that the routers choose for a budget. Raises FlextronError if no sub-network keeps to the budget.

        share: budget, as a share of the full model's first cost.
        """
        cost = self.costs[0]
        return self.selector().select([Budget(cost, share * cost.full)])

    def argmax(self, share: float) -> SubNetwork:
        """Network with the likeliest candidate of every choice, argmax(R_i(T)) (Flextron, eq. 9). It may miss the budget.

        share: budget T, as a share of the full model's first cost; other costs get the target 1 (full model).
        """
        targets = [1.0] * len(self.costs)
        targets[0] = target_of(self.costs[0], share * self.costs[0].full)
        return self.selector().argmax(targets)

    # A step.

    def networks(self, step: int) -> list[SubNetwork | Weights]:
        """Networks that the routers choose in this step, one for each randomly drawn target, without the full model.

        A network is a SubNetwork, or the Weights of a weighted network. Call once a step, on the main process.
        """
        raise NotImplementedError

    def step_networks(self, step: int) -> list[Network]:
        """Networks of a step: the full model (None), then the result of `networks`, the same on every rank. Call on all ranks."""
        drawn = on_main_process(lambda: self.networks(step))
        return [None, *(WeightedNetwork.of(net, device()) if isinstance(net, list) else net for net in drawn)]

    def _generator(self, step: int, stream: int) -> torch.Generator:
        """Random number generator on the CPU that depends on (seed, step, stream) only. stream: DRAW or LEARN."""
        value = np.random.SeedSequence([self.training.seed, 6, stream, step]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(value))

    def _entropy(self, logits_TNK: Tensor, step: int) -> Tensor:
        """Entropy of the routers' probabilities, summed over choices, averaged over targets, times a weight that falls by step.

        Subtracted from the loss, it makes the optimal probabilities proportional to exp(-loss / weight), so that candidates that
        are not the best keep an order, too.
        """
        weight = self._annealed(self.settings.entropy, step)
        log_p_TNK = logits_TNK.log_softmax(-1).masked_fill(~self.routers.exists_NK, 0.0)
        return -weight * (log_p_TNK.exp() * log_p_TNK * self.routers.exists_NK).sum((-1, -2)).mean()

    def _annealed(self, ends: tuple[float, float], step: int) -> float:
        """Value at `step` of a schedule that falls geometrically from ends[0] at step 0 to ends[1] at the end of the training."""
        first, last = ends
        return first * (last / first) ** (step / self.training.max_steps)

    def _update(self, loss: Tensor) -> None:
        """Take one optimizer step of the routers on `loss`."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _figures(self, targets_TC: Tensor, indices_TN: Tensor) -> Figures:
        """{"targets": budgets, "costs": costs} of a step's networks, a list of shares of the full model's costs for each network.

        Args:
            targets_TC: targets of the networks, 0 (smallest network's cost) to 1 (full model's).
            indices_TN: candidate that each choice takes.
        """
        networks = map(self.choices.network, indices_TN.tolist())
        return {
            "targets": self.targets.shares(targets_TC),
            "costs": [[cost.of(net) / cost.full for cost in self.costs] for net in networks],
        }

    # State on disk.

    def write(self, folder: Path) -> None:
        write_routers(folder, self.info, self.routers, self.training.table)
        save_state(folder / STATE_FILE, **self._state())

    def read(self, folder: Path) -> None:
        check_same_table(folder, self.training.table)
        described, _ = read_routers(folder, self.choices)
        self.info = replace(self.info, evaluated=described.evaluated)
        self._restore(load_state(folder / STATE_FILE))

    def _state(self) -> dict[str, Any]:
        """State that a continued training needs: {name: module, optimizer, tensor or plain value}."""
        return {"routers": self.routers, "optimizer": self.optimizer}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.routers.load_state_dict(state["routers"])
        self.optimizer.load_state_dict(state["optimizer"])
