"""Conversion of `trtllm-bench` reports into the file of `flextron latency measurements=FILE` (docs/tensorrt_llm.md).

    python -m flextron_mcore.latency.trtllm_bench measured.json run/exports/*

Every directory is an export: metrics.json names its sub-network, and bench.json is the report of its benchmark
(`trtllm-bench ... --report_json bench.json`). No torch import.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError
from flextron_mcore.files import explain, read_json

REPORT = "bench.json"


def measurements(exports: Sequence[Path]) -> list[dict[str, Any]]:
    """Entries for `flextron latency measurements=FILE`: [{"subnetwork": ..., "ms": mean latency of a request in milliseconds}].

    Raises FlextronError that names a missing or invalid file.

    exports: directories of exports, each with the report of its benchmark in bench.json.
    """
    found = []
    for folder in exports:
        try:
            file = folder / "metrics.json"
            net = read_json(file)["subnetwork"]
            file = folder / REPORT
            milliseconds = float(read_json(file)["performance"]["avg_request_latency_ms"])
        except FileNotFoundError:
            raise FlextronError(f"{file}: no such file: name exports that were benchmarked, each with its {REPORT}") from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise FlextronError(f"{file}: is damaged, or of another program ({explain(error)}): write it again") from None
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
