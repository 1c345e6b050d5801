"""Named sub-networks of increasing size, for tables."""

from __future__ import annotations

from flextron_mcore.axes import AXES
from flextron_mcore.config import ModelConfig
from flextron_mcore.space import ElasticSpace, SubNetwork


def uniform_family(model: ModelConfig, space: ElasticSpace) -> dict[str, SubNetwork]:
    """{name: sub-network} of networks with the same widths in every layer, from the smallest to the full model, named "full".

    From one network to the next, all axes of the space grow together. There are as many networks as the axis with the most
    candidates has; other axes repeat some of theirs. A smaller network is named by its sizes, as "uniform 75% heads 75% ffn".
    """
    steps = max(map(len, space.sizes.values()))
    family = {}
    for step in range(steps):
        sizes = {name: candidates[-(-(step + 1) * len(candidates) // steps) - 1] for name, candidates in space.sizes.items()}
        net = space.uniform(model, **sizes)
        axes = [axis for axis in AXES.values() if axis.of_layer or space.elastic(axis)]
        shown = [f"{_percent(sizes[axis.name], axis.full(model))} {axis.short.lower()}" for axis in axes]
        family["full" if net == SubNetwork.full(model) else f"uniform {' '.join(shown)}"] = net
    return family


def _percent(size: int, full: int) -> str:
    return f"{100 * size / full:.3g}%"
