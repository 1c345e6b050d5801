"""The family of networks, from `evaluate`: sizes, losses, and the gain of training. Losses are in nats per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flextron_mcore.config import ModelConfig
from flextron_mcore.report.drawing import Picture, Theme, chart, label_points, picture
from flextron_mcore.report.networks import (
    is_plain,
    layer_columns,
    layer_grid,
    network_columns,
    percent_label,
    shares_in_words,
    units,
)
from flextron_mcore.report.reader import Settings, StageOutput
from flextron_mcore.report.text import big, cost_unit, loss, memory, percent, perplexity, short
from flextron_mcore.report.topic import Card, Column, Highlights, Section, Table, Topic
from flextron_mcore.space import SubNetwork, count_parameters

BEFORE_WORDS = ("parent", "before")
Point = tuple[float, float]


@dataclass(frozen=True)
class Mean:
    """Mean over the domains."""

    loss: float
    perplexity: float


@dataclass(frozen=True)
class Network:
    """One evaluated network: its choice, its size (parameters, bytes) and its loss per domain (nats per token)."""

    name: str
    subnetwork: SubNetwork
    parameters: int
    non_embedding_parameters: int
    weight_bytes: int
    kv_cache_bytes: int
    loss: dict[str, float]
    perplexity: dict[str, float]
    mean: Mean

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as in the metrics.json it was read from; hidden size and executed layers on top."""
        sizes = {"hidden_size": self.subnetwork.hidden_size, "depth": self.subnetwork.depth}
        return {**self.__dict__, "subnetwork": self.subnetwork.to_dict(), "mean": asdict(self.mean), **sizes}


@dataclass(frozen=True)
class Evaluation:
    """One `evaluate` directory: the networks, largest first."""

    label: str
    model: ModelConfig
    networks: list[Network]
    settings: Settings

    @property
    def smallest(self) -> Network:
        """The network of fewest parameters."""
        return self.networks[-1]

    @property
    def says_before(self) -> bool:
        """True if the directory's name says that elastic training came later."""
        return any(word in self.label.lower() for word in BEFORE_WORDS)

    def share(self, net: Network) -> float:
        """The network's parameters as a fraction of the full model's."""
        return net.parameters / count_parameters(self.model)

    def full(self) -> Network | None:
        """The network that is the whole model, or None."""
        return self.same_shape(SubNetwork.full(self.model))

    def same_shape(self, subnetwork: SubNetwork) -> Network | None:
        """The network with exactly these widths, or None."""
        return next((net for net in self.networks if net.subnetwork == subnetwork), None)


def read(output: StageOutput) -> Evaluation | None:
    """One `evaluate` directory; None for an evaluation of token routing, which has no single network (adaptive/report.py)."""
    if output.metrics.has("kv_policy"):
        return None
    output.metrics.refuse_empty("networks")
    found = output.into(Evaluation)
    return replace(found, networks=sorted(found.networks, key=lambda net: -net.parameters))


def find_before(results: Sequence[Evaluation]) -> Evaluation | None:
    """The evaluation before elastic training: the first whose directory name says so, if another one does not."""
    marked = [found for found in results if found.says_before]
    return marked[0] if marked and len(marked) < len(results) else None


def find_family(results: Sequence[Evaluation]) -> Evaluation | None:
    """The evaluation the report is about: `evaluate` if there is one, else the last of those that are not `before`."""
    after = [found for found in results if not found.says_before] or results
    return next((found for found in after if found.label == "evaluate"), after[-1] if after else None)


def sections(results: list[Evaluation]) -> list[Section]:
    """The family's table, loss against size, and the widths of the networks whose layers differ."""
    family, before = find_family(results), find_before(results)
    parts = [_family_section(family, before), _pareto_section(results, family, before)]
    differing = [(net.name, net.subnetwork) for net in family.networks if not is_plain(net.subnetwork)]
    if differing:
        note = f"Networks whose layers differ: what every layer keeps of its {' and of its '.join(units())}."
        widths = layer_grid(differing, family.model, "layer_widths")
        parts.append(Section("widths", "Widths of every layer", note, [], [widths]))
    return parts


def highlights(results: list[Evaluation]) -> Highlights:
    """Sentences and key figures of the full model, its parent, and the smallest sub-network before and after training."""
    family, before = find_family(results), find_before(results)
    values: dict[str, Any] = {
        "family": [net.to_dict() for net in family.networks] if family else [],
        "before": [net.to_dict() for net in before.networks] if before else None,
    }
    if not family:
        return Highlights(values=values)
    sentences, cards, full, least = [], [], family.full(), family.smallest
    old = lambda net: before.same_shape(net.subnetwork) if before else None  # noqa: E731
    was = lambda net: [f"{loss(old(net).mean.loss)} before training"] if old(net) else []  # noqa: E731
    if full:
        text = f"The full model has a mean loss of {loss(full.mean.loss)} nats per token"
        text += f" (perplexity {perplexity(full.mean.perplexity)})"
        text += f"; its parent, before elastic training, had {loss(old(full).mean.loss)}." if old(full) else "."
        sentences.append(text)
        cards.append(Card("Full model, mean loss", loss(full.mean.loss), "; ".join(was(full))))
    if least is not full:
        count = len(family.networks) - bool(full)
        which = f"The smallest of its {count} sub-networks" if count > 1 else "Its one sub-network"
        text = f"{which}, {least.name}, has {percent(family.share(least))} of the parameters"
        text += f" and a mean loss of {loss(least.mean.loss)}"
        if old(least):
            text += f", {'down' if least.mean.loss <= old(least).mean.loss else 'up'} from {was(least)[0]}"
        sentences.append(text + ".")
        notes = [*was(least), f"{percent(family.share(least))} of the parameters"]
        cards.append(Card("Smallest network, mean loss", loss(least.mean.loss), "; ".join(notes)))
    sizes = [net.parameters for net in family.networks]
    cards.append(Card("Networks in one model", f"{len(sizes):,}", f"{big(min(sizes))} to {big(max(sizes))} parameters"))
    return Highlights(sentences, cards, settings=[family.settings], values=values)


def _family_section(family: Evaluation, before: Evaluation | None) -> Section:
    """Sizes and losses of every network of the family."""
    nets, full = family.networks, family.full()
    domains = list(dict.fromkeys(domain for net in nets for domain in net.loss))
    columns: list[Column] = [
        ("Network", [net.name for net in nets]),
        ("% of full", [percent(family.share(net)) for net in nets]),
        ("Mean loss", [loss(net.mean.loss) for net in nets]),
    ]
    if before:
        old = [before.same_shape(net.subnetwork) for net in nets]
        columns.append(("Mean loss before", [loss(net.mean.loss if net else None) for net in old]))
    columns += [
        ("Perplexity", [perplexity(net.mean.perplexity) for net in nets]),
        *((f"Loss, {domain}", [loss(net.loss.get(domain)) for net in nets]) for domain in domains),
        ("Parameters", [f"{net.parameters:,}" for net in nets]),
        *layer_columns([net.subnetwork for net in nets], family.model),
        *network_columns([net.subnetwork for net in nets], family.model, all_axes=False),
    ]
    for name, sizes in (("Weights", [net.weight_bytes for net in nets]), ("KV cache", [net.kv_cache_bytes for net in nets])):
        unit, shown = memory(sizes)
        columns.append((f"{name} ({unit})", shown))
    note = f"Every network is a part of the same weights. Loss in nats per token, evaluated in “{family.label}”"
    note += f"; before: the same widths in “{before.label}”." if before else "."
    note += " A mean with a range in brackets: the layers differ. Parameters include embeddings."
    return Section("family", "The family", note, [Table.of_columns(columns, strong=nets.index(full) if full else None)], [])


def _pareto_section(results: list[Evaluation], family: Evaluation, before: Evaluation | None) -> Section:
    """Loss against parameters: all evaluations, and the family alone."""
    pictures = []
    if len(results) > 1:
        text = "All evaluations on one scale. Networks of equal widths stand above each other."
        drawn = [found for found in results if found is not family] + [family]
        pictures.append(pareto(family, drawn, before, "pareto", text))
    hint = f"Labels give {shares_in_words()}; ★ is the full model."
    pictures.append(pareto(family, [family], before, "pareto_family", f"“{family.label}” alone. {hint}"))
    return Section("pareto", "Loss against size", "Lower and further left is better.", [], pictures)


def pareto(family: Evaluation, drawn: Sequence[Evaluation], before: Evaluation | None, name: str, caption: str) -> Picture:
    """Mean loss against parameters of `drawn`, in order; where that is `family` alone, its networks are named."""
    label, unit = cost_unit("parameters", family.networks[0].parameters)
    place = lambda net: (net.parameters / unit, net.mean.loss)  # noqa: E731

    def draw(figure: Figure, theme: Theme) -> None:
        axes, others = chart(figure, f"{label[:-1]}, embeddings included)"), iter(theme.others * len(drawn))
        obstacles: list[Point] = []
        for found in drawn:
            colour = theme.after if found is family else theme.before if found is before else next(others)
            points = [place(net) for net in found.networks]
            face = colour if found is family else "none"
            text = short(found.label) + (" (before training)" if found is before else "")
            axes.plot(*zip(*points, strict=True), "o", color=colour, markerfacecolor=face, markersize=5.5, label=text, zorder=3)
            if full := found.full():
                axes.plot(*place(full), "*", color=colour, markerfacecolor=face, markersize=13, zorder=4)
            obstacles += points
        line = [place(net) for net in pareto_front(family.networks)]
        if line:
            axes.plot(*zip(*line, strict=True), "-", color=theme.after, linewidth=1.2, alpha=0.55, zorder=2, label="Pareto front")
            obstacles += _along(line)
        axes.plot([], [], "*", color=theme.muted, markersize=10, linestyle="none", label="full model")
        axes.margins(x=0.09, y=0.1)
        axes.legend(loc="best" if len(drawn) > 1 else "upper right")
        if len(drawn) == 1:
            name_networks(figure, axes, family, place, obstacles, theme)

    full, least = family.full(), family.smallest
    words = f"Scatter plot of mean loss against parameters for {len(family.networks)} networks"
    if full:
        words += f"; full model {full.mean.loss:.3f} nats per token at {full.parameters:,} parameters"
    words += f"; smallest, {least.name}: {least.mean.loss:.3f} at {least.parameters:,}."
    if before and before in drawn:
        words += f" The series {before.label} shows the same before training."
    return picture(name, words, caption, draw)


def pareto_front(networks: Sequence[Network]) -> list[Network]:
    """The networks that no smaller one beats, smallest first."""
    front: list[Network] = []
    for net in sorted((n for n in networks if np.isfinite(n.mean.loss)), key=lambda n: (n.parameters, n.mean.loss)):
        if not front or net.mean.loss < front[-1].mean.loss:
            front.append(net)
    return front


def _along(line: list[Point], parts: int = 12) -> list[Point]:
    """Points along a polyline, for labels to keep away from."""
    ends = zip(line, line[1:], strict=False)
    return [(a[0] + (b[0] - a[0]) * t / parts, a[1] + (b[1] - a[1]) * t / parts) for a, b in ends for t in range(parts)]


def name_networks(
    figure: Figure, axes: Axes, found: Evaluation, place: Callable[[Network], Point], obstacles: list[Point], theme: Theme
) -> None:
    """Name the points where there is room: the full model first, then the smallest, then down in size."""
    full = found.full()
    nets = [net for net in found.networks if net is full or not full or net.subnetwork != full.subnetwork]
    nets.sort(key=lambda net: (net is not full, net is not found.smallest, -net.parameters))
    name = lambda net: "full" if net is full else percent_label(net.subnetwork, found.model) or short(net.name, 20)  # noqa: E731
    label_points(figure, axes, [(name(net), place(net), net is full) for net in nets], obstacles, theme)


TOPIC = Topic(("evaluate",), read, sections, highlights)
