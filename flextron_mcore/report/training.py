"""Topic of `pretrain` and `elastic`: figures and curves of a training, which stages that train routers use, too.

Losses are in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from flextron_mcore.report.drawing import MARKERS, SIZE, Picture, Theme, chart, moving_average, picture, ramp
from flextron_mcore.report.reader import PLAIN, Settings, StageOutput
from flextron_mcore.report.text import big, duration, loss, short, stem
from flextron_mcore.report.topic import Card, Column, Highlights, Progress, Section, Table, Topic

VALIDATION = "Validation losses are the full model’s on the samples that training validates on: other parts use other samples."
MOST_LABELS = 12  # lines named in one legend
TITLES = {
    "pretrain": "Pretraining",
    "elastic": "Elastic training",
    "router": "Router training",
    "joint": "Joint training",
    "gumbel": "Training of model and router",
}
GROUPS = {  # of validated networks by the beginning of their names, each with its caption
    "uniform": "Validation loss of uniform sub-networks (the same widths in every layer; as Flextron, figure 10).",
    "random": "Validation loss of random sub-networks (as Flextron, figure 11).",
    "router": "{label}: validation loss of the networks that the routers choose, by share of the full model’s cost.",
    "other": "Validation loss of the other sub-networks.",
}


@dataclass(frozen=True)
class TrainRow:
    """One logged training step, with losses in nats per token.

    Attributes:
        step: number of the step, from 1.
        loss: loss of the full model.
        subnetwork_losses: losses of the sub-networks that were drawn for the step; None if there were none.
    """

    step: int
    loss: float
    subnetwork_losses: list[float] | None = None


@dataclass(frozen=True)
class Training:
    """Result of one directory of a training stage. Losses are in nats per token.

    Attributes:
        label: name of the directory.
        kind: name of the stage.
        steps: number of training steps.
        tokens: tokens of all steps.
        seconds: wall time since the last start of the stage, so of an interrupted training its last part only.
        tokens_per_second: mean throughput in that time.
        train: logged steps.
        validation: (step, {name of a network: loss, mean over domains}) of each validation.
        first, last: {name of a network: loss} in the first and in the last validation.
        settings: architecture and elastic space, for the page.
    """

    label: str
    kind: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    train: list[TrainRow]
    validation: list[tuple[int, dict[str, float]]]
    first: dict[str, float]
    last: dict[str, float]
    settings: Settings

    @property
    def time(self) -> float:
        """Wall time of all steps in seconds, at the mean throughput of the last start."""
        return self.tokens / self.tokens_per_second if self.tokens_per_second > 0 else self.seconds

    @property
    def first_loss(self) -> float | None:
        """First validation loss of the full model, None if it was not validated."""
        return self.first.get("full")

    @property
    def last_loss(self) -> float | None:
        """Last validation loss of the full model, None if it was not validated."""
        return self.last.get("full")

    def progress(self) -> Progress:
        """Summary of the stage as one sentence (steps, trained tokens, time, loss unless kind is "router") and a key figure."""
        text = f"{TITLES[self.kind]} took {self.steps:,} steps, {big(self.tokens)} tokens and {duration(self.time)}"
        if self.kind != "router" and self.first_loss is not None and self.last_loss is not None:  # `router` trains no model
            text += (
                f"; the full model’s validation loss went from {loss(self.first_loss)} to {loss(self.last_loss)} nats per token"
            )
        note = f"tokens in {self.steps:,} steps, {duration(self.time)}"
        return Progress(f"{text}.", Card(TITLES[self.kind], big(self.tokens), note), self.kind == "elastic")


def read(output: StageOutput) -> Training:
    """Result of one directory of a training stage, with its log if there is one."""
    validation = [(row.read("step", int), row.read("losses", dict[str, float])) for row in output.log("validation")]
    rows = [row.into(TrainRow) for row in output.log("train")]
    ends = {"first": _end(output, "first", validation), "last": _end(output, "last", validation[::-1])}
    return output.into(Training, train=rows, validation=validation, **ends)


def _end(output: StageOutput, end: str, logged: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """{network: loss} of the first or last validation, from metrics.json; networks that it lacks are taken from the log.

    Args:
        output: output of the stage.
        end: "first" or "last".
        logged: (step, {network: loss}) of each logged validation, beginning at this end.
    """
    given = output.metrics.values.get("validation")
    row = given.get(end) if isinstance(given, Mapping) else None
    losses = row.get("losses", row) if isinstance(row, Mapping) else None
    _, is_number = PLAIN[float]
    found = {name: float(value) for name, value in losses.items() if is_number(value)} if isinstance(losses, Mapping) else {}
    for _, values in logged:
        found = {**values, **found}
    return found


def sections(results: list[Training]) -> list[Section]:
    """List of one section of the page: a table of all pretraining and elastic training runs, and their loss curves."""
    pictures = []
    for training in results:
        pictures += [train_curve(training)] if training.train else []
        pictures += validation_curves(training)
    return [Section("training", "Training", VALIDATION, [training_table(results)], pictures, "trained", folded=True)]


def highlights(results: Sequence[Training]) -> Highlights:
    """Summary of each training stage, and the architecture and elastic space of each, the latest first."""
    settings = [training.settings for training in reversed(results)]
    return Highlights(progress=[training.progress() for training in results], settings=settings)


def training_table(results: Sequence[Training], more: Sequence[Column] = ()) -> Table:
    """Table with a row for each training stage.

    Columns are its directory, steps, tokens, wall time, tokens per second, and the full model's first and last validation loss
    (nats per token, mean over domains). more: further columns, (header, cells), added on the right.
    """
    columns = [
        ("Stage", [t.label for t in results]),
        ("Steps", [f"{t.steps:,}" for t in results]),
        ("Tokens", [f"{t.tokens:,}" for t in results]),
        ("Time", [duration(t.time) for t in results]),
        ("Tokens per second", [f"{t.tokens_per_second:,.0f}" for t in results]),
        ("Validation, first", [loss(t.first_loss) for t in results]),
        ("Validation, last", [loss(t.last_loss) for t in results]),
    ]
    return Table.of_columns([*columns, *more])


def train_curve(training: Training) -> Picture:
    """Picture of the training loss by step, smoothed by a moving average; the full model's loss itself is a pale line.

    Sub-networks are a line (mean of the step's sub-networks) in a band (lowest to highest loss of them). A stage without
    sub-networks shows the validation loss of the full model instead.
    """
    steps, full = [row.step for row in training.train], [row.loss for row in training.train]
    subs = [(row.step, row.subnetwork_losses) for row in training.train if row.subnetwork_losses]
    window = max(1, len(steps) // 40)
    validated = [(step, losses["full"]) for step, losses in training.validation if "full" in losses]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = chart(figure, "Step", "Training loss (nats per token)" if subs else "Loss (nats per token)")
        if subs:
            x = [step for step, _ in subs]
            low, mean, high = (moving_average([of(losses) for _, losses in subs], window) for of in (min, np.mean, max))
            axes.fill_between(x, low, high, color=theme.before, alpha=0.18, linewidth=0, label="sub-networks, lowest to highest")
            axes.plot(x, mean, "--", color=theme.before, label="sub-networks, mean")
        axes.plot(steps, full, color=theme.after, alpha=0.25, linewidth=0.8)
        axes.plot(steps, moving_average(full, window), color=theme.after, label="full model")
        if validated and not subs:
            style = {"color": theme.ink, "markersize": 4, "linewidth": 1, "label": "full model, validation"}
            axes.plot(*zip(*validated, strict=True), "o--", **style)
        axes.legend(loc="upper right")

    smooth = f"smoothed over {window} logged steps" if window > 1 else "not smoothed"
    words = f"Training loss over {steps[-1]:,} steps; full model from {full[0]:.3f} to {full[-1]:.3f} nats per token."
    text = f"Training loss of the full model{' and of the step’s sub-networks' if subs else ''}, {smooth}."
    return picture(f"{stem(training.label)}_training", words, text, draw)


def validation_curves(training: Training) -> list[Picture]:
    """Pictures of the validation loss by step, one for each kind of network that was validated, each with the full model.

    Kinds: uniform networks (Flextron, figure 10), random networks (figure 11), networks that routers choose, all other networks.
    """
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in dict.fromkeys(name for _, losses in training.validation for name in losses if name != "full"):
        groups[next((group for group in GROUPS if name.startswith(group)), "other")].append(name)
    return [_validation(training, group, members) for group, members in groups.items() if members]


def _validation(training: Training, group: str, names: list[str]) -> Picture:
    curves = {name: [(step, losses[name]) for step, losses in training.validation if name in losses] for name in ["full", *names]}
    ordered = sorted(names, key=lambda name: -curves[name][-1][1])

    def draw(figure: Figure, theme: Theme) -> None:
        axes = chart(figure, "Step", "Validation loss (nats per token)")
        colours = ramp(theme, len(ordered))
        for i, name in enumerate(ordered):
            label = short(name.removeprefix("uniform ")) if i < MOST_LABELS else None
            marker = MARKERS[i % len(MARKERS)]
            axes.plot(*zip(*curves[name], strict=True), marker=marker, markersize=3, linewidth=1.3, color=colours[i], label=label)
        if len(ordered) > MOST_LABELS:
            axes.plot([], [], color="none", label=f"and {len(ordered) - MOST_LABELS} more")
        if curves["full"]:
            axes.plot(*zip(*curves["full"], strict=True), color=theme.ink, linewidth=2.2, label="full model", zorder=4)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)

    rows = (min(len(names), MOST_LABELS + 1) + 2) // 2
    ends = ", ".join(f"{name} {curves[name][0][1]:.3f} to {curves[name][-1][1]:.3f}" for name in curves if curves[name])
    words = f"Validation loss in nats per token, first to last: {ends}."
    caption = GROUPS[group].format(label=training.label)
    return picture(f"{stem(training.label)}_validation_{group}", words, caption, draw, (SIZE[0], SIZE[1] + 0.17 * rows))


TOPIC = Topic(("pretrain", "elastic"), read, sections, highlights)
