"""Latencies measured elsewhere: a JSON list of {"subnetwork": ..., "ms": ...}."""

from __future__ import annotations

from pathlib import Path

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.files import child, explain, read_json
from flextron_mcore.space import ElasticSpace, SubNetwork


def read_measurements(file: Path, model: ModelConfig, space: ElasticSpace) -> list[tuple[SubNetwork, float]]:
    """Read (network, milliseconds) pairs. Raises FlextronError for an invalid file or entry.

    Args:
        file: JSON list. An entry's "subnetwork" is a sub-network, or the path of its file relative to `file`.
        model: architecture of the full model.
        space: space of the sub-networks.
    """
    try:
        found, rows = [], read_json(file, given=True)
        if not isinstance(rows, list) or not rows:
            raise ValueError("not a list with at least one entry")
        for i, row in enumerate(rows):
            net, where = row["subnetwork"], f"{file}: [{i}].subnetwork"
            net = (
                SubNetwork.from_file(child(file.parent, net, file)) if isinstance(net, str) else SubNetwork.from_dict(net, where)
            )
            space.check(model, net, where)
            found.append((net, float(row["ms"])))
            if not 0 < found[-1][1] < float("inf"):
                raise FlextronError(f"{file}: [{i}].ms={row['ms']} is not a latency: it must be above 0")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FlextronError(f'{file}: is not a list of {{"subnetwork": ..., "ms": ...}} ({explain(error)})') from None
