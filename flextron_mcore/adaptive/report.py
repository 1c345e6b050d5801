"""Report topics about token routing (Flextron, figures 8 and 9): loss and cost by budget, domain and token.

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
    """Loss and cost of token routing at one budget.

    Attributes:
        loss: {domain: loss in nats per token}.
        mean_loss: mean of `loss` over domains.
        shares: {domain: average cost of a token, as a share of the full model's cost}.
        share: mean of `shares` over domains.
        levels: {domain: [share of tokens at each level, smallest candidate first] of each block}.
    """

    loss: dict[str, float]
    mean_loss: float
    shares: dict[str, float]
    share: float
    levels: dict[str, list]

    def cell(self, domain: str) -> str:
        """Text for one domain in a table: loss in nats per token, and average cost as percent of the full model's; – without."""
        return f"{loss(self.loss[domain])} at {percent(self.shares[domain])}" if domain in self.loss else "–"


@dataclass(frozen=True)
class Static:
    """Result of the sub-network that the static routers choose for one budget.

    Attributes:
        mean_loss: loss in nats per token, mean over domains.
        share: cost of the sub-network, as a share of the full model's cost.
    """

    mean_loss: float
    share: float


@dataclass(frozen=True)
class Budget:
    """Results of static and adaptive routers at one budget.

    Attributes:
        target: budget, as a share of the full model's cost.
        static: result of the static routers.
        adaptive: {KV policy: result of token routing}.
    """

    target: float
    static: Static
    adaptive: dict[str, Outcome]


@dataclass(frozen=True)
class TokenCosts:
    """Cost of each of the first tokens of one text at a budget.

    Attributes:
        domain: domain of the text.
        budget: budget, as a share of the full model's cost.
        texts: text of each token.
        shares: cost of each token, as a share of the full model's cost.
    """

    domain: str
    budget: float
    texts: list[str]
    shares: list[float]


@dataclass(frozen=True)
class TokenRouters:
    """Settings of trained adaptive routers.

    Attributes:
        costs: names of the costs that budgets limit.
        kv_policy: keys and values that a token writes: `full`, of all KV groups, or `own`, of the groups that it uses.
    """

    costs: list[str]
    kv_policy: KvPolicy


@dataclass(frozen=True)
class Trained:
    """Evaluation of adaptive routers by the stage that trained them.

    Attributes:
        label: name of the stage's directory.
        model: architecture of the full model.
        routers: settings of the routers.
        full_loss: {domain: loss of the full model in nats per token}.
        adaptive_budgets: results at each budget.
        token_costs: cost of each token of a text, for each domain.
    """

    label: str
    model: ModelConfig
    routers: TokenRouters
    full_loss: dict[str, float]
    adaptive_budgets: list[Budget]
    token_costs: list[TokenCosts]

    @property
    def costs(self) -> str:
        """Names of the costs that budgets and shares refer to, as text."""
        return " and ".join(self.routers.costs)

    def outcomes(self) -> list[tuple[float, Outcome]]:
        """(budget, result of token routing) for each budget, with the KV policy of the training.

        Budgets are shares of the full model's cost.
        """
        return [(budget.target, budget.adaptive[self.routers.kv_policy]) for budget in self.adaptive_budgets]


@dataclass(frozen=True)
class Evaluated:
    """Result of one `flextron evaluate selector=adaptive`.

    Attributes:
        label: name of the directory.
        cost: name of the cost that the budget limits.
        budget: budget, as a share of the full model's cost.
        kv_policy: keys and values that a token writes: `full`: of all KV groups, `own`: of those it uses.
        outcome: loss and cost of token routing.
    """

    label: str
    cost: str
    budget: float
    kv_policy: KvPolicy
    outcome: Outcome


def read_trained(output: StageOutput) -> Trained | None:
    """Read the directory of a stage that trains routers; None for static routers."""
    if not output.metrics.inner("routers").has("kind"):
        return None
    found = output.into(Trained)
    return replace(found, adaptive_budgets=sorted(found.adaptive_budgets, key=lambda budget: budget.target))


def read_evaluated(output: StageOutput) -> Evaluated | None:
    """Read an `evaluate` directory; None for an evaluation of sub-networks."""
    if not output.metrics.has("kv_policy"):
        return None
    mean_loss = output.metrics.inner("mean").read("loss", float)
    return output.into(Evaluated, outcome=output.metrics.into(Outcome, mean_loss=mean_loss))


def trained_sections(results: list[Trained]) -> list[Section]:
    """Section of the page for each training: static against adaptive routers, by domain, by block, and token by token."""
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
        parts.append(Section(f"adaptive_{name}", f"A choice for every token ({found.label})", note, tables, pictures, "budgets"))
    return parts


def evaluated_sections(results: list[Evaluated]) -> list[Section]:
    """Section of the page with one table, which has a row for each evaluation of adaptive routers."""
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
    note = "Adaptive routers at one budget: validation loss, and average cost of a token as a share of the full model’s cost."
    table = Table.of_columns(columns, left=2)
    return [Section("adaptive_evaluated", "Token routing, evaluated", note, [table], [], "budgets")]


def _lines(figure: Figure, series: dict[str, list[tuple[float, float]]], colours: list, xlabel: str, ylabel: str) -> None:
    """Draw a chart with a line with markers for each series, and a legend.

    Args:
        figure: figure to draw into.
        series: {name: points}.
        colours: colour of each series.
        xlabel, ylabel: labels of the axes.
    """
    axes = chart(figure, xlabel, ylabel)
    for (text, points), marker, colour in zip(series.items(), MARKERS * len(series), colours, strict=False):
        axes.plot(*zip(*points, strict=True), f"{marker}-", color=colour, label=text, markersize=5)
    axes.legend()


def loss_against_share(found: Trained, name: str) -> Picture:
    """Chart of the mean loss against the average cost, for static and adaptive routers. name: file name without its ending."""
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
    caption = f"{found.label}: mean loss against the average cost of a token. Lower and further left is better."
    return picture(name, f"Mean loss against the average share of {found.costs}: {words}.", caption, draw)


def degradation(found: Trained, name: str) -> Picture:
    """Chart of each domain's loss minus the full model's loss there, against the budget (Flextron, figure 8).

    name: file name without its ending.
    """
    series = {
        domain: [(100 * target, outcome.loss[domain] - full) for target, outcome in found.outcomes()]
        for domain, full in found.full_loss.items()
    }

    def draw(figure: Figure, theme: Theme) -> None:
        label = f"Budget (% of the full model’s {found.costs})"
        _lines(figure, series, list(ramp(theme, len(series))), label, "Loss above the full model’s (nats)")

    words = "; ".join(f"{domain} {', '.join(f'{y:.3f} at {x:.0f}%' for x, y in points)}" for domain, points in series.items())
    caption = f"{found.label}: loss above the full model’s in each domain, at each budget (as the paper’s figure 8)."
    return picture(name, f"Loss above the full model’s, by domain: {words}.", caption, draw)


def allocation(found: Trained, name: str) -> Picture:
    """Chart of the mean level of tokens in each block by domain, at the middle budget (Flextron, figure 9).

    A level is the index of a block's candidate, scaled to 0 for the smallest and 1 for the largest. name: file name without its
    ending.
    """
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
    """Mean level, scaled to 0 (all tokens at the smallest) .. 1 (all at the largest). shares: share of tokens at each level."""
    return sum(level * share for level, share in enumerate(shares)) / max(len(shares) - 1, 1)


def heat(tokens: TokenCosts, name: str, costs: str) -> Picture:
    """Chart of a text whose tokens are coloured by their cost.

    Args:
        tokens: tokens of the text and the cost of each.
        name: file name without its ending.
        costs: name of the cost.
    """
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
    words = f"Cost of the first {len(order)} tokens of a text of {tokens.domain}, {percent(low)} to {percent(high)} of the full"
    words += f" model’s {costs}; most: {', '.join(map(repr, order[:5]))}; least: {', '.join(map(repr, order[-5:]))}."
    caption = f"{tokens.domain}: the share of the full model’s {costs} that each token spends, at a budget of"
    return picture(name, words, f"{caption} {percent(tokens.budget)}.", draw, (SIZE[0], 0.8 + 0.17 * len(lines)))


TOPICS = (
    Topic(("router", "joint"), read_trained, trained_sections),
    Topic(("evaluate",), read_evaluated, evaluated_sections),
)
