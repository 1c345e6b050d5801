"""Shell code of a job's script that queues the job again: after a stop at its time limit, and after a failure that may pass.

Slurm itself queues a job again that was preempted or lost a node. A job that fails, or a training that Slurm ends at its time
limit, is queued again up to run.retries times in a row; a new checkpoint starts the count anew. Two jobs of a training in a row
without a step are enough to give up, and input that was refused is not tried again. The node of a rank that died is excluded if
others can take its place.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from flextron_mcore.launch.plan import Job

AGAIN = r"""
newest() {{ find {checkpoints} -maxdepth 1 -name 'iter_*' 2>/dev/null | sort | tail -n 1; }}
begun=$(newest)
again() {{
    local code=$? log={log}_"${{SLURM_JOB_ID}}_${{SLURM_RESTART_COUNT:-0}}".out failures=0 idle=0 why="" said node excluded
    set +e
    # Once a job: by this script, or by last_moment.
    if (set -o noclobber; true > {asked}) 2>/dev/null || [ ! -e {asked} ]; then
        if [ -n "${{watcher:-}}" ]; then kill -KILL "$watcher"; wait "$watcher"; fi 2>/dev/null
    else
        if [ -n "${{watcher:-}}" ]; then wait "$watcher"; fi
        return
    fi
    # Not after scancel or a preemption, when Slurm is ending the job; but where it ends a training at the job's time limit.
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then
        {trains} && [ -n "${{end:-}}" ] && [ "$(date +%s)" -ge "$end" ] || return
    fi
    if [ "$code" -eq 0 ]; then rm -f {tries} {asked}; return; fi
    if [ -e {stopped} ]; then
        rm -f {stopped}
        if [ "$(newest)" != "$begun" ]; then rm -f {tries}; scontrol requeue "$SLURM_JOB_ID"; return; fi
    fi
    said=$(grep -ohE 'flextron: (error|failed|stopped).*' "$log" 2>/dev/null | tail -n 1)
    if [ {retries} -eq 0 ]; then return; fi
    case $said in 'flextron: error:'*"run the same command again"*) ;; 'flextron: error:'*) rm -f {tries}; return ;; esac
    if [ -e {tries} ]; then read -r failures idle < {tries}; fi
    if [ "$(newest)" != "$begun" ]; then failures=0; fi
    failures=$((failures + 1)) idle=$((idle + 1))
    if ! {trains} || grep -qE '{stage}: step [0-9]+/' "$log" 2>/dev/null; then idle=0; fi
    if [ "$idle" -ge 2 ]; then why="two jobs in a row ended without a step"; fi
    if [ "$failures" -gt {retries} ]; then why="run.retries={retries} were used up without a new checkpoint"; fi
    said=${{said#flextron: *: }}
    if [ -n "$why" ]; then
        rm -f {tries}
        echo "flextron: failed: not queued again, $why; the last job said: ${{said:-exit code $code}}" | tee -a "$log"
        return
    fi
    echo "$failures $idle" > {tries}
    echo "queued again after failure $failures of {retries}: ${{said:-exit code $code}}"
    node=$(sed -nE 's/.*flextron: failed: rank [0-9]+ of [0-9]+ \(host ([^,]+), pid .*/\1/p' "$log" 2>/dev/null | tail -n 1)
    trap '' TERM  # the request below ends this script
    scontrol requeue "$SLURM_JOB_ID"
    if [ -n "$node" ] && {may_exclude}; then
        excluded=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%x | grep -v null)
        # A job whose remaining nodes are too few would wait for ever.
        if [ "$(others "$node${{excluded:+,$excluded}}")" -ge "$SLURM_NNODES" ]; then
            scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$node${{excluded:+,$excluded}}"
        fi
    fi
}}
others() {{
    sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,alloc,mix --format=%N | sort -u |
        grep -cvxF "$(scontrol show hostnames "$1")"
}}
# In the background: where processes outlive the job's end by KillWait, Slurm kills this script with them before EXIT.
last_moment() {{
    local wait turn
    trap '' TERM
    while [ "$(date +%s)" -lt "$end" ]; do sleep 5 &> /dev/null; done
    for turn in {{1..300}}; do
        if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then
            wait=$(scontrol show config | sed -nE 's/^KillWait *= *([0-9]+) .*/\1/p')
            sleep $((${{wait:-30}} > 4 ? ${{wait:-30}} - 4 : 0)) &> /dev/null
            (exit 137)
            again
            return
        fi
        sleep 2 &> /dev/null
    done
}}
rm -f {stopped} {asked}
trap again EXIT
trap : TERM  # at its time limit, wait for the processes, which save"""


def lines(job: Job, results: Path, folder: Path) -> str:
    """Shell code for the script of a job, to run before its command.

    Args:
        job: the job.
        results: run.results_dir.
        folder: directory of the job's logs.
    """
    paths = {
        "checkpoints": job.out / "checkpoints",
        "log": folder / f"log-{job.name}",
        "stopped": stopped(job, results),
        "asked": results / "launch" / f"{job.name}.asked",
        "tries": results / "launch" / f"{job.name}.failures",
    }
    return AGAIN.format(
        **{name: shlex.quote(str(path)) for name, path in paths.items()},
        retries=job.retries,
        stage=job.stage,
        trains=str(job.trains).lower(),
        may_exclude=str(not job.cluster.nodelist).lower(),
    )


def stopped(job: Job, results: Path) -> Path:
    """File that a training creates when it has stopped with a checkpoint and is to be continued."""
    return results / "launch" / f"{job.name}.stopped"
