"""`flextron quickstart`: the whole chain on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.data.corpus import open_corpus
from flextron_mcore.data.prepare import parse_inputs
from flextron_mcore.runs.chain import quoted, run_chain
from flextron_mcore.runs.output import METRICS_FILE, is_empty, write_metrics
from flextron_mcore.runs.terminal import print_table
from flextron_mcore.runtime.disk import write_aside
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.settings.stages import QuickstartSettings
from flextron_mcore.training.sampler import draw


def run(settings: QuickstartSettings) -> dict[str, Any]:
    """Run the commands of settings.chain as the command line would, and continue where an earlier run stopped.

    Call on all ranks. Returns the content of metrics.json: losses before and after elastic training, and seconds of the commands.
    """
    out = Path(settings.out)
    try:
        chain = {name: (step["stage"], [_key(key, out) for key in step["keys"]]) for name, step in settings.chain.items()}
    except (KeyError, TypeError, AttributeError):
        raise FlextronError(
            "chain: every command needs a stage and a list of keys: {name: {stage: elastic, keys: [...]}}"
        ) from None
    on_main_process(lambda: _check_input(settings, out))
    seconds = run_chain(settings, chain, ("chain",), lambda stage: _write_networks(out) if stage == "export" else None)
    return write_metrics(out, "quickstart", on_main_process(lambda: _summary(out, seconds)))


def _check_input(settings: QuickstartSettings, out: Path) -> None:
    """Raise FlextronError, before anything is written, for text that does not exist. A chain that continues may lack its text."""
    if settings.overwrite or is_empty(out):
        for domain, paths in parse_inputs(settings.input).items():
            open_corpus(domain, paths)


def _key(key: str, out: Path) -> str:
    """Key of a stage as typed, with {out} in its value replaced by the directory `out`."""
    name, _, value = key.partition("=")
    return f"{name}={quoted(Path(value.format(out=out)))}" if "{out}" in value else key


def _write_networks(out: Path) -> None:
    """Write two sub-networks for the exports, unless there are some: the middle candidates in all layers, and a random one."""
    folder = out / "networks"
    if folder.is_dir():
        return
    info = open_checkpoint(out / "elastic")
    model, space = info.model, info.space
    middle: Callable[[tuple[int, ...]], int] = lambda sizes: sizes[(len(sizes) - 1) // 2]  # noqa: E731
    with write_aside(folder) as aside:
        (aside / "half.json").write_text(space.uniform(model, middle(space.heads), middle(space.ffn_hidden_size)).to_json())
        (aside / "mixed.json").write_text(draw(model, space, 0, 0, 1, stream=2)[0].to_json())


def _summary(out: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Print the losses of every network before and after elastic training; return the figures of metrics.json.

    {"parent_loss" and "full_loss": loss of the full model before and after, "networks": [{"name", "parameters", "before",
    "after", "change"}], "seconds"}; losses are means over domains in nats per token.

    Args:
        out: directory of the stage, which holds a directory for each stage that it runs.
        seconds: {directory: seconds} of the commands that ran now.
    """
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
