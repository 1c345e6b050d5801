"""Topic of `importance`: gain of sorting by importance (Flextron, Table 5). Losses are in nats per token."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from flextron_mcore.report.drawing import Picture, Theme, picture, tidy
from flextron_mcore.report.text import loss, perplexity, short
from flextron_mcore.report.topic import Section, Table, Topic

FULL = "full (baseline)"  # name of the full model's row; sorting does not change its loss
_ROOMY = 2  # groups of bars that have room for long names and three decimals


@dataclass(frozen=True)
class AblationRow:
    """Loss and perplexity of one network before any training, from `flextron importance`.

    Attributes:
        setup: name of the network: the full model, or a network with half of one axis.
        order: "unsorted", "random" or "sorted": order of heads, neurons, channels and layers.
        score: importance score that the axis is sorted by; "" where nothing is sorted.
        loss: loss in nats per token, mean over domains.
        perplexity: perplexity.
    """

    setup: str
    order: str
    score: str
    loss: float
    perplexity: float


@dataclass(frozen=True)
class Ablation:
    """Result of one directory that `flextron importance` wrote.

    Attributes:
        label: name of the directory.
        samples: number of calibration samples.
        ablation: losses of the full model and of networks with half of one axis, unsorted, in random order, and sorted.
    """

    label: str
    samples: int
    ablation: list[AblationRow]


def sections(results: list[Ablation]) -> list[Section]:
    """Section of the page with a table and a bar chart for each directory."""
    tables, pictures = [], []
    for i, result in enumerate(results):
        rows = [[r.setup, r.order, r.score, loss(r.loss), perplexity(r.perplexity)] for r in result.ablation]
        setup = f"Setup ({result.label})" if len(results) > 1 else "Setup"
        tables.append(Table([setup, "Order", "Score", "Loss", "Perplexity"], rows, left=3))
        if any(row.setup != FULL for row in result.ablation):
            label = f"{result.label}: " if len(results) > 1 else ""
            pictures.append(ablation_bars(result.ablation, f"sorting{i + 1 if i else ''}", label))
    first = results[0]
    note = f"Heads and neurons are sorted by importance on {first.samples:,} samples: a smaller network keeps the most important"
    note += " ones. Losses of networks with about half of one kind of unit, before elastic training (as Flextron, Table 5)."
    return [Section("sorting", "Sorting by importance", note, tables, pictures, "trained")]


def ablation_bars(rows: Sequence[AblationRow], name: str, label: str = "") -> Picture:
    """Bar chart of the losses of networks with half of one axis, unsorted, sorted and in random order (Flextron, Table 5).

    Args:
        rows: losses of the full model and of networks with half of one axis.
        name: file name without its ending.
        label: beginning of the caption, such as "sorted: ", where the page has several such charts.
    """
    base = next((row for row in rows if row.setup == FULL), None)
    cut = [row for row in rows if row.setup != FULL]
    setups = list(dict.fromkeys(row.setup for row in cut))
    scores = {setup: {row.score for row in cut if row.setup == setup and row.order == "sorted"} for setup in setups}
    many = any(len(each) > 1 for each in scores.values())
    kind = lambda row: f"sorted by {row.score}" if many and row.order == "sorted" else row.order  # noqa: E731
    kinds = list(dict.fromkeys(kind(row) for row in sorted(cut, key=lambda row: row.order == "random")))  # random has no theme

    def draw(figure: Figure, theme: Theme) -> None:
        axes, colours = figure.subplots(), (theme.before, theme.after, *theme.others)
        width = 0.74 / max(len(kinds), 1)
        crowded = len(setups) > _ROOMY
        for i, series in enumerate(kinds):
            bars = {row.setup: row.loss for row in cut if kind(row) == series}
            places = [setups.index(s) + (i - (len(kinds) - 1) / 2) * width for s in bars]
            made = axes.bar(places, list(bars.values()), width * 0.92, color=colours[i % len(colours)], label=short(series, 34))
            size = 6.5 if crowded else 9
            axes.bar_label(made, fmt="%.2f" if crowded else "%.3f", padding=2, fontsize=size, color=theme.ink)
        if base:
            axes.axhline(base.loss, color=theme.ink, linestyle="--", label=f"full model, {base.loss:.3f}", zorder=4)
        axes.set_xticks(range(len(setups)), [textwrap.fill(short(s), 12) if crowded else short(s) for s in setups])
        axes.set_ylabel("Loss (nats per token)")
        axes.margins(x=0.08, y=0.12)
        tidy(axes, x_numbers=False)
        figure.legend(loc="outside lower center", ncols=2 if many else 3)

    words = "Bar chart of loss in nats per token: " + "; ".join(f"{r.setup}, {kind(r)}: {r.loss:.3f}" for r in cut)
    words += f"; full model: {base.loss:.3f}." if base else "."
    return picture(name, words, f"{label}Loss of networks with half of one kind of unit, before any elastic training.", draw)


TOPIC = Topic(("importance",), lambda output: output.into(Ablation), sections)
