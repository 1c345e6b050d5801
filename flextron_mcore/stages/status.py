"""`flextron status`: state of the jobs that `flextron launch` submitted."""

from __future__ import annotations

from typing import Any

from flextron_mcore.config import FlextronError, nearest
from flextron_mcore.files import LARGEST_LOG, expanded, read_bytes
from flextron_mcore.launch.follow import (
    STATE_COLUMNS,
    SlurmSilent,
    follow,
    last_states,
    log_files,
    read_record,
    state_rows,
    states,
)
from flextron_mcore.runs.terminal import print_table
from flextron_mcore.settings.stages import StatusSettings


def run(settings: StatusSettings) -> dict[str, Any]:
    """Print the states of the jobs of the newest launch in settings.run, or the log of one job.

    With watch=true, print changes until all jobs have ended. Returns {"jobs": {name: state}} or {"log": file}.
    """
    results = expanded(settings.run).absolute()
    records = read_record(results)
    if settings.logs:
        known = {record.name: record for record in records}
        if settings.logs not in known:
            raise FlextronError(
                f"logs={settings.logs}: no such job{nearest(settings.logs, known)}: use one of {', '.join(known)}"
            )
        files = log_files(known[settings.logs])
        if not files:
            raise FlextronError(
                f"logs={settings.logs}: nothing was logged yet in {known[settings.logs].logs}: try again when the job runs"
            )
        print(files[0])
        lines = read_bytes(files[0], largest=LARGEST_LOG).decode(errors="replace").splitlines()
        print("\n".join(lines[-settings.lines :] if settings.lines else lines))
        return {"log": str(files[0])}
    try:
        found = follow(results, records, lambda line: print(line, flush=True)) if settings.watch else states(results, records)
    except SlurmSilent as error:
        print(f"squeue: {error.said}; without it:", flush=True)
        found = last_states(results, records)
    print_table(str(results), STATE_COLUMNS, state_rows(found))
    return {"jobs": {state.record.name: state.state for state in found}}
