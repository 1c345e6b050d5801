"""Learners: routers in training beside the model, one class for each signal that a router can learn from.

The language model runs on all ranks. Static routers are small and learn on the CPU of the main process, which tells the others
what it chose; token routers learn on every rank, from what the networks left there.

Shape suffixes: T networks of a step beside the full model, N blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from flextron_mcore.pipeline.networks import Watch

Figures = dict[str, Any]  # a row of the log: plain numbers and lists of them


class Learner(ABC):
    """Routers in training. Losses are in nats per token, the full model's first; `learn` returns figures for the log."""

    needs_backward: bool = True  # gradients are the signal: a frozen model runs its backward pass too

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the routers, and what continues their training, into a checkpoint's directory. Call on the main process."""

    @abstractmethod
    def read(self, folder: Path) -> None:
        """Continue from what `write` left."""


class LossLearner(Learner):
    """Learns from losses alone, through a surrogate model of them (eq. 10). Learns on the main process."""

    needs_backward = False

    @abstractmethod
    def learn(self, step: int, losses: Sequence[float]) -> Figures:
        """Update from a step's losses."""


class GateLearner(Learner):
    """Learns straight through the gates on the networks' blocks. Learns on the main process."""

    @abstractmethod
    def learn(self, step: int, losses: Sequence[float], gradients_TN: Tensor) -> Figures:
        """Update from a step's losses, and the gradients of each network's loss by the gates of its blocks."""


class WeightLearner(Learner):
    """Learns from the weights of networks that are weighted sums of candidates. Learns on the main process."""

    @abstractmethod
    def learn(self, step: int, losses: Sequence[float], gradients: Sequence[Sequence[Tensor]]) -> Figures:
        """Update from a step's losses, and what `WeightedNetwork.gradients` gives for each weighted network."""


class TraceLearner(Learner):
    """Learns from the traces that token routings keep of their step. Learns on all ranks."""

    @property
    def watch(self) -> Watch | None:
        """Callback for each micro-batch of the last pipeline stage, of a learner that needs no gradients; None of others."""
        return None

    @property
    def needs_backward(self) -> bool:  # type: ignore[override]
        """True without a watch."""
        return self.watch is None

    @abstractmethod
    def learn(self, step: int, losses: Sequence[float]) -> Figures:
        """Update from a step's losses, and the traces of the routings that it ran."""
