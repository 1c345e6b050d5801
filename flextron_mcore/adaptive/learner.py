"""What input-adaptive routers learn from a step: which levels would have served a token better (Flextron, 3.2).

Straight through: networks run with masks that carry a gradient, the change of the loss, to first order, when a token's block uses
one part more or less; a router's probabilities take it. Or through a surrogate model of a token's loss, with forward passes only.
Routers are replicated; every rank learns from the blocks and tokens that it has seen, and gradients are summed, so they stay
equal on all ranks.

Shape suffixes: S sequence, B batch, N blocks, K candidates, C constrained costs, D hidden channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from flextron_mcore.adaptive.cost import overhead_costs_N3, overhead_N3, size_NK
from flextron_mcore.adaptive.evaluation import average, total_counts
from flextron_mcore.adaptive.routers import AdaptiveRouters, Seen, TokenRouting
from flextron_mcore.adaptive.surrogate import SurrogateSettings, TokenSurrogate, mine
from flextron_mcore.choices import Choices
from flextron_mcore.cost import Cost
from flextron_mcore.pipeline.networks import Watch
from flextron_mcore.routers.store import (
    STATE_FILE,
    RouterInfo,
    check_same_table,
    load_state,
    read_routers,
    save_state,
    write_routers,
)
from flextron_mcore.selection.router import target_of
from flextron_mcore.training.constraint import Constraint
from flextron_mcore.training.learner import Figures, TraceLearner

# The share of a block's tokens at which something counts as half occurring, in training: that it does or not has no slope.
_HALF = 0.05


@dataclass(frozen=True)
class AdaptiveSettings:
    """How adaptive routers learn; see settings/sections.py."""

    targets_per_step: int = 2
    lr: float = 2e-3
    noise: float = 0.3
    constraint_weight: float = 16.0


class AdaptiveLearner(TraceLearner):
    """Adaptive routers and their optimizer."""

    surrogate: TokenSurrogate | None = None

    def __init__(
        self,
        blocks: Choices,
        costs: Sequence[Cost],
        info: RouterInfo,
        settings: AdaptiveSettings,
        seed: int,
        max_steps: int,
        routers: AdaptiveRouters,
        sequence_parallel: bool,
        counted: Mapping[str, Sequence[Cost]],
        table: Mapping[str, Any] | None = None,
        surrogate: SurrogateSettings | None = None,
    ) -> None:
        """costs: those of `info`, which targets are of. counted: by KV policy, what tokens' choices really cost, in their units.

        surrogate: learn through one. routers: on this rank's device, the same on all ranks.
        """
        self.blocks, self.costs, self.info, self.settings, self.table = blocks, list(costs), info, settings, table
        self.seed, self.max_steps, self.sequence_parallel, self.routers = seed, max_steps, sequence_parallel, routers
        device = routers.out_NKU.device
        spans = [cost.full - cost.smallest or 1.0 for cost in self.costs]
        self.counted = counted
        counts = counted[info.kv_policy]
        starts = [(mix.constant - cost.smallest) / span for mix, cost, span in zip(counts, self.costs, spans, strict=True)]
        self.start_C = torch.tensor(starts, device=device)
        in_spans = lambda rows: torch.tensor(np.array(rows), dtype=torch.float32, device=device)  # noqa: E731
        costs, mixed = [blocks.costs_NK(cost) for cost in counts], [overhead_costs_N3(blocks, cost) for cost in counts]
        self.spent_CNK, self.mixed_CN3 = (
            in_spans([row / span for row, span in zip(rows, spans, strict=True)]) for rows in (costs, mixed)
        )
        least = [
            mix.constant + np.where(blocks.exists_NK, row, np.inf).min(-1).sum() for mix, row in zip(counts, costs, strict=True)
        ]
        bounds = [
            [target_of(cost, max(low * cost.full, min(value, cost.full))), target_of(cost, high * cost.full)]
            for cost, value, (low, high) in zip(self.costs, least, info.ranges, strict=True)
        ]
        self.low_C, self.high_C = torch.tensor(bounds, dtype=torch.float32).T
        self.trained = [parameter for parameter in routers.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=settings.lr, betas=(0.9, 0.99))
        self.scale: float | None = None  # of the losses above the full model's
        self.drawn: list[TokenRouting] = []
        if surrogate:
            self.surrogate = TokenSurrogate(blocks, surrogate, seed, max_steps, sequence_parallel).to(device)

    @property
    def watch(self) -> Watch | None:
        """What the surrogate is told."""
        return self.surrogate.watch if self.surrogate else None

    def networks(self, step: int) -> list[TokenRouting]:
        """The routers at work for this step's targets, with exploration noise."""
        value = np.random.SeedSequence([self.seed, 8, step]).generate_state(2)
        generator, count = torch.Generator().manual_seed(int(value[0])), self.settings.targets_per_step
        part_TC = torch.stack([torch.randperm(count, generator=generator) for _ in self.costs], -1)
        part_TC = (part_TC + torch.rand(part_TC.shape, generator=generator)) / count
        targets_TC = self.low_C + (self.high_C - self.low_C) * part_TC
        self.drawn = [
            TokenRouting(
                self.routers,
                target_C,
                self.info.kv_policy,
                self.settings.noise,
                int(value[1]) + t,
                masked=self.surrogate is None,
                watched=self.surrogate is not None,
            )
            for t, target_C in enumerate(targets_TC)
        ]
        return self.drawn

    def routing(self, share: float) -> TokenRouting:
        """The routers at work for a share of the (first) cost of the full model, as in evaluation."""
        return self.at_target(target_of(self.costs[0], share * self.costs[0].full))

    def at_target(self, target: float, kv_policy: str | None = None) -> TokenRouting:
        """The same for a target between 0 and 1."""
        target_C = torch.ones(len(self.costs))
        target_C[0] = target
        return TokenRouting(self.routers, target_C, kv_policy or self.info.kv_policy)

    def share(self, share_NK: np.ndarray, kv_policy: str | None = None) -> float:
        """What a mix of levels [N, K] costs a token, as a share of the full model's (first) cost."""
        mix = self.counted[kv_policy or self.info.kv_policy][0]
        return average(mix, self.blocks, share_NK) / self.costs[0].full

    def learn(self, step: int, losses: Sequence[float]) -> Figures:
        """Update from what the step's networks have seen, and their losses [nats per token], the full model's first."""
        above = max(float(np.mean(losses[1:])) - losses[0], 1e-6)
        self.scale = above if self.scale is None else 0.9 * self.scale + 0.1 * above
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * (1 - 0.9 * step / self.max_steps)
        self.optimizer.zero_grad()
        spent_TC, figures = [], {}
        if self.surrogate:
            figures = self.surrogate.learn(step, self.drawn, self.scale)
        for t, routing in enumerate(self.drawn):
            learned = routing.seen
            if not self.surrogate:  # without a gradient it was computed to be computed again: recomputation
                learned = [seen for seen in learned if seen.mask_SBK.grad is not None]
            counts_NK = torch.zeros_like(routing.counts_NK)
            for seen in learned:
                counts_NK[seen.block] += torch.bincount(seen.levels_SB[seen.counted_SB], minlength=counts_NK.shape[1])
            counts_NK = total_counts(counts_NK)
            tokens = counts_NK.sum(-1).max()
            share_NK = (counts_NK / counts_NK.sum(-1, keepdim=True).clamp_min(1)).float()
            spent_C = self.start_C + (share_NK * self.spent_CNK).sum((-1, -2)) + self._mixed(share_NK)
            spent_TC.append(spent_C)
            over_C = spent_C - routing.target_C
            slope_C = Constraint().slope(over_C, step)
            price_NK = (slope_C[:, None, None] * self.spent_CNK).sum(0) + self._mixed_slope(slope_C, learned, routing)
            price_NK = price_NK * self.settings.constraint_weight * self.scale
            for seen in learned:
                value_SBK = self.surrogate.values(t, seen) if self.surrogate else self._straight_through(seen)
                self._backward(seen, routing, value_SBK + price_NK[seen.block], float(tokens) * len(self.drawn))
            routing.seen.clear()
        self._sum_gradients()
        self.optimizer.step()
        spent_TC = torch.stack(spent_TC)
        targets_TC = torch.stack([routing.target_C for routing in self.drawn])
        self.drawn = []
        return {
            **figures,
            "targets": self._shares(targets_TC).tolist(),
            "costs": self._shares(spent_TC).tolist(),
            "constraint_loss": float((spent_TC - targets_TC).abs().mean()),
        }

    def _straight_through(self, seen: Seen) -> Tensor:
        """What each level would have changed of the loss, for the tokens of this rank: [S, B, K]."""
        part_SBK = seen.mask_SBK.grad
        if parallel_state.get_tensor_model_parallel_world_size() > 1:  # each has the neurons and heads of its own
            torch.distributed.all_reduce(part_SBK, group=parallel_state.get_tensor_model_parallel_group())
        return mine(part_SBK.cumsum(-1), self.sequence_parallel)

    def _mixed(self, share_NK: Tensor) -> Tensor:
        """What it adds to a token's average cost [C] that tokens differ."""
        much_N3 = torch.stack(overhead_N3(share_NK, size_NK(self.blocks), occurring), -1)
        return (much_N3 * self.mixed_CN3).sum((-1, -2))

    def _mixed_slope(self, slope_C: Tensor, learned: Sequence[Seen], routing: TokenRouting) -> Tensor:
        """The slope of that by each level's probability, [N, K], at their mean over tokens: counts are too coarse."""
        total_NK = torch.zeros_like(routing.counts_NK)
        if not self.mixed_CN3.any():
            return total_NK.float()
        tokens_N1 = torch.zeros_like(total_NK[:, :1])
        with torch.no_grad():
            for seen in learned:
                logits_SBK = self.routers(seen.block, seen.hidden_SBD, routing.target_C, routing.start_NK)
                counted_SB = mine(seen.counted_SB, self.sequence_parallel)
                total_NK[seen.block] += logits_SBK.softmax(-1)[counted_SB].sum(0)
                tokens_N1[seen.block] += counted_SB.sum()
            sums = torch.cat([total_NK, tokens_N1], -1)
            if self.sequence_parallel:
                torch.distributed.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
            sums = total_counts(sums)
        share_NK = (sums[:, :-1] / sums[:, -1:].clamp_min(1)).float().requires_grad_()
        (slope_NK,) = torch.autograd.grad((self._mixed(share_NK) * slope_C).sum(), share_NK)
        return slope_NK

    def _backward(self, seen: Seen, routing: TokenRouting, loss_SBK: Tensor, tokens: float) -> None:
        """Gradient of the expected loss, and price, under the router's own probabilities; mean over tokens."""
        logits_SBK = self.routers(seen.block, seen.hidden_SBD, routing.target_C, routing.start_NK)
        expected_SB = (logits_SBK.softmax(-1) * loss_SBK).sum(-1)
        ((expected_SB * mine(seen.counted_SB, self.sequence_parallel)).sum() / tokens).backward()

    def _sum_gradients(self) -> None:
        groups = [parallel_state.get_data_parallel_group(), parallel_state.get_pipeline_model_parallel_group()]
        if self.sequence_parallel:
            groups.append(parallel_state.get_tensor_model_parallel_group())
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            for group in groups:
                torch.distributed.all_reduce(parameter.grad, group=group)

    def write(self, folder: Path) -> None:
        """The routers, and what continues their training, into a checkpoint's directory."""
        write_routers(folder, self.info, self.routers, self.table)
        more = {}
        if kept := self.surrogate:
            more = {"surrogate": kept.model, "surrogate_optimizer": kept.optimizer, "error": kept.error}
        save_state(folder / STATE_FILE, routers=self.routers, optimizer=self.optimizer, scale=self.scale, **more)

    def read(self, folder: Path) -> None:
        """Continue from what `write` left."""
        check_same_table(folder, self.table)
        state = load_state(folder / STATE_FILE)
        self.routers.load_state_dict(state["routers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scale = state["scale"]
        if self.surrogate:
            self.surrogate.model.load_state_dict(state["surrogate"])
            self.surrogate.optimizer.load_state_dict(state["surrogate_optimizer"])
            self.surrogate.error = state["error"]
        self.info = read_routers(folder, self.blocks, "adaptive")[0]

    def _shares(self, targets_TC: Tensor) -> Tensor:
        """Targets as shares of the full model's costs."""
        ends = torch.tensor([[cost.smallest / cost.full, 1.0] for cost in self.costs], device=targets_TC.device)
        return ends[:, 0] + targets_TC * (ends[:, 1] - ends[:, 0])


def occurring(share: Tensor) -> Tensor:
    """How much something occurs that this share of a block's tokens have: 0 for none, and nearly 1 unless they are few.

    Smooth, since exploration gives every level some tokens.
    """
    return share * (1 + _HALF) / (share + _HALF)
