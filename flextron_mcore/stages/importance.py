"""`flextron importance`: importance scores and sorting of the weights (Flextron, section 3.1, eq. 3-4, Table 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flextron_mcore.axes import AXES, DEPTH, HIDDEN_SIZE, network_axes
from flextron_mcore.checkpoint.sharding import check_granularity
from flextron_mcore.checkpoint.store import iteration_path, open_checkpoint
from flextron_mcore.checkpoint.writer import write_streaming
from flextron_mcore.config import ModelConfig
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
from flextron_mcore.sorting.ablation import ablation_networks, ablation_rows, no_better_than_random
from flextron_mcore.sorting.importance import Scores, collect, importance, random_scores, removal_errors
from flextron_mcore.sorting.permutation import order, sorted_tensors
from flextron_mcore.space import ElasticSpace
from flextron_mcore.training.checks import sequence_length


def run(settings: ImportanceSettings) -> dict[str, Any]:
    """Score units on calibration samples, write the sorted checkpoint, and print losses with and without sorting.

    Call on all ranks. Returns the content of metrics.json: `samples`, `scores` {axis: score}, `model`, `space`, `ablation` (rows
    of sorting/ablation.py), and for an elastic depth `layers`: {score: value of each layer}.
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
        names = _score_names(settings, info.model, space)
        table = partial(
            ablation_rows,
            scores=names,
            datasets=valid_datasets(data, seq_length, settings.seed, out / "cache") if batches else {},
            seq_length=seq_length,
            micro_batch_size=size,
            batches=batches,
        )
        rows = table("unsorted", model, networks=ablation_networks(info.model, space)) if batches else []
        say(f"importance: scoring on {settings.samples} sequences of {seq_length} tokens")
        count = count_batches(settings.samples, size)
        with progress_bar(total=count * len(model), desc="importance", unit="batch") as bar:
            counted = partial(_counted, dataset, settings.samples, size, bar)
            scores = collect(importance(model, counted, count, seq_length, size, space, names), info.model.num_layers)
        layers: dict[str, list[float]] = {}
        if space.elastic(DEPTH):
            layers["block_influence"] = [layer.influence for layer in scores.layers.values()]
        if names.get("depth") == "mse":
            samples = min(settings.layer_samples, settings.samples)
            say(f"importance: measuring the error without each layer on {samples} sequences")
            count = count_batches(samples, size)
            with progress_bar(total=count * len(model), desc="importance of layers", unit="batch") as bar:
                counted = partial(_counted, dataset, samples, size, bar)
                layers["mse"] = removal_errors(model, counted, count, info.model, seq_length, size)
        del model  # free its memory: sorting reads and writes one tensor at a time

        def write_sorted(run: Path, space: ElasticSpace, scores: Scores) -> Path:
            orders = {i: order(info.model, space, layer) for i, layer in scores.layers.items()}
            channels = scores.channels.argsort(descending=True, stable=True) if space.elastic(HIDDEN_SIZE) else None
            folder = iteration_path(run, info.step)
            folder.mkdir(parents=True, exist_ok=True)
            tensors = sorted_tensors(info, orders, channels)
            write_streaming(folder, replace(info, space=space, sorted=True, path=None), tensors)
            return folder

        def losses(order: str, folder: Path, space: ElasticSpace) -> list[dict[str, Any]]:
            networks = ablation_networks(info.model, space)
            return table(order, loaded_model(settings.model, open_checkpoint(folder), dtype), networks=networks)

        if batches and settings.ablation_random:  # as a checkpoint of its own, so that it is sorted and sliced in the same way
            chance = random_scores(info.model, space, settings.seed)
            shuffled = _ranked(space, [layer.influence for layer in chance.layers.values()])
            folder = write_sorted(out / "random_order", shuffled, chance)
            rows += losses("random", folder, shuffled)[1:]  # without the full model, which no order changes
            discard(out / "random_order")
        if space.elastic(DEPTH):
            space = _ranked(space, layers[names["depth"]])
        folder = write_sorted(out, space, scores)
        if batches:
            rows += losses("sorted", folder, space)
        discard(out / "cache")
        figures = {"samples": settings.samples, "scores": names, "model": info.model.to_dict(), "space": space.to_dict()}
        figures |= {"layers": layers} if layers else {}
        if is_main_process():
            copy_tokenizer(info, data, out / "tokenizer")
            _write_scores(out, scores)
        metrics = write_metrics(out, "importance", {**figures, "ablation": rows})
    if rows:
        print_table(
            "sorting, before any training: loss (nats per token) and perplexity, mean over domains",
            ["network", "order", "score", "loss", "perplexity"],
            [[row["setup"], row["order"], row["score"], row["loss"], row["perplexity"]] for row in rows],
        )
    for line in no_better_than_random(rows):
        say(f"importance: {line}")
    return metrics


def _score_names(settings: ImportanceSettings, model: ModelConfig, space: ElasticSpace) -> dict[str, str]:
    """{name of an elastic axis: its score}; the attention unit decides between the keys score.kv_groups and score.heads."""
    given, names = asdict(settings.score), {}
    for axis in space.layer_axes:
        field = axis.unit_field(model, space.attention_unit)
        names[axis.name] = given.get(field) or given.get(axis.name, "activation")
    names |= {axis.name: given[axis.name] for axis in network_axes()}
    return {name: score for name, score in names.items() if space.elastic(AXES[name])}


def _ranked(space: ElasticSpace, importance: Sequence[float]) -> ElasticSpace:
    """Space whose layers are ranked by decreasing importance. importance: value of each layer."""
    return replace(space, layer_ranking=tuple(sorted(range(len(importance)), key=lambda i: -importance[i])))


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
