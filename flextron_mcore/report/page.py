"""Write the report of a run: index.html (nothing outside it is loaded), one PNG a figure, and family.json. No torch import.

Losses are in nats per token, sizes in bytes and parameters. The look of the page is in page.html, beside this file.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from flextron_mcore import __version__
from flextron_mcore.report import figures
from flextron_mcore.report.collect import Ablation, Data, Export, Network, Run, Series, Training, collect
from flextron_mcore.space import SubNetwork, count_parameters

KIND_TITLES = {"pretrain": "Pretraining", "elastic": "Elastic training"}
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
MINUS, TIMES = "−", "×"


@dataclass(frozen=True)
class Table:
    """A table as text. The first `left` columns are aligned left, the others right; `strong` is the row to stress."""

    head: list[str]
    rows: list[list[str]]
    left: int = 1
    strong: int | None = None


@dataclass(frozen=True)
class Card:
    """One key figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: heading, one line of explanation, tables and pictures."""

    key: str
    title: str
    note: str
    tables: list[Table]
    pictures: list[figures.Picture]
    beside: bool = False  # table and picture next to each other where there is room


def build_report(run: Path, out: Path) -> dict[str, Any]:
    """Write the report of the run directory `run` into the directory `out`.

    Returns {"index": path of the page, "figures": paths of the PNGs, "family": number of networks}. Raises FlextronError
    (one line) if `run` holds no stage output, or naming the file that is not as it should be; then nothing is written.
    """
    found, out = collect(Path(run)), Path(out)
    parts = sections(found)
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inline"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    page = environment.from_string(template).render(
        run=found.name,
        summary=summary(found),
        cards=cards(found),
        sections=parts,
        settings=settings(found),
        stages=found.stages,
        version=__version__,
    )
    pictures = [picture for part in parts for picture in part.pictures]
    names = [picture.name for picture in pictures]
    files = [out / f"{name}{f'_{names[:i].count(name) + 1}' if name in names[:i] else ''}.png" for i, name in enumerate(names)]
    out.mkdir(parents=True, exist_ok=True)
    for file, picture in zip(files, pictures, strict=True):
        file.write_bytes(picture.light)
    (out / "family.json").write_text(family_json(found), encoding="utf-8")
    (out / "index.html").write_text(page, encoding="utf-8")
    family = found.family()
    return {
        "index": out / "index.html",
        "figures": files,
        "family": len(family.networks) if family else 0,
    }


def family_json(run: Run) -> str:
    """The family as JSON, largest network first; `before` is null without an evaluation before training, NaN becomes null."""
    family, before, chosen = run.family(), run.before(), run.settings()
    values = {
        "model": chosen.model,
        "space": chosen.space,
        "family": [net.to_dict() for net in family.networks] if family else [],
        "before": [net.to_dict() for net in before.networks] if before else None,
    }
    return json.dumps(_finite(values), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def summary(run: Run) -> list[str]:
    """Two plain sentences: the full model against its parent, and the smallest sub-network before and after."""
    family, before = run.family(), run.before()
    if not family:
        sentences = [_training_sentence(training) for training in run.training][-2:]
        stages = ", ".join(f"{directory} ({kind})" if directory != kind else kind for directory, kind in run.stages)
        return sentences or [f"No network has been evaluated yet; this run holds the output of: {stages}."]
    sentences, full, least = [], family.full(), family.networks[-1]
    if full:
        text = f"The full model has a mean loss of {loss(full.mean_loss)} nats per token"
        text += f" (perplexity {perplexity(full.mean_perplexity)})"
        parent = before.same_shape(full.subnetwork) if before else None
        text += f"; its parent, before elastic training, had {loss(parent.mean_loss)}." if parent else "."
        sentences.append(text)
    if least is not full:
        count = len(family.networks) - bool(full)
        which = f"The smallest of its {count} sub-networks" if count > 1 else "Its one sub-network"
        text = f"{which}, {least.name}, has {percent(_share(family, least))} of the parameters"
        text += f" and a mean loss of {loss(least.mean_loss)}"
        old = before.same_shape(least.subnetwork) if before else None
        if old:
            text += f", {'down' if least.mean_loss <= old.mean_loss else 'up'} from {loss(old.mean_loss)} before training"
        sentences.append(text + ".")
    return sentences


def cards(run: Run) -> list[Card]:
    """Up to four key figures."""
    result, family, before = [], run.family(), run.before()
    if family:
        full, least = family.full(), family.networks[-1]
        for label, net in (
            ("Full model, mean loss", full),
            ("Smallest network, mean loss", least if least is not full else None),
        ):
            if net:
                old = before.same_shape(net.subnetwork) if before else None
                notes = [f"{loss(old.mean_loss)} before training"] if old else []
                notes += [f"{percent(_share(family, net))} of the parameters"] if net is not full else []
                result.append(Card(label, loss(net.mean_loss), "; ".join(notes)))
        sizes = [net.parameters for net in family.networks]
        result.append(Card("Networks in one model", f"{len(sizes):,}", f"{big(min(sizes))} to {big(max(sizes))} parameters"))
    for training in [t for t in run.training if t.kind == "elastic"] or run.training:
        note = f"tokens in {training.steps:,} steps, {duration(training.seconds)}"
        result.append(Card(KIND_TITLES[training.kind], big(training.tokens), note))
    return result[:4]


def sections(run: Run) -> list[Section]:
    """The parts of the page for which the run has data, each with its pictures drawn."""
    parts, family = [], run.family()
    if family:
        parts.append(_family_section(run, family))
        parts.append(_pareto_section(run, family))
        widths = figures.layer_widths(family)
        if widths:
            note = "Networks whose layers differ: what every layer keeps of its attention heads and of its FFN neurons."
            parts.append(Section("widths", "Widths of every layer", note, [], [widths]))
    if run.training:
        parts.append(_training_section(run.training))
    if run.ablations:
        parts.append(_ablation_section(run.ablations))
    if run.data:
        parts.append(
            Section("data", "Data", "Tokens, documents and size of every domain.", [_data_table(d) for d in run.data], [])
        )
    if run.exports:
        note = "Networks cut out as dense models. The logit difference is the largest one from the elastic model’s logits."
        parts.append(Section("exports", "Exports", note, [_export_table(run.exports)], []))
    return parts


def _family_section(run: Run, family: Series) -> Section:
    model, before, nets = family.model, run.before(), family.networks
    full = family.full()
    domains = list(dict.fromkeys(domain for net in nets for domain in net.loss))
    weights, kv = memory([net.weight_bytes for net in nets]), memory([net.kv_cache_bytes for net in nets])
    columns: list[tuple[str, Sequence[str]]] = [
        ("Network", [net.name for net in nets]),
        ("% of full", [percent(_share(family, net)) for net in nets]),
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
    depths = [sum(layer.executed for layer in net.subnetwork.layers) for net in nets]
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


def _pareto_section(run: Run, family: Series) -> Section:
    before, hint = run.before(), "Labels give percent of heads / percent of FFN neurons; ★ is the full model."
    pictures = []
    if len(run.series) > 1:
        text = "All evaluations on one scale. Networks of equal widths stand above each other."
        drawn = [series for series in run.series if series is not family] + [family]
        pictures.append(figures.pareto(family, drawn, before, "pareto", text))
    text = f"“{family.label}” alone. {hint}"
    pictures.append(figures.pareto(family, [family], before, "pareto_family", text))
    return Section("pareto", "Loss against size", "Lower and further left is better.", [], pictures)


def _training_section(stages: Sequence[Training]) -> Section:
    head = ["Stage", "Steps", "Tokens", "Time", "Tokens per second", "Validation, first", "Validation, last"]
    rows, pictures = [], []
    for t in stages:
        sizes = [f"{t.steps:,}", f"{t.tokens:,}", duration(t.seconds), f"{t.tokens_per_second:,.0f}"]
        rows.append([t.label, *sizes, loss(t.first_loss), loss(t.last_loss)])
        pictures += [figures.train_curve(t)] if t.train else []
        pictures += figures.validation_curves(t)
    return Section(
        "training", "Training", "Validation is that of the full model, in nats per token.", [Table(head, rows)], pictures
    )


def _ablation_section(ablations: Sequence[Ablation]) -> Section:
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


def _data_table(data: Data) -> Table:
    unit, sizes = memory([domain.bytes for domain in data.domains])
    head = [f"Domain ({data.label})", "Training tokens", "Validation tokens", "Documents", f"Text ({unit})", "Bytes per token"]
    rows = []
    for domain, size in zip(data.domains, sizes, strict=True):
        tokens = domain.train_tokens + domain.valid_tokens
        counts = [f"{domain.train_tokens:,}", f"{domain.valid_tokens:,}", f"{domain.documents:,}"]
        rows.append([domain.name, *counts, size, f"{domain.bytes / tokens:.2f}" if tokens else "–"])
    return Table(head, rows)


def _export_table(exports: Sequence[Export]) -> Table:
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


def settings(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, (name, value) rows) of what was set: the model, the elastic space, and the data."""
    chosen = run.settings()
    show = lambda v: v if isinstance(v, str) else ", ".join(map(show, v)) if isinstance(v, list) else json.dumps(v)  # noqa: E731
    parts = [(title, [(k, show(v)) for k, v in values.items()]) for title, values in _named(chosen.model, chosen.space)]
    return parts + [(f"Tokenizer ({d.label})", [("vocab_size", f"{d.vocab_size:,}")]) for d in run.data]


def _named(model: dict[str, Any] | None, space: dict[str, Any] | None) -> Iterable[tuple[str, dict[str, Any]]]:
    return [(title, values) for title, values in (("Model", model), ("Elastic space", space)) if values]


def _training_sentence(t: Training) -> str:
    text = f"{KIND_TITLES[t.kind]} took {t.steps:,} steps, {big(t.tokens)} tokens and {duration(t.seconds)}"
    if t.first_loss is not None and t.last_loss is not None:
        text += f"; the full model’s validation loss went from {loss(t.first_loss)} to {loss(t.last_loss)} nats per token"
    return text + "."


def _share(series: Series, net: Network) -> float:
    return net.parameters / count_parameters(series.model, SubNetwork.full(series.model))


def _widths(net: Network, name: str) -> list[int]:
    return [getattr(layer, name) for layer in net.subnetwork.layers if layer.executed]


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, so that strict JSON readers accept it."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def loss(value: float | None) -> str:
    """Three decimals; – where there is none."""
    return "–" if value is None else f"{value:,.3f}" if math.isfinite(value) else _odd(value)


def perplexity(value: float) -> str:
    """Two decimals below 1,000, none above."""
    return _odd(value) if not math.isfinite(value) else f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def percent(share: float) -> str:
    """A share as percent with one decimal."""
    return f"{100 * share:.1f}%"


def small(value: float) -> str:
    """A small difference: two digits, 3.1 × 10^-6 written 3.1e-06."""
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+").replace("e-", f"e{MINUS}")


def big(count: int) -> str:
    """A count in three digits with thousand, million or billion."""
    for size, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


def memory(sizes: Sequence[int]) -> tuple[str, list[str]]:
    """The unit that suits the largest of `sizes` (bytes), and each size in that unit."""
    power = 0
    while power + 1 < len(UNITS) and max(sizes, default=0) >= 1024 ** (power + 1):
        power += 1
    digits = 0 if power == 0 else 1 if max(sizes) >= 100 * 1024**power else 2
    return UNITS[power], [f"{size / 1024**power:,.{digits}f}" for size in sizes]


def duration(seconds: float) -> str:
    """35 s, 12 min 5 s, 3 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def spread(widths: Sequence[int]) -> str:
    """One number if all are equal, else their mean and range; – for none."""
    if not widths:
        return "–"
    low, high = min(widths), max(widths)
    mean = sum(widths) / len(widths)
    return f"{low:,}" if low == high else f"{mean:,.{0 if high >= 100 else 1}f} ({low:,}–{high:,})"


def _odd(value: float) -> str:
    return "NaN" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
