"""Reports of `trtllm-bench` as the file that `flextron latency measurements=FILE` reads: docs/tensorrt_llm.md.

    python -m flextron_mcore.latency.trtllm_bench measured.json run/exports/*

Every directory is an export, with the report of its benchmark in it: metrics.json (whose sub-network it is), bench.json
(`trtllm-bench ... --report_json bench.json`). No torch import.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError

REPORT = "bench.json"


def measurements(exports: Sequence[Path]) -> list[dict[str, Any]]:
    """[{"subnetwork": ..., "ms": mean latency of a request}]. Raises FlextronError naming a file that does not fit."""
    found = []
    for folder in exports:
        try:
            file = folder / "metrics.json"
            net = json.loads(file.read_text(encoding="utf-8"))["subnetwork"]
            file = folder / REPORT
            milliseconds = float(json.loads(file.read_text(encoding="utf-8"))["performance"]["avg_request_latency_ms"])
        except FileNotFoundError:
            raise FlextronError(f"{file}: no such file") from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise FlextronError(f"{file}: not a report as expected ({type(error).__name__}: {error})") from None
        found.append({"subnetwork": net, "ms": milliseconds})
    return found


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m flextron_mcore.latency.trtllm_bench OUT.json EXPORT...")
    try:
        rows = measurements([Path(name) for name in sys.argv[2:]])
        Path(sys.argv[1]).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    except (FlextronError, OSError) as error:
        sys.exit(f"error: {error}")
