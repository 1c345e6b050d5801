"""The topic about exports."""

from __future__ import annotations

from flextron_mcore.report import exports
from tests.report import synthetic
from tests.report.synthetic import EXPORT


def test_exports_are_named_by_their_directories(tmp_path):
    """The report names an export by its directory, because metrics.json, which moves with it, holds no path."""
    found = synthetic.read(exports.TOPIC, tmp_path, export=EXPORT, other=EXPORT)
    assert [row[:3] for row in exports.sections(found)[0].tables[0].rows] == [["export", "hf", "A"], ["other", "hf", "A"]]
