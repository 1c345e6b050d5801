"""Learners: routers in training beside the model, one base class for each kind of training signal.

The language model runs on all ranks. Static routers (one network for all tokens) learn on the CPU of the main process, which
sends its choices to the other ranks. Adaptive routers (a choice for every token) learn on every rank, from the traces of the
tokens there.

Shape suffixes: T sub-networks of a step, N blocks.
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
    """Routers in training beside the model.

    Subclasses have `learn`, which updates the routers from the losses of a step's networks (nats per token, the full model first)
    and from gradients or traces, as their training signal needs, and returns figures for the log. Steps are counted from 0.

    Attributes:
        needs_backward: True if the training signal is a gradient, so that a step needs backward passes.
    """

    needs_backward: bool = True  # the loop runs backward passes then even if the model is frozen

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the routers and the state of their training into a checkpoint's directory. Call on the main process."""

    @abstractmethod
    def read(self, folder: Path) -> None:
        """Restore the routers and the state of their training from a checkpoint's directory.

        Call on all ranks. Raises FlextronError for a damaged file, or if the checkpoint has another latency table.
        """


class LossLearner(Learner):
    """Learner whose only training signal is the losses of networks, which a surrogate model is fitted to (Flextron, eq. 10).

    `learn` runs on the main process.
    """

    needs_backward = False

    @abstractmethod
    def learn(self, step: int, losses: Sequence[float]) -> Figures:
        """Update the routers from the losses of a step, on the main process. Returns figures for the log.

        Args:
            step: number of the step.
            losses: loss of each network in nats per token, the full model first.
        """


class GateLearner(Learner):
    """Learner whose training signal is gradients of router gates: scalars of value 1 that multiply blocks' outputs.

    `learn` runs on the main process.
    """

    @abstractmethod
    def learn(self, step: int, losses: Sequence[float], gradients_TN: Tensor) -> Figures:
        """Update the routers from the losses of a step and the gradients of the gates, on the main process.

        Returns figures for the log.

        Args:
            step: number of the step.
            losses: loss of each network in nats per token, the full model first.
            gradients_TN: derivative of each sub-network's loss (nats per token) with respect to the router gate of each block.
        """


class WeightLearner(Learner):
    """Learner whose training signal is gradients of candidates' weights, with which networks multiply all units.

    `learn` runs on the main process.
    """

    @abstractmethod
    def learn(self, step: int, losses: Sequence[float], gradients: Sequence[Sequence[Tensor]]) -> Figures:
        """Update the routers from the losses of a step and the gradients of the weights, on the main process.

        Returns figures for the log.

        Args:
            step: number of the step.
            losses: loss of each network in nats per token, the full model first.
            gradients: result of `WeightedNetwork.gradients` for each weighted network.
        """


class TraceLearner(Learner):
    """Learner of adaptive routers, whose training signal is the traces that token routing keeps of a step (adaptive/routing.py).

    `learn` runs on all ranks.
    """

    @property
    def watch(self) -> Watch | None:
        """Function that the last pipeline stage calls with losses and final hidden states (pipeline.networks.Watch), or None.

        A learner that fits a surrogate model to the losses, and so needs no gradients, has one.
        """
        return None

    @property
    def needs_backward(self) -> bool:  # type: ignore[override]
        """True if the learner has no `watch`, so that its training signal is a gradient."""
        return self.watch is None

    @abstractmethod
    def learn(self, step: int, losses: Sequence[float]) -> Figures:
        """Update the routers from the losses of a step and the traces of its token routings. Call on all ranks.

        Returns figures for the log.

        Args:
            step: number of the step.
            losses: loss of each network in nats per token, the full model first.
        """
