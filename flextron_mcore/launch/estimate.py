"""Needs of a stage, before a job is submitted: bytes of GPU memory, tokens, floating-point operations. No torch import.

docs/estimates.md has the formulas, what they leave out, and how they were checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flextron_mcore.config import ModelConfig
from flextron_mcore.launch.activations import activations
from flextron_mcore.launch.flops import work
from flextron_mcore.launch.layout import TRAINED, Layout, Rank
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.space import ElasticSpace


@dataclass(frozen=True)
class Estimate:
    """Bytes are of the fullest rank. tokens: read by the stage, each counted once. flops: of the stage, all ranks together."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    tokens: int
    flops: float

    @property
    def memory(self) -> int:
        """Bytes that tensors take at their peak."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def hours(self, gpus: int, peak_flops: float, utilisation: float) -> float:
        """Hours on `gpus` devices of `peak_flops` per second, of which the share `utilisation` is reached."""
        return self.flops / (gpus * peak_flops * utilisation) / 3600


def estimate(
    model: ModelConfig,
    space: ElasticSpace,
    settings: StageSettings,
    world_size: int,
    stored_dtype: str,
    *,
    valid_samples: Sequence[int] | None = None,
    cuda: bool = True,
) -> Estimate:
    """Needs of the stage of `settings`, on `world_size` ranks.

    stored_dtype: of the checkpoint, which stages compute in unless trainer.precision says otherwise. valid_samples: of each
    domain's validation split; None: one domain, which has what limit_val_batches asks for. cuda: False for the CPU, where norms
    keep more. Raises FlextronError for a layout that does not divide.
    """
    layout = Layout.read(model, space, settings, world_size, stored_dtype, cuda)
    ranks = [Rank(model, layout, index) for index in range(layout.pipeline)]
    found = max((memory_of(rank, settings) for rank in ranks), key=sum)
    spent = work(model, space, settings, layout, valid_samples)
    return Estimate(*found, spent.tokens, spent.flops)


def memory_of(rank: Rank, settings: StageSettings) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients, optimizer state, activations."""
    layout, count = rank.layout, rank.parameters
    gradients = optimizer = 0
    if settings.stage in TRAINED:
        gradients = 4 * count  # main_grad
        state = count * (8 if layout.dtype == 4 else 12)  # two moments; for bf16 weights a main copy
        optimizer = -(-state // layout.data) if settings.model.ddp.use_distributed_optimizer else state
    return count * layout.dtype, gradients, optimizer, activations(rank, settings)
