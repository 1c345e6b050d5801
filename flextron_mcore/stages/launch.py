"""`flextron launch`: stages as jobs of a Slurm cluster, or on this machine."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError, JobFailed
from flextron_mcore.launch import follow, local, slurm
from flextron_mcore.launch.check import check_configuration, check_layouts, missing
from flextron_mcore.launch.plan import Job, Plan, plan
from flextron_mcore.launch.resources import COLUMNS, check_memory, resources
from flextron_mcore.launch.search import COLUMNS as LAYOUT_COLUMNS
from flextron_mcore.launch.search import lay_out
from flextron_mcore.launch.storage import COLUMNS as DISK_COLUMNS
from flextron_mcore.launch.storage import preemptions, repeats, storage
from flextron_mcore.launch.texts import check_texts
from flextron_mcore.runs.inputs import check_inputs
from flextron_mcore.runs.output import claimed
from flextron_mcore.runs.terminal import print_table
from flextron_mcore.runtime.disk import write_whole
from flextron_mcore.settings.compose import to_yaml
from flextron_mcore.settings.launch import LaunchSettings
from flextron_mcore.training.rampup import BatchSizes


def run(settings: LaunchSettings) -> dict[str, Any]:
    """Plan and check the jobs of settings.stages, then submit or run them; with dry_run only print them.

    Returns {"jobs": {name: Slurm id; on this machine its state}} without complete jobs; with dry_run {"jobs": {name: ""},
    "not_ready": lines on what is missing}. Raises FlextronError for a job that cannot run, JobFailed for one that failed.
    """
    planned, found = lay_out(settings, plan(settings))
    check_texts(settings, planned)
    for job in planned.to_run:
        check_inputs(job.settings)
    check_configuration(settings, planned)
    check_memory(settings, planned)
    check_layouts(planned)
    wanting = missing(settings, planned)
    if found:
        print_table(found.title, LAYOUT_COLUMNS, found.rows)
        print("".join(f"{line}\n" for line in found.notes), end="")
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
    with claimed(planned.results):
        if settings.cluster.type == "slurm":
            _check_idle(planned)  # first: jobs that are queued again read the files that are replaced below
        else:
            local.check(planned.to_run)
        _print_resources(settings, planned)
        with _files_written(settings, planned, configs) as files:
            if settings.cluster.type == "slurm":
                return _submit(settings, planned, files)
        local.run(planned.to_run, configs, local.environment(settings))
        return {"jobs": {job.name: follow.COMPLETE for job in planned.to_run}}


def _print_resources(settings: LaunchSettings, planned: Plan) -> None:
    """Print the estimates of a plan: memory, FLOPs and hours; disk; cost of preemptions; passes over the data."""
    title, rows = resources(settings, planned)
    print_table(title, COLUMNS, rows)
    title, rows = storage(settings, planned)
    print_table(title, DISK_COLUMNS, rows)
    for line in (*preemptions(settings, planned), *repeats(planned)):
        print(line)


def _dry_run(settings: LaunchSettings, planned: Plan, configs: dict[str, Path], wanting: list[str]) -> dict[str, Any]:
    """Print the scripts or commands of the jobs, the estimates, and what is missing; return the result of `run`.

    Args:
        settings: settings of the launch.
        planned: plan of the launch.
        configs: {job's name: configuration file of its stage}.
        wanting: messages about inputs and tools that are missing.
    """
    if settings.cluster.type == "slurm":
        for name, script in slurm.scripts(settings, planned, configs):
            print(f"# ---- {name}\n{script.rstrip()}\n")
    else:
        for job in planned.to_run:
            words = [*local.command(job, configs[job.name])]
            if variables := local.environment(settings):
                words = ["env", *(f"{name}={value}" for name, value in variables.items()), *words]
            print(f"# ---- {job.name}\n{shlex.join(words)}\n")
    _print_resources(settings, planned)
    for line in wanting:
        print(f"not ready: {line}")
    print("dry run: nothing was written or submitted")
    return {"jobs": {job.name: "" for job in planned.to_run}, "not_ready": wanting}


@contextlib.contextmanager
def _files_written(settings: LaunchSettings, planned: Plan, configs: dict[str, Path]) -> Iterator[list[Path]]:
    """Context that writes the jobs' configurations and, for Slurm, their scripts; its value is the list of the scripts' files.

    If the block raises FlextronError, directories that did not exist before are removed again.

    Args:
        settings: settings of the launch.
        planned: plan of the launch.
        configs: {job's name: configuration file of its stage}.
    """
    folder = planned.results / "launch"
    new = [place for place in (folder, planned.results) if not place.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for job in planned.to_run:
                write_whole(configs[job.name], to_yaml(job.settings))
            files = slurm.write_scripts(settings, planned, configs) if settings.cluster.type == "slurm" else []
        except OSError as error:
            raise FlextronError(
                f"run.results_dir={planned.results}: cannot be written: {error.strerror}: set base_results_dir= to a directory "
                "that you may write"
            ) from None
        yield files
    except FlextronError:
        if folder in new:
            shutil.rmtree(folder, ignore_errors=True)
        if planned.results in new:
            with contextlib.suppress(OSError):  # jobs may have begun to write there
                planned.results.rmdir()
        raise


def _submit(settings: LaunchSettings, planned: Plan, files: list[Path]) -> dict[str, Any]:
    """Submit the jobs, record them in launch/jobs.json and, with detach=false, wait for their end; return the result of `run`.

    Args:
        settings: settings of the launch.
        planned: plan of the launch.
        files: sbatch scripts, from `slurm.write_scripts`.

    Raises:
        FlextronError: sbatch refused a job.
        JobFailed: a job failed, with detach=false.
    """

    def recorded(jobs: list[slurm.Submitted]) -> list[follow.Record]:
        records = [_record(planned, job, submitted) for job, submitted in zip(planned.to_run, jobs, strict=False)]
        follow.write_record(planned.results, records)
        return records

    records = recorded(slurm.submit(planned, files, recorded))
    for record in records:
        print(f"{record.name}: job {record.id}")
    if settings.detach:
        print(f"follow with: {shlex.join(['flextron', 'status', f'run={planned.results}'])}")
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


def _record(planned: Plan, job: Job, submitted: slurm.Submitted) -> follow.Record:
    steps, tokens, samples, options = None, None, None, job.settings
    if job.trains:
        steps, length = options.trainer.max_steps, options.model.seq_length or planned.model.default_length
        samples = BatchSizes(options.model, steps).start(steps)
        tokens = samples * length / steps
    return follow.Record(job.name, job.stage, submitted.id, submitted.folder, steps, tokens, job.ranks, samples)


def _check_idle(planned: Plan) -> None:
    """Raise FlextronError if a job of an earlier launch is still waiting or running, recorded in the results or not."""
    alive = {number: ("", state) for number, state in follow.queued(planned.results).items()}
    if (planned.results / follow.RECORD).is_file():
        for state in follow.states(planned.results, follow.read_record(planned.results)):
            if state.alive:
                alive[state.record.id] = (f"{state.record.name}: ", state.state)
    for number, (name, state) in alive.items():
        raise FlextronError(
            f"{name}job {number} of an earlier launch is {state.lower()}: wait for its end, or cancel it with `scancel {number}`"
        )
