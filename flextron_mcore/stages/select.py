"""`flextron select`: choice of the sub-network for a budget (Flextron, section 3.2)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import show
from flextron_mcore.data.blend import open_data, valid_datasets
from flextron_mcore.evaluation.evaluator import Evaluator
from flextron_mcore.latency.measure import Setting, time_networks
from flextron_mcore.latency.table import LatencyTable
from flextron_mcore.model import loaded_model
from flextron_mcore.runs import choice
from flextron_mcore.runs.memory import memory_line, timing_line
from flextron_mcore.runs.opened import precision
from flextron_mcore.runs.output import check_file, write_file
from flextron_mcore.runs.terminal import print_table, say, say_next
from flextron_mcore.settings.sections import EvaluationModelSettings, LayoutSettings
from flextron_mcore.settings.stages import SelectSettings
from flextron_mcore.space import SubNetwork
from flextron_mcore.training.checks import sequence_length

_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def run(settings: SelectSettings) -> dict[str, Any]:
    """Choose a network for settings.budget, print its costs, and write it to settings.out.

    Returns {"stage", "selector", "subnetwork", "costs": {name: {"value", "share"}}, "device_latency": {"ms", "full_ms"} timed
    here, or None}. Raises FlextronError under torchrun with several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise FlextronError("select: is for one process: run it without torchrun")
    out = Path(settings.out) if settings.out else None
    check_file(out, settings.overwrite)
    info = open_checkpoint(settings.checkpoint)
    net, budgets = choice.select(settings, info, _losses(settings, info) if settings.data else None)
    table = choice.latency_table(settings, info)
    costs = choice.available_costs(settings, info, table)
    limits = {budget.cost.name: budget.asked or budget.limit for budget in budgets}
    latencies = _latencies(settings, info, net, table) if settings.measure and table else None
    rows = []
    for name, cost in costs.items():
        value = cost.of(net)
        limit = show(name, limits[name]) if name in limits else ""
        rows.append([choice.cost_label(name, settings, info), limit, show(name, value), value / cost.full, show(name, cost.full)])
    if latencies:
        ours, full = latencies
        rows.append(["latency, measured", "", show("latency", ours), ours / full, show("latency", full)])
    print_table(f"selector {settings.selector}", ["cost", "budget", "sub-network", "share", "full model"], rows)
    for axis in info.space.layer_axes:
        say(f"{axis.unit} of each layer: " + " ".join(str(axis.size(layer)) for layer in net.layers))
    write_file(out, net.to_json())
    if out:
        say(f"written to {out}")
        say_next("export", checkpoint=settings.checkpoint, subnetwork=out, out=out.with_suffix(""))
    else:
        asked = {key: getattr(settings, key) for key in ("budget", "selector", "latency", "sensitivity", "data")}
        say_next("select", checkpoint=settings.checkpoint, **asked, out="net.json")
    return {
        "stage": "select",
        "selector": settings.selector,
        "subnetwork": net.to_dict(),
        "costs": {name: {"value": cost.of(net), "share": cost.of(net) / cost.full} for name, cost in costs.items()},
        "device_latency": latencies and {"ms": latencies[0], "full_ms": latencies[1]},
    }


def _latencies(
    settings: SelectSettings, info: CheckpointInfo, net: SubNetwork, table: LatencyTable
) -> tuple[float, float] | None:
    """Time a network and the full model on this device: milliseconds of each; None if the table was fitted.

    Args:
        settings: settings of the stage, with the number of rounds.
        info: checkpoint.
        net: network to time.
        table: latency table, whose workload, precision and statistic (minimum or median) are used.
    """
    precision = _PRECISIONS.get(table.machine.get("dtype"))
    if precision is None:
        return None
    setting = Setting(**table.setting)
    say(timing_line(settings, info, precision, setting))
    model = loaded_model(LayoutSettings(), info, precision)[0]
    ours, full = time_networks(model, info.model, [net, None], setting, settings.rounds, settings.seed)
    return getattr(ours, table.statistic), getattr(full, table.statistic)


def _losses(settings: SelectSettings, info: CheckpointInfo) -> choice.Losses:
    """Function from networks to the loss of each in nats per token: the mean over the validation domains of settings.data.

    Each call loads the model.
    """
    data = open_data(settings.data)
    options = EvaluationModelSettings(**asdict(settings.model))
    seq_length = sequence_length(options, info, data)
    say(memory_line(settings, info))

    def losses(networks: Sequence[SubNetwork]) -> list[float]:
        model = loaded_model(options, info, precision(settings, info))
        with tempfile.TemporaryDirectory() as cache:
            datasets = valid_datasets(data, seq_length, settings.seed, Path(cache))
            return Evaluator(model, datasets, seq_length, settings.model.micro_batch_size, settings.limit_val_batches).means(
                networks
            )

    return losses
