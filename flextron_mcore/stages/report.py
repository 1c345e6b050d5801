"""`flextron report`: one HTML page of a run, and family.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flextron_mcore.adaptive import report as adaptive
from flextron_mcore.config import FlextronError
from flextron_mcore.report import TOPICS, build_report
from flextron_mcore.runs.output import serial_output, write_metrics
from flextron_mcore.runtime.ranks import is_main_process
from flextron_mcore.settings.stages import ReportSettings


def run(settings: ReportSettings) -> dict[str, Any]:
    """Write index.html, its figures and family.json from the stages in settings.run.

    Only the main process works. Returns the content of metrics.json, {"stage", "figures": names of the PNGs, "family": number of
    evaluated networks in family.json}; {} on other ranks.
    """
    if not is_main_process():
        return {}
    if not Path(settings.run).is_dir():
        raise FlextronError(f"run={settings.run}: no such directory: name the one that holds the out directories of stages")
    with serial_output(settings) as out:
        figures = build_report(Path(settings.run), out, (*TOPICS, *adaptive.TOPICS))
        metrics = write_metrics(
            out, "report", {"figures": [Path(f).name for f in figures["figures"]], "family": figures["family"]}
        )
    print(f"report: {settings.out}/index.html")
    return metrics
