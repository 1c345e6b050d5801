"""Elastic training inside a loop that is not ours: Megatron-LM's, Megatron-Bridge's, NeMo's.

Two ways, of the same gradient (Flextron, eq. 5). As micro-batches: `RepeatedMicroBatches` orders the data so that every
micro-batch comes once for each network, and `choose` makes the model compute the next one; any layout, no more memory. At once:
`all_losses` runs all networks in one forward step; nothing but that step changes, but the activations of all networks are
alive together, and there is no pipeline parallelism.

Shape suffixes: N networks, B batch, S sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.data import Dataset

from flextron_mcore.choosing import keep_states, set_subnetwork
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.pipeline.losses import masked_sum
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.space import ElasticSpace, SubNetwork
from flextron_mcore.training.sampler import draw


def adapt(config: TransformerConfig) -> None:
    """Set what elastic training needs of a TransformerConfig; call before the model is built."""
    config.calculate_per_token_loss = True  # the loss is divided by the full model's tokens, which `loss_function` counts
    config.hetereogenous_dist_checkpoint = True  # Megatron-Core's spelling; keys on disk as in our checkpoints


class ElasticTraining:
    """The full model and `count` random sub-networks in every step, the same that `flextron elastic` draws from the same seed."""

    def __init__(self, model: ModelConfig, space: ElasticSpace, count: int, seed: int, mode: str = "flextron") -> None:
        self.per_batch = 1 + count
        self.names = ["lm loss", *(f"sub-network {i + 1} loss" for i in range(count))]
        self._draw = functools.partial(draw, model, space, seed, count=count, mode=mode)
        self._passes: dict[int, tuple[int, int]] = {}  # chunk -> (step, forward passes in it)

    def networks(self, step: int) -> list[SubNetwork | None]:
        """The networks of a step, the full model (None) first."""
        return [None, *self._draw(step)]

    def watch(self, chunk: torch.nn.Module) -> None:
        """Let a model that was not built by `build_model` recompute activations with the right choices; call once."""
        unwrap(chunk).decoder.register_forward_hook(keep_states)

    def choose(self, chunk: torch.nn.Module, step: int, micro_batches: int) -> int:
        """Make `chunk` compute the network of its next micro-batch of `step`; that network's index, 0 for the full model.

        micro_batches: of a step on this rank, networks included. In evaluation mode it is the full model, and nothing is counted.
        """
        if not chunk.training:
            set_subnetwork(chunk, None)
            return 0
        if micro_batches % self.per_batch:
            raise FlextronError(
                f"{micro_batches} micro-batches a step cannot be shared out to {self.per_batch} networks: make the global batch "
                f"size a multiple of {self.per_batch} x the micro-batch size x the data-parallel size"
            )
        key = id(unwrap(chunk))
        counted_step, passes = self._passes.get(key, (step, 0))
        done = passes if counted_step == step else 0
        self._passes[key] = step, done + 1
        index = done % self.per_batch
        set_subnetwork(chunk, self.networks(step)[index])
        return index

    def loss_function(
        self, loss_mask_BS: Tensor, indices: Sequence[int], training: bool, losses: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum of the losses, tokens to divide it by, figures to report) of a forward step through the networks `indices`.

        losses: per-token, [B, S] of one network or [N, B, S]. Only the full model's tokens are counted, so the step's loss is the
        sum over networks of their mean losses. Figures are pairs (sum of a network's losses, its tokens); they are zero for
        networks that come with other micro-batches.
        """
        tokens = loss_mask_BS.sum()
        sums = [masked_sum(loss_BS, loss_mask_BS) for loss_BS in losses.view(-1, *loss_mask_BS.shape)]
        report = {name: torch.zeros(2, device=losses.device) for name in (self.names if training else self.names[:1])}
        for index, value in zip(indices, sums, strict=True):
            report[self.names[index]] += torch.stack([value.detach(), tokens])
        return sum(sums), (tokens if 0 in indices else torch.zeros_like(tokens)).int(), report

    def all_losses(self, chunk: torch.nn.Module, step: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """The per-token losses of all networks of `step`, [N, B, S]; in evaluation mode of the full model alone.

        inputs: arguments of the model's forward, labels among them.
        """
        found = []
        for net in self.networks(step) if chunk.training else [None]:
            set_subnetwork(chunk, net)
            found.append(chunk(**inputs))
        set_subnetwork(chunk, None)
        return torch.stack(found)


class RepeatedMicroBatches(Dataset):
    """A training dataset whose every micro-batch comes `times` times in a row, for Megatron's sequential sampler.

    size: samples of a micro-batch over all data-parallel ranks. Samples are found by their index alone: a resumed run continues.
    """

    def __init__(self, dataset: Dataset, times: int, size: int) -> None:
        self.dataset, self.times, self.size = dataset, times, size

    def __len__(self) -> int:
        return len(self.dataset) // self.size * self.size * self.times

    def __getitem__(self, index: int) -> dict[str, Any]:
        block, within = divmod(index, self.size)
        return self.dataset[block // self.times * self.size + within]
