"""Training of input-adaptive routers (Flextron, section 3.2, eq. 8 and 11).

The value of a level for a token is estimated in one of two ways. Straight through: networks run with masks, whose gradient is the
first-order change of the loss if a token's block used one level more or less. Surrogate: a model of each token's loss, which
needs forward passes only. A router minimises the expected value under its own probabilities, plus a price: the derivative of the
constraint loss (eq. 8) with respect to the share of tokens at each level.

Routers are replicated. Every rank learns from the blocks and tokens that it computed, and gradients are summed over ranks.

Shape suffixes: S sequence, B batch, N blocks, K candidates, T targets of a step, C constrained costs, D hidden channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from flextron_mcore.adaptive.evaluation import total_counts
from flextron_mcore.adaptive.routers import AdaptiveRouters
from flextron_mcore.adaptive.routing import AdaptiveRouting, Trace
from flextron_mcore.adaptive.store import AdaptiveInfo, read_adaptive_routers
from flextron_mcore.adaptive.surrogate import TokenSurrogate, own_part
from flextron_mcore.adaptive.usage import TokenCost, level_shares_NK, overheads_N3
from flextron_mcore.choices import Choices
from flextron_mcore.cost import Cost
from flextron_mcore.pipeline.networks import Watch
from flextron_mcore.routers.store import STATE_FILE, check_same_table, load_state, save_state, write_routers
from flextron_mcore.selection.router import target_of
from flextron_mcore.settings.sections import JointAdaptiveSettings, SurrogateSettings
from flextron_mcore.training.constraint import Constraint, Targets
from flextron_mcore.training.learner import Figures, TraceLearner

# Share of a block's tokens at which `smooth_occurrence` is about 0.5.
_HALF = 0.05


class AdaptiveLearner(TraceLearner):
    """Adaptive routers in training, and their optimizer.

    Targets are shares of the span from the smallest network's cost (0) to the full model's (1).

    Args:
        choices: blocks of the model (attention and MLP of each layer) and candidates of each.
        costs: costs that targets limit, in the order of `info.costs`.
        info: description of the routers, stored beside them.
        settings: learning rate, noise and constraint weight.
        targets_per_step: number of targets, and so of routed forward passes, in a step.
        seed: seed of the run.
        max_steps: number of steps of the training.
        routers: adaptive routers on this rank's device, the same on all ranks.
        sequence_parallel: True if tensor-parallel ranks hold different positions of the sequence.
        token_costs: {KV policy: cost of a pass with token routing, for each of `costs`}.
        table: latency table as plain types, stored beside the routers; None without.
        surrogate: settings of a surrogate model of the loss to learn from; None to learn from gradients of masks.
    """

    surrogate: TokenSurrogate | None = None

    def __init__(
        self,
        choices: Choices,
        costs: Sequence[Cost],
        info: AdaptiveInfo,
        settings: JointAdaptiveSettings,
        targets_per_step: int,
        seed: int,
        max_steps: int,
        routers: AdaptiveRouters,
        sequence_parallel: bool,
        token_costs: Mapping[str, Sequence[TokenCost]],
        table: Mapping[str, Any] | None = None,
        surrogate: SurrogateSettings | None = None,
    ) -> None:
        self.choices, self.costs, self.info, self.settings, self.table = choices, list(costs), info, settings, table
        self.seed, self.max_steps, self.sequence_parallel = seed, max_steps, sequence_parallel
        self.targets_per_step, self.routers, self.token_costs = targets_per_step, routers, token_costs
        self.constraint, self.targets = Constraint(), Targets(self.costs, info.ranges)
        device, used = routers.out_NKU.device, token_costs[info.kv_policy]
        spans = self.targets.spans

        def in_spans(rows: Sequence[Any]) -> Tensor:
            return (
                torch.tensor(np.array([np.array(row) / span for row, span in zip(rows, spans, strict=True)])).float().to(device)
            )

        self.constant_C = in_spans([mix.levels.constant - cost.smallest for mix, cost in zip(used, self.costs, strict=True)])
        self.level_CNK = in_spans([choices.costs_NK(mix.levels) for mix in used])
        self.overhead_CN3 = in_spans([mix.overhead_N3(choices) for mix in used])
        # With routing overhead the cheapest levels of all blocks may cost more than the smallest network: no target below them.
        least_CNK = self.level_CNK.masked_fill(torch.tensor(~choices.exists_NK, device=device), torch.inf)
        least_C = (self.constant_C + least_CNK.amin(-1).sum(-1)).cpu()
        self.targets.low_C = torch.maximum(self.targets.low_C, least_C.clamp(max=1.0))
        self.trained = [parameter for parameter in routers.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=settings.lr, betas=(0.9, 0.99))
        self.scale: float | None = None  # running mean of the routed networks' loss minus the full model's
        self.drawn: list[AdaptiveRouting] = []
        if surrogate:
            self.surrogate = TokenSurrogate(choices, surrogate, seed, max_steps, sequence_parallel).to(device)

    @property
    def watch(self) -> Watch | None:
        """Method of the surrogate model that receives the loss of each micro-batch; None without a surrogate."""
        return self.surrogate.watch if self.surrogate else None

    def networks(self, step: int) -> list[AdaptiveRouting]:
        """Token routings of this step: adaptive routers with Gumbel noise, one routing for each randomly drawn target.

        Call once a step, on all ranks.
        """
        value = np.random.SeedSequence([self.seed, 8, step]).generate_state(2)
        targets_TC = self.targets.draw(self.targets_per_step, torch.Generator().manual_seed(int(value[0])))
        masked, noise = self.surrogate is None, self.settings.noise
        self.drawn = [
            AdaptiveRouting(self.routers, target_C, self.info.kv_policy, noise, int(value[1]) + t, traced=True, masked=masked)
            for t, target_C in enumerate(targets_TC)
        ]
        return self.drawn

    def target(self, share: float) -> float:
        """Convert a share of the full model's first cost into a target: 0 for the smallest network, 1 for the full model."""
        return target_of(self.costs[0], share * self.costs[0].full)

    def routing(self, target: float, kv_policy: str | None = None) -> AdaptiveRouting:
        """Token routing without noise, so that every token takes its likeliest level (candidate).

        Args:
            target: target of the first cost, 0 (smallest network) to 1 (full model); other costs get the target 1.
            kv_policy: keys and values that a token writes: `full`: of all KV groups, `own`: of those it uses; None: as in
                the training.
        """
        target_C = torch.ones(len(self.costs))
        target_C[0] = target
        return AdaptiveRouting(self.routers, target_C, kv_policy or self.info.kv_policy)

    def share(self, share_NK: np.ndarray, kv_policy: str | None = None) -> float:
        """Average cost of token routing by the first of the learner's costs, as a share of the full model's cost.

        Args:
            share_NK: share of tokens at each level k (candidate) of each block n.
            kv_policy: keys and values that a token writes: `full`: of all KV groups, `own`: of those it uses; None: as in
                the training.
        """
        return self.token_costs[kv_policy or self.info.kv_policy][0].average(self.choices, share_NK) / self.costs[0].full

    def learn(self, step: int, losses: Sequence[float]) -> Figures:
        """Update the routers from the losses of a step and the traces of its token routings. Call on all ranks.

        Returns figures for the log: {"targets" and "costs": shares of the full model's costs for each routing, "constraint_loss":
        mean of |cost - target|, scaled as targets}, and those of the surrogate, if there is one.

        Args:
            step: number of the step, from 0.
            losses: loss of each network in nats per token, the full model first.
        """
        above = max(float(np.mean(losses[1:])) - losses[0], 1e-6)
        self.scale = above if self.scale is None else 0.9 * self.scale + 0.1 * above
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * (1 - 0.9 * step / self.max_steps)
        self.optimizer.zero_grad()
        figures = self.surrogate.learn(step, self.drawn, self.scale) if self.surrogate else {}
        spent_TC = torch.stack([self._learn_from(t, routing, step) for t, routing in enumerate(self.drawn)])
        self._sum_gradients()
        self.optimizer.step()
        targets_TC = torch.stack([routing.target_C for routing in self.drawn])
        self.drawn = []
        return {
            **figures,
            "targets": self.targets.shares(targets_TC),
            "costs": self.targets.shares(spent_TC),
            "constraint_loss": float((spent_TC - targets_TC).abs().mean()),
        }

    def _learn_from(self, t: int, routing: AdaptiveRouting, step: int) -> Tensor:
        """Add the gradients from one routing's traces, and return the average cost [C] of its tokens, scaled as targets.

        Args:
            t: index of the routing in `drawn`.
            routing: the routing; its traces are removed.
            step: number of the step, from 0.
        """
        traces = routing.traces
        if not self.surrogate:  # with recomputation, the first forward pass leaves traces without a gradient
            traces = [trace for trace in traces if trace.mask_SBK.grad is not None]
        counts_NK = torch.zeros_like(routing.counts_NK)
        for trace in traces:
            counts_NK[trace.block] += torch.bincount(trace.levels_SB[trace.counted_SB], minlength=counts_NK.shape[1])
        counts_NK = total_counts(counts_NK)
        share_NK = (counts_NK / counts_NK.sum(-1, keepdim=True).clamp_min(1)).float()
        spent_C = self.constant_C + (share_NK * self.level_CNK).sum((-1, -2)) + self._overhead_C(share_NK)
        slope_C = self.constraint.slope(spent_C - routing.target_C, step)
        price_NK = (slope_C[:, None, None] * self.level_CNK).sum(0) + self._overhead_slope_NK(slope_C, traces, routing)
        price_NK = price_NK * self.settings.constraint_weight * self.scale
        tokens = float(counts_NK.sum(-1).max()) * len(self.drawn)
        for trace in traces:
            value_SBK = self.surrogate.values(t, trace) if self.surrogate else self._straight_through(trace)
            logits_SBK = self._logits(trace, routing)
            expected_SB = (logits_SBK.softmax(-1) * (value_SBK + price_NK[trace.block])).sum(-1)
            ((expected_SB * own_part(trace.counted_SB, self.sequence_parallel)).sum() / tokens).backward()
        routing.traces.clear()
        return spent_C

    def _logits(self, trace: Trace, routing: AdaptiveRouting) -> Tensor:
        """Logits [S, B, K] of a trace's block for its hidden states, with gradients to the routers."""
        return self.routers(trace.block, trace.hidden_SBD, routing.target_C, routing.start_NK)

    def _straight_through(self, trace: Trace) -> Tensor:
        """First-order change of the loss for each level and token of this rank [S, B, K], from the gradients of the masks.

        Only differences between the levels of one token have a meaning.
        """
        part_SBK = trace.mask_SBK.grad
        if parallel_state.get_tensor_model_parallel_world_size() > 1:  # each rank has a part of the neurons and heads
            torch.distributed.all_reduce(part_SBK, group=parallel_state.get_tensor_model_parallel_group())
        return own_part(part_SBK.cumsum(-1), self.sequence_parallel)

    def _overhead_C(self, share_NK: Tensor) -> Tensor:
        """Routing overhead [C] at these shares of tokens at each level, scaled as targets, differentiable."""
        amount_N3 = torch.stack(overheads_N3(share_NK, level_shares_NK(self.choices), smooth_occurrence), -1)
        return (amount_N3 * self.overhead_CN3).sum((-1, -2))

    def _overhead_slope_NK(self, slope_C: Tensor, traces: Sequence[Trace], routing: AdaptiveRouting) -> Tensor:
        """Derivative [N, K] of sum_c slope_c * overhead_c with respect to each level's share of tokens.

        The shares are the mean probabilities of the routers, because counts of tokens are too coarse.

        Args:
            slope_C: weight of each cost's routing overhead, slope_c.
            traces: records of this rank's blocks in the step.
            routing: token routing of these traces.
        """
        total_NK = torch.zeros_like(routing.counts_NK)
        if not self.overhead_CN3.any():
            return total_NK.float()
        tokens_N1 = torch.zeros_like(total_NK[:, :1])
        with torch.no_grad():
            for trace in traces:
                counted_SB = own_part(trace.counted_SB, self.sequence_parallel)
                total_NK[trace.block] += self._logits(trace, routing).softmax(-1)[counted_SB].sum(0)
                tokens_N1[trace.block] += counted_SB.sum()
            sums = torch.cat([total_NK, tokens_N1], -1)
            if self.sequence_parallel:
                torch.distributed.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
            sums = total_counts(sums)
        share_NK = (sums[:, :-1] / sums[:, -1:].clamp_min(1)).float().requires_grad_()
        (slope_NK,) = torch.autograd.grad((self._overhead_C(share_NK) * slope_C).sum(), share_NK)
        return slope_NK

    def _sum_gradients(self) -> None:
        """Sum the routers' gradients over all ranks that computed different blocks or tokens, in place. Call on all ranks."""
        groups = [parallel_state.get_data_parallel_group(), parallel_state.get_pipeline_model_parallel_group()]
        if self.sequence_parallel:
            groups.append(parallel_state.get_tensor_model_parallel_group())
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            for group in groups:
                torch.distributed.all_reduce(parameter.grad, group=group)

    def write(self, folder: Path) -> None:
        """Write the routers and the state of their training into a checkpoint's directory. Call on the main process."""
        write_routers(folder, self.info, self.routers, self.table)
        more = {}
        if kept := self.surrogate:
            more = {"surrogate": kept.model, "surrogate_optimizer": kept.optimizer, "error": kept.error}
        save_state(folder / STATE_FILE, routers=self.routers, optimizer=self.optimizer, scale=self.scale, **more)

    def read(self, folder: Path) -> None:
        """Restore the routers and the state of their training from a checkpoint's directory.

        Call on all ranks. Raises FlextronError for a damaged file, or if the checkpoint has another latency table.
        """
        check_same_table(folder, self.table)
        state = load_state(folder / STATE_FILE)
        self.routers.load_state_dict(state["routers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scale = state["scale"]
        if self.surrogate:
            self.surrogate.model.load_state_dict(state["surrogate"])
            self.surrogate.optimizer.load_state_dict(state["surrogate_optimizer"])
            self.surrogate.error = state["error"]
        self.info, _ = read_adaptive_routers(folder, self.choices)


def smooth_occurrence(share: Tensor) -> Tensor:
    """Differentiable approximation of "a token of this level occurs", from the share of tokens at the level.

    It is share * (1 + h) / (share + h) with h = 0.05: 0 for a share of 0, 1 for a share of 1. A step function would have no
    gradient.
    """
    return share * (1 + _HALF) / (share + _HALF)
