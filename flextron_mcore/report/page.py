"""Write the report of a run: index.html (nothing outside it is loaded), one PNG a figure, and family.json. No torch import.

Losses are in nats per token, sizes in bytes and parameters. The look of the page is in page.html, beside this file.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from flextron_mcore import __version__
from flextron_mcore.report import figures
from flextron_mcore.report.collect import Run, Training, collect
from flextron_mcore.report.parts import Card, Section, big, duration, loss, percent, perplexity
from flextron_mcore.report.sections import (
    ablation_section,
    data_table,
    export_table,
    family_section,
    pareto_section,
    training_section,
)
from flextron_mcore.report.sections_adaptive import evaluated_section
from flextron_mcore.report.sections_compare import comparison_sections, comparison_sentence, sensitivity_sections
from flextron_mcore.report.sections_family import family_sections
from flextron_mcore.report.sections_routing import routing_sections

KIND_TITLES = {
    "pretrain": "Pretraining",
    "elastic": "Elastic training",
    "router": "Router training",
    "joint": "Joint training",
    "gumbel": "Training of model and router",
}


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
    """The family as JSON, largest network first; `before` is null without an evaluation before training, NaN becomes null.

    `budgets`: the networks of each `family` directory.
    """
    family, before, chosen = run.family(), run.before(), run.settings()
    values = {
        "model": chosen.model,
        "space": chosen.space,
        "family": [net.to_dict() for net in family.networks] if family else [],
        "before": [net.to_dict() for net in before.networks] if before else None,
        "budgets": {made.label: [member.to_dict() for member in made.members] for made in run.families},
    }
    return json.dumps(_finite(values), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def summary(run: Run) -> list[str]:
    """Plain sentences: the full model and its parent, the smallest sub-network before and after, what the routers reach."""
    family, before = run.family(), run.before()
    routed = [sentence for sentence in map(comparison_sentence, run.comparisons) if sentence][:1]
    if not family:
        sentences = [_training_sentence(training) for training in run.training][-2:] + routed
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
        text = f"{which}, {least.name}, has {percent(family.share(least))} of the parameters"
        text += f" and a mean loss of {loss(least.mean_loss)}"
        old = before.same_shape(least.subnetwork) if before else None
        if old:
            text += f", {'down' if least.mean_loss <= old.mean_loss else 'up'} from {loss(old.mean_loss)} before training"
        sentences.append(text + ".")
    return sentences + routed


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
                notes += [f"{percent(family.share(net))} of the parameters"] if net is not full else []
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
        parts.append(family_section(run, family))
        parts.append(pareto_section(run, family))
        widths = figures.layer_widths(family)
        if widths:
            note = "Networks whose layers differ: what every layer keeps of its attention heads and of its FFN neurons."
            parts.append(Section("widths", "Widths of every layer", note, [], [widths]))
    parts += family_sections(run.families)
    parts += comparison_sections(run.comparisons)
    parts += sensitivity_sections(run.sensitivities)
    if run.routed():
        parts += routing_sections(run.routed())
    if run.mixes:
        parts.append(evaluated_section(run.mixes))
    plain = [training for training in run.training if not training.routing]
    if plain:
        parts.append(training_section(plain))
    if run.ablations:
        parts.append(ablation_section(run.ablations))
    if run.data:
        parts.append(
            Section("data", "Data", "Tokens, documents and size of every domain.", [data_table(d) for d in run.data], [])
        )
    if run.exports:
        note = "Networks cut out as dense models. The logit difference is the largest one from the elastic model’s logits."
        parts.append(Section("exports", "Exports", note, [export_table(run.exports)], []))
    return parts


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
    if t.kind != "router" and t.first_loss is not None and t.last_loss is not None:  # routers leave the full model as it is
        text += f"; the full model’s validation loss went from {loss(t.first_loss)} to {loss(t.last_loss)} nats per token"
    return text + "."


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, so that strict JSON readers accept it."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
