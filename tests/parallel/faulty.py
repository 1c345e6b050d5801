"""The command, with a fault in the training of one rank or of all: FAULT=WHEN:RANKS:WHAT.

WHEN: a step counted from 0, or "start" for the validation before the first. RANKS: a rank, or "all". WHAT: a function below.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time

from flextron_mcore.cli import main
from flextron_mcore.config import FlextronError
from flextron_mcore.runtime import signals


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_launcher() -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    while not signals.received():  # torchrun passes it on
        time.sleep(0.1)


def signal_group() -> None:
    """SIGUSR1 for the whole process group, again and again until it has ended."""
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
    main()
