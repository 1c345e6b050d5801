"""`flextron launch`: stages as jobs of a cluster, or here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError, JobFailed
from flextron_mcore.launch import follow, local, slurm
from flextron_mcore.launch.check import check_configuration, missing
from flextron_mcore.launch.plan import Plan, plan
from flextron_mcore.launch.resources import COLUMNS, check_memory, resources
from flextron_mcore.runs.terminal import print_table
from flextron_mcore.runtime.disk import write_whole
from flextron_mcore.settings.compose import to_yaml
from flextron_mcore.settings.launch import LaunchSettings


def run(settings: LaunchSettings) -> dict[str, Any]:
    """Plan, check, and submit or run settings.stages."""
    planned = plan(settings)
    check_configuration(settings, planned)
    check_memory(settings, planned)
    wanting = missing(settings, planned)
    configs = {job.name: planned.results / "launch" / f"{job.name}.yaml" for job in planned.jobs}
    for job in planned.jobs:
        if job.complete:
            print(f"{job.name}: complete in {job.out}")
    if settings.dry_run:
        return _dry_run(settings, planned, configs, wanting)
    if wanting:
        raise FlextronError(wanting[0] + (f" (and {len(wanting) - 1} more: dry_run=true lists them)" if wanting[1:] else ""))
    if not planned.to_run:
        print("nothing is left to do")
        return {"jobs": {}}
    if settings.cluster.type == "slurm":
        _check_idle(planned)  # before a file is replaced that a job reads when it is queued again
    _print_resources(settings, planned)
    _write_configs(planned, configs)
    if settings.cluster.type == "local":
        local.run(planned.to_run, configs, {name: str(value) for name, value in settings.env_vars.items() if value is not None})
        return {"jobs": {job.name: follow.COMPLETE for job in planned.to_run}}
    return _submit(settings, planned, configs)


def _print_resources(settings: LaunchSettings, planned: Plan) -> None:
    title, rows = resources(settings, planned)
    print_table(title, COLUMNS, rows)


def _dry_run(settings: LaunchSettings, planned: Plan, configs: dict[str, Path], wanting: list[str]) -> dict[str, Any]:
    if settings.cluster.type == "slurm":
        for name, script in slurm.scripts(settings, planned, configs):
            print(f"# ---- {name}\n{script.rstrip()}\n")
    else:
        for job in planned.to_run:
            print(f"# ---- {job.name}\n{' '.join(local.command(job, configs[job.name]))}\n")
    _print_resources(settings, planned)
    for line in wanting:
        print(f"not ready: {line}")
    print("dry run: nothing was written or submitted")
    return {"jobs": {job.name: "" for job in planned.to_run}, "not_ready": wanting}


def _write_configs(planned: Plan, configs: dict[str, Path]) -> None:
    try:
        (planned.results / "launch").mkdir(parents=True, exist_ok=True)
        for job in planned.to_run:
            write_whole(configs[job.name], to_yaml(job.settings))
    except OSError as error:
        raise FlextronError(f"run.results_dir={planned.results}: cannot be written: {error.strerror}") from None


def _submit(settings: LaunchSettings, planned: Plan, configs: dict[str, Path]) -> dict[str, Any]:
    experiment, submitted = slurm.submit(settings, planned, configs)
    steps = {job.name: job.settings.trainer.max_steps if job.trains else None for job in planned.to_run}
    stages = {job.name: job.stage for job in planned.to_run}
    records = [follow.Record(job.name, stages[job.name], job.id, job.folder, steps[job.name]) for job in submitted]
    follow.write_record(planned.results, experiment, records)
    for record in records:
        print(f"{record.name}: job {record.id}")
    if settings.detach:
        print(f"follow with: flextron status run={planned.results}")
        return {"jobs": {record.name: record.id for record in records}}
    found = follow.follow(planned.results, records, lambda line: print(line, flush=True))
    print_table(str(planned.results), follow.STATE_COLUMNS, follow.state_rows(found))
    failed = [state for state in found if state.state != follow.COMPLETE]
    if failed:
        first = failed[0]
        raise JobFailed(
            f"{first.record.name} (job {first.record.id}) {first.state.lower()}: {first.error or 'see ' + first.record.logs}"
        )
    return {"jobs": {record.name: record.id for record in records}}


def _check_idle(planned: Plan) -> None:
    """Refuse to launch again what is still waiting or running."""
    if not (planned.results / follow.RECORD).is_file():
        return
    for state in follow.states(planned.results, follow.read_record(planned.results)):
        if state.alive:
            raise FlextronError(
                f"{state.record.name}: job {state.record.id} of an earlier launch is {state.state.lower()}: wait for its end, or "
                f"cancel it with `scancel {state.record.id}`"
            )
