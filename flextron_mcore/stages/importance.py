"""`flextron importance`: importance scores and sorting of the weights (Flextron, section 3.1, eq. 3-4, Table 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flextron_mcore.axes import AXES
from flextron_mcore.checkpoint.sharding import check_granularity
from flextron_mcore.checkpoint.store import iteration_path, open_checkpoint
from flextron_mcore.checkpoint.writer import write_streaming
from flextron_mcore.data.blend import open_data, train_dataset, valid_datasets
from flextron_mcore.model import check_layout, loaded_model
from flextron_mcore.pipeline.batches import count_batches, share
from flextron_mcore.pipeline.networks import Batch
from flextron_mcore.runs.memory import memory_line
from flextron_mcore.runs.opened import precision
from flextron_mcore.runs.output import discard, new_output, write_metrics
from flextron_mcore.runs.terminal import print_table, progress_bar, say
from flextron_mcore.runs.tokenizers import copy_tokenizer
from flextron_mcore.runtime.progress import Progress
from flextron_mcore.runtime.ranks import is_main_process
from flextron_mcore.settings.stages import ImportanceSettings
from flextron_mcore.sorting.ablation import ablation_networks, ablation_rows
from flextron_mcore.sorting.importance import Scores, collect, importance, removal_errors
from flextron_mcore.sorting.permutation import order, sorted_tensors
from flextron_mcore.space import ElasticSpace
from flextron_mcore.training.checks import sequence_length


def run(settings: ImportanceSettings) -> dict[str, Any]:
    """Score units on calibration samples, write the sorted checkpoint, and print losses with and without sorting.

    Call on all ranks. Returns the content of metrics.json: `samples`, `score`, `model`, `space`, `ablation` (rows of
    sorting/ablation.py), and for an elastic depth `layers`: {score: value of each layer}.
    """
    info, data = open_checkpoint(settings.checkpoint), open_data(settings.data)
    wanted = {k: v for k, v in asdict(settings.space).items() if v is not None}
    # Only this stage may change the space, because sorting rewrites all units.
    space = ElasticSpace.from_dict(info.model, {**info.space.to_dict(), **wanted})
    dtype = precision(settings, info)
    check_layout(info.model, info.space, settings.model, dtype)
    if settings.ablation_batches:
        check_granularity(space.granularity, settings.model.tensor_model_parallel_size)
    seq_length, size = sequence_length(settings.model, info, data), settings.model.micro_batch_size
    memory = memory_line(settings, info)
    with new_output(settings) as out:
        say(memory)
        dataset = train_dataset(data, seq_length, settings.samples, settings.seed, out / "cache", settings.data_weights)
        model = loaded_model(settings.model, info, dtype)
        batches = settings.ablation_batches
        table = partial(
            ablation_rows,
            networks=ablation_networks(info.model, space),
            datasets=valid_datasets(data, seq_length, settings.seed, out / "cache") if batches else {},
            seq_length=seq_length,
            micro_batch_size=size,
            batches=batches,
        )
        rows = table("unsorted", model) if batches else []
        say(f"importance: scoring on {settings.samples} sequences of {seq_length} tokens")
        count = count_batches(settings.samples, size)
        with progress_bar(total=count * len(model), desc="importance", unit="batch") as bar:
            counted = partial(_counted, dataset, settings.samples, size, bar)
            scores = collect(importance(model, counted, count, seq_length, size, settings.score), info.model.num_layers)
        layers: dict[str, list[float]] = {}
        if len(space.depth) > 1:
            samples = min(settings.layer_samples, settings.samples)
            say(f"importance: measuring the error without each layer on {samples} sequences")
            count = count_batches(samples, size)
            with progress_bar(total=count * len(model), desc="importance of layers", unit="batch") as bar:
                counted = partial(_counted, dataset, samples, size, bar)
                layers["mse"] = removal_errors(model, counted, count, info.model, seq_length, size)
            layers["block_influence"] = [layer.influence for layer in scores.layers.values()]
            ranking = sorted(range(info.model.num_layers), key=lambda i: -layers[settings.layer_score][i])
            space = replace(space, layer_ranking=tuple(ranking))
        del model  # free its memory: sorting reads and writes one tensor at a time
        orders = {i: order(info.model, space, layer) for i, layer in scores.layers.items()}
        channels = scores.channels.argsort(descending=True, stable=True) if len(space.hidden_size) > 1 else None
        folder = iteration_path(out, info.step)
        folder.mkdir(parents=True, exist_ok=True)
        write_streaming(folder, replace(info, space=space, sorted=True, path=None), sorted_tensors(info, orders, channels))
        if batches:
            rows += table("sorted", loaded_model(settings.model, open_checkpoint(folder), dtype))
        discard(out / "cache")
        figures = {"samples": settings.samples, "score": settings.score, "model": info.model.to_dict(), "space": space.to_dict()}
        figures |= {"layers": layers} if layers else {}
        if is_main_process():
            copy_tokenizer(info, data, out / "tokenizer")
            _write_scores(out, scores)
        metrics = write_metrics(out, "importance", {**figures, "ablation": [{**row, "score": settings.score} for row in rows]})
    if rows:
        print_table(
            "sorting, before any training: loss (nats per token) and perplexity, mean over domains",
            ["network", "order", "loss", "perplexity"],
            [[row["setup"], row["order"], row["loss"], row["perplexity"]] for row in rows],
        )
    return metrics


def _counted(dataset: torch.utils.data.Dataset, samples: int, size: int, bar: Progress) -> Iterator[Batch]:
    """Micro-batches of this rank, of the first `samples` samples. Each is counted on the bar when it is used up.

    Args:
        dataset: calibration samples.
        samples: number of samples of all ranks together.
        size: samples of a micro-batch.
        bar: progress bar.
    """
    for batch in share(dataset, samples, size):
        yield batch
        bar.update()


def _write_scores(out: Path, scores: Scores) -> None:
    """Write the scores of all units in fp32 to scores.safetensors in the directory `out`: `channels` and `layers.INDEX.UNIT`."""
    tensors = {"channels": scores.channels.to(torch.float32)}
    for i, layer in scores.layers.items():
        tensors |= {f"layers.{i}.{AXES[name].unit}": units.to(torch.float32) for name, units in layer.units.items()}
    save_file(tensors, out / "scores.safetensors")
