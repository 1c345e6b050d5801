"""Lines, tables and progress bars on the terminal, printed by the main process only."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from flextron_mcore.runtime.progress import Progress
from flextron_mcore.runtime.ranks import is_main_process


def say(text: str) -> None:
    """Print a line on standard output."""
    if is_main_process():
        print(text, flush=True)


def say_next(stage: str, **values: object) -> None:
    """Print a command that can be pasted into a shell.

    Args:
        stage: name of a stage.
        values: its keys; those that are None are left out.
    """
    words = [f"{key}={_as_typed(str(value))}" for key, value in values.items() if value is not None]
    say("next: " + shlex.join(["flextron", stage, *words]))


def _as_typed(value: str) -> str:
    """A value as `key=value` takes it: in quotes unless it is a plain word."""
    return value if re.fullmatch(r"[\w./+-]+", value) else "'" + value.replace("\\", "\\\\").replace("'", r"\'") + "'"


_warnings: list[str] = []  # of the command that is running


def warn(text: str) -> None:
    """Print a warning, once for all ranks. `write_metrics` adds it to the stage's metrics.json, where the report finds it."""
    say(f"warning: {text}")
    if text not in _warnings:
        _warnings.append(text)


def warnings_so_far() -> list[str]:
    """Warnings of the command that is running."""
    return list(_warnings)


@contextlib.contextmanager
def own_warnings() -> Iterator[None]:
    """Keep the warnings of a command apart from those of the command that runs it."""
    outer = _warnings[:]
    _warnings.clear()
    try:
        yield
    finally:
        _warnings[:] = outer


def progress_bar(**options: Any) -> Progress:
    """Make a bar, or without a terminal lines once a minute, shown by the main process. options: tqdm's."""
    return Progress(**options)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on standard output.

    Args:
        title: line above it.
        columns: headings. A column of numbers is aligned to the right.
        rows: cells of each row. A float is shown with four decimals, an int with thousands separators.
    """
    if not is_main_process():
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        numeric = all(isinstance(row[i], int | float) or str(row[i])[:1].isdigit() for row in rows) and rows
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(
            *(
                f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
                for value in row
            )
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a log has no width to fit into
    console.print(table)
