"""The command `flextron STAGE key=value ...`.

Light on imports: checkpoint writers are spawned processes that import the main module again.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from flextron_mcore.config import FlextronError, JobFailed, nearest
from flextron_mcore.runs.start import run_stage
from flextron_mcore.runtime import signals, watch
from flextron_mcore.runtime.environment import prepare_environment
from flextron_mcore.runtime.memory import collect_rarely
from flextron_mcore.settings.compose import compose, read
from flextron_mcore.settings.help import stage_help, title
from flextron_mcore.settings.stages import STAGES


def _end_with_parent() -> None:
    """Make the kernel end this helper process when its parent ends, however that does.

    Megatron-Core's checkpoint writer runs in helpers, forked and spawned, that would outlive a run killed by kill -9.
    """
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


# Spawned: multiprocessing runs the main module again under this name, which imports this one. Else it is an alias of __main__.
if getattr(sys.modules.get("__mp_main__"), "__name__", None) == "__mp_main__":
    _end_with_parent()
    importlib.import_module("flextron_mcore.runtime.cpu").import_megatron()  # which it needs in any case

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130
EXITS = {
    0: "done",
    1: "failed: anything unexpected, a rank that died",
    EXIT_BAD_INPUT: "bad input",
    signals.EXIT_STOPPED: "training stopped for SIGTERM, SIGUSR1 or trainer.max_time, with a checkpoint: run it again",
}
USAGE = "usage: flextron STAGE key=value ... [--config-dir DIR]\n       flextron STAGE --config FILE\n\nstages:\n"
USAGE += "".join(f"  {name:<12}{title(schema)}\n" for name, schema in STAGES.items())
USAGE += "\nexit codes:\n" + "".join(f"  {code:<12}{text}\n" for code, text in EXITS.items())


class _Failure(NamedTuple):
    """How a command that does not succeed ends: a line on standard error, head and text, and an exit code.

    wait: seconds that a rank of many gives the others to name the cause, of which its own error may be a consequence.
    """

    head: str
    text: str
    code: int
    wait: float = 0.0


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with one of EXITS, after one line on standard error if that is not 0.

    Of many ranks, only one prints that line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    os.register_at_fork(after_in_child=_end_with_parent)
    collect_rarely()
    prepare_environment()
    signals.install(_stopped)
    try:
        failure = _attempt(argv)
    except signals.Stopped as stop:
        failure = _Failure("", str(stop), signals.EXIT_STOPPED)
        _mark_stopped()
    signals.ignore()
    sys.stdout.flush()
    ranks = watch.current()
    if failure and ranks:
        ranks.fail(*failure)
    if failure:
        print(failure.head + failure.text, file=sys.stderr)
        sys.exit(failure.code)
    if ranks:
        from flextron_mcore.runtime import distributed

        ranks.leave()
        distributed.shutdown()
    sys.exit(0)


def _mark_stopped() -> None:
    """Leave the file that $FLEXTRON_STOPPED names. A launcher may hide exit codes, and its script wants to run the job again."""
    file = os.environ.get("FLEXTRON_STOPPED")
    if file and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            Path(file).touch()


def _stopped(text: str, code: int) -> NoReturn:
    """End this process for a signal, wherever it is."""
    with contextlib.suppress(RuntimeError):  # it was about to write there
        sys.stdout.flush()
    if ranks := watch.current():
        # torchrun stops the other ranks when one dies, perhaps before the watch has found out which.
        ranks.fail("", text, code, wait=watch.GRACE)
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{text}\n".encode())
    os._exit(code)


def _attempt(argv: list[str]) -> _Failure | None:
    """Run the command; None if it succeeds."""
    debug = "debug=true" in argv
    try:
        watch.start()
        _main(argv)
        return None
    except KeyboardInterrupt:
        return _Failure("flextron: ", "interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        wait = _wait_for_cause(error)
        if isinstance(error, FlextronError):
            return _Failure("flextron: error: ", " ".join(str(error).split()), EXIT_BAD_INPUT, wait)
        if isinstance(error, JobFailed):
            return _Failure("flextron: failed: ", " ".join(str(error).split()), 1, wait)
        line = (str(error).strip().splitlines() or [""])[0]
        hint = "" if debug else "; add debug=true for the traceback"
        return _Failure("flextron: failed: ", f"{type(error).__name__}: {line}{hint}", 1, wait)


def _wait_for_cause(error: BaseException | None) -> float:
    """How long another rank may be found to be the cause of an error: long for those of communication."""
    while error:
        if re.search("gloo|NCCL", str(error)) or type(error).__module__.startswith("torch.distributed"):
            return watch.SILENCE + 3 * watch.PERIOD
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return 0.0


def _main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if argv[0] == "--version":
        from flextron_mcore import __version__

        print(__version__)
        return
    stage, *rest = argv
    if stage not in STAGES:
        raise FlextronError(f"unknown stage '{stage}'{nearest(stage, STAGES)}: use one of {', '.join(STAGES)}")
    config_dirs, overrides, file, help_wanted = [], [], None, False
    arguments = iter(rest)
    for argument in arguments:
        if argument in ("-h", "--help"):
            help_wanted = True
        elif argument.startswith("--config-dir"):
            value = argument.partition("=")[2] or next(arguments, "")
            if not Path(value).is_dir():
                raise FlextronError(f"--config-dir {value}: no such directory")
            config_dirs.append(value)
        elif argument.partition("=")[0] == "--config":
            file = Path(argument.partition("=")[2] or next(arguments, ""))
        elif "=" not in argument:
            raise FlextronError(f"'{argument}' is not of the form key=value")
        else:
            overrides.append(argument)
    if file is not None and overrides:
        raise FlextronError(f"--config {file}: holds all keys, {overrides[0]} must be changed there")
    settings = read(stage, file) if file is not None else compose(stage, overrides, config_dirs, partial=help_wanted)
    if help_wanted:
        print(stage_help(settings), end="")
        return
    run_stage(settings)
