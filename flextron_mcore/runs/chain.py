"""Chain: stages that one command runs in order, each in a directory of its own; run again, it continues where it stopped."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from flextron_mcore.config import FlextronError
from flextron_mcore.digests import DIGESTS_FILE
from flextron_mcore.files import first_line, read_yaml
from flextron_mcore.runs.output import CONFIG_FILE, METRICS_FILE, is_empty, new_directory, write_config
from flextron_mcore.runs.start import run_stage
from flextron_mcore.runs.terminal import command_line, say
from flextron_mcore.runtime import distributed
from flextron_mcore.runtime.disk import disk_errors
from flextron_mcore.runtime.ranks import on_main_process, wait_for_all
from flextron_mcore.settings.compose import compose
from flextron_mcore.settings.training import StageSettings


def run_chain(
    settings: StageSettings,
    chain: Mapping[str, tuple[str, Sequence[str]]],
    same: Sequence[str] = (),
    prepare: Callable[[str], None] = lambda stage: None,
) -> dict[str, float]:
    """Run the stages of a chain in order, each into settings.out/NAME, except those that already have their result there.

    Under torchrun the processes share the batches of every stage. The keys of all stages are checked before the first one starts.
    Raises FlextronError for a wrong key, and if settings.out holds something else.

    Args:
        settings: settings of the command that runs the chain.
        chain: {directory below settings.out: (stage, keys as a user would type them)}, in order.
        same: keys of `settings` that must be as before when an interrupted chain continues. Empty to add stages to a chain that
            ran before, in a settings.out that exists.
        prepare: called with the stage's name on the main process before each stage.

    Returns:
        {directory: seconds} of the stages that ran now.
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
        say(f"== {name}: {command_line(['flextron', stage, *keys, f'out={folder}'])}")
        on_main_process(lambda stage=stage: prepare(stage))
        begun = time.perf_counter()
        composed = compose(stage, keys, values=[{"out": str(folder), "seed": settings.seed, "debug": settings.debug}])
        # The keys of a chain are chosen for one process, whose micro-batches may be too large for a share of the batch.
        if ranks > 1 and hasattr(getattr(composed, "model", None), "global_batch_size"):
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
    """Make the directory of a chain, or check that it holds this chain; with overwrite=true, replace any earlier chain or stage.

    Raises FlextronError if it holds anything else.

    same: keys of `settings` that must equal those in the directory's config.yaml.
    """
    out, stage = Path(settings.out), settings.stage
    known = (out / CONFIG_FILE).is_file()
    if not is_empty(out):
        if not known:
            raise FlextronError(f"out={out}: exists and was not written by `flextron {stage}`; choose another")
        if not settings.overwrite:
            before = _before(out / CONFIG_FILE)
            if any(before.get(key) != getattr(settings, key) for key in same):
                raise FlextronError(f"out={out}: holds a `flextron {stage}` of other keys; choose another, or overwrite=true")
    with disk_errors(out):
        if known and not settings.overwrite:
            (out / DIGESTS_FILE).unlink(missing_ok=True)  # stale now; written again at the end of the chain
            write_config(out, settings)
            return
        with new_directory(out) as folder:
            write_config(folder, settings)


def _before(file: Path) -> dict[str, Any]:
    """Content of config.yaml of an earlier call. Raises FlextronError if it is damaged."""
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
