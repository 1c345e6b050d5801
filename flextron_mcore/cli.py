"""Command line `flextron STAGE key=value ...`.

The module imports little, because checkpoint writers are spawned processes, which import the main module again.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from flextron_mcore.config import FlextronError, JobFailed, nearest
from flextron_mcore.runs.start import run_stage
from flextron_mcore.runtime import signals, watch
from flextron_mcore.runtime.environment import prepare_environment
from flextron_mcore.runtime.memory import collect_rarely
from flextron_mcore.settings.compose import compose, read
from flextron_mcore.settings.help import stage_help, title
from flextron_mcore.settings.stages import STAGES, VerifySettings

# True in a spawned process: multiprocessing runs the main module again under the name __mp_main__. Elsewhere that entry of
# sys.modules is an alias of __main__, or missing.
if getattr(sys.modules.get("__mp_main__"), "__name__", None) == "__mp_main__":
    signals.end_with_parent()
    prepare_environment()
    importlib.import_module("flextron_mcore.runtime.cpu").import_megatron()  # the CPU runtime must precede Megatron-Core

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130
EXITS = {
    0: "done",
    1: "failed: an unexpected error, or a rank that died",
    EXIT_BAD_INPUT: "bad input",
    signals.EXIT_STOPPED: "training stopped with a checkpoint at SIGTERM, SIGUSR1, trainer.max_time or the job's end: run again",
}
USAGE = "usage: flextron STAGE key=value ... [--config-dir DIR]\n       flextron STAGE --config FILE\n\nstages:\n"
USAGE += "".join(f"  {name:<12}{title(schema)}\n" for name, schema in STAGES.items())
USAGE += "\nexit codes:\n" + "".join(f"  {code:<12}{text}\n" for code, text in EXITS.items())


class _Failure(NamedTuple):
    """Failure of a command on this rank: a line on standard error (head + text), and an exit code.

    wait: seconds to wait for an error of another rank, which may have caused this rank's error.
    """

    head: str
    text: str
    code: int
    wait: float = 0.0


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit with a code of EXITS, 130 for Ctrl-C, or 128 plus a signal's number.

    Unless the code is 0, one rank prints one line on standard error.

    argv: arguments without the program's name; None for the process's own.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    os.register_at_fork(after_in_child=signals.end_with_parent)
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
    """Create the file $FLEXTRON_STOPPED, which tells a job script to run the job again: launchers may hide the exit code."""
    file = os.environ.get("FLEXTRON_STOPPED")
    if file and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            Path(file).touch()


def _stopped(text: str, code: int) -> NoReturn:
    """End this process at once because of a signal, with a line on standard error (`text`) and an exit code."""
    with contextlib.suppress(RuntimeError):  # the signal interrupted a write to stdout
        sys.stdout.flush()
    if ranks := watch.current():
        # torchrun stops the other ranks when one dies, perhaps before the watch knows which one: give it time.
        ranks.fail("", text, code, wait=watch.GRACE)
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{text}\n".encode())
    os._exit(code)


def _attempt(argv: list[str]) -> _Failure | None:
    """Run a command; return None if it succeeds, else its failure. argv: arguments without the program's name."""
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
    """Seconds to wait for another rank to report the cause of an error: some for an error of communication, else 0."""
    while error:
        if re.search("gloo|NCCL", str(error)) or type(error).__module__.startswith("torch.distributed"):
            return watch.SILENCE + 3 * watch.PERIOD
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return 0.0


def _value(argument: str, following: Iterator[str]) -> str:
    """Value of an option, written `--option=VALUE` or `--option VALUE`. Raises FlextronError without one.

    following: arguments behind the option, of which one is taken if it is the value.
    """
    name, _, value = argument.partition("=")
    value = value or next(following, "")
    if not value:
        raise FlextronError(f"{name}: lacks its value: write {name}=PATH")
    return value


def _main(argv: list[str]) -> None:
    """Parse the arguments, and run the stage or print help. Raises FlextronError for a wrong argument."""
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
        elif argument.partition("=")[0] == "--config-dir":
            value = _value(argument, arguments)
            if not Path(value).is_dir():
                raise FlextronError(f"--config-dir {value}: no such directory: name one with recipes of yours")
            config_dirs.append(value)
        elif argument.partition("=")[0] == "--config":
            file = Path(_value(argument, arguments))
        elif "=" not in argument and stage == VerifySettings.stage:
            if any(override.startswith("path=") for override in overrides):
                raise FlextronError(f"verify: checks one path at a time: call it again for {argument}")
            overrides.append(f"path={argument}")
        elif "=" not in argument:
            raise FlextronError(f"'{argument}' is not of the form key=value: `flextron {stage} --help` lists the keys")
        else:
            overrides.append(argument)
    if file is not None and overrides:
        raise FlextronError(f"--config {file}: holds all keys: remove {overrides[0]} from the command, and change it in the file")
    settings = read(stage, file) if file is not None else compose(stage, overrides, config_dirs, partial=help_wanted)
    if help_wanted:
        print(stage_help(settings), end="")
        return
    run_stage(settings)
