"""Search for the layout of a launch: of all that fit into the GPUs, the one with the least estimated time. No torch import."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flextron_mcore.config import FlextronError
from flextron_mcore.flops import Costs
from flextron_mcore.launch.estimate import memory_of
from flextron_mcore.launch.flops import recomputed_share, work
from flextron_mcore.launch.layout import Layout, Rank
from flextron_mcore.launch.plan import PARALLEL, Job, Plan, gpus_of_node
from flextron_mcore.launch.resources import ESTIMATED, gpu_memory, with_reserve
from flextron_mcore.launch.speed import Speed, stage_seconds
from flextron_mcore.settings.compose import SHARED
from flextron_mcore.settings.launch import LaunchSettings
from flextron_mcore.settings.schema import show
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.training.rampup import BatchSizes

TENSOR, PIPELINE, CHUNKS = (f"{kind}model_parallel_size" for kind in ("tensor_", "pipeline_", "virtual_pipeline_"))
FIRST, LAST = (f"num_layers_in_{end}_pipeline_stage" for end in ("first", "last"))
MICRO, SEQUENCE, DISTRIBUTED = "micro_batch_size", "sequence_parallel", "use_distributed_optimizer"  # DISTRIBUTED: of model.ddp
RECOMPUTATION = ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules")
SEARCHED = (TENSOR, PIPELINE, CHUNKS, FIRST, LAST, MICRO, SEQUENCE, DISTRIBUTED, *RECOMPUTATION)
RECOMPUTED: tuple[dict[str, Any], ...] = (  # all layers first: it needs least memory
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    {},
)
MICRO_BATCHES, MOST_CHUNKS = (1, 2, 4, 8, 16), 8
COLUMNS = ("TP", "PP", "chunks", "DP", "micro batch", "recomputed", "time", "GB needed", "")
SHOWN = 4  # layouts shown beside the chosen one: at most four that fit, and four that do not
EQUAL = 1.01  # times within 1 % count as equal: the estimate cannot tell them apart
Keys = Mapping[str, Any]  # values of keys in SEARCHED; a key that is absent has its default


@dataclass(frozen=True)
class Found:
    """Table of the best layouts that a search found.

    Attributes:
        title, rows: title and rows of the table; a row has the COLUMNS of one layout.
        notes: lines for below the table, about keys that limited the search.
    """

    title: str
    rows: list[list[str]]
    notes: list[str]


@dataclass(frozen=True)
class _Tried:
    """Layout that a search has tried.

    Attributes:
        seconds: estimated seconds of all trainings together; without a training, of all parallel jobs.
        keys: layout keys.
        needed: bytes that a GPU needs for the largest job, reserve included.
        job: that job.
    """

    seconds: float
    keys: Keys
    needed: int
    job: Job


def lay_out(settings: LaunchSettings, plan: Plan) -> tuple[Plan, Found | None]:
    """Choose the best layout for settings.gpus: (plan with that layout, table of the search).

    The plan is returned unchanged, with None, if settings.layouts has an entry for these GPUs, or no job is parallel. Layout keys
    that the user set for all trainings (training.model.*) or for one stage keep their values.

    Raises:
        FlextronError: no layout divides the model and the batch, or none fits into the GPUs.
    """
    search = _Search(settings, plan)
    if settings.gpus in settings.layouts or not search.jobs:
        return plan, None
    keys, found = search.best()
    jobs = [replace(job, settings=search.settings_of(job, keys)) if job in search.jobs else job for job in plan.jobs]
    return replace(plan, jobs=jobs), found


class _Search:
    """Search for one layout that all parallel jobs of a plan can have."""

    def __init__(self, settings: LaunchSettings, plan: Plan) -> None:
        self.plan, self.gpus, self.size = plan, settings.gpus, gpu_memory(settings)
        self.own = {stage: _searched(values.get("model", {})) for stage, values in settings.stage_keys.items()}
        self.fixed = self.own.get(SHARED, {})
        self.jobs = [job for job in plan.to_run if job.stage in PARALLEL and job.stage in ESTIMATED]
        self.timed = [job for job in self.jobs if job.trains] or self.jobs
        self.node = gpus_of_node(settings)
        self.speed = Speed.read(settings, min(self.node, self.gpus))
        batches = [size for job in self.jobs if job.trains for size in _batch_sizes(job)]
        self.batch = math.gcd(*batches) if batches else None
        self.flops: dict[tuple, float] = {}

    def best(self) -> tuple[Keys, Found]:
        """Keys of the fastest layout that fits, and the table. Raises FlextronError if none divides, or none fits."""
        timed, reason = [], None
        for keys in self.candidates():
            try:
                timed.append((sum(self.seconds(job, keys) for job in self.timed), keys))
            except FlextronError as error:  # keys of one stage do not go with this layout
                reason = error
        if not timed:
            raise reason or FlextronError(self._indivisible())
        timed.sort(key=lambda pair: pair[0])
        too_large: list[_Tried] = []
        fitting: list[_Tried] = []
        for seconds, keys in timed:
            tried = _Tried(seconds, keys, *self.needed(keys, self.gpus))
            if fitting and seconds > EQUAL * fitting[0].seconds and len(fitting) > SHOWN:
                break
            (fitting if self.size is None or tried.needed <= self.size else too_large).append(tried)
        if not fitting:
            raise FlextronError(self._too_small(min(too_large, key=lambda tried: tried.needed)))
        best = min((tried for tried in fitting if tried.seconds <= EQUAL * fitting[0].seconds), key=lambda tried: tried.needed)
        faster = [tried for tried in too_large if tried.seconds < best.seconds]
        others = [tried for tried in fitting if tried is not best]
        shown = sorted([*_distinct(faster, [best]), best, *_distinct(others, [best])], key=lambda tried: tried.seconds)
        title = f"layouts for gpus={self.gpus}: {len(timed)} divide model and batch"
        if self.size is not None:
            title += f", {len(faster)} faster ones do not fit into {self.size / 1e9:.0f} GB"
        title += f"; the one that needs least of those within {EQUAL - 1:.0%} of the fastest"
        return best.keys, Found(title, [self._row(tried, best) for tried in shown], list(self._notes()))

    def candidates(self) -> Iterator[Keys]:
        """Keys of all layouts that divide GPUs, layers, heads and batch. Keys that are set for training keep their values."""
        for tensor in self._tensor_sizes(min(self.node, self.gpus)):
            for pipeline in range(1, min(self.plan.model.num_layers, self.gpus // tensor) + 1):
                if self.gpus % (tensor * pipeline) or self.fixed.get(PIPELINE, pipeline) != pipeline:
                    continue
                data = self.gpus // (tensor * pipeline)
                for stages in self._stages(pipeline):
                    yield from self._completed({TENSOR: tensor, **stages}, data)

    def _tensor_sizes(self, devices: int) -> list[int]:
        """Sizes of tensor parallelism that stay within a node and divide the model."""
        whole = math.gcd(devices, self.plan.space.granularity, self.plan.model.num_query_groups)
        return [size for size in range(1, whole + 1) if whole % size == 0 and self.fixed.get(TENSOR, size) == size]

    def _stages(self, pipeline: int) -> Iterator[Keys]:
        """Pipeline keys for `pipeline` stages, once for each number of chunks that divides the layers of a stage.

        If the stages do not divide the layers, the first and the last stage get fewer. Nothing if that is not possible either.
        """
        layers, keys = self.plan.model.num_layers, {PIPELINE: pipeline}
        given = {name: self.fixed[name] for name in (FIRST, LAST) if name in self.fixed}
        middle, left = pipeline - len(given), layers - sum(given.values())
        sizes = [*given.values(), left // middle if middle else 0]
        if not given and layers % pipeline:
            each = -(-layers // pipeline)
            ends = layers - each * (pipeline - 2)
            if pipeline < 3 or ends < 2:
                return
            given = {FIRST: ends // 2, LAST: ends - ends // 2}
            sizes = [*given.values(), each]
        elif middle and left % middle:
            return
        most = math.gcd(*sizes) if pipeline > 1 else 1
        for chunks in range(1, min(most, MOST_CHUNKS) + 1):
            if most % chunks == 0 and self.fixed.get(CHUNKS, chunks) == chunks:
                yield keys | given | ({CHUNKS: chunks} if chunks > 1 else {})

    def _completed(self, sizes: Keys, data: int) -> Iterator[Keys]:
        """Layout keys with given parallel sizes, once for each micro-batch size and kind of recomputation.

        The first one needs least memory.

        Args:
            sizes: keys of tensor and pipeline parallelism.
            data: number of data-parallel ranks.
        """
        recomputed = {name: self.fixed[name] for name in RECOMPUTATION if name in self.fixed}
        micro_batches = [self.fixed[MICRO]] if MICRO in self.fixed else MICRO_BATCHES
        for micro in micro_batches:
            number, rest = divmod(self.batch, micro * data) if self.batch else (1, 0)
            # The interleaved schedule needs a multiple of the pipeline stages as micro-batches.
            if rest or not number or (CHUNKS in sizes and number % sizes[PIPELINE]):
                continue
            layers = self.plan.model.num_layers // (sizes[PIPELINE] * sizes.get(CHUNKS, 1))
            half = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers // 2}
            for again in [recomputed] if recomputed else [*RECOMPUTED, *([half] if layers > 1 else [])]:
                yield {**sizes, MICRO: micro, SEQUENCE: sizes[TENSOR] > 1, DISTRIBUTED: data > 1, **again, **self.fixed}

    def settings_of(self, job: Job, keys: Keys) -> StageSettings:
        """Settings of a job in a layout; keys that the user set for its stage keep their values."""
        own, model = self.own.get(job.stage, {}), job.settings.model
        dropped = set(own)
        if dropped & set(RECOMPUTATION):
            dropped |= set(RECOMPUTATION)
        if PIPELINE in own:
            dropped |= {CHUNKS, FIRST, LAST}
        kept = {name: value for name, value in keys.items() if name not in dropped}
        if own.get(TENSOR) == 1:
            kept[SEQUENCE] = False
        distributed = kept.pop(DISTRIBUTED, None)
        if distributed is not None and hasattr(model, "ddp"):
            kept["ddp"] = replace(model.ddp, use_distributed_optimizer=distributed)
        return replace(job.settings, model=replace(model, **kept))

    def seconds(self, job: Job, keys: Keys) -> float:
        """Estimated seconds of a job in a layout. Raises FlextronError if its sizes do not divide."""
        settings = self.settings_of(job, keys)
        layout = self._layout(settings, job.ranks)
        costs = Costs(self.plan.model, self.plan.space, layout.length, layout.tensor)
        return stage_seconds(costs, settings, layout, self._flops(job, settings, layout), self.speed)

    def _flops(self, job: Job, settings: StageSettings, layout: Layout) -> float:
        """FLOPs of a job. They depend on tensor parallelism and recomputation only, and are computed once for each of these."""
        if layout.recompute[0] == "block":
            none, all_ = (self._flops(job, settings, replace(layout, recompute=(method, 1))) for method in ("", "uniform"))
            return none + recomputed_share(layout) * (all_ - none)
        place = job.name, layout.tensor, layout.recompute[0]
        if place not in self.flops:
            self.flops[place] = work(self.plan.model, self.plan.space, settings, layout, None).flops
        return self.flops[place]

    def needed(self, keys: Keys, gpus: int) -> tuple[int, Job]:
        """Need of the largest job in a layout of `gpus` ranks: (bytes on each GPU, reserve included; that job)."""
        found = []
        for job in self.jobs:
            settings = self.settings_of(job, keys)
            layout = self._layout(settings, gpus)
            # Stages between the second and the last one have as many layers as the second, and fewer micro-batches in flight.
            model = self.plan.model
            ranks = {0, min(1, layout.pipeline - 1), layout.pipeline - 1}
            if model.window_attn_skip_freq or model.no_rope_freq:  # layers differ
                ranks = set(range(layout.pipeline))
            found.append((with_reserve(max(sum(memory_of(Rank(model, layout, i), settings)) for i in ranks)), job))
        return max(found, key=lambda pair: pair[0])

    def _layout(self, settings: StageSettings, gpus: int) -> Layout:
        """Layout of a stage on `gpus` ranks. Raises FlextronError if its sizes do not divide."""
        return Layout.read(self.plan.model, self.plan.space, settings, gpus, "bf16", cuda=True)

    def _row(self, tried: _Tried, best: _Tried) -> list[str]:
        """Row of COLUMNS for a layout; its time is a multiple of the time of the chosen layout, `best`."""
        keys, over = tried.keys, tried.needed - (self.size or math.inf)
        layers = [keys[name] for name in (FIRST, LAST) if name in keys]
        ends = f" (ends of {' and '.join(map(str, layers))} layers)" if layers else ""
        data = self.gpus // (keys[TENSOR] * keys[PIPELINE])
        number = f"{keys.get('recompute_num_layers')} layers of a chunk"
        again = {
            "full": number if keys.get("recompute_method") == "block" else "layers",
            "selective": ", ".join(keys.get("recompute_modules") or ()),
        }
        verdict = f"{over / 1e9:.1f} GB too much for {tried.job.name}" if over > 0 else "chosen" if tried is best else ""
        return [
            *(str(keys[TENSOR]), f"{keys[PIPELINE]}{ends}", str(keys.get(CHUNKS, 1)), str(data), str(keys[MICRO])),
            again.get(keys.get("recompute_granularity"), "-"),
            *(f"{tried.seconds / best.seconds:.3f}", f"{tried.needed / 1e9:.1f}", verdict),
        ]

    def _notes(self) -> Iterator[str]:
        """Lines about keys that the user fixed, and about a granularity that limits tensor parallelism."""
        if self.fixed:
            yield "as set: " + ", ".join(f"training.model.{_path(name)}={show(value)}" for name, value in self.fixed.items())
        granularity = self.plan.space.granularity
        possible = math.gcd(8, min(self.node, self.gpus), self.plan.model.num_query_groups)
        if possible > granularity and TENSOR not in self.fixed:
            yield (
                f"TP is at most space.granularity={granularity}; with importance.space.granularity={possible} "
                f"importance.space.attention_unit=query_head it could be {possible}"
            )

    def _indivisible(self) -> str:
        """Message for a number of GPUs without a layout that divides."""
        names = "".join(f", training.model.{_path(name)}={show(value)}" for name, value in self.fixed.items())
        whole = {job.settings.model.global_batch_size for job in self.jobs if job.trains}
        sizes = "model.global_batch_size" if not whole or self.batch in whole else "the common divisor of all batch sizes"
        wanted, groups = self.fixed.get(TENSOR, 1), self.plan.model.num_query_groups
        finer = self.plan.space.granularity % wanted and groups % wanted == 0
        return (
            f"gpus={self.gpus}: no layout divides {self.plan.model.num_layers} layers, space.granularity="
            f"{self.plan.space.granularity} and {sizes}={self.batch}{names}: set gpus= to another number"
            + (", or leave out keys of the layout (training.model.*)" if self.fixed else "")
            + (f", or set importance.space.granularity={wanted} importance.space.attention_unit=query_head" if finer else "")
        )

    def _too_small(self, least: _Tried) -> str:
        """Message for GPUs into which no layout fits; it names the smallest number that does."""
        number = self._smallest()
        remedy = f"use gpus={number}" if number else "no number of them is enough: plan for GPUs with more memory with gpu="
        return (
            f"gpus={self.gpus}: no layout fits: {least.job.name} needs at least {least.needed / 1e9:.1f} GB of each GPU, reserve "
            f"included; it has {self.size / 1e9:.0f} GB (cluster.gpu.memory): {remedy}"
        )

    def _smallest(self) -> int | None:
        """Smallest number of GPUs, above settings.gpus, for which a layout fits; None if there is none."""
        batch = self.batch or 1
        sizes = []
        for tensor in self._tensor_sizes(self.node):
            for pipeline in range(1, self.plan.model.num_layers + 1):
                if self.fixed.get(PIPELINE, pipeline) != pipeline:
                    continue
                for data in (n for n in range(1, batch + 1) if batch % n == 0):
                    number = tensor * pipeline * data
                    devices = min(number, self.node)
                    if number > self.gpus and number % devices == 0 and devices % tensor == 0:
                        sizes.append((number, tensor, pipeline, data))
        for number, tensor, pipeline, data in sorted(sizes):
            for stages in self._stages(pipeline):
                # The first layout of these sizes needs least memory: smallest micro-batch, all layers recomputed.
                keys = next(self._completed({TENSOR: tensor, **stages}, data), None)
                try:
                    if keys and self.needed(keys, number)[0] <= self.size:
                        return number
                except FlextronError:  # keys of one stage do not go with this layout
                    continue
        return None


def _batch_sizes(job: Job) -> list[int]:
    """Distinct global batch sizes of a training: several with rampup_batch_size. Raises FlextronError if that key is wrong."""
    try:
        return BatchSizes(job.settings.model, job.settings.trainer.max_steps).sizes
    except FlextronError as error:
        raise FlextronError(f"{job.stage}: {error}") from None


def _distinct(tried: list[_Tried], shown: list[_Tried]) -> list[_Tried]:
    """First SHOWN layouts of `tried` that differ from each other and from those in `shown` in more than the number of chunks."""
    found: list[_Tried] = []
    for each in tried:
        kinds = [{**other.keys, CHUNKS: 1} for other in (*shown, *found)]
        if len(found) < SHOWN and {**each.keys, CHUNKS: 1} not in kinds:
            found.append(each)
    return found


def _searched(model: Mapping[str, Any]) -> dict[str, Any]:
    """Layout keys (SEARCHED) that the section `model` sets to another value than null: {key: value}.

    Args:
        model: keys of the section, nested. Keys of its section `ddp` are returned without that prefix.
    """
    found = {**model, **(model.get("ddp") or {})}
    return {name: found[name] for name in SEARCHED if found.get(name) is not None}


def _path(name: str) -> str:
    """Dotted name of a layout key (SEARCHED) within the section `model`."""
    return f"ddp.{name}" if name == DISTRIBUTED else name
