"""The part of a model card that every format has: the size of the sub-network, and its costs."""

from __future__ import annotations

import itertools

from flextron_mcore.checkpoint.store import TABLE_FILE
from flextron_mcore.config import FlextronError
from flextron_mcore.exports.formats import Job
from flextron_mcore.latency.table import LatencyTable
from flextron_mcore.space import count_parameters, kv_cache_bytes, weight_bytes

NO_TOKENIZER = "**No tokenizer** came with the checkpoint that this was cut from, so none is here."


def describe(job: Job) -> str:
    """Markdown: tables of costs and of widths, and a warning where there is no tokenizer."""
    model, net, dtype = job.info.model, job.net, job.dtype
    parameters, full = count_parameters(model, net), count_parameters(model)
    rows = [
        ("parameters", f"{parameters:,}, {parameters / full:.1%} of the elastic model's {full:,}"),
        ("weights", f"{weight_bytes(model, net, dtype):,} bytes in {dtype}"),
        ("KV cache", f"{kv_cache_bytes(model, net, 1, 1, dtype):,} bytes a token in {dtype}"),
        *([("latency", latency)] if (latency := _latency(job)) else []),
        *([("chosen by", job.origin)] if job.origin else []),
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
    """The prediction of the latency table beside the checkpoint, if there is one that says something about job.net."""
    info, net = job.info, job.net
    file = info.path / TABLE_FILE
    if not file.is_file() or net.hidden_size != info.model.hidden_size:  # whose blocks the table did not measure
        return None
    try:
        table = LatencyTable.from_file(file, info.model, info.space)
    except FlextronError:
        return f"not predicted: {TABLE_FILE} beside the checkpoint cannot be read, or is of another model"
    cost, setting = table.cost(), ", ".join(f"{name} {value}" for name, value in table.setting.items())
    where = f"{setting}; {table.machine.get('dtype', 'unknown dtype')} on {table.machine.get('device', 'an unnamed device')}"
    return f"{cost.of(net):.4g} ms predicted, {cost.of(net) / cost.full:.1%} of the full model's {cost.full:.4g} ms ({where})"
