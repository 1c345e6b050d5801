"""`flextron quickstart`: the whole chain on this machine."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime.ranks import on_main_process, wait_for_all
from flextron_mcore.stages.common import CONFIG_FILE, METRICS_FILE, make_parent, print_table, say, write_config, write_metrics


def run(config: DictConfig) -> dict[str, Any]:
    """Run config.chain, each command as the command line would; continue where an earlier run stopped.

    Under torchrun the processes share the batches of every command.
    """
    from flextron_mcore.cli import compose, run_stage

    out = Path(config.out)
    chain = {name: (step.stage, [_key(key, out) for key in step["keys"]]) for name, step in config.chain.items()}
    for stage, keys in chain.values():  # every key is checked before the first minute is spent
        compose(stage, [*keys, f"out={_quoted(out / 'x')}"])
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        from megatron.core import parallel_state

        from flextron_mcore.runtime import distributed

        distributed.initialize(seed=config.seed)
    on_main_process(lambda: _make_output(config, out))
    seconds: dict[str, float] = {}
    for name, (stage, keys) in chain.items():
        folder = out / name
        if on_main_process(lambda file=folder / METRICS_FILE: file.is_file()):
            say(f"== {name}: complete")
            continue
        say(f"== {name}: flextron {stage} {' '.join(keys)} out={folder}")
        if stage == "export":
            on_main_process(lambda: _write_networks(out))
        begun = time.perf_counter()
        composed = compose(stage, [*keys, f"out={_quoted(folder)}", f"seed={config.seed}", f"debug={config.debug}"])
        if ranks > 1 and "global_batch_size" in composed.get("model", {}):  # the chain is written for one process
            model = composed.model
            model.micro_batch_size = math.gcd(model.micro_batch_size, model.global_batch_size // ranks)
        # Half-written directories exist only for training, which continues them.
        run_stage(composed)
        if ranks > 1:
            wait_for_all()
            parallel_state.destroy_model_parallel()  # the next command has a layout of its own
        seconds[name] = time.perf_counter() - begun
    return write_metrics(out, "quickstart", on_main_process(lambda: _summary(out, seconds)))


def _make_output(config: DictConfig, out: Path) -> None:
    """The directory of the whole chain: made, or found with the same chain. Raises FlextronError when it is another's."""
    if config.overwrite and (out / CONFIG_FILE).is_file():
        shutil.rmtree(out)
    if out.exists() and any(out.iterdir()):
        if not (out / CONFIG_FILE).is_file():
            raise FlextronError(f"out={out}: exists and is not a quickstart; choose another")
        before = OmegaConf.load(out / CONFIG_FILE)
        if before.get("chain") != config.chain:
            raise FlextronError(f"out={out}: holds a quickstart with other settings; choose another, or overwrite=true")
    make_parent(out)
    out.mkdir(exist_ok=True)
    write_config(out, config)


def _quoted(path: Path) -> str:
    """A path as a Hydra override takes it."""
    return "'" + str(path).replace("'", r"\'") + "'"


def _key(key: str, out: Path) -> str:
    name, _, value = key.partition("=")
    return f"{name}={_quoted(Path(value.format(out=out)))}" if "{out}" in value else key


def _write_networks(out: Path) -> None:
    """Two members of the family, for the exports: half of everything, and one with other widths in every layer."""
    from flextron_mcore.checkpoint.store import open_checkpoint
    from flextron_mcore.training.sampler import draw

    folder = out / "networks"
    if folder.is_dir():
        return
    info = open_checkpoint(out / "elastic")
    model, space = info.model, info.space
    middle: Callable[[tuple[int, ...]], int] = lambda sizes: sizes[(len(sizes) - 1) // 2]  # noqa: E731
    folder.mkdir()
    (folder / "half.json").write_text(space.uniform(model, middle(space.heads), middle(space.ffn_hidden_size)).to_json())
    (folder / "mixed.json").write_text(draw(model, space, 0, 0, 1, stream=2)[0].to_json())


def _summary(out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The result in one table: every network before and after elastic training."""
    read = lambda name: json.loads((out / name / METRICS_FILE).read_text(encoding="utf-8"))  # noqa: E731
    before = {net["name"]: net for net in read("evaluate_before")["networks"]}
    after = read("evaluate")["networks"]
    rows = []
    for net in after:
        old, new = before[net["name"]]["mean"]["loss"], net["mean"]["loss"]
        rows.append([net["name"], net["parameters"], old, new, new - old])
    print_table(
        "the family: validation loss (nats per token, mean over domains) before and after elastic training",
        ["network", "parameters", "before", "after", "change"],
        rows,
    )
    parent, full = before["full"]["mean"]["loss"], next(n for n in after if n["name"] == "full")["mean"]["loss"]
    print(f"full model after elastic training: {full:.4f}, its parent: {parent:.4f} ({full - parent:+.4f} nats per token)")
    print(f"report: {out / 'report' / 'index.html'}")
    if seconds:
        print(
            "seconds: "
            + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
            + f"; together {sum(seconds.values()):.0f}"
        )
    return {
        "parent_loss": parent,
        "full_loss": full,
        "networks": [dict(zip(("name", "parameters", "before", "after", "change"), row, strict=True)) for row in rows],
        "seconds": seconds,
    }
