"""The sections of the page about data, training, evaluated networks and exports.

Losses are in nats per token, sizes in bytes and parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

from flextron_mcore.report import figures
from flextron_mcore.report.collect import Ablation, Data, Export, Network, Run, Series, Training
from flextron_mcore.report.parts import Section, Table, duration, loss, memory, percent, perplexity, small, spread


def family_section(run: Run, family: Series) -> Section:
    """Sizes and losses of every network of the family."""
    model, before, nets = family.model, run.before(), family.networks
    full = family.full()
    domains = list(dict.fromkeys(domain for net in nets for domain in net.loss))
    weights, kv = memory([net.weight_bytes for net in nets]), memory([net.kv_cache_bytes for net in nets])
    columns: list[tuple[str, Sequence[str]]] = [
        ("Network", [net.name for net in nets]),
        ("% of full", [percent(family.share(net)) for net in nets]),
        ("Mean loss", [loss(net.mean_loss) for net in nets]),
    ]
    if before:
        old = [before.same_shape(net.subnetwork) for net in nets]
        columns.append(("Mean loss before", [loss(net.mean_loss if net else None) for net in old]))
    columns += [
        ("Perplexity", [perplexity(net.mean_perplexity) for net in nets]),
        *((f"Loss, {domain}", [loss(net.loss.get(domain)) for net in nets]) for domain in domains),
        ("Parameters", [f"{net.parameters:,}" for net in nets]),
        (f"Heads of {model.num_attention_heads:,}", [spread(_widths(net, "num_attention_heads")) for net in nets]),
        (f"FFN of {model.ffn_hidden_size:,}", [spread(_widths(net, "ffn_hidden_size")) for net in nets]),
    ]
    if any(net.subnetwork.hidden_size != model.hidden_size for net in nets):
        columns.append((f"Hidden of {model.hidden_size:,}", [f"{net.subnetwork.hidden_size:,}" for net in nets]))
    depths = [net.depth for net in nets]
    if any(depth != model.num_layers for depth in depths):
        columns.append((f"Layers of {model.num_layers}", [str(depth) for depth in depths]))
    columns += [
        (f"Weights ({weights[0]})", weights[1]),
        (f"KV cache ({kv[0]})", kv[1]),
    ]
    note = f"Every network is a part of the same weights. Loss in nats per token, evaluated in “{family.label}”"
    note += f"; before: the same widths in “{before.label}”." if before else "."
    note += " A mean with a range in brackets: the layers differ. Parameters include embeddings."
    rows = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
    table = Table([head for head, _ in columns], rows, strong=nets.index(full) if full else None)
    return Section("family", "The family", note, [table], [])


def pareto_section(run: Run, family: Series) -> Section:
    """Loss against parameters: all evaluations, and the family alone."""
    before, hint = run.before(), "Labels give percent of heads / percent of FFN neurons; ★ is the full model."
    pictures = []
    if len(run.series) > 1:
        text = "All evaluations on one scale. Networks of equal widths stand above each other."
        drawn = [series for series in run.series if series is not family] + [family]
        pictures.append(figures.pareto(family, drawn, before, "pareto", text))
    text = f"“{family.label}” alone. {hint}"
    pictures.append(figures.pareto(family, [family], before, "pareto_family", text))
    return Section("pareto", "Loss against size", "Lower and further left is better.", [], pictures)


def training_section(stages: Sequence[Training]) -> Section:
    """Numbers and curves of pretraining and elastic training."""
    pictures = []
    for t in stages:
        pictures += [figures.train_curve(t)] if t.train else []
        pictures += figures.validation_curves(t)
    note = "Validation is that of the full model, in nats per token."
    return Section("training", "Training", note, [training_table(stages)], pictures)


def training_table(stages: Sequence[Training], more: Sequence[tuple[str, Sequence[str]]] = ()) -> Table:
    """A row a stage; `more` columns at the end, as (head, cells)."""
    head = ["Stage", "Steps", "Tokens", "Time", "Tokens per second", "Validation, first", "Validation, last"]
    rows = []
    for i, t in enumerate(stages):
        sizes = [f"{t.steps:,}", f"{t.tokens:,}", duration(t.seconds), f"{t.tokens_per_second:,.0f}"]
        rows.append([t.label, *sizes, loss(t.first_loss), loss(t.last_loss), *(cells[i] for _, cells in more)])
    return Table(head + [title for title, _ in more], rows)


def ablation_section(ablations: Sequence[Ablation]) -> Section:
    """What sorting by importance gains."""
    tables, pictures = [], []
    for i, ablation in enumerate(ablations):
        rows = [[r.setup, r.order, r.score, loss(r.loss), perplexity(r.perplexity)] for r in ablation.rows]
        tables.append(Table(["Setup", "Order", "Score", "Loss", "Perplexity"], rows, left=3))
        if any(row.order != "-" for row in ablation.rows):
            pictures.append(figures.ablation_bars(ablation.rows, f"sorting{i + 1 if i else ''}"))
    first = ablations[0]
    note = f"Half of one operator cut, without any training, before and after sorting by importance ({first.samples:,} samples,"
    note += f" score {first.score}; as the paper’s Table 5)."
    return Section("sorting", "Sorting by importance", note, tables, pictures, beside=len(tables) == 1)


def data_table(data: Data) -> Table:
    """Sizes of the domains."""
    unit, sizes = memory([domain.bytes for domain in data.domains])
    head = [f"Domain ({data.label})", "Training tokens", "Validation tokens", "Documents", f"Text ({unit})", "Bytes per token"]
    rows = []
    for domain, size in zip(data.domains, sizes, strict=True):
        tokens = domain.train_tokens + domain.valid_tokens
        counts = [f"{domain.train_tokens:,}", f"{domain.valid_tokens:,}", f"{domain.documents:,}"]
        rows.append([domain.name, *counts, size, f"{domain.bytes / tokens:.2f}" if tokens else "–"])
    return Table(head, rows)


def export_table(exports: Sequence[Export]) -> Table:
    """A row an export."""
    unit, sizes = memory([export.bytes for export in exports])
    head = ["Export", "Format", "Architecture", "Path", "Parameters", f"Size ({unit})", "Logit difference"]
    rows = [
        [
            e.label,
            e.format,
            e.architecture,
            e.path,
            f"{e.parameters:,}",
            size,
            "not measured" if e.difference is None else small(e.difference),
        ]
        for e, size in zip(exports, sizes, strict=True)
    ]
    return Table(head, rows, left=4)


def _widths(net: Network, name: str) -> list[int]:
    return [getattr(layer, name) for layer in net.subnetwork.layers if layer.executed]
