"""Elastic training inside another framework's loop: Megatron-LM's, Megatron-Bridge's or NeMo's.

Two ways give the same gradient (Flextron, eq. 5). As micro-batches: `RepeatedMicroBatches` repeats every micro-batch for each
network, and `choose` sets the network of the next one. It needs no more memory and works in any layout. At once: `all_losses`
runs all networks in one forward step. Only that step of the framework changes, but the activations of all networks are alive
together, and pipeline parallelism is not possible.

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
    """Set the options of a TransformerConfig that elastic training needs, in place. Call before the model is built.

    They are calculate_per_token_loss and hetereogenous_dist_checkpoint (Megatron-Core's spelling).
    """
    config.calculate_per_token_loss = True  # the loss is divided by the full model's tokens, which `loss_function` counts
    config.hetereogenous_dist_checkpoint = True  # Megatron-Core's spelling; one key a layer, as `flextron` writes checkpoints


class ElasticTraining:
    """Networks of every step: the full model, and the random sub-networks that `flextron elastic` draws from the same seed.

    Args:
        model: architecture of the full model.
        space: elastic space of the model.
        count: number of sub-networks of a step.
        seed: seed of the draws.
        mode: `flextron` or `matformer` (training/sampler.py).

    Attributes:
        per_batch: number of networks of a step, 1 + count.
        names: names of their losses in reports, full model first.
    """

    def __init__(self, model: ModelConfig, space: ElasticSpace, count: int, seed: int, mode: str = "flextron") -> None:
        self.per_batch = 1 + count
        self.names = ["lm loss", *(f"sub-network {i + 1} loss" for i in range(count))]
        self._draw = functools.partial(draw, model, space, seed, count=count, mode=mode)
        self._passes: dict[int, tuple[int, int]] = {}  # chunk -> (step, forward passes in it)

    def networks(self, step: int) -> list[SubNetwork | None]:
        """Networks of a step: None for the full model, then the random sub-networks, the same on all ranks."""
        return [None, *self._draw(step)]

    def watch(self, chunk: torch.nn.Module) -> None:
        """Make activation recomputation compute the network of its forward pass; `build_model` does this for its own models.

        Call once for each model chunk.
        """
        unwrap(chunk).decoder.register_forward_hook(keep_states)

    def choose(self, chunk: torch.nn.Module, step: int, micro_batches: int) -> int:
        """Make `chunk` compute the network of its next micro-batch, and return the network's index, 0 for the full model.

        Call once before each forward pass, because the calls of a step are counted. In evaluation mode it is always the full
        model. Raises FlextronError if micro-batches do not divide among the networks.

        Args:
            chunk: this rank's model chunk.
            step: number of the step.
            micro_batches: number of this rank's micro-batches of a step, over all networks.
        """
        if not chunk.training:
            set_subnetwork(chunk, None)
            return 0
        if micro_batches % self.per_batch:
            raise FlextronError(
                f"{micro_batches} micro-batches a step cannot be divided among {self.per_batch} networks: make the global batch "
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
        """Loss of a forward step, in the form of Megatron's loss functions.

        Only the full model's tokens are counted, so a step's loss is the sum over networks of their mean losses (eq. 5).

        Args:
            loss_mask_BS: weight of each token.
            indices: indices of the networks that the step ran.
            training: false in evaluation, where only the full model is reported.
            losses: per-token losses, [B, S] of one network or [N, B, S].

        Returns:
            (sum of the losses; number of tokens to divide it by, 0 without the full model; {name: [sum of a network's losses, its
            number of tokens]}, zeros for networks that the step did not run).
        """
        tokens = loss_mask_BS.sum()
        sums = [masked_sum(loss_BS, loss_mask_BS) for loss_BS in losses.view(-1, *loss_mask_BS.shape)]
        report = {name: torch.zeros(2, device=losses.device) for name in (self.names if training else self.names[:1])}
        for index, value in zip(indices, sums, strict=True):
            report[self.names[index]] += torch.stack([value.detach(), tokens])
        return sum(sums), (tokens if 0 in indices else torch.zeros_like(tokens)).int(), report

    def all_losses(self, chunk: torch.nn.Module, step: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Per-token losses [N, B, S] of all networks of a step; in evaluation mode of the full model only.

        Args:
            chunk: the model.
            step: number of the step.
            inputs: keyword arguments of the model's `forward`, with labels.
        """
        found = []
        for net in self.networks(step) if chunk.training else [None]:
            set_subnetwork(chunk, net)
            found.append(chunk(**inputs))
        set_subnetwork(chunk, None)
        return torch.stack(found)


class RepeatedMicroBatches(Dataset):
    """Dataset that repeats every micro-batch of another one, for Megatron's sequential sampler.

    Samples depend on their index only, so a resumed run continues exactly. An incomplete last micro-batch is left out.

    Args:
        dataset: training data.
        times: number of repetitions in a row, one for each network.
        size: samples of a micro-batch over all data-parallel ranks.
    """

    def __init__(self, dataset: Dataset, times: int, size: int) -> None:
        self.dataset, self.times, self.size = dataset, times, size

    def __len__(self) -> int:
        return len(self.dataset) // self.size * self.size * self.times

    def __getitem__(self, index: int) -> dict[str, Any]:
        block, within = divmod(index, self.size)
        return self.dataset[block // self.times * self.size + within]
