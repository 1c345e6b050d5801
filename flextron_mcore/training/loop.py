"""The training loop of every phase: Megatron-Core's DDP, optimizer, schedule and pipeline around `run_networks`."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from flextron_mcore.checkpoint.reader import load_model
from flextron_mcore.checkpoint.store import CheckpointInfo, list_checkpoints, open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import PreparedData, batch, check_tokenizer, check_weights, train_dataset, valid_datasets
from flextron_mcore.evaluation.perplexity import evaluate, mean
from flextron_mcore.layers.gate import new_gates
from flextron_mcore.layers.weighted import WeightedNetwork
from flextron_mcore.model import PRECISIONS, Network, build_chunks, check_layout, loaded_model
from flextron_mcore.pipeline.networks import Batch, Distillation, gate_gradients, run_networks
from flextron_mcore.runtime import signals
from flextron_mcore.runtime.compat import count_padding
from flextron_mcore.runtime.disk import disk_errors
from flextron_mcore.runtime.distributed import device, stop_agreed
from flextron_mcore.runtime.ranks import is_main_process
from flextron_mcore.runtime.seeds import seed_step
from flextron_mcore.training.checkpointing import (
    KEPT,
    Extra,
    FrozenCheckpointer,
    TrainingCheckpointer,
    remove_unfinished,
)
from flextron_mcore.training.learner import Figures, GateLearner, Learner, LossLearner, TraceLearner, WeightLearner
from flextron_mcore.training.log import Log


@dataclass
class Phase:
    """What a training phase computes. networks(step): the networks of a step, the full model (None) first.

    Called on all ranks, with the same results. frozen: the model's weights stay as they are, only `learner` learns. after:
    what is called with the model, ready for evaluation, on all ranks after so many steps, before their validation and checkpoint;
    there is one of the step before.
    """

    networks: Callable[[int], list[Network]]
    validation: Callable[[int], Mapping[str, Network]]
    teach: Distillation = field(default_factory=Distillation)
    learner: Learner | None = None
    frozen: bool = False
    after: Mapping[int, Callable[[list[torch.nn.Module]], None]] = field(default_factory=dict)


def train(config: Any, out: Path, info: CheckpointInfo, data: PreparedData, phase: Phase, seq_length: int) -> dict[str, Any]:
    """Train until trainer.max_steps and return the figures of metrics.json. Call on all ranks.

    info: the model and space; its `path` holds the weights to start from, None for a fresh initialisation. seq_length: from
    `check`. A run that was interrupted continues from its newest whole checkpoint in `out`.
    """
    with disk_errors(out, KEPT):
        return _Run(config, out, info, data, phase, seq_length).train()


def check(config: Any, info: CheckpointInfo, data: PreparedData, networks: int = 1) -> int:
    """Check what can be checked before anything is written; the sequence length. Raises FlextronError naming the key.

    networks: how many a step runs.
    """
    options, trainer = config.model, config.trainer
    seq_length = sequence_length(options, info, data)
    if trainer.precision not in PRECISIONS:
        raise FlextronError(f"trainer.precision={trainer.precision!r} is not known: use one of {', '.join(PRECISIONS)}")
    ranks = parallel_state.get_data_parallel_world_size()
    if options.global_batch_size % (options.micro_batch_size * ranks):
        raise FlextronError(
            f"model.global_batch_size={options.global_batch_size} is not a multiple of model.micro_batch_size="
            f"{options.micro_batch_size} x {ranks} data-parallel rank(s)"
        )
    check_weights(data, config.data_weights)
    if trainer.max_steps < 1:
        raise FlextronError(f"trainer.max_steps={trainer.max_steps} must be at least 1")
    check_layout(info.model, info.space, options, trainer.precision)
    duration(trainer.max_time)
    if "ddp" in options:
        _check_ddp(options.ddp)
    stages = options.pipeline_model_parallel_size
    micro_batches = options.global_batch_size // (options.micro_batch_size * ranks) * networks
    if options.virtual_pipeline_model_parallel_size and micro_batches % stages:
        raise FlextronError(
            f"model.virtual_pipeline_model_parallel_size: the interleaved schedule needs a multiple of "
            f"model.pipeline_model_parallel_size={stages} micro-batches times networks a step, not {micro_batches}"
        )
    return seq_length


def duration(text: str | None) -> float | None:
    """Seconds of trainer.max_time, DD:HH:MM:SS as in NeMo. Raises FlextronError when it is not."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", str(text))
    if not match:
        raise FlextronError(f"trainer.max_time={text}: must be days:hours:minutes:seconds, 00:03:30:00 say")
    days, hours, minutes, seconds = map(int, match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _check_ddp(ddp: Any) -> None:
    if ddp.overlap_param_gather and not (ddp.use_distributed_optimizer and ddp.overlap_grad_reduce):
        raise FlextronError(
            "model.ddp.overlap_param_gather=true needs model.ddp.use_distributed_optimizer=true and "
            "model.ddp.overlap_grad_reduce=true"
        )
    if ddp.use_distributed_optimizer and mcore_optimizer.USING_PYTORCH_OPTIMIZER:
        raise FlextronError(
            "model.ddp.use_distributed_optimizer=true needs the FusedAdam of Transformer Engine or apex on a GPU: "
            "Megatron-Core cannot load the state of torch's"
        )


def sequence_length(options: Any, info: CheckpointInfo, data: PreparedData) -> int:
    """model.seq_length, by default the model's positions. Raises FlextronError where model, layout and data do not fit.

    options: the configuration's model section.
    """
    wanted, positions = options.seq_length, info.model.max_position_embeddings
    if wanted is not None and not 1 <= wanted <= positions:
        raise FlextronError(f"model.seq_length={wanted} is not within 1..{positions}, the model's max_position_embeddings")
    if data.vocab_size > info.model.vocab_size:
        raise FlextronError(
            f"data={data.path}: its tokenizer has {data.vocab_size} tokens, the model's vocabulary {info.model.vocab_size}: "
            "prepare the data with the model's tokenizer"
        )
    check_tokenizer(data, info.tokenizer)
    length = wanted or positions
    if options.sequence_parallel and length % options.tensor_model_parallel_size:
        raise FlextronError(
            f"model.sequence_parallel=true: model.tensor_model_parallel_size={options.tensor_model_parallel_size} does not "
            f"divide the sequence length {length}: set model.seq_length"
        )
    return length


class _Run:
    def __init__(self, config: Any, out: Path, info: CheckpointInfo, data: PreparedData, phase: Phase, seq_length: int) -> None:
        self.config, self.out, self.info, self.phase, self.seq_length = config, out, info, phase, seq_length
        self.options, self.trainer = config.model, config.trainer
        self.ranks = parallel_state.get_data_parallel_world_size()
        self.rank = parallel_state.get_data_parallel_rank()
        self.micro_batches = self.options.global_batch_size // (self.options.micro_batch_size * self.ranks)
        cache = out / "cache"
        samples = self.trainer.max_steps * self.options.global_batch_size
        self.train_data = train_dataset(data, self.seq_length, samples, config.seed, cache, config.data_weights)
        self.valid_data = valid_datasets(data, self.seq_length, config.seed, cache)
        saving = config.exp_manager.checkpoint_callback_params
        learner = phase.learner
        extra = Extra(learner.write, learner.read) if learner else Extra()
        self.optimizer: Any = None
        self.checkpointer: TrainingCheckpointer | FrozenCheckpointer
        if phase.frozen:
            done = list_checkpoints(out)
            source = open_checkpoint(done[-1]) if done else info
            self.model = loaded_model(self.options, source, self.trainer.precision)
            self.checkpointer = FrozenCheckpointer(out, source, saving.keep_last, extra)
        else:
            self.model, self.optimizer, self.scheduler = self._build()
            self.checkpointer = TrainingCheckpointer(
                out, self.model, self.optimizer, self.scheduler, saving.keep_last, saving.async_save, extra
            )
        self.save_interval = saving.every_n_train_steps

    def _build(self) -> tuple[list[torch.nn.Module], Any, Any]:
        """DDP-wrapped chunks, optimizer, scheduler."""
        options, precision = self.options, self.trainer.precision
        fresh = self.info.path is None
        chunks = []
        for gpt in build_chunks(self.info.model, self.info.space, options, precision, initialize=fresh):
            if not fresh:
                load_model(gpt, self.info)
            chunks.append(Float16Module(gpt.config, gpt) if precision == "bf16" else gpt)
        config = chunks[0].config
        distributed = options.ddp.use_distributed_optimizer
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=options.ddp.overlap_grad_reduce,
            overlap_param_gather=options.ddp.overlap_param_gather,
            bucket_size=options.ddp.bucket_size,
            use_distributed_optimizer=distributed,
        )
        model = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
        for chunk in model:
            count_padding(chunk)
            chunk.broadcast_params()
        optim = options.optim
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                min_lr=optim.min_lr,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.betas[0],
                adam_beta2=optim.betas[1],
                adam_eps=optim.eps,
                clip_grad=optim.clip_grad,
                bf16=precision == "bf16",
                params_dtype=PRECISIONS[precision],
                use_distributed_optimizer=distributed,
                overlap_param_gather=options.ddp.overlap_param_gather,
            ),
            model,
        )
        scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=optim.lr,
            min_lr=optim.min_lr,
            lr_warmup_steps=min(optim.sched.warmup_steps, self.trainer.max_steps - 1),
            lr_decay_steps=self.trainer.max_steps,
            lr_decay_style=optim.sched.name,
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=self.trainer.max_steps,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss
        if options.ddp.overlap_grad_reduce:
            no_sync = [chunk.no_sync for chunk in model]
            config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
        return model, optimizer, scheduler

    def train(self) -> dict[str, Any]:
        remove_unfinished(self.out) if is_main_process() else None
        step, done = 0, list_checkpoints(self.out)
        if done:
            newest = open_checkpoint(done[-1])
            self.checkpointer.load(newest)
            step = newest.step
        log = Log(self.out, step, self.trainer.max_steps, self.config)
        started, trained = time.perf_counter(), 0
        validation: dict[str, Any] = {"first": log.first_validation, "last": {}}
        if step == 0:
            validation["first"] = self._validate(0, log)
        for chunk in self.model:
            chunk.train(not self.phase.frozen)
        signals.defer(True)
        signals.limit(duration(self.trainer.max_time))
        try:
            while step < self.trainer.max_steps:
                self._step(step, log)
                step, trained = step + 1, trained + 1
                if then := self.phase.after.get(step):
                    self.checkpointer.finish()  # it can take long, and then a killed run loses a step
                    with self._gathered():
                        then([chunk.eval() for chunk in self.model])
                    for chunk in self.model:
                        chunk.train(not self.phase.frozen)
                if step % self.trainer.val_check_interval == 0 or step == self.trainer.max_steps:
                    validation["last"] = self._validate(step, log)
                stop = stop_agreed() if step < self.trainer.max_steps else 0
                due = step % self.save_interval == 0 or step == self.trainer.max_steps or step + 1 in self.phase.after
                if stop or due:
                    with self._gathered(), signals.deaf_helpers():
                        dtype = self.info.dtype if self.phase.frozen else self.trainer.precision
                        self.checkpointer.save(self.info.at_step(step, dtype=dtype))
                if stop:
                    self.checkpointer.close()
                    signals.stop(stop, self.config.stage, step)
                self.checkpointer.poll()
            self.checkpointer.close()
        except BaseException:
            if torch.distributed.get_world_size() == 1:
                # The save in flight becomes whole; left alone, its results would be taken for those of the next one.
                with contextlib.suppress(Exception):
                    self.checkpointer.close()
            raise
        finally:
            signals.defer(False)
            signals.limit(None)
            log.close()
        seconds = time.perf_counter() - started
        tokens = self.options.global_batch_size * self.seq_length
        return {
            "steps": step,
            "tokens": step * tokens,
            "seconds": seconds,
            "tokens_per_second": trained * tokens / seconds,
            "model": self.info.model.to_dict(),
            "space": self.info.space.to_dict(),
            "validation": validation,
        }

    def _batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches: a function of the step alone."""
        size = self.options.micro_batch_size
        first = step * self.options.global_batch_size
        for m in range(self.micro_batches):
            start = first + (m * self.ranks + self.rank) * size
            yield batch(self.train_data, range(start, start + size))

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        """All parameters whole: with overlap_param_gather only training's own forward pass waits for them, module by module."""
        overlap = self.optimizer and self.options.ddp.overlap_param_gather
        for chunk in self.model if overlap else ():
            chunk.disable_forward_pre_hook()
        yield
        for chunk in self.model if overlap else ():
            chunk.enable_forward_pre_hook()

    def _step(self, step: int, log: Log) -> None:
        begun = time.perf_counter()
        seed_step(self.config.seed, step)
        networks, learner = self.phase.networks(step), self.phase.learner
        gates = None
        if isinstance(learner, GateLearner):
            gates = [None, *new_gates(len(networks) - 1, 2 * self.info.model.num_layers, device())]
        if self.optimizer:
            for chunk in self.model:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        total = run_networks(
            self.model,
            lambda: self._batches(step),
            self.micro_batches,
            networks,
            self.seq_length,
            self.options.micro_batch_size,
            forward_only=not (self.optimizer or (learner and learner.needs_backward)),
            teach=self.phase.teach if self.phase.teach.weight > 0 else None,
            gates=gates,
            watch=learner.watch if isinstance(learner, TraceLearner) else None,
        )
        losses = (total[:, 0] / total[:, 1]).tolist()
        row: dict[str, Any] = {"step": step + 1, "event": "train", "loss": losses[0]}
        if len(losses) > 1:
            row["subnetwork_losses"] = losses[1:]
        if self.optimizer:
            row["learning_rate"] = self.optimizer.param_groups[0]["lr"]
            _, grad_norm, _ = self.optimizer.step()
            self.scheduler.step(increment=1)
            row["grad_norm"] = float(grad_norm) if grad_norm is not None else None
        if not all(map(_finite, losses)):
            what = "training diverged, lower model.optim.lr" if self.optimizer else "the checkpoint's weights are not finite"
            raise FlextronError(f"step {step + 1}: the loss is {losses[0]}: {what}")
        row |= self._tell(step, losses, networks, gates, total[0, 1].item())
        row["tokens_per_second"] = self.options.global_batch_size * self.seq_length / (time.perf_counter() - begun)
        log.train(row)

    def _tell(
        self, step: int, losses: list[float], networks: list[Network], gates: list[list[Tensor] | None] | None, tokens: float
    ) -> Figures:
        """Give the learner the signal that it learns from, which all ranks gather; its figures on the main process."""
        learner, parallel = self.phase.learner, self.options.sequence_parallel
        match learner:
            case TraceLearner():
                return learner.learn(step, losses)
            case LossLearner():
                return learner.learn(step, losses) if is_main_process() else {}
            case GateLearner():
                gradients_TN = gate_gradients(gates[1:], tokens, parallel)
                return learner.learn(step, losses, gradients_TN) if is_main_process() else {}
            case WeightLearner():
                gradients = [net.gradients(tokens, parallel) for net in networks if isinstance(net, WeightedNetwork)]
                return learner.learn(step, losses, gradients) if is_main_process() else {}
        return {}

    def _validate(self, step: int, log: Log) -> dict[str, float]:
        size, limit = self.options.micro_batch_size, self.trainer.limit_val_batches
        samples = limit and limit * self.options.global_batch_size
        with self._gathered():
            domains = evaluate(self.model, self.valid_data, self.phase.validation(step), self.seq_length, size, samples)
        losses = {name: mean(values) for name, values in domains.items()}
        log.validation({"step": step, "event": "validation", "losses": losses, "domains": domains})
        return losses


def _finite(value: float) -> bool:
    return value - value == 0
