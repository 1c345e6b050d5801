"""`flextron sensitivity`: the loss when one block alone is replaced by a smaller candidate (Flextron, figure 6)."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from flextron_mcore.choices import Choices
from flextron_mcore.data.blend import valid_datasets
from flextron_mcore.evaluation.perplexity import evaluate, mean
from flextron_mcore.model import loaded_model
from flextron_mcore.runs.opened import check_widths_only, opened
from flextron_mcore.runs.output import discard, new_output, write_metrics
from flextron_mcore.runs.terminal import print_table, progress_bar
from flextron_mcore.space import SubNetwork


def run(config: DictConfig) -> dict[str, Any]:
    """Evaluate the full model, and it with every smaller candidate of every block."""
    info, data, computed, seq_length = opened(config)
    check_widths_only(info, "`flextron sensitivity`")
    choices, full = Choices(info.model, info.space), SubNetwork.full(info.model)
    places = [(block, k) for block, sizes in enumerate(choices.sizes) for k in range(len(sizes) - 1)]
    networks = {"full": full, **{f"{block} {k}": choices.replaced(full, block, k) for block, k in places}}
    with new_output(config) as out:
        datasets = valid_datasets(data, seq_length, config.seed, out / "cache")
        model = loaded_model(config.model, info, computed)
        size, limit = config.model.micro_batch_size, config.limit_val_batches
        with progress_bar(total=len(networks) * len(datasets), desc="sensitivity") as bar:
            found = evaluate(
                model,
                datasets,
                networks,
                seq_length,
                size,
                limit and limit * size,
                lambda done: bar.set_postfix_str(done) or bar.update(),
            )
        discard(out / "cache")
        losses = {name: mean(domains) for name, domains in found.items()}
        rows = [
            {
                "layer": choices.blocks[block][0],
                "axis": choices.blocks[block][1],
                "size": choices.sizes[block][k],
                "loss": losses[f"{block} {k}"],
                "degradation": losses[f"{block} {k}"] - losses["full"],
            }
            for block, k in places
        ]
        figures = {"model": info.model.to_dict(), "space": info.space.to_dict(), "full_loss": losses["full"], "blocks": rows}
        samples = sum(min(len(d), limit * size if limit else len(d)) for d in datasets.values())
        metrics = write_metrics(out, "sensitivity", {"samples": samples, **figures})
    print_table(
        f"loss (nats per token) above the full model's {losses['full']:.4f} with one smaller block",
        ["layer", "block", "size", "loss", "more"],
        [[row["layer"] + 1, row["axis"], row["size"], row["loss"], row["degradation"]] for row in rows],
    )
    return metrics
