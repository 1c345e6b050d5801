"""Estimate of a stage's GPU memory (bytes), tokens and floating-point operations, before a job is submitted. No torch import.

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
from flextron_mcore.space import ADAM_BYTES, ElasticSpace


@dataclass(frozen=True)
class Estimate:
    """Estimated memory, tokens and FLOPs of a stage.

    Attributes:
        weights, gradients, optimizer, activations: bytes on the rank that needs most memory.
        tokens: tokens that the stage reads. Of a training: tokens of all steps, without validation; a token counts once, however
            many networks see it. Other stages: see `Work` (flops.py).
        flops: floating-point operations of all ranks together, validation included.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    tokens: int
    flops: float

    @property
    def memory(self) -> int:
        """Peak bytes of weights, gradients, optimizer state and activations together, on the rank that needs most."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def hours(self, gpus: int, peak_flops: float, utilisation: float) -> float:
        """Hours that the stage takes to compute its FLOPs.

        Args:
            gpus: number of GPUs.
            peak_flops: peak throughput of one GPU, FLOP/s.
            utilisation: share of the peak that is reached, 0 to 1.
        """
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
    """Estimate the memory, tokens and FLOPs of a stage.

    Args:
        model: architecture of the full model.
        space: elastic space.
        settings: settings of the stage.
        world_size: number of ranks.
        stored_dtype: precision of the checkpoint ("bf16", "fp32"), used where trainer.precision is null.
        valid_samples: samples in each domain's validation split; None assumes one domain with as many samples as
            limit_val_batches reads.
        cuda: False for a CPU, where RMSNorm keeps more tensors for the backward pass.

    Raises:
        FlextronError: sizes of the layout do not divide the model, the batch or the ranks.
    """
    layout = Layout.read(model, space, settings, world_size, stored_dtype, cuda)
    ranks = [Rank(model, layout, index) for index in range(layout.pipeline)]
    found = max((memory_of(rank, settings) for rank in ranks), key=sum)
    spent = work(model, space, settings, layout, valid_samples)
    return Estimate(*found, spent.tokens, spent.flops)


def memory_of(rank: Rank, settings: StageSettings) -> tuple[int, int, int, int]:
    """Bytes on a rank during a stage: (weights, gradients, optimizer state, activations).

    A frozen teacher counts with the weights. Gradients are fp32; a distributed optimizer splits its state over data-parallel
    ranks.
    """
    layout, count, teacher = rank.layout, rank.parameters, rank.teacher(settings)
    gradients = optimizer = 0
    if settings.stage in TRAINED:
        gradients = 4 * count  # main_grad
        state = count * ADAM_BYTES[layout.dtype]
        optimizer = -(-state // layout.data) if settings.model.ddp.use_distributed_optimizer else state
    weights = count + (teacher.parameters if teacher else 0)
    return weights * layout.dtype, gradients, optimizer, activations(rank, settings)
