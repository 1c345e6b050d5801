"""Plan of a launch: one job for each stage, with the stage's complete settings. Inputs of a job are results of earlier jobs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig, nearest
from flextron_mcore.cost import read_budget
from flextron_mcore.files import expanded
from flextron_mcore.settings.compose import SHARED, compose, missing
from flextron_mcore.settings.launch import ClusterSettings, LaunchSettings
from flextron_mcore.settings.schema import keys as keys_of
from flextron_mcore.settings.schema import make_paths_absolute
from flextron_mcore.settings.stages import AUTO, STAGES
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.space import ATTENTION_UNITS, ElasticSpace

WITH_ROUTERS = ("gumbel", "joint", "router")  # stages whose checkpoints have routers, in order of preference
# {stage: {key: sources}}: a key gets the result of the first source that is planned before the stage, else of the first that is
# complete on disk. The sources `data` and `hf` are launch's keys, `results` is run.results_dir.
INPUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "prepare": {"tokenizer": ("hf",)},
    "pretrain": {"data": ("data",)},
    "import": {"hf": ("hf",)},
    "importance": {"checkpoint": ("pretrain", "import"), "data": ("data",)},
    "elastic": {"checkpoint": ("importance",), "data": ("data",)},
    "latency": {"checkpoint": ("elastic", "importance")},
    "router": {"checkpoint": ("elastic",), "data": ("data",), "latency": ("latency",)},
    "joint": {"checkpoint": ("router",), "data": ("data",)},
    "gumbel": {"checkpoint": ("elastic", "importance"), "data": ("data",), "latency": ("latency",)},
    "sensitivity": {"checkpoint": (*WITH_ROUTERS, "elastic"), "data": ("data",)},
    "compare": {"checkpoint": WITH_ROUTERS, "data": ("data",), "sensitivity": ("sensitivity",)},
    "evaluate": {"checkpoint": (*WITH_ROUTERS, "elastic"), "data": ("data",)},
    "family": {"checkpoint": WITH_ROUTERS, "data": ("data",)},
    "export": {"checkpoint": (*WITH_ROUTERS, "elastic", "importance", "pretrain", "import")},
    "report": {"run": ("results",)},
}
# (stage, key) of keys that keep their default if no source exists
OPTIONAL = {("prepare", "tokenizer"), ("router", "latency"), ("gumbel", "latency"), ("compare", "sensitivity")}
TRAINS = ("pretrain", "elastic", "router", "joint", "gumbel")
WRITTEN_LAST = "metrics.json"  # file that a stage writes last: if it exists, the result is complete
NODE = 8  # GPUs of a node where no key says otherwise
PARALLEL = (*TRAINS, "importance", "sensitivity", "compare", "evaluate")  # stages of several ranks; the others are one process


@dataclass(frozen=True)
class Job:
    """One job of a launch: a stage with its complete settings.

    Attributes:
        name: name of the stage; export_BUDGET for one of several exports.
        stage: name of the stage.
        settings: complete settings of the stage.
        nodes: number of nodes.
        devices: processes on each node.
        time_limit: time limit of the job, seconds.
        complete: True if the job's result is already on disk.
        cluster: cluster keys of the job.
        reserve: seconds before the time limit at which training stops.
        retries: how many times in a row a failed job is queued again.
    """

    name: str
    stage: str
    settings: StageSettings
    nodes: int
    devices: int
    time_limit: int
    complete: bool
    cluster: ClusterSettings
    reserve: int
    retries: int

    @property
    def out(self) -> Path:
        """Directory of the job's result."""
        return Path(self.settings.out)

    @property
    def ranks(self) -> int:
        """Processes of the job."""
        return self.nodes * self.devices

    @property
    def gpus(self) -> int:
        """GPUs that the job holds, used or not: cluster.gpus_per_node of each node; if that is not set, one for each process."""
        return self.nodes * (self.cluster.gpus_per_node or self.devices)

    @property
    def usable(self) -> int:
        """Seconds in which the job works: its time limit, or for a training the smaller of time limit and trainer.max_time."""
        limit = self.settings.trainer.max_time if self.trains else None
        if limit is None:
            return self.time_limit
        days, hours, minutes, rest = map(int, limit.split(":"))
        return min(self.time_limit, ((days * 24 + hours) * 60 + minutes) * 60 + rest)

    @property
    def trains(self) -> bool:
        """True if the stage has a training loop, which a further job can continue."""
        return self.stage in TRAINS


@dataclass(frozen=True)
class Plan:
    """Jobs of a launch, in the order of running.

    Attributes:
        jobs: all jobs, complete ones included.
        problems: messages, a line each, about inputs that are missing.
        model: architecture of the full model.
        space: elastic space of the model.
        results: run.results_dir as an absolute path.
    """

    jobs: list[Job]
    problems: list[str]
    model: ModelConfig
    space: ElasticSpace
    results: Path

    @property
    def to_run(self) -> list[Job]:
        """Jobs whose result is not on disk yet."""
        return [job for job in self.jobs if not job.complete]


def plan(settings: LaunchSettings) -> Plan:
    """Plan the jobs of settings.stages.

    Raises FlextronError for an error in the keys themselves; a missing input is one of the plan's `problems`.
    """
    results = expanded(settings.run.results_dir).absolute()
    model = architecture(settings)
    stages = list(settings.stages)
    if not stages:
        raise FlextronError("stages=[]: name at least one of " + ", ".join(INPUTS))
    for stage in stages:
        if stage not in INPUTS:
            raise FlextronError(f"stages: '{stage}' is not known{nearest(stage, INPUTS)}: use {', '.join(INPUTS)}")
        if stages.count(stage) > 1:
            raise FlextronError(f"stages: '{stage}' is named twice: name it once")
    jobs: list[Job] = []
    problems: list[str] = []
    for stage in stages:
        for name, keys in _instances(settings, stage):
            job = _job(settings, results, name, stage, keys, [j.stage for j in jobs], problems)
            jobs.append(job)
    return Plan(jobs, problems, model, _space(settings, model, jobs), results)


def architecture(settings: LaunchSettings) -> ModelConfig:
    """Architecture of the full model in settings.model; its default vocabulary size is prepare.vocab_size."""
    values = {field.name: getattr(settings.model, field.name) for field in fields(ModelConfig)}
    if values.get("vocab_size") is None:
        values["vocab_size"] = int(_own(settings, "prepare").get("vocab_size") or compose("prepare", partial=True).vocab_size)
    return ModelConfig.from_dict(values)


def _space(settings: LaunchSettings, model: ModelConfig, jobs: list[Job]) -> ElasticSpace:
    """Elastic space of the jobs: set by the stage that makes the checkpoint, then changed by keys of `importance`.

    Keys of `importance` count also if that stage is not planned: it has then run before, with the same recipe.
    """
    made = next((job.stage for job in jobs if job.stage in ("pretrain", "import")), "import")
    values = asdict(compose("import", partial=True).space)
    for stage in (made, "importance"):
        values |= {name: value for name, value in _own(settings, stage).get("space", {}).items() if value is not None}
    if values["attention_unit"] == AUTO:
        raise FlextronError(
            "importance.space.attention_unit=auto: a plan needs the sizes of all networks: set importance.space.attention_unit "
            f"to {' or '.join(ATTENTION_UNITS)}"
        )
    return ElasticSpace.build(model, **values)


def is_complete(folder: Path) -> bool:
    """True if a stage has finished in `folder`."""
    return (folder / WRITTEN_LAST).is_file()


def seconds(limit: str, key: str) -> int:
    """Seconds of a Slurm time: minutes[:seconds], hours:minutes:seconds or days-hours[:minutes[:seconds]].

    Raises FlextronError, which names `key`, for any other text.
    """
    text = str(limit)
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", text):
        raise FlextronError(f"{key}={text}: is not a time: write it as 04:00:00 or 1-12:00:00 (days-hours:minutes:seconds)")
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, rest_seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, rest_seconds = numbers
    else:
        hours, (minutes, rest_seconds) = 0, [*numbers, 0][:2]
    if len(numbers) > 1 and max(numbers[1:]) > 59:  # Slurm itself would carry them over
        raise FlextronError(f"{key}={text}: has more than 59 minutes or seconds: write it as 04:00:00 or 1-12:00:00")
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest_seconds


def clock(total: int) -> str:
    """Seconds in the form of trainer.max_time: days:hours:minutes:seconds."""
    return f"{total // 86400:02d}:{total // 3600 % 24:02d}:{total // 60 % 60:02d}:{total % 60:02d}"


def count(tokens: int) -> str:
    """Number of tokens as text with three digits and a unit: 83.9 B for 83.9e9."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if tokens >= size:
            return f"{tokens / size:.3g} {letter}"
    return str(tokens)


def _instances(settings: LaunchSettings, stage: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, keys) of each job of a stage: one job, but for `export`, which has one for each of settings.budgets."""
    read_budget(settings.budgets or [])  # refuses a wrong unit now, not in the last stage of the chain
    if stage == "family" and settings.budgets:
        return [(stage, {} if "budgets" in _own(settings, stage) else {"budgets": settings.budgets})]
    if stage != "export" or not settings.budgets or {"budget", "subnetwork"} & _own(settings, "export").keys():
        return [(stage, {})]
    names = [f"export_{_word(budget)}" for budget in settings.budgets]
    for name in names:
        if names.count(name) > 1:
            raise FlextronError(f"budgets: two of them would be exported to {name}: name each budget once")
    return list(zip(names, ({"budget": budget} for budget in settings.budgets), strict=True))


def _own(settings: LaunchSettings, stage: str) -> dict[str, Any]:
    """Keys that the user or a recipe set as STAGE.key."""
    return dict(settings.stage_keys.get(stage, {}))


def _word(budget: float | str | list) -> str:
    """Budget as part of a directory's name: 0.6, or 25ms."""
    return re.sub(r"[^0-9A-Za-z.]+", "_", str(budget)).strip("_")


def _job(
    settings: LaunchSettings,
    results: Path,
    name: str,
    stage: str,
    keys: Mapping[str, Any],
    before: list[str],
    problems: list[str],
) -> Job:
    """Job of a stage, with its complete settings.

    Args:
        settings: settings of the launch.
        results: run.results_dir, absolute.
        name: name of the job and of its directory in `results`.
        stage: name of the stage.
        keys: keys of the stage that only this job has, such as the budget of an export.
        before: stages planned earlier, whose results the job may read.
        problems: list that receives a message for each input that is missing.

    Raises:
        FlextronError: a key is wrong.
    """
    own = _own(settings, stage)
    run = {**asdict(settings.run), **own.pop("run", {})}
    cluster = replace(settings.cluster, **own.pop("cluster", {}))
    known = set(keys_of(STAGES[stage]))
    shared = [_own(settings, SHARED)] if stage in TRAINS else []
    if stage in (*PARALLEL, "family"):
        shared.append(_layout(settings))
    if stage == "pretrain":
        shared.append({"model": {field.name: getattr(settings.model, field.name) for field in fields(ModelConfig)}})
    values = [_only(each, known) for each in shared]  # shared keys that the stage does not have are left out
    values += [{"out": str(results / name), "seed": settings.seed, "debug": settings.debug}, {**own, **keys}]
    calibrated = {"data": INPUTS["importance"]["data"]} if own.get("compensate") else {}
    for key, sources in {**INPUTS[stage], **calibrated}.items():
        if key in own:
            continue
        value = _source(settings, results, sources, before)
        if value is not None:
            values.append({key: value})
        elif sources == ("hf",) and (stage, key) not in OPTIONAL:
            problems.append(f"{stage}: missing hf=: set it to the directory of a Hugging Face checkpoint")
        elif (stage, key) not in OPTIONAL:
            wanted = " or ".join(sources)
            problems.append(
                f"{stage}: needs the result of {wanted}, which is neither among the stages before it nor complete in {results}: "
                f"add it to stages=[...], or set {stage}.{key}="
            )
    composed = compose(stage, values=values, partial=True)
    make_paths_absolute(composed)
    limit, reserve = (seconds(run[key], f"run.{key}") for key in ("time_limit", "stop_before"))
    if stage in TRAINS and settings.cluster.type == "slurm" and composed.trainer.max_time is None:
        if reserve >= limit:
            raise FlextronError(
                f"{stage}: run.stop_before={run['stop_before']} leaves nothing of run.time_limit={run['time_limit']}: lower the "
                "first or raise the second"
            )
        composed.trainer.max_time = clock(limit - reserve)
    nodes, devices = 1, 1
    if stage in PARALLEL:
        nodes, devices = composed.trainer.num_nodes or 1, composed.trainer.devices or 1
        composed.trainer.num_nodes, composed.trainer.devices = nodes, devices
    if lacking := [key for key in missing(composed) if key not in INPUTS[stage]]:
        problems.append(f"{stage}: missing {', '.join(f'{stage}.{key}=' for key in lacking)}")
    return Job(name, stage, composed, nodes, devices, limit, is_complete(results / name), cluster, reserve, run["retries"])


def gpus_of_node(settings: LaunchSettings) -> int:
    """Largest number of GPUs of a node that a job uses.

    It is training.trainer.devices if that is set, else cluster.gpus_per_node; if neither is set, all GPUs of a launch on this
    machine (cluster=local) and NODE on Slurm.
    """
    devices = _own(settings, SHARED).get("trainer", {}).get("devices")
    return devices or settings.cluster.gpus_per_node or (settings.gpus if settings.cluster.type == "local" else NODE)


def _layout(settings: LaunchSettings) -> dict[str, Any]:
    """Layout keys for settings.gpus: the entry of settings.layouts, else numbers of nodes and devices only.

    In the second case search.py chooses the parallel sizes. Raises FlextronError if the GPUs do not fill whole nodes.
    """
    gpus, node = settings.gpus, gpus_of_node(settings)
    if gpus in settings.layouts:
        return settings.layouts[gpus]
    if gpus > node and gpus % node:
        raise FlextronError(
            f"gpus={gpus}: is not a multiple of the {node} GPUs of a node (cluster.gpus_per_node): use "
            f"gpus={gpus // node * node} or gpus={-(-gpus // node) * node}"
        )
    return {"trainer": {"num_nodes": max(1, gpus // node), "devices": min(gpus, node)}}


def _only(values: Mapping[str, Any], known: set[str], prefix: str = "") -> dict[str, Any]:
    """Part of a nested mapping whose dotted names are in `known`."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if prefix + name in known:
            kept[name] = value
        elif isinstance(value, Mapping) and (inner := _only(value, known, f"{prefix}{name}.")):
            kept[name] = inner
    return kept


def _source(settings: LaunchSettings, results: Path, sources: tuple[str, ...], before: list[str]) -> str | None:
    """Path that an input key gets; None if none of its sources is planned or complete.

    Args:
        settings: settings of the launch.
        results: run.results_dir, absolute.
        sources: sources of the key, an entry of INPUTS.
        before: stages planned earlier.
    """
    if sources == ("results",):
        return str(results)
    if sources == ("hf",):
        return settings.hf and str(expanded(settings.hf).absolute())
    stages = ("prepare",) if sources == ("data",) else sources
    found = [stage for stage in stages if stage in before] or [stage for stage in stages if is_complete(results / stage)]
    if sources == ("data",) and not found:
        return str(expanded(settings.data).absolute())
    return str(results / found[0]) if found else None
