"""What routers learn from a step: through the surrogate model, or straight through the gates (Flextron, section 3.2, eq. 7-10).

The language model runs on all ranks; routers and surrogate are small and live on the CPU of the main process, which tells the
others what it chose. Choices are therefore the same on all ranks, whatever the layout.

Shape suffixes: T targets, C constrained costs, N blocks, K candidates, B pairs of a choice and its loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flextron_mcore.blocks import Axes, Blocks
from flextron_mcore.cost import Budget, Cost
from flextron_mcore.routers.static import StaticRouters, gates, log_probabilities
from flextron_mcore.routers.store import STATE_FILE, RouterInfo, check_same_table, load_state, save_state, write_routers
from flextron_mcore.routers.surrogate import Surrogate
from flextron_mcore.selection.routed import Routed, target_of
from flextron_mcore.space import SubNetwork

# Networks that are run are large more often than small ones: the nearer to the full model, the less losses differ, and the more
# of them it takes to tell which blocks matter.
LARGE = 2.0
DRAW, LEARN = 0, 1  # streams of random numbers of a step


@dataclass(frozen=True)
class RouterSettings:
    """How routers learn; see conf/stage/router.yaml."""

    targets_per_step: int = 4
    lr: float = 3e-3
    updates_per_step: int = 4
    batch_size: int = 32
    entropy: tuple[float, float] = (0.3, 0.03)
    constraint_weight: float = 16.0
    two_sided_from: float = 0.5
    surrogate: bool = True
    surrogate_hidden_size: int = 128
    surrogate_lr: float = 3e-3
    surrogate_weight_decay: float = 1.0
    surrogate_updates_per_step: int = 8
    surrogate_batch_size: int = 64
    surrogate_threshold: float = 0.2


class RouterLearner:
    """Routers, surrogate, their optimizers, and the pairs of choices and losses seen so far."""

    def __init__(
        self,
        blocks: Blocks | Axes,
        costs: Sequence[Cost],
        info: RouterInfo,
        settings: RouterSettings,
        seed: int,
        max_steps: int,
        table: Mapping[str, Any] | None = None,
        start: StaticRouters | None = None,
    ) -> None:
        """costs: those of `info`, which are constrained. table: of latencies, kept beside the routers. start: trained routers."""
        self.blocks, self.costs, self.settings, self.seed, self.max_steps = blocks, list(costs), settings, seed, max_steps
        self.info, self.table = info, table
        spans = [cost.full - cost.smallest or 1.0 for cost in self.costs]
        self._prepare(spans)
        bounds = [
            [target_of(cost, share * cost.full) for share in pair] for cost, pair in zip(self.costs, info.ranges, strict=True)
        ]
        self.low_C, self.high_C = torch.tensor(bounds, dtype=torch.float32).T
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.routers = start or StaticRouters(blocks, len(self.costs), info.hidden_size)
            count, width = blocks.exists_NK.shape
            self.surrogate = Surrogate(count, width, settings.surrogate_hidden_size) if settings.surrogate else None
        self.optimizer = torch.optim.Adam(self.routers.parameters(), lr=settings.lr, betas=(0.9, 0.99))
        if self.surrogate:
            self.surrogate_optimizer = torch.optim.AdamW(
                self.surrogate.parameters(), lr=settings.surrogate_lr, weight_decay=settings.surrogate_weight_decay
            )
        self.seen_indices: list[Tensor] = []
        self.seen_losses: list[Tensor] = []
        self.error: float | None = None
        self.scale: float | None = None  # of the losses above the full model's, where no pairs are kept
        self.steps_followed = 0  # in which routers had the surrogate's gradient
        self.drawn: tuple[Tensor, Tensor] | None = None

    def _prepare(self, spans: Sequence[float]) -> None:
        """What candidates cost, in shares of the span between the smallest and the full network."""
        spent = [self.blocks.costs_NK(cost) / span for cost, span in zip(self.costs, spans, strict=True)]
        self.spent_CNK = torch.tensor(np.array(spent), dtype=torch.float32)
        self.start_C = torch.tensor([(c.constant - c.smallest) / s for c, s in zip(self.costs, spans, strict=True)])

    # What a step runs.

    def networks(self, step: int) -> list[SubNetwork]:
        """The routers' choices for this step's targets, with exploration noise."""
        generator = self._generator(step, DRAW)
        with torch.no_grad():
            targets_TC = self._targets(self.settings.targets_per_step, generator, LARGE)
            indices_TN = self._choose(self.routers(targets_TC), generator)
        self.drawn = targets_TC, indices_TN
        return [self.blocks.network(row) for row in indices_TN.tolist()]

    def selector(self) -> Routed:
        """What the routers choose now, without noise."""
        costs = {cost.name: cost for cost in self.costs}
        return Routed(self.blocks, costs, log_probabilities(self.routers), measured=self.info.losses(self.blocks))

    def choose(self, share: float) -> SubNetwork:
        """What the routers choose now for a share of the (first) cost of the full model."""
        cost = self.costs[0]
        return self.selector().select([Budget(cost, share * cost.full)])

    def argmax(self, share: float) -> SubNetwork:
        """The same before it is brought to the budget."""
        targets = [1.0] * len(self.costs)
        targets[0] = target_of(self.costs[0], share * self.costs[0].full)
        return self.selector().argmax(targets)

    # What is learned from it.

    @property
    def gated(self) -> bool:
        """Whether it learns from the gates' gradients, not from a surrogate."""
        return self.surrogate is None

    @property
    def everywhere(self) -> bool:
        """It learns on the main process."""
        return False

    @property
    def watch(self) -> None:
        """The step's losses are enough."""

    def learn(self, step: int, losses: Sequence[float], gate_gradients_TN: Tensor | None = None) -> dict[str, Any]:
        """Update from the step's losses [nats per token], the full model's first; the figures to log.

        gate_gradients_TN: of the loss by the gates of the networks, where there is no surrogate.
        """
        targets_TC, indices_TN = self.drawn
        degradation_T = (torch.tensor(losses[1:], dtype=torch.float64) - losses[0]).float()
        self.seen_indices.append(indices_TN)
        self.seen_losses.append(degradation_T)
        generator = self._generator(step, LEARN)
        figures: dict[str, Any] = {
            "targets": self._shares(targets_TC).tolist(),
            "costs": [[cost.of(self.blocks.network(row)) / cost.full for cost in self.costs] for row in indices_TN.tolist()],
        }
        scale = float(torch.cat(self.seen_losses).mean().clamp_min(1e-6))
        if self.surrogate:
            if len(self.seen_losses) == 1:
                self.surrogate.scale.fill_(scale)
            figures |= self._fit_surrogate(step, indices_TN, degradation_T, scale, generator)
            for _ in range(self.settings.updates_per_step):
                constraint = self._surrogate_update(step, scale, figures["routers_follow_surrogate"], generator)
        else:
            constraint = self._gate_update(step, scale, targets_TC, indices_TN, gate_gradients_TN)
        return {**figures, "constraint_loss": constraint}

    def _fit_surrogate(
        self, step: int, indices_TN: Tensor, degradation_T: Tensor, scale: float, generator: torch.Generator
    ) -> dict[str, Any]:
        """First how wrong it was about the new pairs, then learn from all."""
        indices_BN, losses_B = torch.cat(self.seen_indices), torch.cat(self.seen_losses)
        with torch.no_grad():
            l2 = float(((self.surrogate(self._one_hot(indices_TN)) - degradation_T) ** 2).mean())
        relative = l2 / max(float(losses_B.var(unbiased=False)), 1e-12)
        self.error = relative if self.error is None else 0.9 * self.error + 0.1 * relative
        self.surrogate_optimizer.param_groups[0]["lr"] = self.settings.surrogate_lr * (1 - step / self.max_steps)
        for _ in range(self.settings.surrogate_updates_per_step):
            pick = torch.randint(len(losses_B), (self.settings.surrogate_batch_size,), generator=generator)
            found_B = self.surrogate(self._one_hot(indices_BN[pick]))
            loss = (((found_B - losses_B[pick]) / self._typical(found_B, scale)) ** 2).mean()
            self.surrogate_optimizer.zero_grad()
            loss.backward()
            self.surrogate_optimizer.step()
        follow = len(losses_B) > 4 * self.settings.targets_per_step and self.error < self.settings.surrogate_threshold
        self.steps_followed += follow
        return {"surrogate_loss": l2, "surrogate_error": self.error, "routers_follow_surrogate": follow}

    def _surrogate_update(self, step: int, scale: float, follow: bool, generator: torch.Generator) -> float:
        targets_TC = self._targets(self.settings.batch_size, generator)
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

    def _gate_update(
        self, step: int, scale: float, targets_TC: Tensor, indices_TN: Tensor, gate_gradients_TN: Tensor | None
    ) -> float:
        logits_TNK = self.routers(targets_TC)
        constraint_TNK = self._constraint(indices_TN, targets_TC, step)
        limited = self._expected(logits_TNK, self.settings.constraint_weight * constraint_TNK)
        language = (gates(logits_TNK, indices_TN) * gate_gradients_TN.float() / scale).sum(-1).mean()
        self._update(limited + language - self._entropy(logits_TNK, step))
        return self._mean_constraint(constraint_TNK, indices_TN)

    def _constraint(self, indices_TN: Tensor, targets_TC: Tensor, step: int) -> Tensor:
        """Eq. 8 for each candidate of each block, the other blocks as chosen: [T, N, K].

        In shares of what lies between the smallest and the full network; two-sided late in training.
        """
        spent_TCNK = self.spent_CNK.expand(len(indices_TN), -1, -1, -1)
        now_TCN1 = spent_TCNK.gather(-1, indices_TN[:, None, :, None].expand(-1, len(self.costs), -1, -1))
        over_TC = now_TCN1.sum((-1, -2)) + self.start_C - targets_TC
        over_TCNK = over_TC[..., None, None] - now_TCN1 + spent_TCNK
        above_TNK = over_TCNK.clamp_min(0).sum(1)
        if step < self.settings.two_sided_from * self.max_steps:
            return above_TNK
        # Of several costs the one that is nearest to its target is to reach it.
        return above_TNK + (-over_TCNK.amax(1)).clamp_min(0)

    def _expected(self, logits_TNK: Tensor, loss_TNK: Tensor) -> Tensor:
        """Expected loss under each block's own probabilities, summed over blocks.

        Its gradient is what a straight-through one-hot choice estimates, with real differences between candidates in place of
        derivatives.
        """
        return (logits_TNK.softmax(-1) * loss_TNK).sum((-1, -2)).mean()

    @staticmethod
    def _mean_constraint(constraint_TNK: Tensor, indices_TN: Tensor) -> float:
        """That of the choices as they are, which every block's chosen candidate has."""
        return float(constraint_TNK[:, 0].gather(-1, indices_TN[:, :1]).mean())

    def _entropy(self, logits_TNK: Tensor, step: int) -> Tensor:
        """Entropy of the choices, mean over targets and sum over blocks, times a weight that falls over the training.

        It keeps the second-best candidates' probabilities meaningful: in proportion to exp(-loss / weight).
        """
        first, last = self.settings.entropy
        weight = first * (last / first) ** (step / self.max_steps)
        log_p_TNK = logits_TNK.log_softmax(-1).masked_fill(~self.routers.exists_NK, 0.0)
        return -weight * (log_p_TNK.exp() * log_p_TNK * self.routers.exists_NK).sum((-1, -2)).mean()

    @staticmethod
    def _typical(losses_B: Tensor, scale: float) -> Tensor:
        """What differences of losses are compared with: small ones matter to large budgets as large ones to small budgets."""
        return losses_B.detach().abs() + 0.3 * scale

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    # What is kept.

    def write(self, folder: Path) -> None:
        """The routers, and what continues their training, into a checkpoint's directory."""
        write_routers(folder, self.info, self.routers, self.table)
        more = {}
        if self.surrogate:
            more = {"surrogate": self.surrogate, "surrogate_optimizer": self.surrogate_optimizer}
        seen = {}
        if self.seen_losses:
            seen = {"indices": torch.cat(self.seen_indices), "losses": torch.cat(self.seen_losses)}
        plain = {"seen": seen, "error": self.error, "steps_followed": self.steps_followed, "scale": self.scale}
        save_state(folder / STATE_FILE, routers=self.routers, optimizer=self.optimizer, **plain, **more)

    def read(self, folder: Path) -> None:
        """Continue from what `write` left."""
        check_same_table(folder, self.table)
        state = load_state(folder / STATE_FILE)
        self.routers.load_state_dict(state["routers"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.surrogate:
            self.surrogate.load_state_dict(state["surrogate"])
            self.surrogate_optimizer.load_state_dict(state["surrogate_optimizer"])
        if state["seen"]:
            self.seen_indices, self.seen_losses = [state["seen"]["indices"]], [state["seen"]["losses"]]
        self.scale = state.get("scale")
        self.error, self.steps_followed = state["error"], state["steps_followed"]

    # Draws.

    def _targets(self, count: int, generator: torch.Generator, power: float = 1.0) -> Tensor:
        """[T, C] in the routers' range, each cost's spread evenly over it, or for a larger `power` more densely at its top."""
        columns = []
        for low, high in zip(self.low_C, self.high_C, strict=True):
            part = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
            columns.append(high - (high - low) * (1 - part / count) ** power)
        return torch.stack(columns, -1)

    def _choose(self, logits_TNK: Tensor, generator: torch.Generator) -> Tensor:
        """A draw from the routers' probabilities: argmax of the logits with Gumbel noise."""
        uniform_TNK = torch.rand(logits_TNK.shape, generator=generator).clamp_min(1e-9)
        return (logits_TNK - torch.log(-torch.log(uniform_TNK))).argmax(-1)

    def _one_hot(self, indices_BN: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(indices_BN, self.blocks.exists_NK.shape[1]).float()

    def _shares(self, targets_TC: Tensor) -> Tensor:
        """Targets as shares of the full model's costs."""
        ends = torch.tensor([[cost.smallest / cost.full, 1.0] for cost in self.costs])
        return ends[:, 0] + targets_TC * (ends[:, 1] - ends[:, 0])

    def _generator(self, step: int, stream: int) -> torch.Generator:
        value = np.random.SeedSequence([self.seed, 6, stream, step]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(value))
