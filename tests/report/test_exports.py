"""The topic about exports: how a path is shown."""

from __future__ import annotations

from flextron_mcore.report import exports
from tests.report import synthetic
from tests.report.synthetic import EXPORT


def test_paths_inside_the_run_are_shown_relative_to_it(tmp_path):
    inside, outside = str(tmp_path.resolve() / "export" / "model"), "/elsewhere/model"
    found = synthetic.read(exports.TOPIC, tmp_path, export={**EXPORT, "path": inside}, other={**EXPORT, "path": outside})
    assert [export.path for export in found] == ["export/model", outside]
    assert [row[3] for row in exports.sections(found)[0].tables[0].rows] == ["export/model", outside]
