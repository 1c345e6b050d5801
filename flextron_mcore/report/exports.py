"""Topic of `export`: networks written as dense models. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from flextron_mcore.report.reader import StageOutput
from flextron_mcore.report.text import memory, small
from flextron_mcore.report.topic import Section, Table, Topic


@dataclass(frozen=True)
class Export:
    """Result of one directory that `flextron export` wrote.

    Attributes:
        label: name of the directory.
        format: name of the format.
        architecture: name of the model's class in the format.
        parameters: number of parameters.
        bytes: bytes of all files.
        max_logit_difference: largest absolute difference between logits of the export and of the elastic model; None for
            verify=false.
    """

    label: str
    format: str
    architecture: str
    parameters: int
    bytes: int
    max_logit_difference: float | None


def read(output: StageOutput) -> Export:
    """Result of one `export` directory."""
    return output.into(Export)


def sections(results: list[Export]) -> list[Section]:
    """Section with a table that has a row for each export."""
    unit, sizes = memory([export.bytes for export in results])
    differences = [export.max_logit_difference for export in results]
    columns = [
        ("Export", [export.label for export in results]),
        ("Format", [export.format for export in results]),
        ("Architecture", [export.architecture for export in results]),
        ("Parameters", [f"{export.parameters:,}" for export in results]),
        (f"Size ({unit})", sizes),
        ("Logit difference", ["not measured" if value is None else small(value) for value in differences]),
    ]
    note = "Networks cut out so far. Logit difference: the largest from the elastic model’s logits; rounding gives about 1e−5."
    return [Section("exports", "Exports", note, [Table.of_columns(columns, left=3)], [], "next")]


TOPIC = Topic(("export",), read, sections)
