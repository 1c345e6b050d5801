"""Networks cut out as dense models by `export`. No torch import."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from flextron_mcore.report.reader import StageOutput
from flextron_mcore.report.text import memory, small
from flextron_mcore.report.topic import Section, Table, Topic


@dataclass(frozen=True)
class Export:
    """One `export` directory. max_logit_difference: from the elastic model's logits, None if not measured."""

    label: str
    format: str
    architecture: str
    path: str
    parameters: int
    bytes: int
    max_logit_difference: float | None


def read(output: StageOutput) -> Export:
    """One `export` directory; a path within the run becomes relative to it."""
    found, run = output.into(Export), output.run.resolve()
    return replace(found, path=str(Path(found.path).relative_to(run))) if Path(found.path).is_relative_to(run) else found


def sections(results: list[Export]) -> list[Section]:
    """A table with a row for each export."""
    unit, sizes = memory([export.bytes for export in results])
    differences = [export.max_logit_difference for export in results]
    columns = [
        ("Export", [export.label for export in results]),
        ("Format", [export.format for export in results]),
        ("Architecture", [export.architecture for export in results]),
        ("Path", [export.path for export in results]),
        ("Parameters", [f"{export.parameters:,}" for export in results]),
        (f"Size ({unit})", sizes),
        ("Logit difference", ["not measured" if value is None else small(value) for value in differences]),
    ]
    note = "Networks cut out as dense models. The logit difference is the largest one from the elastic model’s logits."
    return [Section("exports", "Exports", note, [Table.of_columns(columns, left=4)], [])]


TOPIC = Topic(("export",), read, sections)
