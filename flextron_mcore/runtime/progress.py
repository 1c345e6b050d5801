"""Progress of long work: a bar on a terminal, else a line at the start and one line a minute with the remaining time."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from flextron_mcore.runtime.ranks import is_main_process

INTERVAL = 60.0  # seconds between two lines without a terminal


class Progress(tqdm):
    """tqdm bar that prints lines if the output is no terminal. Only rank 0 shows progress.

    Args:
        options: arguments of tqdm; `desc` is the beginning of each line.
    """

    def __init__(self, **options: Any) -> None:
        self._counts = is_main_process()  # before tqdm's constructor, which calls `update` and `refresh`
        self._unit, self._scaled = options.get("unit", "evaluation"), options.get("unit_scale", False)
        self._plural = "" if self._scaled else "es" if self._unit.endswith("ch") else "s"
        self._name, self._all, self._done = options.get("desc", ""), options.get("total"), 0
        super().__init__(disable=None if self._counts else True, **options)
        self._counts = self._counts and self.disable
        self._out = sys.stdout  # also where a library's output is caught meanwhile
        self._begun = self._said = time.monotonic()
        if self._counts and self._all:
            self._say()

    def reset(self, total: float | None = None) -> None:
        """Start again at 0, with another total."""
        super().reset(total)
        if getattr(self, "_counts", False) and self.disable:
            self._all, self._done = total, 0
            self._begun = self._said = time.monotonic()
            self._say()

    def update(self, n: float = 1) -> bool | None:
        """Count n more units. Returns tqdm's result: True if the bar was redrawn."""
        if self._counts and self.disable:
            self._done += n
            if time.monotonic() - self._said >= INTERVAL and self._done != self._all:
                self._say()
        return super().update(n)

    def _say(self) -> None:
        self._said = time.monotonic()
        seconds = self._said - self._begun
        shown = [tqdm.format_sizeof(x) if self._scaled else str(x) for x in (self._done, self._all) if x is not None]
        left = f", {duration_text(seconds / self._done * (self._all - self._done))} left" if self._done and self._all else ""
        rate = f", {tqdm.format_sizeof(self._done / seconds)}{self._unit}/s" if self._scaled and self._done and seconds else ""
        print(f"{self._name}: {' of '.join(shown)} {self._unit}{self._plural}{rate}{left}", file=self._out, flush=True)


def duration_text(seconds: float) -> str:
    """Text of a duration, such as `40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
