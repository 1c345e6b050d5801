"""The report's topics about token routing (the paper's figures 8 and 9): losses and spending by budget, domain and token.

Losses are in nats per token, budgets and shares in fractions of the full model's cost. No torch import.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from flextron_mcore.axes import layer_axes
from flextron_mcore.config import ModelConfig
from flextron_mcore.report.drawing import MARKERS, SIZE, Picture, Theme, chart, panels, picture, ramp
from flextron_mcore.report.networks import units
from flextron_mcore.report.reader import StageOutput
from flextron_mcore.report.text import loss, percent, stem
from flextron_mcore.report.topic import Section, Table, Topic
from flextron_mcore.settings.sections import KV_POLICIES, KvPolicy

COLUMNS = 64  # characters of a line of text


@dataclass(frozen=True)
class Outcome:
    """Losses of tokens that choose, and their spending. levels: for each domain and block, the share of tokens at each level."""

    loss: dict[str, float]
    mean_loss: float
    shares: dict[str, float]
    share: float
    levels: dict[str, list]

    def cell(self, domain: str) -> str:
        """Loss and share of a domain, for a table."""
        return f"{loss(self.loss[domain])} at {percent(self.shares[domain])}" if domain in self.loss else "–"


@dataclass(frozen=True)
class Static:
    """The static routers' network of a budget."""

    mean_loss: float
    share: float


@dataclass(frozen=True)
class Budget:
    """One budget: the static routers' network, and the tokens' own choices, by KV policy."""

    target: float
    static: Static
    adaptive: dict[str, Outcome]


@dataclass(frozen=True)
class TokenCosts:
    """The first tokens of a text, and the share of the full model's cost that each spent."""

    domain: str
    budget: float
    texts: list[str]
    shares: list[float]


@dataclass(frozen=True)
class TokenRouters:
    """Costs that the routers were trained for, and the KV policy that they were trained with."""

    costs: list[str]
    kv_policy: KvPolicy


@dataclass(frozen=True)
class Trained:
    """Token routers as evaluated by the command that trained them."""

    label: str
    model: ModelConfig
    routers: TokenRouters
    full_loss: dict[str, float]
    adaptive_budgets: list[Budget]
    token_costs: list[TokenCosts]

    @property
    def costs(self) -> str:
        """The costs that budgets and shares are of, in words."""
        return " and ".join(self.routers.costs)

    def outcomes(self) -> list[tuple[float, Outcome]]:
        """(target, outcome) of every budget, with the routers' own KV policy."""
        return [(budget.target, budget.adaptive[self.routers.kv_policy]) for budget in self.adaptive_budgets]


@dataclass(frozen=True)
class Evaluated:
    """One `evaluate selector=adaptive` directory. cost: the kind of the budget and the shares."""

    label: str
    cost: str
    budget: float
    kv_policy: KvPolicy
    outcome: Outcome


def read_trained(output: StageOutput) -> Trained | None:
    """One directory of a stage that trains routers; None for static routers."""
    if not output.metrics.inner("routers").has("kind"):
        return None
    found = output.into(Trained)
    return replace(found, adaptive_budgets=sorted(found.adaptive_budgets, key=lambda budget: budget.target))


def read_evaluated(output: StageOutput) -> Evaluated | None:
    """One `evaluate` directory; None for an evaluation of networks."""
    if not output.metrics.has("kv_policy"):
        return None
    mean_loss = output.metrics.inner("mean").read("loss", float)
    return output.into(Evaluated, outcome=output.metrics.into(Outcome, mean_loss=mean_loss))


def trained_sections(results: list[Trained]) -> list[Section]:
    """A part of the page for each directory: static against adaptive, by domain, by block, and token by token."""
    parts = []
    for found in results:
        policies = [policy for policy in KV_POLICIES if any(policy in budget.adaptive for budget in found.adaptive_budgets)]
        columns = [
            ("Budget", [percent(budget.target) for budget in found.adaptive_budgets]),
            ("Static", [loss(budget.static.mean_loss) for budget in found.adaptive_budgets]),
            ("Share", [percent(budget.static.share) for budget in found.adaptive_budgets]),
        ]
        for policy in policies:
            outcomes = [budget.adaptive.get(policy) for budget in found.adaptive_budgets]
            columns.append((f"Adaptive, kv {policy}", [loss(each and each.mean_loss) for each in outcomes]))
            columns.append(("Share", [percent(each and each.share) for each in outcomes]))
        rows = [[percent(target), *map(outcome.cell, found.full_loss)] for target, outcome in found.outcomes()]
        name = stem(found.label)
        pictures = [
            loss_against_share(found, f"{name}_pareto"),
            degradation(found, f"{name}_domains"),
            allocation(found, f"{name}_allocation"),
            *(heat(row, f"{name}_tokens_{stem(row.domain)}", found.costs) for row in found.token_costs),
        ]
        note = "Every token chooses its own levels. Loss on validation data, mean over domains, and the average share of the full"
        note += f" model’s {found.costs} that tokens spent. The routers were trained with kv {found.routers.kv_policy}: with full"
        note += " every token writes all keys and values, with own only those of the heads that it uses."
        tables = [Table.of_columns(columns), Table(["Budget", *found.full_loss], rows)]
        parts.append(Section(f"adaptive_{name}", f"A choice for every token ({found.label})", note, tables, pictures))
    return parts


def evaluated_sections(results: list[Evaluated]) -> list[Section]:
    """A table with a row for each directory."""
    domains = list(dict.fromkeys(domain for found in results for domain in found.outcome.loss))
    columns = [
        ("Run", [found.label for found in results]),
        ("Cost", [found.cost for found in results]),
        ("Budget", [percent(found.budget) for found in results]),
        ("KV policy", [found.kv_policy for found in results]),
        *((domain, [found.outcome.cell(domain) for found in results]) for domain in domains),
        ("Mean loss", [loss(found.outcome.mean_loss) for found in results]),
        ("Share", [percent(found.outcome.share) for found in results]),
    ]
    note = "Adaptive routers at one budget: validation loss, and the average share of the full model’s cost that tokens spent."
    return [Section("adaptive_evaluated", "Tokens that choose, evaluated", note, [Table.of_columns(columns, left=2)], [])]


def _lines(figure: Figure, series: dict[str, list[tuple[float, float]]], colours: list, xlabel: str, ylabel: str) -> None:
    """One marked line for each of the series."""
    axes = chart(figure, xlabel, ylabel)
    for (text, points), marker, colour in zip(series.items(), MARKERS * len(series), colours, strict=False):
        axes.plot(*zip(*points, strict=True), f"{marker}-", color=colour, label=text, markersize=5)
    axes.legend()


def loss_against_share(found: Trained, name: str) -> Picture:
    """Mean loss against the average share, static and adaptive."""
    series = {"static": [(100 * budget.static.share, budget.static.mean_loss) for budget in found.adaptive_budgets]}
    for policy in KV_POLICIES:
        outcomes = [budget.adaptive[policy] for budget in found.adaptive_budgets if policy in budget.adaptive]
        if outcomes:
            series[f"adaptive, kv {policy}"] = [(100 * outcome.share, outcome.mean_loss) for outcome in outcomes]

    def draw(figure: Figure, theme: Theme) -> None:
        colours = [theme.before, theme.after, theme.others[0]]
        across = {text: sorted(points) for text, points in series.items()}
        label = f"Average share of the full model’s {found.costs} (%)"
        _lines(figure, across, colours, label, "Mean loss (nats per token)")

    words = "; ".join(f"{text} {', '.join(f'{y:.3f} at {x:.1f}%' for x, y in points)}" for text, points in series.items())
    caption = f"{found.label}: mean loss against what tokens spend on average. Lower and further left is better."
    return picture(name, f"Mean loss against the average share of {found.costs}: {words}.", caption, draw)


def degradation(found: Trained, name: str) -> Picture:
    """Each domain's loss above the full model's against the budget (the paper's figure 8)."""
    series = {
        domain: [(100 * target, outcome.loss[domain] - full) for target, outcome in found.outcomes()]
        for domain, full in found.full_loss.items()
    }

    def draw(figure: Figure, theme: Theme) -> None:
        label = f"Budget (% of the full model’s {found.costs})"
        _lines(figure, series, list(ramp(theme, len(series))), label, "Loss above the full model’s (nats)")

    words = "; ".join(f"{domain} {', '.join(f'{y:.3f} at {x:.0f}%' for x, y in points)}" for domain, points in series.items())
    caption = f"{found.label}: what each domain loses at a budget (as the paper’s figure 8)."
    return picture(name, f"Loss above the full model’s, by domain: {words}.", caption, draw)


def allocation(found: Trained, name: str) -> Picture:
    """The mean level of each block, by domain, for the middle budget (the paper's figure 9)."""
    target, outcome = found.outcomes()[len(found.adaptive_budgets) // 2]
    domains, layers = list(outcome.levels), found.model.num_layers
    mean = np.array([[_mean_level(block) for block in outcome.levels[domain]] for domain in domains])
    blocks = mean.reshape(len(domains), layers, -1)
    titles = [axis.title for axis in layer_axes()][: blocks.shape[2]]

    def draw(figure: Figure, theme: Theme) -> None:
        colours = LinearSegmentedColormap.from_list("shares", theme.shades)
        for i, axes in enumerate(panels(figure, titles)):
            drawn = axes.imshow(blocks[:, :, i], cmap=colours, vmin=0, vmax=1, aspect="auto")
            axes.set_yticks(range(len(domains)), domains)
            axes.set_xticks(range(layers), [str(i + 1) for i in range(layers)])
            axes.spines[:].set_visible(False)
        axes.set_xlabel("Layer")
        figure.colorbar(drawn, ax=figure.axes, label="Mean level, 0 smallest, 1 largest", shrink=0.8)

    cells = [f"{domain} {', '.join(f'{value:.2f}' for value in row)}" for domain, row in zip(domains, mean, strict=True)]
    words = f"Mean level of {' and '.join(units()[: len(titles)])} of each layer in turn, by domain: {'; '.join(cells)}."
    caption = f"{found.label}: how much of every block the tokens of a domain use on average, at a budget of {percent(target)}"
    return picture(name, words, f"{caption} (as the paper’s figure 9).", draw, (SIZE[0], 1.6 + 0.5 * len(domains)))


def _mean_level(shares: list[float]) -> float:
    """0 if all tokens are at the smallest level, 1 at the largest."""
    return sum(level * share for level, share in enumerate(shares)) / max(len(shares) - 1, 1)


def heat(tokens: TokenCosts, name: str, costs: str) -> Picture:
    """A text whose tokens are coloured by the share that they spent."""
    cells = []
    for text, share in zip(tokens.texts, tokens.shares, strict=True):
        shown = text.replace("\n", "⏎").replace("\t", "→") or "·"
        cells += [(character, share) for character in shown]
    lines = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    low, high = min(tokens.shares), max(tokens.shares)
    span = high - low or 1.0

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        colours = LinearSegmentedColormap.from_list("shares", theme.shades)
        grid = np.full((len(lines), COLUMNS), np.nan)
        for y, line in enumerate(lines):
            for x, (character, share) in enumerate(line):
                grid[y, x] = (share - low) / span
                ink = "black" if sum(colours(grid[y, x])[:3]) > 1.6 else "white"
                axes.text(x, y, character, ha="center", va="center", fontsize=6, family="monospace", color=ink)
        drawn = axes.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
        axes.set_axis_off()
        bar = figure.colorbar(drawn, ax=axes, orientation="horizontal", fraction=0.08, ticks=[0, 1])
        bar.ax.set_xticklabels([percent(low), percent(high)])

    order = [text for _, text in sorted(zip(tokens.shares, tokens.texts, strict=True), reverse=True)]
    words = f"What the first {len(order)} tokens of a text of {tokens.domain} spend, {percent(low)} to {percent(high)} of the"
    words += f" full model’s {costs}; most: {', '.join(map(repr, order[:5]))}; least: {', '.join(map(repr, order[-5:]))}."
    caption = f"{tokens.domain}: the share of the full model’s {costs} that each token spends, at a budget of"
    return picture(name, words, f"{caption} {percent(tokens.budget)}.", draw, (SIZE[0], 0.8 + 0.17 * len(lines)))


TOPICS = (
    Topic(("router", "joint"), read_trained, trained_sections),
    Topic(("evaluate",), read_evaluated, evaluated_sections),
)
