"""Chains: a command that runs other commands in order, each in a directory of its own, and continues where it stopped."""

from __future__ import annotations

import math
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from flextron_mcore.config import FlextronError
from flextron_mcore.digests import DIGESTS_FILE
from flextron_mcore.files import read_yaml
from flextron_mcore.runs.output import CONFIG_FILE, METRICS_FILE, is_empty, new_directory, write_config
from flextron_mcore.runs.start import run_stage
from flextron_mcore.runs.terminal import say
from flextron_mcore.runtime import distributed
from flextron_mcore.runtime.disk import disk_errors, first_line
from flextron_mcore.runtime.ranks import on_main_process, wait_for_all
from flextron_mcore.settings.compose import compose
from flextron_mcore.settings.training import StageSettings


def run_chain(
    settings: StageSettings,
    chain: Mapping[str, tuple[str, Sequence[str]]],
    same: Sequence[str] = (),
    prepare: Callable[[str], None] = lambda stage: None,
) -> dict[str, float]:
    """Run the commands of a chain into settings.out/NAME, except those that are complete there.

    Under torchrun the processes share the batches of every command. All keys are checked before the first command starts.

    Args:
        settings: settings of the command that runs the chain.
        chain: {name: (stage, keys as the user would type them)}, in order.
        same: keys of `settings` that must be as before when an interrupted chain continues; none to add commands to a chain
            whose directory exists.
        prepare: called with the stage's name on the main process before each command.

    Returns:
        Seconds of each command that ran, by name.
    """
    out = Path(settings.out)
    for stage, keys in chain.values():
        compose(stage, keys, values=[{"out": str(out / "x")}])
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        distributed.initialize(seed=settings.seed)
    if same:
        on_main_process(lambda: _make_output(settings, same))
    seconds: dict[str, float] = {}
    for name, (stage, keys) in chain.items():
        folder = out / name
        if on_main_process(lambda file=folder / METRICS_FILE: file.is_file()):
            say(f"== {name}: complete")
            continue
        say(f"== {name}: {shlex.join(['flextron', stage, *keys, f'out={folder}'])}")
        on_main_process(lambda stage=stage: prepare(stage))
        begun = time.perf_counter()
        composed = compose(stage, keys, values=[{"out": str(folder), "seed": settings.seed, "debug": settings.debug}])
        if ranks > 1 and hasattr(getattr(composed, "model", None), "global_batch_size"):  # the chain is written for one process
            model = composed.model
            model.micro_batch_size = math.gcd(model.micro_batch_size, model.global_batch_size // ranks)
        # Half-written directories exist only for training, which continues them.
        run_stage(composed)
        if ranks > 1:
            wait_for_all()
            parallel_state.destroy_model_parallel()  # the next command has a layout of its own
        seconds[name] = time.perf_counter() - begun
    return seconds


def _make_output(settings: StageSettings, same: Sequence[str]) -> None:
    """Make the directory of a chain, or check that it holds the same chain. Raises FlextronError when it holds another one."""
    out, stage = Path(settings.out), settings.stage
    known = (out / CONFIG_FILE).is_file()
    if not is_empty(out):
        if not known:
            raise FlextronError(f"out={out}: exists and is not a {stage}; choose another")
        if not settings.overwrite:
            before = _before(out / CONFIG_FILE)
            if any(before.get(key) != getattr(settings, key) for key in same):
                raise FlextronError(f"out={out}: holds a {stage} with other settings; choose another, or overwrite=true")
    with disk_errors(out):
        if known and not settings.overwrite:
            (out / DIGESTS_FILE).unlink(missing_ok=True)  # it is written anew at the end of the chain
            write_config(out, settings)
            return
        with new_directory(out) as folder:
            write_config(folder, settings)


def _before(file: Path) -> dict[str, Any]:
    """Configuration of the chain that a directory holds."""
    try:
        values = read_yaml(file)
        if isinstance(values, dict):
            return values
        reason = "not a configuration"
    except (OSError, ValueError) as error:
        reason = first_line(error)
    raise FlextronError(f"{file}: is damaged ({reason}): bring it back from a copy, choose another out, or overwrite=true")


def quoted(value: object) -> str:
    """A value in single quotes, as the command line's `key=value` reads it, whatever characters it holds.

    The quotes are for the parser of settings (settings/schema.py), not for a shell.
    """
    # Backslashes before a quote, and at the end, are doubled; others stand for themselves.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + found[2].replace("'", r"\'"), str(value)) + "'"
