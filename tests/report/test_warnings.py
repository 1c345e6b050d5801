"""Warnings of a stage reach its metrics.json, and no other stage's."""

from __future__ import annotations

import json

from flextron_mcore.runs.output import write_metrics
from flextron_mcore.runs.terminal import own_warnings, warn


def test_metrics_have_the_warnings_of_their_own_stage(tmp_path, capsys):
    with own_warnings():
        warn("of the chain")
        with own_warnings():
            warn("do not trust it")
            warn("do not trust it")
            assert write_metrics(tmp_path, "router", {"steps": 1})["warnings"] == ["do not trust it"]
            assert json.loads((tmp_path / "metrics.json").read_text())["warnings"] == ["do not trust it"]
        with own_warnings():
            assert "warnings" not in write_metrics(tmp_path, "router", {})
        assert write_metrics(tmp_path, "family", {})["warnings"] == ["of the chain"]
    assert capsys.readouterr().out.splitlines() == ["warning: of the chain", *["warning: do not trust it"] * 2]
