"""`flextron family`: a model for each of several budgets from one checkpoint (LLaMaFlex: train once, deploy many)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from flextron_mcore.axes import layer_axes
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Cost, show
from flextron_mcore.data.blend import open_data
from flextron_mcore.runs import choice
from flextron_mcore.runs.chain import quoted, run_chain
from flextron_mcore.runs.compensation import check_calibration
from flextron_mcore.runs.output import METRICS_FILE, write_metrics
from flextron_mcore.runs.terminal import print_table, say
from flextron_mcore.runtime.disk import disk_errors, write_whole
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.settings.schema import show as show_value
from flextron_mcore.settings.stages import FamilySettings
from flextron_mcore.space import SubNetwork


def run(settings: FamilySettings) -> dict[str, Any]:
    """Choose, evaluate and export a network for each budget, and write the report.

    Call on all ranks. Returns the content of metrics.json: {"stage", "selector", "model", "networks": a row for each budget}.
    """
    budgets = settings.budgets
    if not budgets or any(budget is None for budget in budgets):
        raise FlextronError(f"budgets={show_value(budgets)}: must be a list such as [0.4, 0.6, 25ms]")
    if settings.compensate:
        check_calibration(settings)
    if settings.data is not None:
        open_data(settings.data)  # before the first network is written
    info, out = open_checkpoint(settings.checkpoint), Path(settings.out)
    names = [_name(budget) for budget in budgets]
    if len(set(names)) < len(names):
        raise FlextronError(f"budgets={show_value(budgets)}: has one twice: name each budget once")
    chosen = {}
    for name, budget in zip(names, budgets, strict=True):
        chosen[name], _ = choice.select(settings, info, budget=budget)
    costs = choice.available_costs(settings, info, choice.latency_table(settings, info))
    chain = _chain(settings, names, out)

    def write(stage: str) -> None:
        with disk_errors(out):
            (out / "networks").mkdir(exist_ok=True)
            for name, net in chosen.items():
                write_whole(out / "networks" / f"{name}.json", net.to_json())

    run_chain(settings, chain, ("checkpoint", "budgets", "selector"), write)
    rows = on_main_process(lambda: [_row(name, net, costs, out, settings) for name, net in chosen.items()])
    _print(rows, {name: choice.cost_label(name, settings, info) for name in costs})
    metrics = write_metrics(out, "family", {"selector": settings.selector, "model": info.model.to_dict(), "networks": rows})
    run_chain(settings, {"report": ("report", [f"run={quoted(out)}"])})  # after metrics.json, which the report shows
    say(f"report: {out / 'report' / 'index.html'}")
    return metrics


def _name(budget: float | str | list) -> str:
    """Name of a budget in metrics.json, files and directories: the budget as typed, with _ for characters unfit for a path."""
    text = ",".join(map(str, budget)) if isinstance(budget, list) else str(budget)
    return re.sub(r"[^A-Za-z0-9.,-]+", "_", text.strip())


def _chain(settings: FamilySettings, names: list[str], out: Path) -> dict[str, tuple[str, list[str]]]:
    """{directory: (stage, keys as typed)} of the stages to run, in order.

    An evaluation of all networks (`evaluate`) if data is given, then the export of each in each format (NAME_FORMAT).

    Args:
        settings: settings of the stage.
        names: names of the networks, whose files are networks/NAME.json.
        out: directory of the stage, which holds a directory for each stage that it runs.
    """
    checkpoint = f"checkpoint={quoted(settings.checkpoint)}"
    files = {name: quoted(out / "networks" / f"{name}.json") for name in names}
    batches = [f"model.{key}={show_value(value)}" for key, value in vars(settings.model).items()]
    chain: dict[str, tuple[str, list[str]]] = {}
    if settings.data is not None:
        keys = [checkpoint, f"data={quoted(settings.data)}", f"subnetwork=[{','.join(files.values())}]"]
        keys += [f"limit_val_batches={show_value(settings.limit_val_batches)}"]
        chain["evaluate"] = "evaluate", [*keys, *batches]
    more = [f"verify={str(settings.verify).lower()}", *([f"dtype={settings.dtype}"] if settings.dtype else [])]
    if settings.compensate:
        more += ["compensate=true", f"data={quoted(settings.data)}", f"samples={settings.samples}"]
        more += [f"limit_val_batches={show_value(settings.limit_val_batches)}", *batches]
    for name in names:
        for format_ in settings.formats:
            chain[f"{name}_{format_}"] = "export", [checkpoint, f"subnetwork={files[name]}", f"format={format_}", *more]
    return chain


def _row(name: str, net: SubNetwork, costs: dict[str, Cost], out: Path, settings: FamilySettings) -> dict[str, Any]:
    """Entry of metrics.json for the network of one budget, with its validation losses, None where they are not known.

    `loss` of the plain slice is read from the output of `evaluate`, `compensated` from that of the first export; both are means
    over domains in nats per token.

    Args:
        name: name of the budget.
        net: network chosen for it.
        costs: {name: cost}; the entry has the value of each, and its share of the full model's.
        out: directory of the stage, which holds a directory for each stage that it runs.
        settings: settings of the stage.
    """
    means = {f"mean_{axis.name}": sum(map(axis.size, net.executed_layers)) / net.depth for axis in layer_axes()}
    row = {
        "budget": name,
        "subnetwork": net.to_dict(),
        "costs": {kind: {"value": cost.of(net), "share": cost.of(net) / cost.full} for kind, cost in costs.items()},
        "hidden_size": net.hidden_size,
        "depth": net.depth,
        **means,
        "uniform": net.is_uniform,
        "exports": {format_: f"{name}_{format_}" for format_ in settings.formats},
        "loss": None,
        "compensated": None,
    }
    if settings.data is not None and (found := _metrics(out / "evaluate")):
        row["loss"] = next(each["mean"]["loss"] for each in found["networks"] if each["name"] == name)
    if settings.compensate and settings.formats:
        found = _metrics(out / f"{name}_{settings.formats[0]}").get("compensation")
        row["compensated"] = found["loss"]["compensated"] if found else row["loss"]  # None: nothing to compensate
    return row


def _metrics(folder: Path) -> dict[str, Any]:
    """Content of a stage's metrics.json; empty without the file."""
    file = folder / METRICS_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _print(rows: list[dict[str, Any]], costs: dict[str, str]) -> None:
    """Print the table of the networks. costs: {cost: its label}."""
    compensated = any(row["compensated"] is not None for row in rows)
    losses = {"loss": "loss", **({"compensated": "loss, compensated"} if compensated else {})}
    print_table(
        f"the family: what each budget gets ({costs['memory']})",
        ["budget", *costs, "hidden size", "layers", *(f"{axis.unit} (mean)" for axis in layer_axes()), *losses.values()],
        [
            [
                row["budget"],
                *(f"{show(kind, row['costs'][kind]['value'])} ({row['costs'][kind]['share']:.3f})" for kind in costs),
                row["hidden_size"],
                row["depth"],
                *(f"{row[f'mean_{axis.name}']:g}" for axis in layer_axes()),
                *("" if row[key] is None else row[key] for key in losses),
            ]
            for row in rows
        ],
    )
