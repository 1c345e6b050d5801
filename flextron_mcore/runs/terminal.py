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
    """Print "next: " and a command that can be pasted into a shell.

    Args:
        stage: name of a stage.
        values: its keys; those that are None are left out.
    """
    words = [f"{key}={_as_typed(value)}" for key, value in values.items() if value is not None]
    say("next: " + command_line(["flextron", stage, *words]))


def command_line(words: Sequence[str]) -> str:
    """Command that can be pasted into a shell; words with single quotes stand in double quotes if these change nothing."""
    return " ".join(f'"{word}"' if "'" in word and not re.search(r'["$`\\!\n]', word) else shlex.quote(word) for word in words)


def _as_typed(value: object) -> str:
    """Value as the command line's `key=value` reads it: lists in brackets, text in single quotes unless a plain word."""
    if isinstance(value, list):
        return f"[{','.join(map(_as_typed, value))}]"
    value = str(value)
    return value if re.fullmatch(r"[\w./+-]+", value) else "'" + value.replace("\\", "\\\\").replace("'", r"\'") + "'"


_warnings: list[str] = []  # warnings of the stage that is running


def warn(text: str) -> None:
    """Print a warning on the main process, and keep it for the stage's metrics.json, from which a report takes it."""
    say(f"warning: {text}")
    if text not in _warnings:
        _warnings.append(text)


def warnings_so_far() -> list[str]:
    """Warnings that the running stage has printed so far, each text once."""
    return list(_warnings)


@contextlib.contextmanager
def own_warnings() -> Iterator[None]:
    """Context for running a stage: `warnings_so_far` begins empty, and at the end is again what it was for the outer stage."""
    outer = _warnings[:]
    _warnings.clear()
    try:
        yield
    finally:
        _warnings[:] = outer


def progress_bar(**options: Any) -> Progress:
    """Make a progress bar on the main process; without a terminal it prints a line once a minute. options: arguments of tqdm."""
    return Progress(**options)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on standard output.

    Args:
        title: line above the table.
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
        console = Console(width=200)  # a log file has no width that rows must fit into
    console.print(table)
