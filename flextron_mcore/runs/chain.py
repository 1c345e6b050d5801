"""A command that runs other commands one after another, each in a directory of its own, and continues where it stopped."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml
from megatron.core import parallel_state

from flextron_mcore.config import FlextronError
from flextron_mcore.runs.output import CONFIG_FILE, METRICS_FILE, make_parent, write_config
from flextron_mcore.runs.start import run_stage
from flextron_mcore.runs.terminal import say
from flextron_mcore.runtime import distributed
from flextron_mcore.runtime.ranks import on_main_process, wait_for_all
from flextron_mcore.settings.compose import compose
from flextron_mcore.settings.training import StageSettings


def run_chain(
    settings: StageSettings,
    chain: Mapping[str, tuple[str, Sequence[str]]],
    same: Sequence[str] = (),
    prepare: Callable[[str], None] = lambda stage: None,
) -> dict[str, float]:
    """Run {name: (stage, keys)} into settings.out/NAME, but for what is complete there; the seconds of those that ran.

    Under torchrun the processes share the batches of every command. same: keys of `settings` that an interrupted chain must have
    as before; none to run more commands of a chain that is open. prepare: called on the main process before each command. Every
    key is checked before the first minute is spent.
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
        say(f"== {name}: flextron {stage} {' '.join(keys)} out={folder}")
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
    """The directory of the whole chain: made, or found with the same chain. Raises FlextronError when it is another's."""
    out, stage = Path(settings.out), settings.stage
    if settings.overwrite and (out / CONFIG_FILE).is_file():
        shutil.rmtree(out)
    if out.exists() and any(out.iterdir()):
        if not (out / CONFIG_FILE).is_file():
            raise FlextronError(f"out={out}: exists and is not a {stage}; choose another")
        before = yaml.safe_load((out / CONFIG_FILE).read_text(encoding="utf-8"))
        if any(before.get(key) != getattr(settings, key) for key in same):
            raise FlextronError(f"out={out}: holds a {stage} with other settings; choose another, or overwrite=true")
    make_parent(out)
    out.mkdir(exist_ok=True)
    write_config(out, settings)


def quoted(value: object) -> str:
    """A value as `key=value` takes it, whatever it holds."""
    return "'" + str(value).replace("'", r"\'") + "'"
