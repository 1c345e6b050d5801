"""Training loop, shared by all stages that train. A stage describes with a `Phase` which networks a step runs and what learns.

A step runs every micro-batch through the full model and the sub-networks of the step. Unless the phase freezes them, the weights
minimise the sum over networks of their mean losses: sum_j L(M_j(x), y) (Flextron, eq. 5). A learner trains routers beside the
model, from losses, gradients or traces.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core import parallel_state
from torch import Tensor

from flextron_mcore.checkpoint.store import CheckpointInfo, list_checkpoints, open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.choosing import Network
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import PreparedData, batch, train_dataset, valid_datasets
from flextron_mcore.evaluation.perplexity import evaluate, mean
from flextron_mcore.layers.block import new_gates
from flextron_mcore.layers.weighted import WeightedNetwork
from flextron_mcore.model import loaded_model
from flextron_mcore.pipeline.networks import Batch, Teaching, gate_gradients, run_networks
from flextron_mcore.runtime import signals
from flextron_mcore.runtime.disk import disk_errors
from flextron_mcore.runtime.distributed import Drop, device, stop_agreed
from flextron_mcore.runtime.ranks import is_main_process, on_main_process
from flextron_mcore.runtime.seeds import seed_step
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.settings.sections import DistillationSettings
from flextron_mcore.settings.training import LoopSettings
from flextron_mcore.training.build import TrainedModel
from flextron_mcore.training.checkpointing import KEPT, Checkpointer, FrozenCheckpointer, TrainingCheckpointer, remove_unfinished
from flextron_mcore.training.checks import duration, end_of_job
from flextron_mcore.training.learner import Figures, GateLearner, Learner, LossLearner, TraceLearner, WeightLearner
from flextron_mcore.training.log import Log
from flextron_mcore.training.rampup import BatchSizes
from flextron_mcore.training.speed import Meter

Chunks = list[torch.nn.Module]
# A training stops when its job has less time left than this times its slowest step and save: the next ones may be slower.
MARGIN = 1.5


@dataclass
class Phase:
    """Description of a training: the networks that a step runs, and the parts that learn from them.

    The functions are called on all ranks and return the same networks on each.

    Attributes:
        networks: function (index of a step, from 0) that returns the networks it runs, the full model (None) first.
        validation: function (number of finished steps) that returns {name: network} to validate then; None: the full model.
        teach: settings of the distillation; weight 0: no distillation.
        teacher: checkpoint of the frozen teacher of all networks; None: the full model teaches the sub-networks of its step.
        full_weight: factor of the full model's loss in the sum over networks.
        learner: routers in training, None without.
        frozen: True if the weights stay as they are and only `learner` learns.
        after: {number of finished steps: function (this rank's chunks, in evaluation mode)}, called before the validation and the
            checkpoint then. A checkpoint is also written one step earlier, because these functions may take long.
        noted: function (index of a step) that returns figures for its row of the log; None: none.
    """

    networks: Callable[[int], list[Network]]
    validation: Callable[[int], Mapping[str, Network]]
    teach: DistillationSettings = field(default_factory=DistillationSettings)
    teacher: CheckpointInfo | None = None
    full_weight: float = 1.0
    learner: Learner | None = None
    frozen: bool = False
    after: Mapping[int, Callable[[Chunks], None]] = field(default_factory=dict)
    noted: Callable[[int], Figures] | None = None


def train(
    settings: LoopSettings, out: Path, info: CheckpointInfo, data: PreparedData, phase: Phase, seq_length: int
) -> dict[str, Any]:
    """Train until trainer.max_steps and return the results for metrics.json. Call on all ranks.

    The results are `steps` and `tokens` of the whole training; `seconds` and `tokens_per_second` of this call, which may have run
    the last steps only; `model`, `space`, and `validation`: {"first", "last"}, each {network: loss in nats per token}, or {}.

    An interrupted run continues from its newest complete checkpoint in `out`. Raises FlextronError if a loss is not finite, for a
    damaged checkpoint and for a full disk; raises signals.Stopped, with a checkpoint written, at a signal, at trainer.max_time or
    at the end of the job: at SIGTERM before the step in progress has ended, else after it.

    Args:
        settings: settings of the stage.
        out: directory of the run.
        info: architecture and elastic space. Its `path` is the checkpoint to start from; None for a random initialisation.
        data: prepared data set.
        phase: networks that a step runs, and the parts that learn.
        seq_length: tokens of a sample, from `check`.
    """
    with disk_errors(out, KEPT):
        return _Run(settings, out, info, data, phase, seq_length).train()


class _Run:
    """One training run, as this rank sees it: model, data, checkpoints and log."""

    def __init__(
        self, settings: LoopSettings, out: Path, info: CheckpointInfo, data: PreparedData, phase: Phase, seq_length: int
    ) -> None:
        self.settings, self.out, self.info, self.phase, self.seq_length = settings, out, info, phase, seq_length
        self.options, self.trainer = settings.model, settings.trainer
        self.ranks = parallel_state.get_data_parallel_world_size()
        self.rank = parallel_state.get_data_parallel_rank()
        self.sizes = BatchSizes(self.options, self.trainer.max_steps)
        cache, samples = out / "cache", self.sizes.start(self.trainer.max_steps)
        self.train_data = train_dataset(data, seq_length, samples, settings.seed, cache, settings.data_weights)
        self.valid_data = valid_datasets(data, seq_length, settings.seed, cache)
        saving = settings.exp_manager.checkpoint_callback_params
        self.save_interval = saving.every_n_train_steps
        self.save_seconds = math.inf if saving.every_minutes is None else 60 * saving.every_minutes
        self.drop = Drop()
        self.saved = 0  # step of the newest checkpoint, 0 for none
        self.trained: TrainedModel | None = None
        self.checkpointer: Checkpointer
        if phase.frozen:
            done = list_checkpoints(out)
            source = open_checkpoint(done[-1]) if done else info
            self.model = loaded_model(self.options, source, self.trainer.precision)
            self.checkpointer = FrozenCheckpointer(out, saving.keep_last, phase.learner, source)
        else:
            self.trained = TrainedModel(self.options, self.trainer, info)
            self.model = self.trained.chunks
            self.checkpointer = TrainingCheckpointer(out, saving.keep_last, phase.learner, self.trained, saving.async_save)
        self.teaching = None
        if phase.teach.weight > 0:
            parent = phase.teacher and loaded_model(self.options, phase.teacher, self.trainer.precision)
            # Megatron-Core's wrapper for bf16 would convert the teacher's logits to fp32.
            self.teaching = Teaching(phase.teach.weight, phase.teach.temperature, parent and [unwrap(chunk) for chunk in parent])
        gates = isinstance(phase.learner, GateLearner)
        self.meter = Meter(settings, info, seq_length, phase.frozen, gates, self.teaching and phase.teacher)

    def train(self) -> dict[str, Any]:
        """Run the remaining steps, and return the results for metrics.json."""
        if is_main_process():
            remove_unfinished(self.out)
        step, done = 0, list_checkpoints(self.out)
        if done:
            newest = open_checkpoint(done[-1])
            self.checkpointer.load(newest)
            step = self.saved = newest.step
        log = Log(self.out, step, self.settings)
        log.note(self.meter.note)
        started, trained, saved = time.perf_counter(), 0, time.monotonic()
        validation: dict[str, Any] = {"first": log.first_validation, "last": {}}
        if step == 0 and self.trainer.val_at_start:
            validation["first"] = self._validate(0, log)
        signals.defer(True)
        signals.limit(duration(self.trainer.max_time), *end_of_job())
        try:
            if step and self._validation_due(step):  # the run may have ended between a checkpoint and the validation
                validation["last"] = on_main_process(lambda: log.last_validation) or self._validate(step, log)
            self._training_mode()
            checked, longest = time.monotonic(), 0.0
            while step < self.trainer.max_steps:
                self._step(step, log)
                step, trained = step + 1, trained + 1
                last = step == self.trainer.max_steps
                if then := self.phase.after.get(step):
                    self.checkpointer.finish()  # `then` may take long: if the run is killed meanwhile, only one step is lost
                    with self._gathered():
                        then([chunk.eval() for chunk in self.model])
                    self._training_mode()
                if last:  # a job that ends within the last validation repeats only that
                    self._save(step)
                    self.checkpointer.finish()
                if self._validation_due(step):
                    validation["last"] = self._validate(step, log)
                now = time.monotonic()
                checked, longest = now, max(longest, now - checked)
                needed = MARGIN * (longest + self.checkpointer.seconds)
                stop, due = (0, False) if last else stop_agreed(now - saved >= self.save_seconds, needed)
                if stop or due or step % self.save_interval == 0 or step + 1 in self.phase.after:
                    self._save(step)
                    saved = time.monotonic()
                if stop:
                    self._stop(stop, step)
                self.checkpointer.poll()
            self.checkpointer.close()
        except BaseException:
            if torch.distributed.get_world_size() == 1:
                # Complete the save in the background. Otherwise its result would be read as that of the next save.
                with contextlib.suppress(Exception):
                    self.checkpointer.close()
            raise
        finally:
            signals.defer(False)
            signals.limit(None)
            log.close()
        seconds, samples = time.perf_counter() - started, self.sizes.start(step) - self.sizes.start(step - trained)
        return {
            "steps": step,
            "tokens": self.sizes.start(step) * self.seq_length,
            "seconds": seconds,
            "tokens_per_second": samples * self.seq_length / seconds,
            "model": self.info.model.to_dict(),
            "space": self.info.space.to_dict(),
            "validation": validation,
        }

    def _save(self, step: int) -> None:
        """Save the checkpoint of a step, or start to, unless it is the newest one already."""
        if step > self.saved:
            with self._gathered(), signals.deaf_helpers():
                dtype = self.info.dtype if self.phase.frozen else self.trainer.precision
                self.checkpointer.save(self.info.at_step(step, dtype=dtype))
            self.saved = step

    def _stop(self, reason: int, step: int) -> NoReturn:
        """Save the checkpoint of a step and raise signals.Stopped. reason: signal or another result of `received`."""
        self._save(step)
        self.checkpointer.close()
        signals.stop(reason, self.settings.stage, step)

    def _step(self, step: int, log: Log) -> None:
        """Run one step: forward and backward passes, update of weights and learner, and a row of the log.

        A step that SIGTERM interrupts is dropped: it changes nothing but gradients, which the next one clears.

        step: number of steps before this one.
        """
        begun = time.perf_counter()
        seed_step(self.settings.seed, step)
        networks, learner = self.phase.networks(step), self.phase.learner
        gates = None
        if isinstance(learner, GateLearner):
            gates = [None, *new_gates(len(networks) - 1, Choices(self.info.model, self.info.space).count, device())]
        if self.trained:
            self.trained.zero_grad()
        total = run_networks(
            self.model,
            lambda: self._batches(step),
            self._micro_batches(step),
            networks,
            self.seq_length,
            self.options.micro_batch_size,
            forward_only=not (self.trained or (learner and learner.needs_backward)),
            teach=self.teaching,
            gates=gates,
            watch=learner.watch if isinstance(learner, TraceLearner) else None,
            drop=self.drop,
            full_weight=self.phase.full_weight,
        )
        if self.drop.agreed():
            self._stop(signal.SIGTERM, step)
        losses = (total[:, 0] / total[:, 1]).tolist()
        row: Figures = {"step": step + 1, "event": "train", "loss": losses[0]}
        if len(losses) > 1:
            row["subnetwork_losses"] = losses[1:]
        if self.teaching:
            taught = total if self.teaching.parent else total[1:]
            row["distillation_losses"] = (taught[:, 2] / taught[:, 1]).tolist()
        if self.phase.noted:
            row |= self.phase.noted(step)
        if self.trained:
            row |= self.trained.step()
        if not all(map(math.isfinite, losses)):
            cause = "training diverged, lower model.optim.lr" if self.trained else "the checkpoint's weights are not finite"
            number, loss = next((i, loss) for i, loss in enumerate(losses) if not math.isfinite(loss))
            of = f"sub-network {number} of {len(losses) - 1}" if number else "the full model"
            raise FlextronError(f"step {step + 1}: the loss of {of} is {loss}: {cause}")
        row |= self._learn(step, losses, networks, gates, total[0, 1].item())
        row["consumed_samples"] = self.sizes.start(step + 1)
        row |= self.meter.figures(networks, self.sizes.of(step), time.perf_counter() - begun)
        log.train(row)

    def _learn(
        self, step: int, losses: list[float], networks: list[Network], gates: list[list[Tensor] | None] | None, tokens: float
    ) -> Figures:
        """Sum the learner's training signal over ranks, update the learner, and return its figures for the log.

        Learners of static routers run on the main process; other ranks get {}.

        Args:
            step: number of steps before this one.
            losses: loss of each network in nats per token, the full model first.
            networks: networks of the step.
            gates: router gates (scalars on the outputs of blocks) of each network, for a GateLearner; else None.
            tokens: number of tokens of the step.
        """
        learner, parallel, here = self.phase.learner, self.options.sequence_parallel, is_main_process()
        match learner:
            case LossLearner():
                return learner.learn(step, losses) if here else {}
            case GateLearner():
                gradients_TN = gate_gradients(gates[1:], tokens, parallel)
                return learner.learn(step, losses, gradients_TN) if here else {}
            case WeightLearner():
                gradients = [net.gradients(tokens, parallel) for net in networks if isinstance(net, WeightedNetwork)]
                return learner.learn(step, losses, gradients) if here else {}
            case TraceLearner():  # on all ranks
                return learner.learn(step, losses)
        return {}

    def _micro_batches(self, step: int) -> int:
        """Number of micro-batches of this rank in a step."""
        return self.sizes.of(step) // (self.options.micro_batch_size * self.ranks)

    def _batches(self, step: int) -> Iterator[Batch]:
        """Micro-batches of this rank in a step. The samples of all ranks together depend on the step only.

        step: number of steps before this one.
        """
        size = self.options.micro_batch_size
        first = self.sizes.start(step)
        for m in range(self._micro_batches(step)):
            start = first + (m * self.ranks + self.rank) * size
            yield batch(self.train_data, range(start, start + size))

    def _validation_due(self, step: int) -> bool:
        return step == self.trainer.max_steps or step % self.trainer.val_check_interval == 0

    def _validate(self, step: int, log: Log) -> dict[str, float]:
        """Evaluate the phase's validation networks after a step: {network: loss in nats per token, mean over domains}.

        A validation that SIGTERM interrupts is dropped; the run that continues repeats it.
        """
        size, limit = self.options.micro_batch_size, self.trainer.limit_val_batches
        samples = limit and limit * self.options.global_batch_size
        with self._gathered():
            networks = self.phase.validation(step)
            with log.validating(step, len(networks) * len(self.valid_data)) as bar:
                domains = evaluate(
                    self.model, self.valid_data, networks, self.seq_length, size, samples, lambda _: bar.update(), self.drop
                )
        if self.drop.agreed():
            self._stop(signal.SIGTERM, step)
        losses = {name: mean(values) for name, values in domains.items()}
        log.validation({"step": step, "event": "validation", "losses": losses, "domains": domains})
        return losses

    def _gathered(self) -> contextlib.AbstractContextManager[None]:
        """Context in which all parameters are whole on this rank (`TrainedModel.gathered`); a frozen model's always are."""
        return self.trained.gathered() if self.trained else contextlib.nullcontext()

    def _training_mode(self) -> None:
        for chunk in self.model:
            chunk.train(self.trained is not None)
