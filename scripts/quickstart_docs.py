#!/usr/bin/env python3
"""Put a finished quickstart into the documentation: the figures of README.md, and the report that the site shows.

python scripts/quickstart_docs.py [RUN]        # default: runs/quickstart
"""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
REPORT = ROOT / "docs/assets/report.html"
# {network in metrics.json of `evaluate`: its name in the README}
FAMILY = {
    "full": "full model",
    "uniform 75% heads 75% ffn": "75 % of heads and neurons",
    "uniform 50% heads 50% ffn": "50 %",
    "uniform 25% heads 25% ffn": "25 %",
    "random 1": "different widths in each layer (one of four such networks)",
}


def tables(run: Path) -> dict[str, str]:
    """{name: Markdown} of a quickstart: table `family` of both evaluations, table `budgets` of `compare`, sentences `sorting`."""
    before, after, compared, sorting = (
        json.loads((run / stage / "metrics.json").read_text()) for stage in ("evaluate_before", "evaluate", "compare", "sorted")
    )
    losses = {row["name"]: row["mean"]["loss"] for row in before["networks"]}
    found = {row["name"]: row for row in after["networks"]}
    family = [
        [title, f"{found[name]['parameters']:,}", losses[name], found[name]["mean"]["loss"]] for name, title in FAMILY.items()
    ]
    chosen = {(row["selector"], row["target"]): row["mean_loss"] for row in compared["networks"]}
    drawn = {row["target"]: median(row["mean_losses"]) for row in compared["random"] if row["mean_losses"]}
    targets = sorted({target for _, target in chosen})
    budgets = [[f"{t:.2f}", chosen.get(("router", t)), chosen.get(("uniform", t)), drawn.get(t)] for t in targets]
    return {
        "family": _table(["network", "parameters", "before elastic training", "after"], family),
        "budgets": _table(["share of latency", "router", "uniform", "random, median"], budgets),
        "sorting": _sentence(sorting["ablation"]),
    }


def _sentence(ablation: list[dict[str, Any]]) -> str:
    """Sentence on what sorting alone gives to networks of half the neurons or heads."""
    loss = lambda what, order: next(  # noqa: E731
        row["loss"] for row in ablation if re.fullmatch(rf"\d+ of \d+ {what}", row["setup"]) and row["order"] == order
    )
    parts = [
        f"with half of the {name} the loss is {loss(what, 'unsorted'):.3f} unsorted and {loss(what, 'sorted'):.3f} sorted"
        for name, what in (("neurons", "FFN neurons"), ("heads", "heads"))
    ]
    return f"Ordering neurons and heads by importance already helps, before any training:\n{parts[0]};\n{parts[1]}.\n"


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header)]
    lines += [["" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else cell for cell in row] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines).replace("| --- |", "|---|").replace(" --- |", "---|")


def filled(text: str, made: dict[str, str]) -> str:
    """Text of a page with each table between `<!-- quickstart: NAME -->` and `<!-- end -->` replaced."""
    for name, table in made.items():
        mark = f"<!-- quickstart: {name} -->\n"
        text = re.sub(f"{mark}.*?<!-- end -->", lambda _, new=mark + table: new + "<!-- end -->", text, flags=re.S)
    return text


def small(page: str, run: Path) -> str:
    """HTML of a report, `page`, with runs/quickstart for the path of `run`, and its pictures at half their size as lossy WebP."""

    def shrink(match: re.Match[str]) -> str:
        image = Image.open(io.BytesIO(base64.b64decode(match[1]))).convert("RGB")
        file = io.BytesIO()
        image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS).save(file, "WEBP", quality=60, method=6)
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()

    for path in (str(run.resolve()), str(run)):
        page = page.replace(path, "runs/quickstart")
    for end in ("</title>", "</h1>"):
        page = page.replace(run.resolve().name + end, "quickstart" + end)
    return re.sub("data:image/png;base64,([A-Za-z0-9+/=]+)", shrink, page)


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
    if not (run / "metrics.json").is_file():
        sys.exit(f"{run}: no finished quickstart; run make quickstart first")
    README.write_text(filled(README.read_text(encoding="utf-8"), tables(run)), encoding="utf-8")
    REPORT.write_text(small((run / "report/index.html").read_text(encoding="utf-8"), run), encoding="utf-8")


if __name__ == "__main__":
    main()
