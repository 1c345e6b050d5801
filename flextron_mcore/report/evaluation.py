"""Topic of `evaluate`: networks of every size, their losses, and the gain of elastic training. Losses are in nats per token."""

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
from flextron_mcore.report.tasks import Scored, Scores, tasks_section
from flextron_mcore.report.text import big, cost_unit, loss, memory, percent, perplexity, short
from flextron_mcore.report.topic import Card, Column, Highlights, Section, Table, Topic, numbered
from flextron_mcore.space import SubNetwork, count_parameters

BEFORE_WORDS = ("parent", "before")  # in the name of a directory: evaluated before elastic training
Point = tuple[float, float]


@dataclass(frozen=True)
class Mean:
    """Loss of a network in nats per token, averaged over domains, and the perplexity exp(loss) of this average."""

    loss: float
    perplexity: float


@dataclass(frozen=True)
class Network:
    """Network that `flextron evaluate` evaluated.

    Attributes:
        name: name of the network.
        subnetwork: sizes of the network.
        parameters, non_embedding_parameters: number of parameters, with and without embeddings.
        weight_bytes, kv_cache_bytes: bytes of the weights, and of a KV cache of the evaluation's key `kv_cache`.
        loss: {domain: loss in nats per token}.
        perplexity: {domain: perplexity}.
        mean: loss averaged over domains, and the perplexity of this average.
        tasks: {task: {metric: value with standard error}}; None if no tasks were evaluated.
    """

    name: str
    subnetwork: SubNetwork
    parameters: int
    non_embedding_parameters: int
    weight_bytes: int
    kv_cache_bytes: int
    loss: dict[str, float]
    perplexity: dict[str, float]
    mean: Mean
    tasks: Scores | None = None

    def to_dict(self) -> dict[str, Any]:
        """Network as plain types, as in metrics.json, with hidden size and number of executed layers; without tasks if None."""
        values = {name: value for name, value in asdict(self).items() if not (name == "tasks" and value is None)}
        sizes = {"hidden_size": self.subnetwork.hidden_size, "depth": self.subnetwork.depth}
        return {**values, "subnetwork": self.subnetwork.to_dict(), **sizes}


@dataclass(frozen=True)
class Evaluation:
    """Result of one directory that `flextron evaluate` wrote.

    Attributes:
        label: name of the directory.
        model: architecture of the full model.
        networks: evaluated networks, from the most parameters to the fewest.
        settings: architecture and elastic space, for the page.
        samples: evaluated samples, all domains together; None if not recorded.
    """

    label: str
    model: ModelConfig
    networks: list[Network]
    settings: Settings
    samples: int | None = None

    @property
    def smallest(self) -> Network:
        """Network with the fewest parameters."""
        return self.networks[-1]

    @property
    def says_before(self) -> bool:
        """True if the directory's name has a word of BEFORE_WORDS, for an evaluation from before elastic training."""
        return any(word in self.label.lower() for word in BEFORE_WORDS)

    def share(self, net: Network) -> float:
        """Number of parameters of a network as a fraction of the full model's."""
        return net.parameters / count_parameters(self.model)

    def full(self) -> Network | None:
        """Full model among the evaluated networks; None if it was not evaluated."""
        return self.same_shape(SubNetwork.full(self.model))

    def same_shape(self, subnetwork: SubNetwork) -> Network | None:
        """Evaluated network with exactly the sizes of `subnetwork`; None if there is none."""
        return next((net for net in self.networks if net.subnetwork == subnetwork), None)


def read(output: StageOutput) -> Evaluation | None:
    """Result of one `evaluate` directory; None for token routing, which adaptive/report.py shows."""
    if output.metrics.has("kv_policy"):
        return None
    output.metrics.refuse_empty("networks")
    found = output.into(Evaluation)
    return replace(found, networks=sorted(found.networks, key=lambda net: -net.parameters))


def find_before(results: Sequence[Evaluation]) -> Evaluation | None:
    """First evaluation from before elastic training (`says_before`); None if there is none, or there is no other evaluation."""
    marked = [found for found in results if found.says_before]
    return marked[0] if marked and len(marked) < len(results) else None


def find_family(results: Sequence[Evaluation]) -> Evaluation | None:
    """Evaluation that the report's summary is about: directory `evaluate`, else the last one. None if there is none.

    Evaluations from before elastic training (`says_before`) are considered only if there are no others.
    """
    after = [found for found in results if not found.says_before] or results
    return next((found for found in after if found.label == "evaluate"), after[-1] if after else None)


def sections(results: list[Evaluation]) -> list[Section]:
    """Section with a table of the networks, a chart of loss against size, and the widths of networks whose layers differ."""
    family, before = find_family(results), find_before(results)
    parts = [_family_section(family, before), _pareto_section(results, family, before)]
    differing = [(net.name, net.subnetwork) for net in family.networks if not is_plain(net.subnetwork)]
    if differing:
        note = f"Networks whose layers differ: the share of its {' and of its '.join(units())} that every layer keeps."
        widths = layer_grid(differing, family.model, "layer_widths")
        parts.append(Section("widths", "Widths of every layer", note, [], [widths], "budgets"))
    scored = [found for found in results if any(net.tasks for net in found.networks)]
    for found, number, title in numbered(scored):
        nets = [Scored(net.name, net.parameters, net.tasks) for net in found.networks if net.tasks]
        parts.append(tasks_section(found.label, nets, number, title))
    return parts


def highlights(results: list[Evaluation]) -> Highlights:
    """Sentences and key figures about the full model and the smallest network, before and after elastic training.

    family.json gets the networks after it as `family`, those before it as `before` (None if there are none).
    """
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
        text += f" (perplexity {perplexity(full.mean.perplexity)}){_on(family)}"
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
    cards.append(Card("Networks evaluated", f"{len(sizes):,}", f"{big(min(sizes))} to {big(max(sizes))} parameters"))
    return Highlights(sentences, cards, settings=[family.settings], values=values)


def _on(found: Evaluation) -> str:
    return f" on {found.samples:,} validation samples" if found.samples else ""


def _family_section(family: Evaluation, before: Evaluation | None) -> Section:
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
    note = f"Losses of “{family.label}”{_on(family)}"
    note += f"; before: the same networks in “{before.label}”{_on(before)}, before elastic training." if before else "."
    note += " Parameters include embeddings. In brackets: the range where layers differ."
    table = Table.of_columns(columns, strong=nets.index(full) if full else None)
    return Section("family", "Networks of every size", note, [table], [], "budgets")


def _pareto_section(results: list[Evaluation], family: Evaluation, before: Evaluation | None) -> Section:
    pictures = []
    if len(results) > 1:
        text = "All evaluations on one scale. The same network stands at the same place from left to right."
        drawn = [found for found in results if found is not family] + [family]
        pictures.append(pareto(family, drawn, before, "pareto", text))
    hint = f"Labels give {shares_in_words()}; ★ is the full model. The line joins networks that no smaller one beats."
    pictures.append(pareto(family, [family], before, "pareto_family", f"“{family.label}” alone. {hint}"))
    return Section("pareto", "Loss against size", "Lower and further left is better.", [], pictures, "budgets")


def pareto(family: Evaluation, drawn: Sequence[Evaluation], before: Evaluation | None, name: str, caption: str) -> Picture:
    """Scatter plot of mean loss (nats per token) against number of parameters.

    Args:
        family: evaluation that the report is about; its Pareto front is drawn as a line.
        drawn: evaluations to draw, in order. Networks are named if `family` is the only one.
        before: evaluation before elastic training; None if there is none.
        name, caption: file name (without its ending) and caption of the picture.
    """
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
    """Networks with a lower loss than every smaller network, smallest first; networks without a finite loss are left out."""
    front: list[Network] = []
    for net in sorted((n for n in networks if np.isfinite(n.mean.loss)), key=lambda n: (n.parameters, n.mean.loss)):
        if not front or net.mean.loss < front[-1].mean.loss:
            front.append(net)
    return front


def _along(line: list[Point], parts: int = 12) -> list[Point]:
    """Points along a polyline, `parts` on each segment, for labels to keep away from."""
    ends = zip(line, line[1:], strict=False)
    return [(a[0] + (b[0] - a[0]) * t / parts, a[1] + (b[1] - a[1]) * t / parts) for a, b in ends for t in range(parts)]


def name_networks(
    figure: Figure, axes: Axes, found: Evaluation, place: Callable[[Network], Point], obstacles: list[Point], theme: Theme
) -> None:
    """Write the names of networks beside their points where there is room: full model first, then smallest, then down in size.

    Args:
        figure, axes: figure and axes to draw into.
        found: evaluation whose networks are named.
        place: function that returns the coordinates of a network.
        obstacles: points that labels keep away from.
        theme: colours.
    """
    full = found.full()
    nets = [net for net in found.networks if net is full or not full or net.subnetwork != full.subnetwork]
    nets.sort(key=lambda net: (net is not full, net is not found.smallest, -net.parameters))
    name = lambda net: "full" if net is full else percent_label(net.subnetwork, found.model) or short(net.name, 20)  # noqa: E731
    label_points(figure, axes, [(name(net), place(net), net is full) for net in nets], obstacles, theme)


TOPIC = Topic(("evaluate",), read, sections, highlights)
