"""Names for sub-networks that people compare."""

from __future__ import annotations

from flextron_mcore.config import ModelConfig
from flextron_mcore.space import ElasticSpace, SubNetwork


def uniform_family(model: ModelConfig, space: ElasticSpace) -> dict[str, SubNetwork]:
    """The uniform sub-networks, all axes growing together, the full model last under the name "full"."""
    axes = {"heads": space.heads, "ffn": space.ffn_hidden_size, "hidden": space.hidden_size, "layers": space.depth}
    steps = max(map(len, axes.values()))
    family = {}
    for step in range(steps):
        sizes = {axis: candidates[-(-(step + 1) * len(candidates) // steps) - 1] for axis, candidates in axes.items()}
        net = space.uniform(model, *sizes.values())
        shown = [
            f"{_percent(sizes[axis], axes[axis][-1])} {axis}" for axis in axes if axis in ("heads", "ffn") or len(axes[axis]) > 1
        ]
        family["full" if net == SubNetwork.full(model) else f"uniform {' '.join(shown)}"] = net
    return family


def _percent(size: int, full: int) -> str:
    return f"{100 * size / full:.3g}%"
