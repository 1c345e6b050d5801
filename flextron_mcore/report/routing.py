"""Topic of `router`, `joint`, `gumbel`: networks that routers choose, and training (Flextron, figure 12). No torch import.

Losses are in nats per token. Budgets and shares are fractions of the full model's cost.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flextron_mcore.config import ModelConfig
from flextron_mcore.report import training
from flextron_mcore.report.drawing import SIZE, Picture, Theme, log_scale, moving_average, panels, picture, tidy
from flextron_mcore.report.networks import layer_columns, layer_grid, network_columns
from flextron_mcore.report.reader import StageOutput
from flextron_mcore.report.text import loss, percent, stem
from flextron_mcore.report.topic import Column, Highlights, Section, Table, Topic
from flextron_mcore.report.training import VALIDATION, Training, train_curve, training_table, validation_curves
from flextron_mcore.space import SubNetwork

SIGNALS = {  # explanation of each training signal
    "surrogate": "Surrogate: a small model that predicts the loss of a network from its choices.",
    "budgets only": "Budgets only: the surrogate’s error stayed above its threshold, so the routers learned nothing about loss.",
    "straight-through": "Straight-through: the gradient of the loss itself, through hard choices.",
    "relaxed choices": "Relaxed choices: mixtures of sizes, which harden as the temperature falls.",
}
PHASE_TEXTS = (
    "Phase 1: the surrogate learns, and the routers learn only to keep budgets.",
    "Phase 2: the routers follow the surrogate.",
    "Phase 3: the surrogate’s error is steady, the routers go on.",
)


@dataclass(frozen=True)
class BudgetChoice:
    """Network that the routers choose for one budget.

    Attributes:
        target: budget, as a share of the full model's cost.
        share: cost of the chosen network, as a share of the full model's cost.
        argmax_share: cost of the network with the likeliest size of every block, which may miss the budget, as the same share.
        subnetwork: sizes of the chosen network.
    """

    target: float
    share: float
    argmax_share: float
    subnetwork: SubNetwork

    @property
    def name(self) -> str:
        """Budget in percent of the full model's cost: `60%`."""
        return f"{100 * self.target:.4g}%"


@dataclass(frozen=True)
class RouterStep:
    """One logged step of a router's training; None for values that were not logged. Losses are in nats per token.

    Attributes:
        step: number of the step, from 1.
        loss: loss of the full model.
        subnetwork_losses: losses of the networks that the routers drew.
        constraint_loss: constraint loss (Flextron, eq. 8: cost above the budget), for adaptive routers the mean distance of cost
            and budget; both as shares of the span from the smallest network's cost to the full model's.
        surrogate_loss: mean squared error of the surrogate model's predictions for these networks, in nats squared.
        surrogate_error: running mean of surrogate_loss divided by the variance of the losses that the surrogate is fitted to.
        routers_follow_surrogate: True if the routers learn from the surrogate model's predictions at this step.
        temperature: temperature of the softmax of relaxed choices.
    """

    step: int
    loss: float
    subnetwork_losses: list[float] | None = None
    constraint_loss: float | None = None
    surrogate_loss: float | None = None
    surrogate_error: float | None = None
    routers_follow_surrogate: bool | None = None
    temperature: float | None = None

    @property
    def excess(self) -> float | None:
        """Mean loss of the networks that the routers drew minus the full model's loss, in nats per token."""
        losses = self.subnetwork_losses
        return sum(losses) / len(losses) - self.loss if losses else None


@dataclass(frozen=True)
class Routers:
    """Settings of trained routers, from metrics.json.

    Attributes:
        costs: names of the costs that budgets limit.
        surrogate: True if routers learn through a surrogate model of the loss.
        threshold: error of the surrogate below which the routers learn from it.
        kind: "adaptive" for routers that choose for every token; None for routers that choose one network for all tokens.
    """

    costs: list[str]
    surrogate: bool | None
    threshold: float | None
    kind: str | None


@dataclass(frozen=True)
class TrainedRouters:
    """Result of one directory of `router`, `joint` or `gumbel`.

    Attributes:
        label: name of the directory.
        kind: name of the stage.
        model: architecture of the full model.
        routers: settings of the routers.
        budgets: networks chosen for some budgets, the largest budget first; empty for routers that choose for every token.
        training: numbers and curves of the training.
        steps: logged steps of the routers.
    """

    label: str
    kind: str
    model: ModelConfig
    routers: Routers
    budgets: list[BudgetChoice] | None
    training: Training
    steps: list[RouterStep]

    @property
    def relaxed(self) -> bool:
        """True for the stage `gumbel`, whose routers learn from relaxed choices: mixtures of candidates with softmax weights."""
        return self.kind == "gumbel"

    @property
    def signal(self) -> str:
        """Name of the routers' training signal: a key of SIGNALS, or for adaptive routers also "straight-through, a token"."""
        if self.relaxed:
            return "relaxed choices"
        if self.routers.surrogate:
            return "budgets only" if self.steps and self.follows_from() is None else "surrogate"
        return f"straight-through{', a token' if self.routers.kind else ''}"

    def follows_from(self) -> int | None:
        """First logged step at which the routers learn from the surrogate model's predictions; None if they never do."""
        return next((row.step for row in self.steps if row.routers_follow_surrogate), None)

    def steady_from(self) -> int | None:
        """First logged step at which the routers follow the surrogate and its error is steady; None if there is none.

        Steady: at most 1.5 times the median error of the last quarter of the logged steps.
        """
        known = [row for row in self.steps if row.surrogate_error is not None and math.isfinite(row.surrogate_error)]
        if not known:
            return None
        level = statistics.median(row.surrogate_error for row in known[-max(1, len(known) // 4) :])
        return next((row.step for row in known if row.routers_follow_surrogate and row.surrogate_error <= 1.5 * level), None)

    def phases(self) -> list[tuple[int, int]]:
        """(first, last) step of three phases: the surrogate learns, the routers follow it, its error is steady (PHASE_TEXTS).

        Empty if the routers never follow a surrogate. A phase that did not occur has equal ends.
        """
        first = self.follows_from()
        if first is None:
            return []
        end, steady = self.steps[-1].step, self.steady_from()
        steady = end if steady is None else max(steady, first)
        return [(self.steps[0].step, first), (first, steady), (steady, end)]


def read(output: StageOutput) -> TrainedRouters:
    """Read one directory of `router`, `joint` or `gumbel`. Raises FlextronError for a wrong value, which is named."""
    steps = [row.into(RouterStep) for row in output.log("train")]
    found = output.into(TrainedRouters, training=training.read(output), steps=steps)
    return replace(found, budgets=sorted(found.budgets or (), key=lambda budget: -budget.target))


def sections(results: list[TrainedRouters]) -> list[Section]:
    """Sections of the page, as far as there is data: chosen networks, training of the routers, table of training signals."""
    parts = [_budgets_section(results)] if any(trained.budgets for trained in results) else []
    parts.append(_training_section(results))
    routers = [trained for trained in results if trained.kind == "router" and trained.budgets]
    if len(routers) > 1 and not all(trained.routers.surrogate for trained in routers):
        parts.append(_signals_section(routers))
    return parts


def highlights(results: list[TrainedRouters]) -> Highlights:
    """Progress of each training stage, and its architecture and elastic space."""
    return training.highlights([trained.training for trained in results])


def _budgets_section(results: Sequence[TrainedRouters]) -> Section:
    results = [trained for trained in results if trained.budgets]
    tables, pictures = [], []
    for trained in results:
        model, budgets = trained.model, trained.budgets
        nets = [budget.subnetwork for budget in budgets]
        columns: list[Column] = [
            (f"Budget ({trained.label})", [budget.name for budget in budgets]),
            ("Share", [percent(budget.share) for budget in budgets]),
            ("Share without search", [percent(budget.argmax_share) for budget in budgets]),
            *layer_columns(nets, model),
            *(network_columns(nets, model) if trained.relaxed else ()),
        ]
        tables.append(Table.of_columns(columns))
        named = [(budget.name, budget.subnetwork) for budget in budgets]
        pictures.append(layer_grid(named, model, f"{stem(trained.label)}_widths", f"{trained.label}: "))
    costs = " and ".join(dict.fromkeys(cost for trained in results for cost in trained.routers.costs))
    note = "Routers give every size of every block a probability. A search picks the likeliest network within the budget, a share"
    note += f" of the full model’s {costs}. Without search every block has its likeliest size, and the network may cost more. In"
    note += " brackets: the range where layers differ."
    return Section("budgets", "Networks that the routers choose", note, tables, pictures, "budgets")


def _training_section(results: Sequence[TrainedRouters]) -> Section:
    pictures = []
    for trained in results:
        pictures += [made] if (made := dynamics(trained)) else []
        pictures += [train_curve(trained.training)] if trained.kind != "router" and trained.training.train else []
        pictures += validation_curves(trained.training)
    signals = [trained.signal for trained in results]
    table = training_table([trained.training for trained in results], [("Routers learn from", signals)])
    note = " ".join(text for signal, text in SIGNALS.items() if any(found.startswith(signal) for found in signals))
    return Section("routers", "Router training", f"{VALIDATION} {note}", [table], pictures, "trained", folded=True)


def _signals_section(routers: Sequence[TrainedRouters]) -> Section:
    names = list(dict.fromkeys(name for trained in routers for name in trained.training.last if name != "full"))
    rows = [[each.label, each.signal, *(loss(each.training.last.get(name)) for name in names)] for each in routers]
    note = "The same routers trained with and without the surrogate: last validation loss at each budget."
    return Section("signals", "Surrogate or straight-through", note, [Table(["Routers", "Signal", *names], rows, left=2)], [])


@dataclass(frozen=True)
class _Curve:
    """Curve of a training figure by step.

    values: value at each step, or None. threshold: level to draw as a line. averaged: the values are moving averages already.
    """

    title: str
    values: list[float | None]
    log: bool = False
    threshold: float | None = None
    averaged: bool = False

    def points(self, steps: Sequence[RouterStep]) -> tuple[list[int], list[float]]:
        """(steps, values) that can be drawn: values that are known, finite and, on a log scale, positive."""
        pairs = [(row.step, value) for row, value in zip(steps, self.values, strict=True)]
        kept = [(x, y) for x, y in pairs if y is not None and np.isfinite(y) and (y > 0 or not self.log)]
        return [x for x, _ in kept], [y for _, y in kept]

    def smooth(self, values: Sequence[float], window: int) -> np.ndarray:
        """Moving average of some of the curve's values, on a log scale of their logarithms. window: steps in a mean."""
        if self.averaged:
            return np.asarray(values)
        return np.exp(moving_average(np.log(values), window)) if self.log else moving_average(values, window)


def dynamics(trained: TrainedRouters) -> Picture | None:
    """Picture of a router's training by step; None without a log.

    Panels: loss of the drawn networks above the full model's (nats per token); with a surrogate its loss and its error, without
    one the constraint loss; for the stage `gumbel` also the temperature.
    """
    steps = trained.steps
    curves = [curve for curve in _curves(trained) if curve.points(steps)[0]]
    if not curves:
        return None
    window = max(1, len(steps) // 40)
    bounds = trained.phases()

    def draw(figure: Figure, theme: Theme) -> None:
        drawn = panels(figure, [curve.title for curve in curves])
        for i, (axes, curve) in enumerate(zip(drawn, curves, strict=True)):
            x, y = curve.points(steps)
            colour = theme.after if i == 0 else theme.before
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(x, curve.smooth(y, window), "-" if i == 0 else "--", color=colour)
            if curve.threshold is not None:
                label = f"threshold {curve.threshold:g}"
                axes.axhline(curve.threshold, color=theme.ink, linestyle=":", linewidth=1.3, label=label)
                axes.legend(loc="upper right")
            axes.set_xlabel("Step" if axes is drawn[-1] else "")
            tidy(axes)
            if curve.log:
                log_scale(axes, y)
            _mark_phases(axes, bounds, theme, numbers=i == 0)
        if bounds:
            drawn[0].set_title(curves[0].title, loc="left", fontsize=9.5, fontweight="bold", pad=14)  # above the numbers
        drawn[-1].xaxis.get_major_locator().set_params(integer=True)

    ends = []
    for curve in curves:
        smooth = curve.smooth(curve.points(steps)[1], window)
        ends.append(f"{curve.title} from {smooth[0]:.3g} to {smooth[-1]:.3g}")
    words = f"Router training over {steps[-1].step:,} steps. {'; '.join(ends)}."
    caption = f"{trained.label}: loss of the routers’ networks, mean of a step, above the full model’s"
    caption += ", and the surrogate’s error (as Flextron, figure 12)" if trained.routers.surrogate else ""
    caption += f"; smoothed over {window} logged steps." if window > 1 else "; not smoothed."
    if trained.routers.surrogate and trained.follows_from() is not None:
        words += f" The routers follow the surrogate from step {trained.follows_from():,}"
        steady = trained.steady_from()
        words += f", whose error settles at step {steady:,}." if steady is not None else "."
    elif trained.routers.surrogate and trained.kind == "router":
        words += " The routers never follow the surrogate."
    shown = [text for text, (low, high) in zip(PHASE_TEXTS, bounds, strict=False) if low < high]
    caption += f" {' '.join(shown)}" if bounds else ""
    return picture(f"{stem(trained.label)}_dynamics", words, caption, draw, (SIZE[0], 0.7 + 1.5 * len(curves)))


def _curves(trained: TrainedRouters) -> list[_Curve]:
    steps = trained.steps
    curves = [_Curve("Loss above the full model’s (nats per token)", [row.excess for row in steps])]
    if any(row.surrogate_loss is not None for row in steps):
        errors, threshold = [row.surrogate_error for row in steps], trained.routers.threshold or 0.0
        curves.append(_Curve("L2 loss of the surrogate (nats²)", [row.surrogate_loss for row in steps], log=True))
        curves.append(_Curve("Surrogate’s error (share of losses’ variance)", errors, True, threshold, averaged=True))
    else:
        curves.append(_Curve("Constraint loss", [row.constraint_loss for row in steps]))
    if trained.relaxed:
        curves.append(_Curve("Temperature", [row.temperature for row in steps], log=True))
    return curves


def _mark_phases(axes: Axes, bounds: list[tuple[int, int]], theme: Theme, numbers: bool) -> None:
    """Draw a line at the start of phases 2 and 3, and the numbers of phases with room above the axes."""
    for number, (low, high) in enumerate(bounds, start=1):
        if number > 1 and low < high:
            axes.axvline(low, color=theme.muted, linewidth=1.1)
        if numbers and high - low > 0.03 * (bounds[-1][1] - bounds[0][0]):
            style = {"ha": "center", "va": "bottom", "fontsize": 9, "fontweight": "bold", "color": theme.muted}
            axes.text((low + high) / 2, 1.02, str(number), transform=axes.get_xaxis_transform(), **style)


TOPIC = Topic(("router", "joint", "gumbel"), read, sections, highlights)
