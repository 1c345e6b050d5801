"""Benchmarks of what elasticity costs, most of them as ratios of two times. No time is asserted; docs/benchmarks.md lists them.

Functions that are compared run alternately (A B, B A, A B, ...), so that other load on the machine affects all of them equally.
Every round gives one ratio. On a CPU the clock is the processor time of this process, which other processes disturb least;
benchmarks of several processes, and of whole commands, take wall-clock time.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Thunk = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """Ratio of the times of two functions: median, lower and upper quartile over rounds, and the ratio of their fastest times."""

    median: float
    low: float
    high: float
    minima: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def ratio(ours: list[float], theirs: list[float]) -> Ratio:
    """Ratio of times in paired rounds, `ours` over `theirs`: seconds of each round, at least two."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4, method="inclusive")
    return Ratio(median, low, high, min(ours) / min(theirs))


def interleaved(
    compared: Mapping[str, Thunk], rounds: int, before: Mapping[str, Thunk] | None = None, done: Thunk = lambda: None
) -> dict[str, list[float]]:
    """{name: seconds of each round} of functions that run alternately; a first round is not counted.

    Args:
        compared: {name: function to time}.
        rounds: number of counted rounds; every second one runs in reverse order.
        before: {name: function that runs untimed before each timed call}.
        done: called after each round.
    """
    ready = before or dict.fromkeys(compared, lambda: None)
    for name, function in compared.items():
        ready[name]()
        function()
    done()
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for i in range(rounds):
        for name in list(compared) if i % 2 else reversed(compared):
            ready[name]()
            begun = clock()
            compared[name]()
            seconds[name].append(clock() - begun)
        done()
    return seconds


def clock() -> float:
    """Current time in seconds: processor time on a CPU, wall-clock time after synchronization with CUDA."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def print_settings(title: str, *lines: str) -> None:
    """Print the title, the settings, the machine and the date."""
    import megatron.core
    import torch

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s)"
    )
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"\n== {title}")
    print(f"{datetime.date.today()}, {platform.machine()}, {device}, load average {load}")
    print(f"torch {torch.__version__}, Megatron-Core {megatron.core.__version__}, Python {platform.python_version()}")
    for line in lines:
        print(line)
    print(flush=True)
