"""Topic of `compare`: routers against other selectors (Flextron, figures 5 and 13, eq. 12). No torch import.

Losses are in nats per token, costs in the unit of their kind (ms, parameters, bytes). Targets and shares are fractions of the
full model's cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.cost import OWN_UNITS
from flextron_mcore.evaluation.median import median_loss, rising
from flextron_mcore.report.drawing import SIZE, Picture, Theme, chart, picture
from flextron_mcore.report.networks import describe
from flextron_mcore.report.reader import Settings, StageOutput
from flextron_mcore.report.text import cost_unit, loss, lower, percent, signed, significant, stem
from flextron_mcore.report.topic import Column, Highlights, Section, Table, Topic, numbered
from flextron_mcore.settings.sections import ALL_SELECTORS, SelectorName
from flextron_mcore.space import SubNetwork

STYLES = {  # marker and dash of each selector
    **{"router": ("o", "-"), "uniform": ("s", "--"), "matformer": ("^", "-."), "sensitivity": ("D", ":")},
    **{"random": ("x", "none"), "dense": ("P", "none")},
}
MEANINGS = {  # of the selectors, for readers of the page
    "router": "routers: trained on data to choose",
    "uniform": "uniform: the same widths in every layer",
    "matformer": "matformer: all heads, the same FFN width in every layer",
    "sensitivity": "sensitivity: the blocks whose cuts, each alone, cost least loss",
    "random": "random: the best of some random networks",
}
NAMES = {"dense": "dense, from scratch"}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Network that `flextron compare` evaluated. cost: in the unit of the compared cost (ms, parameters, bytes).

    mean_loss: mean of the losses over domains, nats per token. loss: {domain: loss}; None if only the mean is known.
    """

    cost: float
    parameters: int
    non_embedding_parameters: int
    mean_loss: float
    loss: dict[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Selected(Compared):
    """Network that a selector chose, with its evaluation. subnetwork: sizes of the network.

    target: budget, as a share of the full model's cost; None for a network that no budget was set for.
    """

    selector: SelectorName
    target: float | None
    subnetwork: SubNetwork


@dataclass(frozen=True, kw_only=True)
class Dense(Compared):
    """Dense model trained from scratch, for comparison. cost: None if no sub-network of the space has the model's shape."""

    name: str
    cost: float | None


@dataclass(frozen=True)
class RandomNetworks:
    """Cost (shares of the full model's cost) and loss (nats per token) of random networks that meet a budget, the share `target`.

    router_share, router_loss: cost and loss of the network that the router chooses for the budget. better_than: fraction of the
    random networks, other than that one, with a higher loss than it. None without a router, better_than also without others.
    """

    target: float
    shares: list[float]
    mean_losses: list[float]
    router_share: float | None
    router_loss: float | None
    better_than: float | None

    @property
    def finite(self) -> list[float]:
        """Mean losses of the random networks, without those that diverged (NaN or infinite)."""
        return [value for value in self.mean_losses if np.isfinite(value)]


@dataclass(frozen=True)
class EqualCost:
    """Network of the baseline `selector`, and the network that the router chooses for a budget equal to that network's cost.

    share, mean_loss: cost as a share of the full model's cost, and loss in nats per token, of the baseline's network.
    router_share, router_loss: cost and loss of the router's network; None without a router.
    """

    selector: SelectorName
    subnetwork: SubNetwork
    share: float
    mean_loss: float
    router_share: float | None
    router_loss: float | None


@dataclass(frozen=True)
class Fit:
    """Power law L(N) = (N / Nc)^-alpha + E (Flextron, eq. 12), fitted to the losses of a selector's networks and the full model.

    of: quantity N. points: number of different N. Nc_ci, alpha_ci, E_ci: 95% confidence intervals. None: not determined.
    """

    selector: SelectorName
    of: Literal["non_embedding_parameters", "cost"]
    points: int
    Nc: float | None
    alpha: float | None
    E: float | None
    Nc_ci: tuple[float, float] | None
    alpha_ci: tuple[float, float] | None
    E_ci: tuple[float, float] | None

    @property
    def determined(self) -> bool:
        """True if the points were enough to determine Nc, alpha and E."""
        return None not in (self.Nc, self.alpha, self.E)

    def loss(self, sizes: np.ndarray) -> np.ndarray:
        """L(N) of Flextron, eq. 12, at each N in `sizes`; NaN where it is not finite. Only for a fit that is `determined`."""
        with np.errstate(all="ignore"):
            values = (sizes / self.Nc) ** -self.alpha + self.E
        return np.where(np.isfinite(values), values, np.nan)


@dataclass(frozen=True)
class Comparison:
    """Result of one directory (`label`) that `flextron compare` wrote.

    cost: name of the compared cost, whose unit is OWN_UNITS[cost]; full_cost, smallest_cost: cost of the full model and of the
    smallest network. machine, setting: device and workload of the latency table, or None. samples: samples of all domains.
    """

    label: str
    model: ModelConfig
    cost: str
    full_cost: float
    smallest_cost: float
    machine: dict | None
    setting: dict | None
    samples: int
    full: Compared
    networks: list[Selected]
    random: list[RandomNetworks]
    equal: list[EqualCost]
    dense: list[Dense]
    scaling_law: list[Fit]
    settings: Settings

    def share(self, net: Compared) -> float | None:
        """Cost of a network as a share of the full model's cost; None if the cost is not known."""
        return None if net.cost is None else net.cost / self.full_cost

    def of(self, selector: str) -> list[Selected]:
        """Networks that one selector chose, the cheapest first."""
        return sorted((net for net in self.networks if net.selector == selector), key=lambda net: (net.cost, net.mean_loss))


def read(output: StageOutput) -> Comparison:
    """Result of one `compare` directory. Raises FlextronError for a wrong value, which is named."""
    cost = output.metrics.read("cost", Literal[tuple(OWN_UNITS)])
    found, where = output.into(Comparison, cost=cost), output.metrics.where
    if not found.full_cost > 0:
        raise FlextronError(f"{where}: 'full_cost' must be more than 0, not {found.full_cost:g}")
    for i, row in enumerate(found.random):
        losses, shares = len(row.mean_losses), len(row.shares)
        if losses != shares:
            raise FlextronError(f"{where}: random[{i}]: 'mean_losses' has {losses} numbers, but 'shares' has {shares}")
    return found


def sections(results: list[Comparison]) -> list[Section]:
    """Up to four sections of the page for each directory: random networks, loss against cost, equal cost, fits."""
    parts = []
    for c, number, label in numbered(results):
        parts += [_random_section(c, f"random{number}", label)] if c.random else []
        parts.append(_loss_section(c, f"compare{number}", label))
        parts += [_equal_section(c, f"equal{number}", label)] if c.equal else []
        parts += [_fits_section(c, f"scaling{number}", label)] if c.scaling_law else []
    return parts


def highlights(results: list[Comparison]) -> Highlights:
    """Sentence on the routers of the first directory that compared any; architecture and elastic space of every directory."""
    sentences = [text for text in map(sentence, results) if text]
    return Highlights(sentences[:1], settings=[c.settings for c in results])


def sentence(c: Comparison) -> str | None:
    """Sentence on the loss of the network that the routers choose for the smallest budget; None without routers."""
    by_router = [net for net in c.of("router") if net.target is not None]
    if not by_router:
        return None
    net = min(by_router, key=lambda net: net.target)
    text = f"Asked for {100 * net.target:.4g}% of the full model’s {c.cost}, the routers choose a network with a mean loss of"
    text += f" {loss(net.mean_loss)}, against {loss(c.full.mean_loss)} of the full model on the same {c.samples:,} samples"
    row = next((row for row in c.random if row.target == net.target and row.better_than is not None), None)
    return text + (f" and better than {percent(row.better_than)} of random networks of that budget." if row else ".")


def _loss_section(c: Comparison, key: str, label: str) -> Section:
    name, unit = cost_unit(c.cost, c.full_cost)
    chosen = [net for selector in ALL_SELECTORS for net in c.of(selector)[::-1]]
    nets: list[Compared] = [c.full, *chosen, *c.dense]
    domains = list(dict.fromkeys(domain for net in nets for domain in net.loss or ()))
    digits = 3 if c.cost == "latency" and c.full_cost < 100 else 1
    columns: list[Column] = [
        ("Selector", ["full model", *(net.selector for net in chosen), *(f"dense: {net.name}" for net in c.dense)]),
        ("Target", list(map(percent, [None, *(net.target for net in chosen), *(None for _ in c.dense)]))),
        ("Share", [percent(c.share(net)) for net in nets]),
    ]
    if c.cost != "parameters":
        columns.append((name, ["–" if net.cost is None else f"{net.cost / unit:,.{digits}f}" for net in nets]))
    columns += [
        ("Parameters", [f"{net.parameters:,}" for net in nets]),
        ("Non-embedding parameters", [f"{net.non_embedding_parameters:,}" for net in nets]),
        ("Mean loss", [loss(net.mean_loss) for net in nets]),
        *((f"Loss, {domain}", [loss((net.loss or {}).get(domain)) for net in nets]) for domain in domains),
    ]
    note = (
        f"Target and share are of the full model’s {c.cost}; the smallest network has {percent(c.smallest_cost / c.full_cost)}."
    )
    note += (
        f"{_latency_note(c)} Losses are on {c.samples:,} samples: compare them with each other, not with those of other parts."
    )
    if c.networks:
        note += f" Selectors: {'; '.join(text for selector, text in MEANINGS.items() if c.of(selector))}."
    pictures = [loss_against(c, by) for by in ("cost", "non_embedding_parameters")]
    return Section(key, f"Loss against {c.cost}{label}", note, [Table.of_columns(columns, strong=0)], pictures)


def _latency_note(c: Comparison) -> str:
    """Sentence, after a space, on the machine and workload that the latency was measured with; empty for another cost."""
    if c.cost != "latency":
        return ""
    machine, setting = c.machine or {}, c.setting or {}
    parts = [str(machine[key]) for key in ("device", "dtype") if machine.get(key) is not None]
    setting = {key: value for key, value in setting.items() if isinstance(value, str | int | float)}
    parts += [str(value) if key == "kind" else f"{key.replace('_', ' ')} {value}" for key, value in setting.items()]
    return f" Measured on {', '.join(parts)}." if parts else ""


def _fits_section(c: Comparison, key: str, label: str) -> Section:
    unit = OWN_UNITS[c.cost]
    names = {"cost": c.cost if c.cost == unit else f"{c.cost} ({unit})", "non_embedding_parameters": "non-embedding parameters"}
    rows = [[fit.selector, names[fit.of], f"{fit.points:,}", *_fitted(fit)] for fit in c.scaling_law]
    note = (
        "How loss falls with size N: L(N) = (N / Nc)^−α + E (Flextron, eq. 12 and Table 3), fitted to the networks of a selector"
    )
    note += " and the full model. In brackets: 95% confidence intervals. Too few or too similar networks do not determine a fit."
    table = Table(["Selector", "N", "Networks", "Nc", "α", "E"], rows, left=2)
    return Section(key, f"Scaling law{label}", note, [table], [], "evidence")


def _fitted(fit: Fit) -> list[str]:
    if not fit.determined:
        return ["not determined"] * 3
    pairs = ((fit.Nc, fit.Nc_ci), (fit.alpha, fit.alpha_ci), (fit.E, fit.E_ci))
    around = lambda interval: f" ({significant(interval[0])} to {significant(interval[1])})" if interval else ""  # noqa: E731
    return [significant(value) + around(interval) for value, interval in pairs]


def _random_section(c: Comparison, key: str, label: str) -> Section:
    head = ["Budget", "Networks", "Best", "Median", "Worst", "Router", "Router’s share", "Better than"]
    rows = []
    for row in sorted(c.random, key=lambda row: -row.target):
        losses = rising(row.mean_losses)
        ends = [loss(losses[0]), loss(median_loss(losses)), loss(losses[-1])] if losses else ["–"] * 3
        router = [loss(row.router_loss), percent(row.router_share), percent(row.better_than)]
        rows.append([percent(row.target), f"{len(losses):,}", *ends, *router])
    note = (
        f"Losses of random networks of a budget (share of the full model’s {c.cost}), and of the network that the routers choose"
    )
    note += " for it. Better than: share of the random networks with a higher loss; 50% is no better than chance."
    pictures = [random_boxes(c)] if any(row.finite for row in c.random) else []
    return Section(key, f"Routers against random networks{label}", note, [Table(head, rows)], pictures)


def _equal_section(c: Comparison, key: str, label: str) -> Section:
    equal = sorted(c.equal, key=lambda row: (ALL_SELECTORS.index(row.selector), -row.share))
    difference = lambda row: None if row.router_loss is None else row.router_loss - row.mean_loss  # noqa: E731
    columns = [
        ("Baseline", [row.selector for row in equal]),
        ("Network", [describe(row.subnetwork, c.model) for row in equal]),
        ("Share", [percent(row.share) for row in equal]),
        ("Mean loss", [loss(row.mean_loss) for row in equal]),
        ("Router’s share", [percent(row.router_share) for row in equal]),
        ("Router’s mean loss", [loss(row.router_loss) for row in equal]),
        ("Difference", [signed(difference(row)) for row in equal]),
    ]
    note = f"The routers are given exactly the {c.cost} of a baseline’s network. Difference: their loss minus the baseline’s;"
    note += " below zero, the routers are better."
    table = Table.of_columns(columns, left=2)
    return Section(key, f"Routers against baselines of equal {c.cost}{label}", note, [table], [])


def colour(theme: Theme, selector: str) -> str:
    """Colour of the points and line of a selector, or of "dense" models."""
    colours = (theme.after, theme.before, *theme.others[:2], theme.muted, *theme.others[2:])
    return colours[list(STYLES).index(selector) % len(colours)]


def loss_against(c: Comparison, by: str) -> Picture:
    """Chart of each selector's mean loss against "cost" or "non_embedding_parameters" (`by`), as Flextron, figure 5."""
    title, unit = cost_unit(c.cost, c.full_cost)
    if by == "cost":
        place = lambda net: (100 * c.share(net), net.mean_loss)  # noqa: E731
        label, word, own = f"Share of the full model’s {c.cost} (%)", c.cost, c.full_cost / 100
    else:
        name, own = cost_unit("parameters", c.full.non_embedding_parameters)
        place = lambda net: (net.non_embedding_parameters / own, net.mean_loss)  # noqa: E731
        label, word = f"Non-embedding {lower(name)}", "non-embedding parameters"
    groups = [(selector, c.of(selector)) for selector in ALL_SELECTORS]
    groups.append(("dense", [net for net in c.dense if by != "cost" or net.cost is not None]))
    groups = [(selector, sorted(nets, key=place)) for selector, nets in groups if nets]
    fit = next((fit for fit in c.scaling_law if (fit.selector, fit.of) == ("router", by) and fit.determined), None)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = chart(figure, label)
        for selector, nets in groups:
            marker, dash = STYLES[selector]
            style = {"marker": marker, "linestyle": dash, "markersize": 5, "linewidth": 1.3, "color": colour(theme, selector)}
            style["zorder"] = 3.5 if selector == "router" else 3
            axes.plot(*zip(*map(place, nets), strict=True), label=NAMES.get(selector, selector), **style)
        axes.plot(*place(c.full), "*", color=theme.ink, markersize=13, zorder=4, linestyle="none", label="full model")
        by_router = [place(net)[0] for net in c.of("router")]
        if fit and by_router:
            x = np.linspace(min(by_router), max(*by_router, place(c.full)[0]), 200)
            axes.plot(x, fit.loss(x * own), color=theme.ink, linewidth=1, alpha=0.7, label="fit to router (eq. 12)", zorder=2)
        if by == "cost":
            shown = own / unit  # of one percent
            top = axes.secondary_xaxis("top", functions=(lambda x: x * shown, lambda x: x / shown))
            top.set_xlabel(title)
            top.spines[:].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)

    series = [f"{selector} {', '.join(f'{y:.3f} at {x:.4g}' for x, y in map(place, nets))}" for selector, nets in groups]
    x, y = place(c.full)
    words = f"Mean loss in nats per token against {lower(label)}: {'; '.join(series)}; full model {y:.3f} at {x:.4g}."
    caption = f"{c.label}: mean loss against {word}. Lower and further left is better."
    caption += " The thin line is eq. 12, fitted to the routers’ networks." if fit else ""
    name = f"{stem(c.label)}_loss_{'cost' if by == 'cost' else 'parameters'}"
    return picture(name, words, caption, draw, (SIZE[0], SIZE[1] + 0.5))


def random_boxes(c: Comparison) -> Picture:
    """Box plot of the losses of random networks at each budget, with the router's networks as a line (Flextron, figure 13)."""
    rows = [row for row in sorted(c.random, key=lambda row: row.target) if row.finite]
    places = [100 * row.target for row in rows]
    gap = min((b - a for a, b in zip(places, places[1:], strict=False)), default=10.0)
    by_router = [(100 * row.target, row.router_loss) for row in rows if row.router_loss is not None]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = chart(figure, f"Budget (% of the full model’s {c.cost})")
        lines = dict.fromkeys(("whiskerprops", "capprops"), {"color": theme.muted})
        box = {"facecolor": theme.grid, "edgecolor": theme.muted}
        middle = {"color": theme.before, "linewidth": 1.8}
        look = {"patch_artist": True, "boxprops": box, "medianprops": middle, **lines}
        look["usermedians"] = [median_loss(row.mean_losses) for row in rows]  # as in the table: with diverged networks
        axes.boxplot([row.finite for row in rows], positions=places, widths=0.5 * gap, whis=(0, 100), manage_ticks=False, **look)
        handles = [Patch(**box, label="random networks"), *axes.plot([], [], **middle, label="their median")]
        if by_router:
            style = {"color": theme.after, "markersize": 5.5, "zorder": 5, "label": "router"}
            handles += axes.plot(*zip(*by_router, strict=True), "o-", **style)
        axes.axhline(c.full.mean_loss, color=theme.ink, linestyle="--", linewidth=1)
        handles += axes.plot([], [], "--", color=theme.ink, linewidth=1, label="full model")
        axes.grid(False, axis="x")
        axes.set_xticks(places, [f"{place:.4g}" for place in places])
        axes.set_xlim(places[0] - 0.6 * gap, places[-1] + 0.6 * gap)
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8.5)

    boxes = "; ".join(map(_box_words, rows))
    words = f"Box plots of the mean loss of random networks by budget, in nats per token: {boxes}."
    caption = f"{c.label}: losses of random networks of each budget (box from quartile to quartile, whiskers to the"
    caption += " extremes), and of the routers’ network (as Flextron, figure 13)."
    return picture(f"{stem(c.label)}_random", words, caption, draw)


def _box_words(row: RandomNetworks) -> str:
    losses = row.finite
    text = f"{100 * row.target:.4g}%: {min(losses):.3f} to {max(losses):.3f}, median {loss(median_loss(row.mean_losses))}"
    return text + (f", router {row.router_loss:.3f}" if row.router_loss is not None else "")


TOPIC = Topic(("compare",), read, sections, highlights)
