"""`flextron family`: a model for every budget from one checkpoint, in one go (LLaMaFlex: train once, deploy many)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from flextron_mcore.axes import layer_axes
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Cost, show
from flextron_mcore.runs import choice
from flextron_mcore.runs.chain import quoted, run_chain
from flextron_mcore.runs.output import METRICS_FILE, make_parent, write_metrics
from flextron_mcore.runs.terminal import print_table, say
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.settings.stages import FamilySettings
from flextron_mcore.space import SubNetwork


def run(config: FamilySettings) -> dict[str, Any]:
    """Choose, evaluate and export a network for each of config.budgets, and report."""
    budgets = config.budgets
    if not budgets:
        raise FlextronError(f"budgets={budgets}: must be a list such as [0.4, 0.6, 25ms]")
    info, out = open_checkpoint(config.checkpoint), Path(config.out)
    names = [_name(budget) for budget in budgets]
    if len(set(names)) < len(names):
        raise FlextronError(f"budgets={budgets}: has one twice")
    chosen = {}
    for name, budget in zip(names, budgets, strict=True):
        chosen[name], _ = choice.select(config, info, budget=budget)
    costs = choice.known_costs(config, info, choice.latency_table(config, info))
    chain = _chain(config, names, out)

    def write(stage: str) -> None:
        for name, net in chosen.items():
            make_parent(out / "networks" / name)
            (out / "networks" / f"{name}.json").write_text(net.to_json(), encoding="utf-8")

    run_chain(config, chain, ("checkpoint", "budgets", "selector"), write)
    rows = on_main_process(lambda: [_row(name, net, costs, out, config) for name, net in chosen.items()])
    _print(rows, costs)
    metrics = write_metrics(out, "family", {"selector": config.selector, "model": info.model.to_dict(), "networks": rows})
    run_chain(config, {"report": ("report", [f"run={quoted(out)}"])})  # which shows the rows, too
    say(f"report: {out / 'report' / 'index.html'}")
    return metrics


def _name(budget: Any) -> str:
    """A directory's name."""
    text = ",".join(map(str, budget)) if isinstance(budget, list) else str(budget)
    return re.sub(r"[^A-Za-z0-9.,-]+", "_", text.strip())


def _chain(config: FamilySettings, names: list[str], out: Path) -> dict[str, tuple[str, list[str]]]:
    checkpoint = f"checkpoint={quoted(config.checkpoint)}"
    files = {name: quoted(out / "networks" / f"{name}.json") for name in names}
    chain: dict[str, tuple[str, list[str]]] = {}
    if config.data is not None:
        keys = [checkpoint, f"data={quoted(config.data)}", f"subnetwork=[{','.join(files.values())}]"]
        keys += [f"limit_val_batches={'null' if config.limit_val_batches is None else config.limit_val_batches}"]
        chain["evaluate"] = "evaluate", [*keys, f"model.micro_batch_size={config.model.micro_batch_size}"]
    more = [f"verify={str(config.verify).lower()}", *([f"dtype={config.dtype}"] if config.dtype else [])]
    for name in names:
        for format_ in config.formats:
            chain[f"{name}_{format_}"] = "export", [checkpoint, f"subnetwork={files[name]}", f"format={format_}", *more]
    return chain


def _row(name: str, net: SubNetwork, costs: dict[str, Cost], out: Path, config: FamilySettings) -> dict[str, Any]:
    means = {f"mean_{axis.name}": sum(map(axis.size, net.executed_layers)) / net.depth for axis in layer_axes()}
    row = {
        "budget": name,
        "subnetwork": net.to_dict(),
        "costs": {kind: {"value": cost.of(net), "share": cost.of(net) / cost.full} for kind, cost in costs.items()},
        "hidden_size": net.hidden_size,
        "depth": net.depth,
        **means,
        "uniform": net.is_uniform,
        "exports": {format_: f"{name}_{format_}" for format_ in config.formats},
        "loss": None,
    }
    file = out / "evaluate" / METRICS_FILE
    if config.data is not None and file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))["networks"]
        row["loss"] = next(each["mean"]["loss"] for each in found if each["name"] == name)
    return row


def _print(rows: list[dict[str, Any]], costs: dict[str, Cost]) -> None:
    print_table(
        "the family: what each budget gets",
        ["budget", *costs, "hidden size", "layers", *(f"{axis.unit} (mean)" for axis in layer_axes()), "loss"],
        [
            [
                row["budget"],
                *(f"{show(kind, row['costs'][kind]['value'])} ({row['costs'][kind]['share']:.3f})" for kind in costs),
                row["hidden_size"],
                row["depth"],
                *(f"{row[f'mean_{axis.name}']:g}" for axis in layer_axes()),
                "" if row["loss"] is None else row["loss"],
            ]
            for row in rows
        ],
    )
