"""`flextron latency`: latency table of this device (Flextron, section 3.2, eq. 6)."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flextron_mcore.adaptive.latency import measure_routed, networks_per_round
from flextron_mcore.adaptive.table import RoutedTable, routed_warning, token_cost
from flextron_mcore.checkpoint.store import TABLE_FILE, CheckpointInfo, open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.digests import seal
from flextron_mcore.latency.measure import Setting, balanced, measure
from flextron_mcore.latency.measurements import read_measurements
from flextron_mcore.latency.table import LatencyTable, fit
from flextron_mcore.launch.layout import prompt_length
from flextron_mcore.model import loaded_model
from flextron_mcore.runs.memory import memory_line
from flextron_mcore.runs.opened import check_not_modulated, precision
from flextron_mcore.runs.output import check_output, new_output, write_metrics
from flextron_mcore.runs.terminal import print_table, progress_bar, say
from flextron_mcore.runtime.ranks import is_main_process, on_main_process
from flextron_mcore.settings.latency import LatencySettings
from flextron_mcore.settings.sections import KV_POLICIES, LayoutSettings


def run(settings: LatencySettings) -> dict[str, Any]:
    """Measure the latency table, or fit it to settings.measurements; write latency.json and check its sums.

    The check compares sums of table entries with times of whole networks. Returns the content of metrics.json: {"stage",
    "machine", "setting", "full_model_ms", "smallest_network_ms", "check", "warning": text, or None for a table to trust}.
    """
    check_output(Path(settings.out), settings.overwrite)
    info = open_checkpoint(settings.checkpoint)
    if settings.measurements is None:
        table = _measure(settings, info)
    else:
        table = _fitted(settings, info)
    with new_output(settings) as out:
        if is_main_process():
            (out / TABLE_FILE).write_text(json.dumps(seal(table.to_dict()), indent=1) + "\n", encoding="utf-8")
        values = table.to_dict()
        figures = {name: values[name] for name in ("machine", "setting", "full_model_ms", "smallest_network_ms", "check")}
        found = [table.warning(), *(routed_warning(table, policy) for policy in table.routed)]
        warnings = [warning for warning in found if warning]
        metrics = write_metrics(out, "latency", {**figures, "warning": warnings[0] if warnings else None})
    cost = table.cost()
    rows, layers, space = [], info.model.num_layers, info.space
    for hidden in reversed(space.hidden_size):
        part, at = cost.at(hidden), f" at {hidden} channels" if len(space.hidden_size) > 1 else ""
        rows += [["embedding, final norm, output" + at, "", part.constant, part.constant / cost.full]]
        for axis in space.layer_axes:
            costs = zip(space.sizes[axis.name], part.candidates[axis.name], strict=True)
            rows += [[axis.unit + at, size, value, layers * value / cost.full] for size, value in costs]
    title = f"milliseconds a layer; full model {cost.full:.4g} ms, smallest network {cost.smallest:.4g} ms"
    print_table(title, ["block", "candidate", "ms", "share of the full model in all layers"], rows)
    if table.check:
        check = table.check
        say(
            f"latency: error of the table's sums for {check['networks']} whole networks: {check['median_error']:.1%} (median), "
            f"{check['p95_error']:.1%} (95th percentile)"
        )
    for policy in table.routed:
        levels = token_cost(cost, table, policy).levels
        error = RoutedTable.read(table, policy).check["median_error"]
        say(
            f"latency: token routing, KV policy {policy}: {levels.smallest / cost.full:.2f} of the full model's latency with all "
            f"tokens at the smallest level, {levels.full / cost.full:.2f} at the largest; error of the sums for whole networks "
            f"{error:.1%} (median)"
        )
    for warning in warnings:
        say(f"latency: warning: do not trust this table: {warning}")
    return metrics


def _measure(settings: LatencySettings, info: CheckpointInfo) -> LatencyTable:
    """Latency table measured on this device, with token routing if settings.routed asks for it. Call on all ranks."""
    if settings.routed.enabled:
        check_not_modulated(info)
    asked, positions = settings.setting, info.model.max_position_embeddings
    generated = asked.generated_tokens if asked.kind == "generation" else 1
    prompt = prompt_length(info.model, asked)
    if not 1 <= prompt + generated - 1 <= positions:
        raise FlextronError(
            f"setting: {prompt} tokens of prompt and {generated} generated do not fit the model's {positions} positions: lower "
            "setting.prompt_length or setting.generated_tokens"
        )
    say(memory_line(settings, info))
    model = loaded_model(LayoutSettings(), info, precision(settings, info))[0]
    networks = (settings.rounds + 1) * (balanced(info.space) + settings.check_networks)
    setting = Setting(asked.kind, asked.batch_size, prompt, generated)
    with progress_bar(total=networks, desc="latency", unit="network") as bar:
        sizes = settings.rounds, settings.check_networks, settings.seed
        # One process measures its device; others would disturb it, so they wait.
        table = on_main_process(lambda: measure(model, info.model, info.space, setting, *sizes, bar.update))
    if not settings.routed.enabled:
        return table
    choices = Choices(info.model, info.space)
    policies = KV_POLICIES if info.space.attention_unit == "kv_group" else ("full",)
    count = (settings.routed.rounds + 1) * networks_per_round(choices) * len(policies)
    with progress_bar(total=count, desc="latency, routed", unit="network") as bar:
        sizes, cost = (settings.routed.rounds, settings.routed.hidden_size), table.cost()

        def of(policy: str) -> dict[str, Any]:
            return measure_routed(model, choices, setting, *sizes, policy, cost, settings.seed, bar.update).to_dict()

        found = {policy: on_main_process(lambda p=policy: of(p)) for policy in policies}
    return replace(table, routed={policy: found.get(policy, found["full"]) for policy in KV_POLICIES})


def _fitted(settings: LatencySettings, info: CheckpointInfo) -> LatencyTable:
    """Latency table fitted to the file settings.measurements."""
    file = Path(settings.measurements)
    found = read_measurements(file, info.model, info.space)
    setting = {**asdict(settings.setting), "kind": "fitted", "measurements": len(found)}
    return fit(info.model, info.space, found, setting, {"device": f"fitted to {file.name}"})
