"""From the configuration of `launch` to jobs: each with the whole configuration of its stage, which takes earlier results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig, nearest
from flextron_mcore.settings.compose import SHARED, compose, missing
from flextron_mcore.settings.launch import LaunchSettings
from flextron_mcore.settings.schema import keys as keys_of
from flextron_mcore.settings.stages import STAGES
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.space import ElasticSpace

WITH_ROUTERS = ("gumbel", "joint", "router")  # checkpoints with routers, the furthest trained first
# For each stage, what its keys take: results of the first of these stages that is planned before it, else of the first that is
# complete on disk; `data` and `hf` are launch's own keys, `results` its directory. A key in OPTIONAL may stay as it is.
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
OPTIONAL = {("prepare", "tokenizer"), ("router", "latency"), ("gumbel", "latency"), ("compare", "sensitivity")}
TRAINS = ("pretrain", "elastic", "router", "joint", "gumbel")
PARALLEL = (*TRAINS, "importance", "sensitivity", "compare", "evaluate")  # the others are one process


@dataclass(frozen=True)
class Job:
    """One stage as a job. settings: of the stage, resolved. complete: its result is on disk already."""

    name: str
    stage: str
    settings: StageSettings
    nodes: int
    devices: int  # processes a node
    time_limit: int  # seconds
    complete: bool

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    @property
    def trains(self) -> bool:
        return self.stage in TRAINS


@dataclass(frozen=True)
class Plan:
    """All jobs in order, and what must be mended before they can run, a line each."""

    jobs: list[Job]
    problems: list[str]
    model: ModelConfig
    space: ElasticSpace
    results: Path

    @property
    def to_run(self) -> list[Job]:
        return [job for job in self.jobs if not job.complete]


def plan(settings: LaunchSettings) -> Plan:
    """Plan settings.stages. Raises FlextronError for a configuration that no input could make right."""
    results = Path(settings.run.results_dir).expanduser().absolute()
    model = architecture(settings)
    stages = list(settings.stages)
    if not stages:
        raise FlextronError("stages=[]: name at least one of " + ", ".join(INPUTS))
    for stage in stages:
        if stage not in INPUTS:
            raise FlextronError(f"stages: '{stage}' is not known{nearest(stage, INPUTS)}: use {', '.join(INPUTS)}")
        if stages.count(stage) > 1:
            raise FlextronError(f"stages: '{stage}' is named twice")
    jobs: list[Job] = []
    problems: list[str] = []
    for stage in stages:
        for name, keys in _instances(settings, stage):
            job = _job(settings, model, results, name, stage, keys, [j.stage for j in jobs], problems)
            jobs.append(job)
    return Plan(jobs, problems, model, _space(settings, model, jobs), results)


def architecture(settings: LaunchSettings) -> ModelConfig:
    """The model that settings.model describes. A vocabulary that the tokenizer decides counts as prepare's."""
    values = {field.name: getattr(settings.model, field.name) for field in fields(ModelConfig)}
    if values.get("vocab_size") is None:
        values["vocab_size"] = int(_own(settings, "prepare").get("vocab_size") or compose("prepare", partial=True).vocab_size)
    return ModelConfig.from_dict(values)


def _space(settings: LaunchSettings, model: ModelConfig, jobs: list[Job]) -> ElasticSpace:
    """Elastic space as set by the stage that makes the checkpoint, then by `importance`, which may change it, planned or not."""
    made = next((job.stage for job in jobs if job.stage in ("pretrain", "import")), "import")
    values = asdict(compose("import", partial=True).space)
    for stage in (made, "importance"):
        values |= {name: value for name, value in _own(settings, stage).get("space", {}).items() if value is not None}
    return ElasticSpace.build(model, **values)


def is_complete(folder: Path) -> bool:
    """True if a stage has finished in `folder`."""
    return (folder / "metrics.json").is_file()


def seconds(limit: str, key: str) -> int:
    """Seconds of a time limit as Slurm writes it: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    text = str(limit)
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", text):
        raise FlextronError(f"{key}={text}: is not a time; write it as 04:00:00 or 1-12:00:00")
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, rest_seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, rest_seconds = numbers
    else:
        hours, (minutes, rest_seconds) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest_seconds


def clock(total: int) -> str:
    """Seconds as trainer.max_time takes them: days:hours:minutes:seconds."""
    return f"{total // 86400:02d}:{total // 3600 % 24:02d}:{total // 60 % 60:02d}:{total % 60:02d}"


def _instances(settings: LaunchSettings, stage: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, keys) of the jobs of a stage: one, but for the exports of several budgets."""
    if stage == "family" and settings.budgets:
        return [(stage, {} if "budgets" in _own(settings, stage) else {"budgets": settings.budgets})]
    if stage != "export" or not settings.budgets or {"budget", "subnetwork"} & _own(settings, "export").keys():
        return [(stage, {})]
    return [(f"export_{_word(budget)}", {"budget": budget}) for budget in settings.budgets]


def _own(settings: LaunchSettings, stage: str) -> dict[str, Any]:
    """The keys that were set for a stage alone."""
    return dict(settings.stage_keys.get(stage, {}))


def _word(budget: float | str | list) -> str:
    return re.sub(r"[^0-9A-Za-z.]+", "_", str(budget)).strip("_")


def _job(
    settings: LaunchSettings,
    model: ModelConfig,
    results: Path,
    name: str,
    stage: str,
    keys: Mapping[str, Any],
    before: list[str],
    problems: list[str],
) -> Job:
    own = _own(settings, stage)
    run = {**asdict(settings.run), **own.pop("run", {})}
    known = set(keys_of(STAGES[stage]))
    shared = [_own(settings, SHARED)] if stage in TRAINS else []
    if stage in (*PARALLEL, "family"):
        shared.append(_layout(settings))
    if stage == "pretrain":
        shared.append({"model": {field.name: getattr(settings.model, field.name) for field in fields(ModelConfig)}})
    values = [_only(each, known) for each in shared]  # of these each stage takes the keys that it has
    values += [{"out": str(results / name), "seed": settings.seed, "debug": settings.debug}, {**own, **keys}]
    for key, sources in INPUTS[stage].items():
        if key in own:
            continue
        value = _source(settings, results, sources, before)
        if value is not None:
            values.append({key: value})
        elif (stage, key) not in OPTIONAL:
            wanted = " or ".join(sources)
            problems.append(
                f"{stage}: needs the result of {wanted}, which is neither among the stages before it nor complete in {results}: "
                f"add it to stages=[...], or set {stage}.{key}="
            )
    composed = compose(stage, values=values, partial=True)
    limit = seconds(run["time_limit"], "run.time_limit")
    if stage in TRAINS and settings.cluster.type == "slurm" and composed.trainer.max_time is None:
        reserve = seconds(run["stop_before"], "run.stop_before")
        if reserve >= limit:
            raise FlextronError(
                f"{stage}: run.stop_before={run['stop_before']} leaves nothing of run.time_limit={run['time_limit']}"
            )
        composed.trainer.max_time = clock(limit - reserve)
    nodes, devices = 1, 1
    if stage in PARALLEL:
        nodes, devices = composed.trainer.num_nodes or 1, composed.trainer.devices or 1
        composed.trainer.num_nodes, composed.trainer.devices = nodes, devices
    if lacking := [key for key in missing(composed) if key not in INPUTS[stage]]:
        problems.append(f"{stage}: missing {', '.join(f'{stage}.{key}=' for key in lacking)}")
    return Job(name, stage, composed, nodes, devices, limit, is_complete(results / name))


def _layout(settings: LaunchSettings) -> dict[str, Any]:
    layouts = settings.layouts
    if settings.gpus not in layouts:
        raise FlextronError(
            f"gpus={settings.gpus}: layouts has one for {', '.join(map(str, layouts))}; choose one of them, or add yours: "
            f"'layouts={{{settings.gpus}: {{trainer: {{num_nodes: ..., devices: ...}}, model: {{...}}}}}}'"
        )
    return layouts[settings.gpus]


def _only(values: Mapping[str, Any], known: set[str], prefix: str = "") -> dict[str, Any]:
    """The part of a nested mapping whose keys are known."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if prefix + name in known:
            kept[name] = value
        elif isinstance(value, Mapping) and (inner := _only(value, known, f"{prefix}{name}.")):
            kept[name] = inner
    return kept


def _source(settings: LaunchSettings, results: Path, sources: tuple[str, ...], before: list[str]) -> str | None:
    if sources == ("results",):
        return str(results)
    if sources == ("hf",):
        return settings.hf and str(Path(settings.hf).expanduser().absolute())
    stages = ("prepare",) if sources == ("data",) else sources
    found = [stage for stage in stages if stage in before] or [stage for stage in stages if is_complete(results / stage)]
    if sources == ("data",) and not found:
        return str(Path(settings.data).expanduser().absolute())
    return str(results / found[0]) if found else None
