"""`flextron importance`: importance scores and sorting of the weights (Flextron, section 3.1, eq. 3-4, Table 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flextron_mcore.axes import ATTENTION_UNITS, AXES, DEPTH, HIDDEN_SIZE, network_axes
from flextron_mcore.checkpoint.sharding import check_granularity
from flextron_mcore.checkpoint.store import CheckpointInfo, iteration_path, open_checkpoint
from flextron_mcore.checkpoint.writer import write_streaming
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.data.blend import open_data, train_dataset, valid_datasets
from flextron_mcore.model import check_layout, loaded_model
from flextron_mcore.pipeline.batches import count_batches, counted_share
from flextron_mcore.runs.memory import memory_line
from flextron_mcore.runs.opened import precision
from flextron_mcore.runs.output import discard, new_output, write_metrics
from flextron_mcore.runs.terminal import print_table, progress_bar, say
from flextron_mcore.runs.tokenizers import copy_tokenizer
from flextron_mcore.runtime.ranks import is_main_process, on_main_process
from flextron_mcore.settings.stages import AUTO, ImportanceSettings
from flextron_mcore.sorting.ablation import (
    AblationNetwork,
    ablation_networks,
    ablation_rows,
    no_better_than_random,
    unit_networks,
    units_line,
)
from flextron_mcore.sorting.compensation import fold_model
from flextron_mcore.sorting.importance import COMPENSATED, Scores, collect, importance, random_scores, removal_errors
from flextron_mcore.sorting.permutation import order, sorted_tensors
from flextron_mcore.space import ElasticSpace
from flextron_mcore.training.checks import sequence_length


def run(settings: ImportanceSettings) -> dict[str, Any]:
    """Score units on calibration samples, write the sorted checkpoint, and print losses with and without sorting.

    Call on all ranks. Returns the content of metrics.json: `samples`, `scores` {axis: score}, `model`, `space`, `ablation` (rows
    of sorting/ablation.py), for an elastic depth `layers`: {score: value of each layer}, and with attention_unit=auto
    `attention_units`: {unit: rows of its networks}.
    """
    info, data = open_checkpoint(settings.checkpoint), open_data(settings.data)
    spaces = _spaces(settings, info)
    names_of = {unit: _score_names(settings, info.model, space, len(spaces) == 1) for unit, space in spaces.items()}
    dtype = precision(settings, info)
    check_layout(info.model, info.space, settings.model, dtype)
    if settings.ablation_batches:
        for space in spaces.values():
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
            datasets=valid_datasets(data, seq_length, settings.seed, out / "cache") if batches else {},
            seq_length=seq_length,
            micro_batch_size=size,
            batches=batches,
        )
        unsorted = {
            unit: table("unsorted", model, ablation_networks(info.model, space), names_of[unit]) if batches else []
            for unit, space in spaces.items()
        }
        if info.space.compensation:  # sorted again, from the heads and the weights without it
            fold_model(model)
        say(f"importance: scoring on {settings.samples} sequences of {seq_length} tokens")
        count, scores_of = count_batches(settings.samples, size), {}
        with progress_bar(total=count * len(model) * len(spaces), desc="importance", unit="batch") as bar:
            counted = partial(counted_share, dataset, settings.samples, size, bar)
            for unit, space in spaces.items():
                found = importance(model, counted, count, seq_length, size, space, names_of[unit])
                scores_of[unit] = collect(found, info.model.num_layers)
        first = next(iter(spaces))  # channels and layers have the same scores with every unit
        layers: dict[str, list[float]] = {}
        if spaces[first].elastic(DEPTH):
            layers["block_influence"] = [layer.influence for layer in scores_of[first].layers.values()]
        if names_of[first].get("depth") == "mse":
            samples = min(settings.layer_samples, settings.samples)
            say(f"importance: measuring the error without each layer on {samples} sequences")
            count = count_batches(samples, size)
            with progress_bar(total=count * len(model), desc="importance of layers", unit="batch") as bar:
                counted = partial(counted_share, dataset, samples, size, bar)
                layers["mse"] = removal_errors(model, counted, count, info.model, seq_length, size)
        del model  # free its memory: sorting reads and writes a few tensors at a time

        def write_sorted(run: Path, space: ElasticSpace, scores: Scores) -> Path:
            orders = {i: order(info.model, space, layer) for i, layer in scores.layers.items()}
            channels = scores.channels.argsort(descending=True, stable=True) if space.elastic(HIDDEN_SIZE) else None
            folder = iteration_path(run, info.step)
            folder.mkdir(parents=True, exist_ok=True)
            compensations = {i: layer.compensation.matrix_GQQ for i, layer in scores.layers.items() if layer.compensation}
            tensors = sorted_tensors(info, orders, channels, compensations)
            space = replace(space, compensation=bool(compensations))
            write_streaming(folder, replace(info, space=space, sorted=True, path=None), tensors)
            return folder

        def losses(order: str, folder: Path, networks: Sequence[AblationNetwork], names: dict[str, str]) -> list[dict[str, Any]]:
            return table(order, loaded_model(settings.model, open_checkpoint(folder), dtype), networks, names)

        compared: dict[str, list[dict[str, Any]]] = {}
        if len(spaces) > 1:
            for unit, networks in unit_networks(info.model, spaces).items():
                folder = write_sorted(out / unit, spaces[unit], scores_of[unit])
                compared[unit] = losses("sorted", folder, networks, names_of[unit])
                discard(out / unit)
        unit = on_main_process(lambda: _best_unit(compared)) if compared else first  # ranks must agree, whatever the last bit
        space, names, scores, rows = spaces[unit], names_of[unit], scores_of[unit], unsorted[unit]
        if batches and settings.ablation_random:  # as a checkpoint of its own, so that it is sorted and sliced in the same way
            chance = random_scores(info.model, space, settings.seed)
            shuffled = _ranked(space, [layer.influence for layer in chance.layers.values()])
            folder = write_sorted(out / "random_order", shuffled, chance)
            networks = ablation_networks(info.model, shuffled)
            rows += losses("random", folder, networks, names)[1:]  # without the full model, which no order changes
            discard(out / "random_order")
        if space.elastic(DEPTH):
            space = _ranked(space, layers[names["depth"]])
        folder = write_sorted(out, space, scores)
        if batches:
            rows += losses("sorted", folder, ablation_networks(info.model, space), names)
        discard(out / "cache")
        figures = {"samples": settings.samples, "scores": names, "model": info.model.to_dict(), "space": space.to_dict()}
        figures |= ({"layers": layers} if layers else {}) | ({"attention_units": compared} if compared else {})
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
    if compared:
        say(f"importance: space.attention_unit={unit}: {units_line(compared)}")
    for line in no_better_than_random(rows):
        say(f"importance: {line}")
    return metrics


def _spaces(settings: ImportanceSettings, info: CheckpointInfo) -> dict[str, ElasticSpace]:
    """{attention unit: space to sort for}: both units with attention_unit=auto, if the model and the candidates allow both.

    Only this stage may change the space, because sorting rewrites all units. Raises FlextronError for auto without an evaluation.
    """
    wanted = {name: value for name, value in asdict(settings.space).items() if value is not None}
    values = {**info.space.to_dict(), "compensation": None, **wanted}
    if values["attention_unit"] != AUTO:
        space = ElasticSpace.from_dict(info.model, values)
        return {space.attention_unit: space}
    if not settings.ablation_batches:
        raise FlextronError("space.attention_unit=auto: compares losses: set ablation_batches to at least 1")
    spaces, errors = {}, []
    for unit in ATTENTION_UNITS:
        try:
            spaces[unit] = ElasticSpace.from_dict(info.model, {**values, "attention_unit": unit})
        except FlextronError as error:
            errors.append(error)
    if not spaces:
        raise errors[0]
    if info.model.query_heads_per_group == 1 or not unit_networks(info.model, spaces):
        spaces = dict([next(iter(spaces.items()))])
    if len(spaces) == 1:
        [unit] = spaces
        say(f"importance: space.attention_unit={unit}: this model and these candidates allow no comparison with another unit")
    return spaces


def _best_unit(compared: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Unit with the least loss, mean over its networks; of equal ones the first. compared: {unit: rows of its networks}."""
    return min(compared, key=lambda unit: sum(row["loss"] for row in compared[unit]))


def _score_names(settings: ImportanceSettings, model: ModelConfig, space: ElasticSpace, alone: bool) -> dict[str, str]:
    """Importance score of each elastic axis, {name of the axis: name of its score}, from settings.score.

    The attention unit of the space decides between the keys score.kv_groups and score.heads. Raises FlextronError for
    score.heads=compensated without query heads to drop.

    Args:
        settings: settings of the stage.
        model: architecture of the full model.
        space: space to sort for.
        alone: True if it is the only one; False if another unit is compared with its.
    """
    given, names = asdict(settings.score), {}
    for axis in space.layer_axes:
        field = axis.unit_field(model, space.attention_unit)
        names[axis.name] = given.get(field) or given.get(axis.name, "activation")
    if given["heads"] == COMPENSATED and alone:
        if space.attention_unit != "query_head":
            raise FlextronError(
                "score.heads=compensated: has an effect with space.attention_unit=query_head only, because "
                f"{space.attention_unit} drops whole KV groups: set it, or another score.heads"
            )
        if model.query_heads_per_group == 1:
            raise FlextronError(
                "score.heads=compensated: each KV group of this model has one query head, which no other predicts: set another"
            )
    names |= {axis.name: given[axis.name] for axis in network_axes()}
    return {name: score for name, score in names.items() if space.elastic(AXES[name])}


def _ranked(space: ElasticSpace, importance: Sequence[float]) -> ElasticSpace:
    """Space whose layers are ranked by decreasing importance. importance: value of each layer."""
    return replace(space, layer_ranking=tuple(sorted(range(len(importance)), key=lambda i: -importance[i])))


def _write_scores(out: Path, scores: Scores) -> None:
    """Write the scores of all units in fp32 to scores.safetensors in the directory `out`: `channels` and `layers.INDEX.UNIT`."""
    tensors = {"channels": scores.channels.to(torch.float32)}
    for i, layer in scores.layers.items():
        tensors |= {f"layers.{i}.{AXES[name].unit}": units.to(torch.float32) for name, units in layer.units.items()}
    save_file(tensors, out / "scores.safetensors")
