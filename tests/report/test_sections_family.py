"""The section about `family`."""

from __future__ import annotations

import pytest

from flextron_mcore.report.collect import collect
from flextron_mcore.report.sections_family import family_sections
from tests.report import synthetic

pytestmark = pytest.mark.usefixtures("undrawn")


def test_a_row_a_budget(tmp_path):
    synthetic.write(tmp_path / "family", synthetic.family())
    (part,) = family_sections(collect(tmp_path).families)
    (table,) = part.tables
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert (row["Budget"], row["Latency (ms)"], row["Mean loss"]) == ("0.6", "12 (60.0%)", "3.400")
    assert (row["Hidden of 256"], row["Layers of 8"], row["Exports"]) == ("128", "4", "hf")
    assert [picture.name for picture in part.pictures] == ["family_loss_parameters", "family_loss_latency", "family_widths"]
    assert part.pictures[-1].alt.endswith("0/0, 0/0, 0/0, 0/0.")


def test_several_are_told_apart_and_losses_may_be_missing(tmp_path):
    synthetic.write(tmp_path / "one", synthetic.family())
    synthetic.write(tmp_path / "two", synthetic.family(latency=False, losses=False))
    first, second = family_sections(collect(tmp_path).families)
    assert (first.key, second.key, second.title) == ("models", "models2", "A model for every budget (two)")
    assert second.tables[0].rows[0][2] == "–" and [picture.name for picture in second.pictures] == ["two_widths"]
