"""Part of the model card that all formats share: widths and costs of the sub-network."""

from __future__ import annotations

import itertools
from pathlib import Path

from flextron_mcore.checkpoint.store import TABLE_FILE
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import show
from flextron_mcore.exports.formats import Job
from flextron_mcore.latency.table import LatencyTable
from flextron_mcore.space import count_parameters, kv_cache_bytes, weight_bytes

NO_TOKENIZER = "**No tokenizer** is included, because the checkpoint that this was cut from has none."


def title(job: Job) -> str:
    """Name of an exported network, such as "Llama-3.2-1B 740 M": name of the imported model, else "Flextron", and parameters."""
    origin = Path(str((job.info.hf_config or {}).get("_name_or_path") or "Flextron")).name
    return f"{origin} {show('parameters', count_parameters(job.info.model, job.net))}"


def describe(job: Job) -> str:
    """Markdown for the model card: tables of costs and widths, hidden size, skipped layers, and a warning without a tokenizer."""
    model, net, dtype = job.info.model, job.net, job.dtype
    parameters, full = count_parameters(model, net), count_parameters(model)
    rows = [
        ("parameters", f"{parameters:,}, {parameters / full:.1%} of the elastic model's {full:,}"),
        ("weights", f"{weight_bytes(model, net, dtype):,} bytes in {dtype}"),
        ("KV cache", f"{kv_cache_bytes(model, net, 1, 1, dtype):,} bytes a token in {dtype}"),
        *([("latency", latency)] if (latency := _latency(job)) else []),
        *([("chosen by", job.origin)] if job.origin else []),
        *([("compensated", job.refit)] if job.refit else []),
    ]
    widths, first = [], 0
    for layer, run in itertools.groupby(net.executed_layers):
        last = first + len(list(run)) - 1
        span = f"{first}" if first == last else f"{first}-{last}"
        widths.append(f"| {span} | {layer.num_attention_heads} | {layer.kv_groups} | {layer.ffn_hidden_size} |")
        first = last + 1
    skipped = [str(i) for i, layer in enumerate(net.layers) if not layer.executed]
    lines = ["| cost | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    lines += ["| layers | query heads | key-value heads | FFN width |", "|---|---|---|---|", *widths, ""]
    lines += [f"Hidden size {net.hidden_size}."]
    lines += [f"Layers {', '.join(skipped)} of the elastic model are left out."] if skipped else []
    lines += ["", NO_TOKENIZER] if job.tokenizer is None else []
    return "\n".join(lines)


def _latency(job: Job) -> str | None:
    """Text on the latency that the checkpoint's latency table predicts, or on why the table cannot be used.

    None without a table, and for a network without all hidden channels.
    """
    info, net = job.info, job.net
    file = info.path / TABLE_FILE
    if not file.is_file() or net.hidden_size != info.model.hidden_size:  # the table may lack this hidden size
        return None
    try:
        table = LatencyTable.from_file(file, info.model, info.space)
    except FlextronError:
        return f"not predicted: {TABLE_FILE} beside the checkpoint cannot be read, or is of another model"
    cost, setting = table.cost(), ", ".join(f"{name} {value}" for name, value in table.setting.items())
    where = f"{setting}; {table.machine.get('dtype', 'unknown dtype')} on {table.machine.get('device', 'an unnamed device')}"
    return f"{cost.of(net):.4g} ms predicted, {cost.of(net) / cost.full:.1%} of the full model's {cost.full:.4g} ms ({where})"
