"""Names and texts that others wrote stay text in the report: none becomes an element, a formula or a link to a file."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flextron_mcore.adaptive import report as adaptive
from flextron_mcore.report import TOPICS, build_report
from tests.report import synthetic

TEXTS = {
    "script": "<script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "attribute": "\" onmouseover='alert(1)' x=\"",
    "link": "<a href='javascript:alert(1)'>x</a>",
    "template": "{{ 7 * 7 }}{% raw %}",
    "formula": r"$\frac{$ \input{/etc/passwd} $x$",
    "path": "../../../x/..",
    "order": "\u202etxt\u0000",
    "long": "x" * 500,
}


class Elements(HTMLParser):
    """Names of all elements of a page, and of their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.links: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(f"{tag} {name}" for name, _ in attrs)}
        self.links |= {value for name, value in attrs if name in ("href", "src") and value}


def renamed(value: Any, text: str) -> Any:
    """Copy of a value in which `text` is part of every warning and every name of a network or domain."""
    if isinstance(value, dict):
        made = {
            (f"{text}{key}" if name in ("loss", "losses", "perplexity", "domains", "validation") else key): renamed(each, text)
            for name, found in [("", value)]
            for key, each in found.items()
        }
        for name in ("loss", "losses", "perplexity", "domains", "validation"):
            if isinstance(value.get(name), dict):
                made[name] = {f"{text}{key}": each for key, each in value[name].items()}
        return made
    if isinstance(value, list):
        return [renamed(each, text) for each in value]
    return value


def page(root: Path, text: str) -> tuple[Path, str]:
    """Report of a run whose directories, networks and domains have names made of `text`."""
    stages = {"prepare": None, "elastic": synthetic.ELASTIC, "evaluate": synthetic.EVALUATE, "export": synthetic.EXPORT}
    name = "".join(letter for letter in text if letter not in "/\0")[:200]
    run = root / "run"
    for stage, values in stages.items():
        if values is None:
            continue
        folder = run / f"{stage}{name}"
        folder.mkdir(parents=True)
        made = renamed(copy.deepcopy(values), text)
        for network in made.get("networks", []):
            network["name"] = text if network["name"] != "full" else "full"
        if stage == "evaluate":
            made["networks"].append({**copy.deepcopy(made["networks"][0]), "name": text})
        if stage == "export":
            made |= {"architecture": text, "format": text}
        made["warnings"] = [text]
        (folder / "metrics.json").write_text(json.dumps(made))
    rows = [{"event": "train", "step": n, "loss": 2.0 / n, "tokens_per_second": 9.0} for n in (1, 2, 3, 4)]
    rows += [{"event": "validation", "step": n, "losses": {f"{text}d": 2.0 / n}} for n in (2, 4)]
    (run / f"elastic{name}" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = root / "out"
    out.mkdir()
    return out, build_report(run, out, (*TOPICS, *adaptive.TOPICS))["index"].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Elements:
    elements = Elements()
    elements.feed(page(tmp_path_factory.mktemp("plain"), "plain")[1])
    return elements


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_names_are_text(tmp_path, plain, text):
    out, written = page(tmp_path, text)
    elements = Elements()
    elements.feed(written)
    assert elements.found <= plain.found
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in elements.links)
    assert {file.parent for file in tmp_path.rglob("*") if file.suffix in (".png", ".html")} == {out}
    assert "49" not in text and "{{ 7 * 7 }}" in written if "7 * 7" in text else True
