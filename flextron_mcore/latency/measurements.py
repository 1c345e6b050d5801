"""Latencies measured elsewhere: a JSON list of {"subnetwork": ..., "ms": ...}."""

from __future__ import annotations

import json
from pathlib import Path

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import ElasticSpace, SubNetwork


def read_measurements(file: Path, model: ModelConfig, space: ElasticSpace) -> list[tuple[SubNetwork, float]]:
    """(network, milliseconds) of each entry; a sub-network stands in it, or in a file that it names relative to `file`.

    Raises FlextronError for anything else.
    """
    try:
        found = []
        for i, row in enumerate(json.loads(file.read_text(encoding="utf-8"))):
            net, where = row["subnetwork"], f"{file}: [{i}].subnetwork"
            net = SubNetwork.from_file(file.parent / net) if isinstance(net, str) else SubNetwork.from_dict(net, where)
            space.check(model, net, where)
            found.append((net, float(row["ms"])))
            if not 0 < found[-1][1] < float("inf"):
                raise FlextronError(f"{file}: [{i}].ms={row['ms']} is not a latency")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FlextronError(
            f'{file}: is not a list of {{"subnetwork": ..., "ms": ...}} ({type(error).__name__}: {error})'
        ) from None
