"""Shell code of a job's script that queues the job again: after a stop at its time limit, and after a failure.

Slurm itself queues a job again that lost a node, or was preempted with PreemptMode=REQUEUE; with PreemptMode=CANCEL the script
does. A job that fails, or a training that Slurm ends at its time limit, is queued again up to run.retries times in a row; a new
checkpoint resets the count. The script gives up after two jobs of a training in a row without a step. It does not try refused
input again, unless an earlier job trained with it. It excludes the node of a rank that died if other nodes can take its place.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from flextron_mcore.launch.plan import Job

AGAIN = r"""
end="" watcher="" start=$(date +%s)
# The first job of a launch resets the count of failures.
if [ "${{SLURM_RESTART_COUNT:-0}}" -eq 0 ]; then rm -f {tries}; fi
newest() {{ find {checkpoints} -maxdepth 1 -name 'iter_*' 2>/dev/null | sort | tail -n 1; }}
begun=$(newest)
finished() {{
    local file
    for file in {files}; do [ -e "$file" ] || return; done
}}
# Variables of the user's shell or of a module, which would change the answers of Slurm's commands.
plain() {{ unset "${{!SQUEUE_@}}" "${{!SINFO_@}}" SLURM_TIME_FORMAT; }}
# Runs a command of Slurm's again, for an hour, while the controller does not answer.
ask() {{
    local said turn
    for turn in {{1..360}}; do
        if {{ said=$("$@" 2>&1 >&3); }} 3>&1; then return; fi
        case $said in *nvalid*|*denied*|*disabled*|*pending*) break ;; esac
        if [ "$turn" -eq 1 ]; then echo "asking again until Slurm answers: $said" >&2; fi
        sleep 10 &> /dev/null
    done
    echo "$said" >&2
    return 1
}}
# State of this job at Slurm, its end, the time of a preemption, and the reason for the state.
shown() {{ ask squeue --noheader --jobs="$SLURM_JOB_ID" --Format=State:30,EndTime:30,PreemptTime:30,Reason:30; }}
again() {{
    local code=$? log={log}_"${{SLURM_JOB_ID}}_${{SLURM_RESTART_COUNT:-0}}".out failures=0 idle=0 why="" said node excluded
    local state ends preempted reason
    set +e
    plain
    # Only one of two may do the rest: this script at its end, or last_moment in the background.
    if (set -o noclobber; true > {asked}) 2>/dev/null || [ ! -e {asked} ]; then
        if [ -n "$watcher" ]; then kill -KILL "$watcher"; wait "$watcher"; fi 2>/dev/null
    else
        if [ -n "$watcher" ]; then wait "$watcher"; fi
        return
    fi
    read -r state ends preempted reason <<< "$(shown)"
    if [ "$state" != RUNNING ]; then
        case $preempted in
            2[0-9]*) rm -f {stopped}; ask scontrol requeue "$SLURM_JOB_ID"; return ;;
            # Not after scancel, nor where Slurm itself has queued the job again.
            *) [ "$reason" = TimeLimit ] && {{ {trains} || finished; }} || return ;;
        esac
    elif [ "$code" -eq 0 ] || finished; then  # a rank may have died after its work
        rm -f {tries} {asked}
        # Slurm calls a job that ends after its time limit a failure: the next one succeeds at once.
        if [[ $ends == 2[0-9]* && $(date -d "10 seconds" +%FT%T) > $ends ]]; then ask scontrol requeue "$SLURM_JOB_ID"; fi
        exit 0
    fi
    if [ -e {stopped} ]; then
        rm -f {stopped}
        if [ "$(newest)" != "$begun" ]; then rm -f {tries}; ask scontrol requeue "$SLURM_JOB_ID"; return; fi
    fi
    said=$(grep -ohE 'flextron: (error|failed|stopped).*' "$log" 2>/dev/null | tail -n 1)
    if [ {retries} -eq 0 ]; then return; fi
    case $said in
        'flextron: error:'*"run the same command again"*) ;;
        # Input that an earlier job has trained with is right: a file system may be full, or missing on this node.
        'flextron: error:'*) if [ "${{SLURM_RESTART_COUNT:-0}}" -eq 0 ] || [ -z "$begun" ]; then rm -f {tries}; return; fi ;;
    esac
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
    ask scontrol requeue "$SLURM_JOB_ID"
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
# For a process in the background: true while the script that started it runs.
under_script() {{
    local parent rest
    read -r rest rest rest parent rest < "/proc/$BASHPID/stat" && [ "$parent" -eq "$$" ]
}}
# Runs in the background. If processes outlive KillWait after a preemption or the job's end, Slurm kills the script before its
# EXIT trap has run.
last_moment() {{
    local wait turn ending="" state rest
    plain
    trap ending=1 TERM
    # Waits for SIGTERM, the job's end or the script's. A SIGTERM from before the trap was set is lost: hence the other two.
    while [ -z "$ending" ] && under_script && {{ [ -z "$end" ] || [ "$(date +%s)" -lt "$end" ]; }}; do
        (trap '' TERM; exec sleep 5) &> /dev/null &
        wait "$!"
    done
    trap '' TERM
    for turn in {{1..300}}; do
        read -r state rest <<< "$(shown)"
        if [ "$state" != RUNNING ]; then
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
trap : TERM  # wait for the processes, which save
if finished; then exit 0; fi  # an earlier run of this job did the work, and ended before Slurm took notice"""


def lines(job: Job, results: Path, folder: Path, files: Sequence[Path]) -> str:
    """Shell code for the script of a job, to run before its command.

    Args:
        job: the job.
        results: run.results_dir.
        folder: directory of the job's logs.
        files: files that exist when the job's work is complete.
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
        files=shlex.join(str(file) for file in files),
        retries=job.retries,
        stage=job.stage,
        trains=str(job.trains).lower(),
        may_exclude=str(not job.cluster.nodelist).lower(),
    )


def stopped(job: Job, results: Path) -> Path:
    """Path of the file that a training creates when it has stopped with a checkpoint and must be continued.

    Args:
        job: the training's job.
        results: run.results_dir.
    """
    return results / "launch" / f"{job.name}.stopped"
