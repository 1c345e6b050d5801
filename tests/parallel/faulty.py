"""Run `flextron` with a fault, which the environment variable FAULT=WHEN:RANKS:WHAT describes.

WHEN is a training step counted from 0, `start` for the validation before the first step, or one of MOMENTS. RANKS is a rank, or
`all`. WHAT is a function of this module.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import signal
import subprocess
import time

from flextron_mcore.cli import main
from flextron_mcore.config import FlextronError
from flextron_mcore.runtime import signals

# {moment: (module, function, number of the call with the fault)}: in a save, in a helper process that writes a checkpoint, in an
# evaluation, in an export.
MOMENTS = {
    "save": ("flextron_mcore.training.checkpointing", "TrainingCheckpointer._state", 1),
    "writer": ("megatron.core.dist_checkpointing.strategies.filesystem_async", "FileSystemWriterAsync.write_preloaded_data", 1),
    "evaluate": ("flextron_mcore.evaluation.perplexity", "run_networks", 2),
    "export": ("flextron_mcore.exports.formats", "Job.__post_init__", 1),
}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_launcher() -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    while not signals.received():  # torchrun passes the signal on to its processes
        time.sleep(0.1)


def kill_launcher() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(120)  # until the watch of ranks ends this process: the few steps would be done before it looks


def stop_launcher() -> None:
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(120)


def signal_group() -> None:
    """Send SIGUSR1 to the whole process group again and again until the group has ended."""
    script = f"while kill -USR1 -{os.getpgid(0)}; do sleep 0.01; done"
    subprocess.Popen(["sh", "-c", script], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not signals.received():
        time.sleep(0.01)


def fail() -> None:
    raise FlextronError("wires crossed")


if __name__ == "__main__":
    from flextron_mcore.runtime.environment import prepare_environment

    prepare_environment()
    from flextron_mcore.training.loop import _Run

    when, ranks, what = os.environ["FAULT"].split(":")
    train, validate = _Run._step, _Run._validate

    def fault(at: object) -> None:
        if str(at) == when and ranks in ("all", os.environ.get("RANK", "0")):
            globals()[what]()

    def faulty_step(self, number, log):
        fault(number)
        train(self, number, log)

    def faulty_validation(self, number, log):
        fault("start")
        return validate(self, number, log)

    _Run._step, _Run._validate = faulty_step, faulty_validation
    if when in MOMENTS:
        module, name, call = MOMENTS[when]
        *owner, name = name.split(".")
        place = functools.reduce(getattr, owner, importlib.import_module(module))
        whole, calls = getattr(place, name), itertools.count(1)

        def faulty(*arguments, **options):
            if next(calls) == call:
                fault(when)
            return whole(*arguments, **options)

        setattr(place, name, faulty)
    main()
