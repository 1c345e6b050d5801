"""Process that imports the package once and forks a child for each command, which saves the seconds of the import.

Reads a JSON object from each line of standard input: argv, files for the output, and the fault that the preloaded library
injects (tests/faults/shim.c). Answers with a line: the exit code of the command, negative for a signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys


def _command(job: dict) -> None:
    """Run the command of a job in this process, which leads a process group of its own."""
    os.setsid()
    for descriptor, file in ((1, job["stdout"]), (2, job["stderr"])):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    texts = (job[name].encode() for name in ("root", "log", "kinds"))
    shim.fault_arm(*texts, ctypes.c_long(job["at"]), job["error"], job["lasting"])
    from flextron_mcore import cli

    code = 70
    try:
        cli.main(job["argv"])
    except SystemExit as end:
        code = end.code
    finally:
        shim.fault_disarm()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Import the package, and then run commands until standard input ends.

    The imports are here, not at the top of the file, because processes that commands spawn import this file again.
    """
    from flextron_mcore.runtime.environment import prepare_environment

    prepare_environment()
    from flextron_mcore import cli  # noqa: F401
    from flextron_mcore.runtime import cpu
    from flextron_mcore.settings.stages import STAGES

    cpu.import_megatron()
    cpu.enable()
    for stage in STAGES:
        importlib.import_module(f"flextron_mcore.stages.{'import_' if stage == 'import' else stage}")
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _command(json.loads(line))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # Helper processes of a command end with its own interpreter. A forked command has none, so they are killed here.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        print(code, flush=True)


if __name__ == "__main__":
    main()
