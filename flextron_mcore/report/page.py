"""Write the report of a run: index.html (nothing outside it is loaded), one PNG a figure, and family.json. No torch import.

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
from flextron_mcore.report.reader import Settings, collect
from flextron_mcore.report.topic import Card, Highlights, Topic


def build_report(run: Path, out: Path, topics: Sequence[Topic]) -> dict[str, Any]:
    """Write the report of the run directory `run` into the directory `out`, its parts in the order of `topics`.

    Returns {"index": path of the page, "figures": paths of the PNGs, "family": number of networks}. Raises FlextronError
    (one line) if `run` holds no stage output, or naming the file that is not as it should be; then nothing is written.
    """
    run, out = Path(run), Path(out)
    outputs = collect(run)
    found = [(topic, topic.results(outputs)) for topic in topics]
    sections = [section for topic, results in found if results for section in topic.sections(results)]
    highlights = [topic.highlights(results) for topic, results in found]
    chosen, values = chosen_settings(highlights), {key: value for each in highlights for key, value in each.values.items()}
    stages = [(output.label, output.kind) for output in outputs]
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inline"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    page = environment.from_string(template).render(
        run=run.resolve().name,
        summary=summary(highlights, stages),
        cards=cards(highlights),
        sections=sections,
        settings=settings_tables(chosen) + [details for each in highlights for details in each.details],
        stages=stages,
        version=__version__,
    )
    pictures = [picture for section in sections for picture in section.pictures]
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


def summary(highlights: Sequence[Highlights], stages: Sequence[tuple[str, str]]) -> list[str]:
    """Plain sentences about the evaluated networks; without any about the last two training stages."""
    sentences = [sentence for each in highlights for sentence in each.sentences]
    if not any(each.cards for each in highlights):
        sentences = [made.sentence for each in reversed(highlights) for made in each.progress][-2:] + sentences
    directories = ", ".join(f"{directory} ({kind})" if directory != kind else kind for directory, kind in stages)
    return sentences or [f"No network has been evaluated yet; this run holds the output of: {directories}."]


def cards(highlights: Sequence[Highlights]) -> list[Card]:
    """Up to four key figures: of the evaluated networks, then of elastic training, without it of any training stage."""
    progress = [made for each in reversed(highlights) for made in each.progress]
    trained = [made.card for made in progress if made.elastic] or [made.card for made in progress]
    return [*(card for each in highlights for card in each.cards), *trained][:4]


def chosen_settings(highlights: Sequence[Highlights]) -> Settings:
    """Model and space: each from the first topic of the page that knows it."""
    found = [settings for each in highlights for settings in each.settings]
    return Settings(
        next((settings.model for settings in found if settings.model is not None), None),
        next((settings.space for settings in found if settings.space is not None), None),
    )


def settings_tables(chosen: Settings) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, (name, value) rows) of the model and the elastic space, if they are known."""
    show = lambda v: v if isinstance(v, str) else ", ".join(map(show, v)) if isinstance(v, list) else json.dumps(v)  # noqa: E731
    named = (("Model", chosen.model), ("Elastic space", chosen.space))
    return [(title, [(key, show(value)) for key, value in values.items()]) for title, values in named if values]


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, so that strict JSON readers accept it."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
