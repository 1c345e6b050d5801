"""The surrogate model of input-adaptive routers: what its choices, and the final hidden state, tell of a token's loss (eq. 10).

Kept on every rank, the same: gradients are summed over all tokens of a step.

Shape suffixes: S sequence, B batch, N blocks, K candidates, D hidden channels, M tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from flextron_mcore.adaptive.routers import Seen, TokenRouting
from flextron_mcore.choices import Choices
from flextron_mcore.routers.surrogate import Surrogate


@dataclass(frozen=True)
class SurrogateSettings:
    """How it learns; see settings/sections.py."""

    hidden_size: int = 128
    lr: float = 3e-3
    weight_decay: float = 1.0
    updates_per_step: int = 8
    threshold: float = 0.2


class TokenSurrogate:
    """The model, its optimizer, and what the step's micro-batches were: `watch` is told by `run_networks`."""

    def __init__(self, blocks: Choices, settings: SurrogateSettings, seed: int, max_steps: int, sequence_parallel: bool) -> None:
        self.settings, self.max_steps, self.sequence_parallel = settings, max_steps, sequence_parallel
        self.count, self.width = blocks.exists_NK.shape
        self.channels = blocks.model.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Surrogate(self.count, self.width, settings.hidden_size, self.channels)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        self.error: float | None = None
        self.follow = False
        self.told: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def to(self, device: torch.device) -> TokenSurrogate:
        """Move the model."""
        self.model.to(device)
        return self

    def watch(self, network: int, number: int, losses_BS: Tensor, final_SBD: Tensor) -> None:
        """On the last pipeline stage: a micro-batch of a network, the full model's being network 0."""
        self.told[network, number] = losses_BS.T, final_SBD

    def learn(self, step: int, drawn: Sequence[TokenRouting], scale: float) -> dict[str, Any]:
        """From the tokens of a step; after it, `values` has what the routers are to follow. scale: of the losses.

        Returns the squared error before this step's updates, a running mean, as a share of the losses' variance.
        """
        tokens = {
            (t, number): self._of(t, number, [seen for seen in routing.seen if seen.number == number])
            for t, routing in enumerate(drawn)
            for number in dict.fromkeys(seen.number for seen in routing.seen)
        }
        self.told.clear()
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

    def values(self, network: int, seen: Seen) -> Tensor:
        """The loss of each token of this rank for each candidate of a block, zeros where it does not count: [S, B, K]."""
        levels_SB, counted_SB = mine(seen.levels_SB, self.sequence_parallel), mine(seen.counted_SB, self.sequence_parallel)
        values_SBK = torch.zeros(*levels_SB.shape, self.width, device=levels_SB.device)
        if self.follow:
            values_SBK[counted_SB] = self.replaced[network, seen.number][:, seen.block]
        return values_SBK

    def _of(self, network: int, number: int, seen: Sequence[Seen]) -> tuple[Tensor, Tensor, Tensor]:
        """Choices, final hidden state, and loss above the full model's of the counted tokens of a micro-batch.

        A pipeline stage knows its own blocks' choices, and the last one what came out: each gets the sum of what all know.
        """
        first = seen[0]
        levels_NSB = torch.zeros(self.count, *first.levels_SB.shape, dtype=torch.long, device=first.levels_SB.device)
        for one in seen:
            levels_NSB[one.block] = one.levels_SB.clamp_min(0)
        loss_SB, final_SBD = self.told.get((network + 1, number), (None, None))
        if loss_SB is None:
            loss_SB = torch.zeros(first.levels_SB.shape, device=levels_NSB.device)
            final_SBD = torch.zeros(*first.hidden_SBD.shape[:2], self.channels, device=levels_NSB.device)
        else:
            loss_SB, final_SBD = loss_SB.float() - self.told[0, number][0].float(), final_SBD.float()
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            loss_SB, final_SBD = loss_SB.contiguous(), final_SBD.contiguous()
            for tensor in (levels_NSB, loss_SB, final_SBD):
                torch.distributed.all_reduce(tensor, group=parallel_state.get_pipeline_model_parallel_group())
        counted_SB = mine(first.counted_SB, self.sequence_parallel)
        levels_MN = mine(levels_NSB.permute(1, 2, 0), self.sequence_parallel)[counted_SB]
        choices_MNK = torch.nn.functional.one_hot(levels_MN, self.width).float()
        return choices_MNK, final_SBD[counted_SB], mine(loss_SB, self.sequence_parallel)[counted_SB]

    def _summed(self, tensor: Tensor) -> Tensor:
        """Over all tokens of a step, wherever they are."""
        groups = [parallel_state.get_data_parallel_group()]
        if self.sequence_parallel:
            groups.append(parallel_state.get_tensor_model_parallel_group())
        for group in groups:
            torch.distributed.all_reduce(tensor, group=group)
        return tensor


def mine(whole_SX: Tensor, sequence_parallel: bool) -> Tensor:
    """The part of the sequence that this rank's hidden states are of."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    if not sequence_parallel or ranks == 1:
        return whole_SX
    return whole_SX.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
