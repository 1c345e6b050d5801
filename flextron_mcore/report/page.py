"""The files of a report: index.html (loads nothing from outside), one PNG a figure, and family.json. No torch import.

The look of the page is in page.html, beside this file; its parts come from the topics.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from flextron_mcore import __version__
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.report.commands import next_commands
from flextron_mcore.report.reader import Settings, StageOutput, Unfinished, collect, unfinished
from flextron_mcore.report.text import big
from flextron_mcore.report.topic import CHAPTERS, Card, Highlights, Section, Topic
from flextron_mcore.space import count_parameters


def build_report(run: Path, out: Path, topics: Sequence[Topic]) -> dict[str, Any]:
    """Write the report of a run: index.html, a PNG for each figure, and family.json.

    Returns {"index": path of the page, "figures": paths of the PNGs, "family": number of evaluated networks in family.json}.

    Args:
        run: directory of the run, or of one stage.
        out: directory to write into.
        topics: topics of the page, in the order of a run.

    Raises:
        FlextronError: `run` holds no finished stage, or a file has a wrong value, which is named. Nothing is written then.
    """
    run, out = Path(run), Path(out)
    outputs = collect(run)
    found = [(topic, topic.read_all(outputs)) for topic in topics]
    warned: set[str] = set()  # a stage that several topics read is warned of once
    sections = []
    for topic, read in found:
        made = topic.sections([result for _, result in read]) if read else []
        texts = [text for output, _ in read for text in _warnings(output) if text not in warned] if made else []
        warned.update(texts)
        sections += [(section, [] if i else texts) for i, section in enumerate(made)]
    highlights = [topic.highlights([result for _, result in read]) for topic, read in found]
    chosen, values = chosen_settings(highlights), {key: value for each in highlights for key, value in each.values.items()}
    stages, commands = [(output.label, output.kind) for output in outputs], next_commands(outputs)
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inline"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    page = environment.from_string(template).render(
        run=run.resolve().name,
        model=_model(chosen),
        summary=summary(highlights, stages),
        cards=cards(highlights),
        unfinished=[_unfinished(stage) for stage in unfinished(run, out)],
        chapters=_chapters(sections, commands),
        commands=commands,
        settings=settings_tables(chosen) + [details for each in highlights for details in each.details],
        stages=stages,
        version=__version__,
    )
    pictures = [picture for section, _ in sections for picture in section.pictures]
    names = [picture.name for picture in pictures]
    files = [out / f"{name}{f'_{names[:i].count(name) + 1}' if name in names[:i] else ''}.png" for i, name in enumerate(names)]
    out.mkdir(parents=True, exist_ok=True)
    for file, picture in zip(files, pictures, strict=True):
        file.write_bytes(picture.light)
    family = _finite({"model": chosen.model, "space": chosen.space, **values})
    text = json.dumps(family, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    (out / "family.json").write_text(text, encoding="utf-8")
    (out / "index.html").write_text(page, encoding="utf-8")
    return {"index": out / "index.html", "figures": files, "family": len(values.get("family", ()))}


def _warnings(output: StageOutput) -> list[str]:
    """Warnings that a stage printed, each after the name of its directory."""
    return [f"{output.label}: {text}" for text in output.warnings]


def _unfinished(stage: Unfinished) -> str:
    """Line on a stage without a result: how far it came."""
    if not stage.begun:
        return f"{stage.label}: not begun."
    if stage.step is None:
        return f"{stage.label}: no result yet."
    of = f" of {stage.steps:,}" if stage.steps else ""
    return f"{stage.label}: step {stage.step:,}{of}."


Parts = Sequence[tuple[Section, Sequence[str]]]  # sections, each with its warnings


def _chapters(sections: Parts, commands: Sequence) -> list[tuple[str, str, str, Parts]]:
    """(key, title, introduction, sections) of the chapters that have content."""
    chapters = []
    for key, (title, text) in CHAPTERS.items():
        parts = [(section, warnings) for section, warnings in sections if section.chapter == key]
        if parts or (key == "next" and commands):
            chapters.append((key, title, text, parts))
    return chapters


def _model(chosen: Settings) -> str | None:
    """Sentence on the sizes of the trained model; None if its architecture is not known."""
    try:
        model = ModelConfig.from_dict(chosen.model or {})
    except FlextronError:
        return None
    sizes = f"{model.num_layers} layers, {model.num_attention_heads} heads and {model.ffn_hidden_size:,} FFN neurons in each"
    return f"The model has {big(count_parameters(model))} parameters: {sizes}, {model.hidden_size:,} hidden channels."


def summary(highlights: Sequence[Highlights], stages: Sequence[tuple[str, str]]) -> list[str]:
    """Sentences at the head of the page: those of all topics, after the last two training stages if no topic has key figures.

    Without any sentence, one that says that no network was evaluated, and lists `stages`.

    stages: (name of the directory, name of the stage) of each finished stage.
    """
    sentences = [sentence for each in highlights for sentence in each.sentences]
    if not any(each.cards for each in highlights):
        sentences = [made.sentence for each in highlights for made in each.progress][-2:] + sentences
    directories = ", ".join(f"{directory} ({kind})" if directory != kind else kind for directory, kind in stages)
    return sentences or [f"No network has been evaluated yet; this run holds the output of: {directories}."]


def cards(highlights: Sequence[Highlights]) -> list[Card]:
    """Up to four key figures at the head of the page: `cards` of all topics, then those of elastic training.

    If there was no elastic training, those of the other training stages.
    """
    progress = [made for each in highlights for made in each.progress]
    trained = [made.card for made in progress if made.elastic] or [made.card for made in progress]
    return [*(card for each in highlights for card in each.cards), *trained][:4]


def chosen_settings(highlights: Sequence[Highlights]) -> Settings:
    """Architecture and elastic space for the page; None for one that no stage wrote.

    Each is of the last topic that has it, and there of the first stage in `Highlights.settings`.
    """
    found = [settings for each in reversed(highlights) for settings in each.settings]
    return Settings(
        next((settings.model for settings in found if settings.model is not None), None),
        next((settings.space for settings in found if settings.space is not None), None),
    )


def settings_tables(chosen: Settings) -> list[tuple[str, list[tuple[str, str]]]]:
    """Tables of the architecture and the elastic space, those that are known: (title, (name, value) rows)."""
    show = lambda v: v if isinstance(v, str) else ", ".join(map(show, v)) if isinstance(v, list) else json.dumps(v)  # noqa: E731
    named = (("Model", chosen.model), ("Elastic space", chosen.space))
    return [(title, [(key, show(value)) for key, value in values.items()]) for title, values in named if values]


def _finite(value: Any) -> Any:
    """Copy of nested plain values with None in place of NaN and infinities, which strict JSON readers refuse."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
