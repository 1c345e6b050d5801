"""Section of the topic about `evaluate`: scores of networks on tasks, with standard errors. No torch import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from flextron_mcore.report.drawing import MARKERS, Picture, Theme, chart, picture
from flextron_mcore.report.text import cost_unit, lower, stem
from flextron_mcore.report.topic import Column, Section, Table


@dataclass(frozen=True)
class Measured:
    """Metric of a network on a task, and its standard error; None if lm_eval estimates none."""

    value: float
    stderr: float | None

    def __str__(self) -> str:
        """Value and standard error with four decimals, as lm_eval prints them."""
        return f"{self.value:.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")


Scores = dict[str, dict[str, Measured]]  # {task: {metric: ...}}


@dataclass(frozen=True)
class Scored:
    """Network that was evaluated on tasks: its name, its number of parameters and its scores."""

    name: str
    parameters: int
    scores: Scores


def tasks_section(label: str, networks: Sequence[Scored], number: str, title: str) -> Section:
    """Section with a table of all metrics, and a chart of accuracies against parameters if a task has one.

    Args:
        label: name of the evaluation's directory.
        networks: its networks, each with the same tasks.
        number, title: texts at the end of the section's key and title, from `numbered`.
    """
    columns: list[Column] = [
        ("Network", [net.name for net in networks]),
        ("Parameters", [f"{net.parameters:,}" for net in networks]),
    ]
    for task, metrics in networks[0].scores.items():
        for metric in metrics:
            found = [net.scores.get(task, {}).get(metric) for net in networks]
            columns.append((f"{task}, {metric}", [str(each) if each else "–" for each in found]))
    note = "Metrics with their standard errors, by lm-evaluation-harness."
    pictures = [_accuracies(label, networks)] if any("acc" in metrics for metrics in networks[0].scores.values()) else []
    return Section(f"tasks{number}", f"Tasks{title}", note, [Table.of_columns(columns)], pictures, "budgets")


def _accuracies(label: str, networks: Sequence[Scored]) -> Picture:
    """Chart of the metric `acc` of each task against the number of parameters, with standard errors."""
    nets = sorted(networks, key=lambda net: net.parameters)
    axis, unit = cost_unit("parameters", nets[-1].parameters)
    found = {
        task: [(net.parameters / unit, net.scores[task]["acc"]) for net in nets if "acc" in net.scores.get(task, {})]
        for task, metrics in nets[0].scores.items()
        if "acc" in metrics
    }

    words = f"Accuracy against {lower(axis)}. " + " ".join(
        f"{task}: " + ", ".join(f"{each} at {x:.4g}" for x, each in points) + "." for task, points in found.items()
    )
    caption = f"{label}: accuracy against parameters; bars are standard errors."
    return picture(f"{stem(label)}_tasks", words, caption, lambda figure, theme: draw(figure, theme, axis, found))


def draw(figure: Figure, theme: Theme, label: str, found: Mapping[str, Sequence[tuple[float, Measured]]]) -> None:
    """Draw a line with error bars for each task.

    Args:
        figure: figure to draw into.
        theme: colours.
        label: label of the x axis.
        found: {task: (x, accuracy) of each network}.
    """
    axes = chart(figure, label, "Accuracy")
    colours = [theme.after, theme.before, *theme.others]
    for i, (task, points) in enumerate(found.items()):
        x, y = [x for x, _ in points], [each.value for _, each in points]
        error = [each.stderr or 0.0 for _, each in points]
        form = f"{MARKERS[i % len(MARKERS)]}-"
        axes.errorbar(x, y, error, fmt=form, color=colours[i % len(colours)], markersize=5, capsize=3, label=task)
    axes.margins(x=0.09, y=0.1)
    axes.legend(loc="best")
