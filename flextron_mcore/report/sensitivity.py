"""Topic of `sensitivity`: loss if one block alone is made smaller (Flextron, figure 6). Losses are in nats per token."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure

from flextron_mcore.axes import AXES, layer_axes
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.report.drawing import MARKERS, SIZE, Picture, Theme, panels, picture, ramp, tidy
from flextron_mcore.report.reader import Settings, StageOutput
from flextron_mcore.report.text import loss, signed, stem
from flextron_mcore.report.topic import Column, Highlights, Section, Table, Topic, numbered


@dataclass(frozen=True)
class BlockLoss:
    """Loss of the full model with one block reduced to a smaller candidate.

    Attributes:
        layer: index of the layer, from 0.
        axis: axis of the block (heads or FFN neurons).
        size: size of the candidate.
        loss: loss with this block reduced, in nats per token.
        degradation: `loss` minus the loss of the full model.
    """

    layer: int
    axis: str
    size: int
    loss: float
    degradation: float


@dataclass(frozen=True)
class Sensitivity:
    """Result of one directory that `flextron sensitivity` wrote.

    Attributes:
        label: name of the directory.
        model: architecture of the full model.
        samples: evaluated samples, all domains together.
        full_loss: loss of the full model in nats per token.
        blocks: loss with each block at each of its smaller candidates.
        settings: architecture and elastic space, for the page.
    """

    label: str
    model: ModelConfig
    samples: int
    full_loss: float
    blocks: list[BlockLoss]
    settings: Settings

    def candidates(self, axis: str) -> list[int]:
        """Sizes of an axis that were evaluated, largest first."""
        return sorted({block.size for block in self.blocks if block.axis == axis}, reverse=True)

    def curve(self, axis: str, size: int) -> dict[int, float]:
        """{layer: loss above the full model's, in nats per token} of one candidate size, in the order of the layers."""
        return dict(sorted((block.layer, block.degradation) for block in self.blocks if (block.axis, block.size) == (axis, size)))

    def share(self, axis: str, size: int) -> str:
        """Text of a candidate size as percent of the axis's size in the full model."""
        return f"{100 * size / AXES[axis].full(self.model):.0f}%"


def read(output: StageOutput) -> Sensitivity:
    """Result of one `sensitivity` directory. Raises FlextronError without blocks, and for an unknown axis or layer."""
    output.metrics.refuse_empty("blocks")
    found, axes = output.into(Sensitivity), [axis.name for axis in layer_axes()]
    for i, block in enumerate(found.blocks):
        where = f"{output.metrics.where}: blocks[{i}]"
        if block.axis not in axes:
            raise FlextronError(f"{where}: 'axis' must be one of {', '.join(axes)}, not \"{block.axis}\"")
        if not 0 <= block.layer < found.model.num_layers:
            raise FlextronError(f"{where}: 'layer' must be within 0..{found.model.num_layers - 1}, not {block.layer}")
    return found


def sections(results: list[Sensitivity]) -> list[Section]:
    """Section of the page for each directory, with a table and a picture."""
    parts = []
    for s, number, label in numbered(results):
        columns: list[Column] = [("Layer", [*(str(layer + 1) for layer in range(s.model.num_layers)), "mean"])]
        for axis in layer_axes():
            for size in s.candidates(axis.name):
                curve = s.curve(axis.name, size)
                values = [*map(curve.get, range(s.model.num_layers)), sum(curve.values()) / len(curve)]
                columns.append((f"{axis.short} {size:,} ({s.share(axis.name, size)})", list(map(signed, values))))
        note = (
            "How much the loss rises when one block alone is cut to a smaller size: blocks with small numbers are cheap to cut."
        )
        note += f" The full model has {loss(s.full_loss)} nats per token on these {s.samples:,} samples."
        table = Table.of_columns(columns, strong=s.model.num_layers)
        parts.append(Section(f"sensitivity{number}", f"Sensitivity of every block{label}", note, [table], [degradation(s)]))
    return parts


def highlights(results: list[Sensitivity]) -> Highlights:
    """Architecture and elastic space of each directory."""
    return Highlights(settings=[s.settings for s in results])


def degradation(s: Sensitivity) -> Picture:
    """Chart of the loss above the full model's if one block is made smaller, by layer (Flextron, figure 6).

    There is a panel for each axis and a line for each candidate.
    """
    axes_shown = [axis for axis in layer_axes() if s.candidates(axis.name)]
    label = lambda axis, size: f"{s.share(axis.name, size)} ({size:,})"  # noqa: E731

    def draw(figure: Figure, theme: Theme) -> None:
        drawn = panels(figure, [axis.title for axis in axes_shown], sharey=True)
        for axes, axis in zip(drawn, axes_shown, strict=True):
            sizes = s.candidates(axis.name)
            for i, (size, colour) in enumerate(zip(sizes, ramp(theme, len(sizes)), strict=False)):
                curve = s.curve(axis.name, size)
                style = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4, "linewidth": 1.3, "color": colour}
                axes.plot([layer + 1 for layer in curve], list(curve.values()), label=label(axis, size), **style)
            axes.axhline(0, color=theme.muted, linewidth=0.8)
            axes.set_xlabel("Layer" if axes is drawn[-1] else "")
            tidy(axes)
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        drawn[-1].xaxis.get_major_locator().set_params(integer=True)
        figure.supylabel("Loss above the full model’s (nats per token)", fontsize=9.5)

    texts = []
    for axis in axes_shown:
        for size in s.candidates(axis.name):
            values = ", ".join(f"{value:.3g}" for value in s.curve(axis.name, size).values())
            texts.append(f"{axis.title} {label(axis, size)}: {values}")
    words = f"Loss above the full model’s, in nats per token, when one block is replaced, by layer. {'; '.join(texts)}."
    caption = "Loss above the full model’s when the block of one layer alone is cut to a candidate (as Flextron, figure 6)."
    return picture(f"{stem(s.label)}_degradation", words, caption, draw, (SIZE[0], 0.8 + 1.9 * len(axes_shown)))


TOPIC = Topic(("sensitivity",), read, sections, highlights)
