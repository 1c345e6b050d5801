"""Measurement of a latency table: whole networks run, and their blocks are timed inside of them.

A block that runs alone and repeatedly finds its weights in the cache, which it would not in a network. Times of blocks inside of
networks add up to the networks' times.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.inference.contexts import StaticInferenceContext

from flextron_mcore.axes import layer_axes
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.config import ModelConfig
from flextron_mcore.latency.table import STATISTICS, LatencyTable, Timing, Timings, check_errors
from flextron_mcore.runtime.distributed import device
from flextron_mcore.runtime.memory import keep_freed_memory
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.space import ElasticSpace, SubNetwork
from flextron_mcore.training.sampler import draw


@dataclass(frozen=True)
class Setting:
    """Workload that is timed: one forward pass, or a generation of text.

    Attributes:
        kind: `prefill`: one forward pass over batch_size x prompt_length tokens. `generation`: that pass, then generated_tokens -
            1 forward passes of one token each with a KV cache, timed together.
        batch_size: number of sequences.
        prompt_length: tokens of a prompt.
        generated_tokens: tokens generated after a prompt; 1 for prefill.
    """

    kind: str
    batch_size: int
    prompt_length: int
    generated_tokens: int = 1


def measure(
    model: torch.nn.Module,
    arch: ModelConfig,
    space: ElasticSpace,
    setting: Setting,
    rounds: int,
    check_networks: int,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> LatencyTable:
    """Measure the latency table of this process's device. The model runs on a single rank.

    Every round times every candidate in every layer at every hidden size, inside of whole networks, and some random networks as a
    whole, to check the table. A first round warms up and is not counted. The table holds minimum and median over rounds; its
    costs use the one that predicts the random networks better, without a check the median.

    Args:
        model: elastic model, whole on this device, in the dtype to measure.
        arch: architecture of the full model.
        space: elastic space.
        setting: workload.
        rounds: number of timed rounds.
        check_networks: number of random networks whose time is compared with the table's prediction; 0 for no check.
        seed: seed of tokens, networks and order.
        progress: function () called after every network of every round, of the first one too.
    """
    run = runner(model, setting, arch.vocab_size, seed)
    whole = draw(arch, space, seed, 0, check_networks, stream=3)
    samples: list[dict[Any, list[float]]] = []
    for round_ in range(rounds + 1):
        samples.append(defaultdict(list))
        timed = [(net, True) for net in _balanced(arch, space, seed, round_)] + [(net, False) for net in whole]
        order = np.random.default_rng([seed, round_]).permutation(len(timed))
        for i in order:
            net, in_parts = timed[i]
            with use_subnetwork(model, net):
                found = _time_candidates(model, net, run) if in_parts else {("network", i): [time_run(run)]}
            for key, values in found.items():
                samples[-1][key] += values
            progress()
    timings = {key: Timing(min(values), statistics.median(values)) for key, values in without_drift(samples[1:]).items()}
    first = len(timed) - check_networks
    table = LatencyTable(
        arch,
        space,
        asdict(setting),
        machine(next(model.parameters()).dtype),
        "median",
        {
            hidden: Timings(
                timings[hidden, "constant"],
                {axis.name: tuple(timings[hidden, axis.name, s] for s in space.sizes[axis.name]) for axis in space.layer_axes},
            )
            for hidden in space.hidden_size
        },
    )
    if not check_networks:
        return table
    # Medians and minima add up to different sums. The statistic that predicts whole networks better is used.
    found = []
    for statistic in STATISTICS:
        table = replace(table, statistic=statistic)
        latencies = [(net, getattr(timings["network", first + i], statistic)) for i, net in enumerate(whole)]
        found.append(replace(table, check=check_errors(table.cost(), latencies)))
    return min(found, key=lambda table: (table.check["median_error"], table.statistic != "median"))


def time_networks(
    model: torch.nn.Module,
    arch: ModelConfig,
    networks: Sequence[SubNetwork | None],
    setting: Setting,
    rounds: int,
    seed: int,
) -> list[Timing]:
    """Time whole networks in milliseconds, each once a round in random order, after a round of warm-up.

    Returns minimum and median over rounds for each network, after `without_drift`.

    Args:
        model: elastic model, whole on this device.
        arch: architecture of the full model.
        networks: networks to time; None stands for the full model.
        setting: workload.
        rounds: number of timed rounds.
        seed: seed of tokens and order.
    """
    run = runner(model, setting, arch.vocab_size, seed)
    samples: list[dict[int, list[float]]] = []
    for round_ in range(rounds + 1):
        samples.append({})
        for i in np.random.default_rng([seed, round_]).permutation(len(networks)):
            with use_subnetwork(model, networks[i]):
                samples[-1][i] = [time_run(run)]
    found = without_drift(samples[1:])
    return [Timing(min(found[i]), statistics.median(found[i])) for i in range(len(networks))]


def without_drift(rounds: Sequence[Mapping[Any, Sequence[float]]]) -> dict[Any, list[float]]:
    """Correct times for the machine's speed in each round: {key: times of all rounds}, in the unit of `rounds`.

    A machine's speed drifts. A round's slowness is the median, over keys, of (the key's mean time in the round / the median of
    these means over rounds); each time is divided by the slowness of its round. rounds: {key: times} of each round, with the same
    keys.
    """
    means_KR = np.array([[np.mean(times[key]) for times in rounds] for key in rounds[0]])
    slow_R = np.median(means_KR / np.median(means_KR, 1, keepdims=True), 0)
    return {key: [time / slow for times, slow in zip(rounds, slow_R, strict=True) for time in times[key]] for key in rounds[0]}


def _balanced(arch: ModelConfig, space: ElasticSpace, seed: int, round_: int) -> list[SubNetwork]:
    """Random networks without skipped layers that together have every candidate in every layer, at every hidden size.

    Args:
        arch: architecture of the full model.
        space: elastic space.
        seed: seed of the measurement.
        round_: number of the round; each round has other networks.
    """
    count = balanced(space) // len(space.hidden_size)
    generator = np.random.default_rng([seed, round_, 1])

    def column(sizes: Sequence[int]) -> list[int]:
        return generator.permutation([sizes[i % len(sizes)] for i in range(count)]).tolist()

    networks = []
    for size in space.hidden_size:
        columns = [[column(space.sizes[axis.name]) for axis in space.layer_axes] for _ in range(arch.num_layers)]
        networks += [
            SubNetwork(size, tuple(space.layer_choice(arch, *(sizes[i] for sizes in layer)) for layer in columns))
            for i in range(count)
        ]
    return networks


def balanced(space: ElasticSpace) -> int:
    """Number of networks that `measure` runs in every round to time all candidates of all blocks."""
    return len(space.hidden_size) * max(len(space.sizes[axis.name]) for axis in space.layer_axes)


def runner(model: torch.nn.Module, setting: Setting, vocab_size: int, seed: int) -> Callable[[], None]:
    """Function () that runs a workload once, on random tokens.

    On a CPU, the process keeps freed memory from now on, as inference servers do. Otherwise clearing of pages would be timed.

    Args:
        model: elastic model, whole on this device.
        setting: workload.
        vocab_size: size of the vocabulary.
        seed: seed of the tokens.
    """
    keep_freed_memory()
    length = setting.prompt_length + setting.generated_tokens - 1
    tokens = torch.randint(0, vocab_size, (setting.batch_size, length), generator=torch.Generator().manual_seed(seed))
    tokens, positions = tokens.to(device()), torch.arange(length, device=device()).expand(setting.batch_size, -1)

    @torch.no_grad()
    def prefill() -> None:
        model(tokens, positions, None)

    @torch.no_grad()
    def generate() -> None:
        context = StaticInferenceContext(setting.batch_size, length)
        for start, end in [(0, setting.prompt_length), *((t, t + 1) for t in range(setting.prompt_length, length))]:
            part = slice(start, end)
            model(tokens[:, part], positions[:, part], None, inference_context=context, runtime_gather_output=True)
            context.sequence_len_offset = end
            context.enable_decode_mode()

    return prefill if setting.kind == "prefill" else generate


class _Clock:
    """Time marks: CUDA events in the device's queue, or wall-clock times on a CPU."""

    def __init__(self) -> None:
        self.marks: dict[Hashable, list] = defaultdict(list)

    def mark(self, key: Hashable) -> None:
        """Record the current time under a key; a key may have several marks."""
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks[key].append(event)
        else:
            self.marks[key].append(time.perf_counter())

    def between(self, start: Hashable, end: Hashable) -> float:
        """Total milliseconds between the marks `start` and the marks `end`, paired in order."""
        pairs = zip(self.marks[start], self.marks[end], strict=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return sum(a.elapsed_time(b) for a, b in pairs)
        return sum(1000 * (b - a) for a, b in pairs)


def time_run(run: Callable[[], None]) -> float:
    """Time one call of `run`, in milliseconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    clock = _Clock()
    clock.mark("start")
    run()
    clock.mark("end")
    return clock.between("start", "end")


def _time_candidates(model: torch.nn.Module, net: SubNetwork, run: Callable[[], None]) -> Mapping[Any, list[float]]:
    """Milliseconds of a run: {(hidden size, axis, candidate): time of each block}, and (hidden size, "constant") for the rest.

    Args:
        model: elastic model, set to `net`.
        net: network that the model computes.
        run: function () that runs the workload once.
    """
    found: dict[Any, list[float]] = defaultdict(list)
    parts, rest = time_blocks(model, run)
    blocks = [(axis, choice) for choice in net.layers for axis in layer_axes()]
    for (axis, choice), milliseconds in zip(blocks, parts, strict=True):
        found[net.hidden_size, axis.name, axis.size(choice)].append(milliseconds)
    found[net.hidden_size, "constant"].append(rest)
    return found


def time_blocks(model: torch.nn.Module, run: Callable[[], None]) -> tuple[list[float], float]:
    """Time one call of `run`, in milliseconds: (time of each block by layer, then by axis; time of all else).

    A block's time lasts from its start (`Axis.starts`) to the next block's start or the end of the layer, and is summed over the
    forward passes of the call. No layer may be skipped.
    """
    clock = _Clock()
    layers = unwrap(model).decoder.layers
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    with _marked(layers, clock):
        clock.mark("start")
        run()
        clock.mark("end")
    count = len(layer_axes())
    parts = [clock.between((i, block), (i, block + 1)) for i in range(len(layers)) for block in range(count)]
    return parts, clock.between("start", "end") - sum(parts)


@contextlib.contextmanager
def _marked(layers: Sequence[torch.nn.Module], clock: _Clock) -> Iterator[None]:
    """Context in which every layer marks the start of each of its blocks and the end of the last one."""
    starts = [axis.starts or axis.block for axis in layer_axes()]
    count = len(starts)
    with contextlib.ExitStack() as stack:
        for i, layer in enumerate(layers):
            for block, name in enumerate(starts):
                begins = layer.get_submodule(name).register_forward_pre_hook(lambda *_, key=(i, block): clock.mark(key))
                stack.callback(begins.remove)
            ends = layer.register_forward_hook(lambda *_, key=(i, count): clock.mark(key))
            stack.callback(ends.remove)
        yield


def machine(dtype: torch.dtype) -> dict[str, Any]:
    """Description of this machine for a latency table: device, dtype, versions, date, and on a CPU threads and load."""
    import megatron.core

    cuda = torch.cuda.is_available()
    return {
        "device": device_name(),
        "threads": None if cuda else torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "load": None if cuda else os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
        "python": platform.python_version(),
    }


def device_name() -> str:
    """Name of the GPU, or name and number of cores of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"
