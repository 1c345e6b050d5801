"""`flextron compare`: selectors against each other and random sub-networks of equal cost (Flextron, figures 5, 13, Table 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Budget
from flextron_mcore.evaluation.comparison import (
    dense_row,
    equal_rows,
    network_row,
    random_row,
    scaling_laws,
    selected_rows,
)
from flextron_mcore.evaluation.median import median_loss, rising
from flextron_mcore.runs import choice
from flextron_mcore.runs.opened import Opened, evaluator, open_evaluation
from flextron_mcore.runs.output import discard, new_output, write_metrics
from flextron_mcore.runs.routers import validation_targets
from flextron_mcore.runs.terminal import print_table, progress_bar
from flextron_mcore.selection.sampling import draw_near
from flextron_mcore.settings.stages import CompareSettings
from flextron_mcore.space import SubNetwork


def run(settings: CompareSettings) -> dict[str, Any]:
    """Evaluate the network of every selector for every target, and random networks of the same cost; write metrics.json.

    Call on all ranks. Returns the content of metrics.json: compared cost, model and space, and rows of evaluation/comparison.py
    as `full`, `networks`, `random`, `equal`, `dense` and `scaling_law`.
    """
    opened = open_evaluation(settings)
    info = opened.info
    table = choice.latency_table(settings, info)
    choice.check_table(table)
    costs = choice.available_costs(settings, info, table)
    cost = costs.get(settings.cost or ("latency" if table else "parameters"))
    if cost is None:
        raise FlextronError(f"cost={settings.cost}: needs a latency table: set latency=, or use one of {', '.join(costs)}")
    targets = validation_targets(settings.targets, cost, (cost.smallest / cost.full, 1.0))
    choices = Choices(info.model, info.space)
    dense = [(Path(path).name, Opened.of(settings, open_checkpoint(path), opened.data)) for path in settings.dense]
    near = {
        target: draw_near(choices, [Budget(cost, target * cost.full)], settings.random_at_target, settings.seed)
        for target in (targets if settings.random_at_target else ())
    }
    with new_output(settings) as out:
        with progress_bar(desc="compare", unit="evaluation") as bar:
            losses = evaluator(settings, opened, out / "cache", lambda _: bar.update())
            full = network_row(SubNetwork.full(info.model), cost, losses)
            selectors = {name: choice.selector(settings, info, name, losses.means) for name in settings.selectors}
            rows = selected_rows(selectors, cost, targets, losses)
            figures = {
                "model": info.model.to_dict(),
                "space": info.space.to_dict(),
                "cost": cost.name,
                "full_cost": cost.full,
                "smallest_cost": cost.smallest,
                "machine": dict(table.machine) if table else None,
                "setting": dict(table.setting) if table else None,
                "samples": losses.samples,
                "full": full,
                "networks": rows,
                "random": [random_row(target, drawn, cost, losses, rows) for target, drawn in near.items()],
                "equal": equal_rows(selectors, cost, losses),
            }
            figures["dense"] = []
            for name, each in dense:
                arch = each.info.model
                (found,) = evaluator(settings, each, out / "cache", lambda _: bar.update()).losses([SubNetwork.full(arch)])
                figures["dense"].append(dense_row(name, arch, cost, found))
        discard(out / "cache")
        figures["scaling_law"] = scaling_laws(settings.selectors, rows, full)
        metrics = write_metrics(out, "compare", figures)
    _print(figures, choice.cost_label(cost.name, settings, info))
    return metrics


def _print(figures: dict[str, Any], name: str) -> None:
    """Print the tables of the networks and of the random ones. name: label of the cost."""
    print_table(
        f"validation loss (nats per token, mean over domains) at shares of the full model's {name}",
        ["selector", "target", "share", "parameters", "loss"],
        [
            [row["selector"], f"{row['target']:g}", row["share"], row["parameters"], row["mean_loss"]]
            for row in figures["networks"]
        ]
        + [["full", "", 1.0, figures["full"]["parameters"], figures["full"]["mean_loss"]]],
    )
    if figures["random"]:
        print_table(
            "random sub-networks of the same cost",
            ["target", "networks", "best", "median", "router", "router is better than"],
            [
                [
                    f"{row['target']:g}",
                    len(row["mean_losses"]),
                    rising(row["mean_losses"])[0],
                    median_loss(row["mean_losses"]),
                    row["router_loss"] if row["router_loss"] is not None else "",
                    f"{100 * row['better_than']:.1f} %" if row["better_than"] is not None else "",
                ]
                for row in figures["random"]
            ],
        )
