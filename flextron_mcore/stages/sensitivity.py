"""`flextron sensitivity`: loss of the model with one block at a time made smaller (Flextron, figure 6)."""

from __future__ import annotations

from typing import Any

from flextron_mcore.choices import Choices
from flextron_mcore.runs.opened import check_widths_only, evaluator, open_evaluation
from flextron_mcore.runs.output import discard, new_output, write_metrics
from flextron_mcore.runs.terminal import print_table, progress_bar
from flextron_mcore.settings.stages import SensitivitySettings
from flextron_mcore.space import SubNetwork


def run(settings: SensitivitySettings) -> dict[str, Any]:
    """Evaluate the full model, and the full model with each smaller candidate of each block; write metrics.json.

    Call on all ranks. Returns the content of metrics.json: {"stage", "samples", "model", "space", "full_loss", "blocks":
    [{"layer", "axis", "size", "loss", "degradation": loss above full_loss}]}.
    """
    opened = open_evaluation(settings)
    info = opened.info
    check_widths_only(info, "`flextron sensitivity`")
    choices, full = Choices(info.model, info.space), SubNetwork.full(info.model)
    places = [(block, k) for block, sizes in enumerate(choices.sizes) for k in range(len(sizes) - 1)]
    networks = [full, *(choices.replaced(full, block, k) for block, k in places)]
    with new_output(settings) as out:
        with progress_bar(desc="sensitivity") as bar:
            losses = evaluator(settings, opened, out / "cache", lambda done: bar.set_postfix_str(done) or bar.update())
            bar.reset(len(networks) * len(losses.datasets))
            full_loss, *means = losses.means(networks)
        discard(out / "cache")
        rows = [
            {
                "layer": choices.blocks[block][0],
                "axis": choices.blocks[block][1],
                "size": choices.sizes[block][k],
                "loss": loss,
                "degradation": loss - full_loss,
            }
            for (block, k), loss in zip(places, means, strict=True)
        ]
        figures = {"model": info.model.to_dict(), "space": info.space.to_dict(), "full_loss": full_loss, "blocks": rows}
        metrics = write_metrics(out, "sensitivity", {"samples": losses.samples, **figures})
    print_table(
        f"loss (nats per token) above the full model's {full_loss:.4f} with one smaller block",
        ["layer", "block", "size", "loss", "more"],
        [[row["layer"] + 1, row["axis"], row["size"], row["loss"], row["degradation"]] for row in rows],
    )
    return metrics
