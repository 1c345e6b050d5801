"""Lines, tables and progress bars on the terminal, once for all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from flextron_mcore.runtime.ranks import is_main_process


def say(text: str) -> None:
    """A line on standard output, once."""
    if is_main_process():
        print(text, flush=True)


def progress_bar(**options: Any) -> tqdm:
    """A tqdm bar on the terminal, one for all ranks; options are tqdm's."""
    return tqdm(disable=None if is_main_process() else True, **options)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on standard output, once; numbers are right-aligned."""
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
