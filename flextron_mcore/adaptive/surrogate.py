"""Surrogate model of a token's loss, from the token's levels and its final hidden state (Flextron, section 3.2, eq. 10).

The surrogate is replicated: gradients are summed over the tokens of all ranks. "Degradation" is a token's loss minus the full
model's loss of the same token, in nats.

Shape suffixes: S sequence, B batch, N blocks, K candidates, D hidden channels, M tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from flextron_mcore.adaptive.routing import AdaptiveRouting, Trace
from flextron_mcore.choices import Choices
from flextron_mcore.routers.surrogate import Surrogate
from flextron_mcore.settings.sections import SurrogateSettings
from flextron_mcore.training.learner import Figures


class TokenSurrogate:
    """Surrogate model of each token's degradation (loss minus the full model's loss of the token, in nats), and its optimizer.

    It predicts from the token's levels (indices of candidates) in all blocks, and its final hidden state. `run_networks` calls
    `watch` with each micro-batch of a step, then `learn` fits the model.

    Args:
        choices: blocks of the model and candidates of each.
        settings: size and optimizer of the surrogate, and the error below which routers follow it.
        seed: seed of the initial weights.
        max_steps: number of steps, over which the learning rate decreases to 0.
        sequence_parallel: True if tensor-parallel ranks hold different positions of the sequence.
    """

    def __init__(self, choices: Choices, settings: SurrogateSettings, seed: int, max_steps: int, sequence_parallel: bool) -> None:
        self.settings, self.max_steps, self.sequence_parallel = settings, max_steps, sequence_parallel
        self.count, self.width = choices.exists_NK.shape
        self.channels = choices.model.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Surrogate(self.count, self.width, settings.hidden_size, self.channels)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        self.error: float | None = None
        self.follow = False
        self.outputs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (network, micro-batch): losses, final hidden states

    def to(self, device: torch.device) -> TokenSurrogate:
        """Move the surrogate to a device, in place."""
        self.model.to(device)
        return self

    def watch(self, network: int, number: int, losses_BS: Tensor, final_SBD: Tensor) -> None:
        """Store losses and final hidden states of one network for one micro-batch; the last pipeline stage calls it.

        Args:
            network: index of the network, 0 for the full model.
            number: number of the micro-batch within the step, over all data-parallel ranks.
            losses_BS: loss of each token in nats, at all positions.
            final_SBD: hidden states after the final norm; with sequence parallelism those of this rank's positions only.
        """
        self.outputs[network, number] = losses_BS.T, final_SBD

    def learn(self, step: int, drawn: Sequence[AdaptiveRouting], scale: float) -> Figures:
        """Fit the surrogate to the tokens of a step, and prepare `values` for them. Call on all ranks.

        Degradation is a token's loss minus the full model's loss of the same token, in nats. Returns figures for the log:
        `surrogate_error`, a running mean of (squared error before the step's updates / variance of the degradations), and
        `routers_follow_surrogate`, true if that error is below the threshold of the settings.

        Args:
            step: number of the step, from 0.
            drawn: token routings of the step, with their traces.
            scale: typical degradation. The one of the first call scales the surrogate's output from then on.
        """
        tokens = {
            (t, number): self._tokens(t, number, [trace for trace in routing.traces if trace.number == number])
            for t, routing in enumerate(drawn)
            for number in dict.fromkeys(trace.number for trace in routing.traces)
        }
        self.outputs.clear()
        choices_MNK, final_MD, loss_M = (torch.cat(parts) for parts in zip(*tokens.values(), strict=True))
        if self.error is None:
            self.model.scale.fill_(scale)
        count, total, squares = self._summed(torch.stack([loss_M.new_tensor(len(loss_M)), loss_M.sum(), (loss_M**2).sum()]))
        variance = squares / count - (total / count) ** 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * (1 - step / self.max_steps)
        for update in range(self.settings.updates_per_step):
            self.optimizer.zero_grad()
            errors = ((self.model(choices_MNK, final_MD) - loss_M) ** 2).sum() / count
            if update == 0:
                relative = float(self._summed(errors.detach()) / variance.clamp_min(1e-12))
            (errors / variance.clamp_min(1e-12)).backward()
            for parameter in self.model.parameters():
                parameter.grad = self._summed(parameter.grad)
            self.optimizer.step()
        self.error = relative if self.error is None else 0.9 * self.error + 0.1 * relative
        self.follow = self.error < self.settings.threshold
        with torch.no_grad():
            self.replaced = {
                key: self.model.replaced(choices_MNK, final_MD) if self.follow else None
                for key, (choices_MNK, final_MD, _) in tokens.items()
            }
        return {"surrogate_error": self.error, "routers_follow_surrogate": self.follow}

    def values(self, network: int, trace: Trace) -> Tensor:
        """Predicted degradation [S, B, K] of this rank's tokens, in nats, if one block took each of its K candidates instead.

        Degradation is a token's loss minus the full model's loss of the same token. Zero for tokens that do not count in the
        loss, and for all tokens while the surrogate's error is above its threshold.

        Args:
            network: index of the token routing in the argument `drawn` of `learn`.
            trace: record of the block in one micro-batch.
        """
        levels_SB, counted_SB = (own_part(whole_SB, self.sequence_parallel) for whole_SB in (trace.levels_SB, trace.counted_SB))
        values_SBK = torch.zeros(*levels_SB.shape, self.width, device=levels_SB.device)
        if self.follow:
            values_SBK[counted_SB] = self.replaced[network, trace.number][:, trace.block]
        return values_SBK

    def _tokens(self, network: int, number: int, traces: Sequence[Trace]) -> tuple[Tensor, Tensor, Tensor]:
        """Counted tokens of a micro-batch: choices [M, N, K], final hidden states [M, D] and degradations [M].

        Each pipeline stage has the levels of its own blocks, and the last one the outputs; they are summed over the stages.

        Args:
            network: index of the token routing, from 0, the full model not counted.
            number: number of the micro-batch.
            traces: traces of this micro-batch in that routing, of this rank's blocks.
        """
        first = traces[0]
        levels_NSB = torch.zeros(self.count, *first.levels_SB.shape, dtype=torch.long, device=first.levels_SB.device)
        for trace in traces:
            levels_NSB[trace.block] = trace.levels_SB.clamp_min(0)
        loss_SB, final_SBD = self.outputs.get((network + 1, number), (None, None))
        if loss_SB is None:
            loss_SB = torch.zeros(first.levels_SB.shape, device=levels_NSB.device)
            final_SBD = torch.zeros(*first.hidden_SBD.shape[:2], self.channels, device=levels_NSB.device)
        else:
            loss_SB, final_SBD = loss_SB.float() - self.outputs[0, number][0].float(), final_SBD.float()
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            loss_SB, final_SBD = loss_SB.contiguous(), final_SBD.contiguous()
            for tensor in (levels_NSB, loss_SB, final_SBD):
                torch.distributed.all_reduce(tensor, group=parallel_state.get_pipeline_model_parallel_group())
        counted_SB = own_part(first.counted_SB, self.sequence_parallel)
        levels_MN = own_part(levels_NSB.permute(1, 2, 0), self.sequence_parallel)[counted_SB]
        choices_MNK = torch.nn.functional.one_hot(levels_MN, self.width).float()
        return choices_MNK, final_SBD[counted_SB], own_part(loss_SB, self.sequence_parallel)[counted_SB]

    def _summed(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks that have different tokens of the step, in place; returns it. Call on all ranks."""
        groups = [parallel_state.get_data_parallel_group()]
        if self.sequence_parallel:
            groups.append(parallel_state.get_tensor_model_parallel_group())
        for group in groups:
            torch.distributed.all_reduce(tensor, group=group)
        return tensor


def own_part(whole_SX: Tensor, sequence_parallel: bool) -> Tensor:
    """Positions [S, ...] of a whole sequence that this rank holds: all, or with sequence parallelism a part."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    if not sequence_parallel or ranks == 1:
        return whole_SX
    return whole_SX.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
