"""Names for sub-networks that people compare."""

from __future__ import annotations

from flextron_mcore.config import ModelConfig
from flextron_mcore.space import ElasticSpace, SubNetwork


def uniform_family(model: ModelConfig, space: ElasticSpace) -> dict[str, SubNetwork]:
    """The uniform sub-networks, heads and FFN width growing together, the full model last under the name "full"."""
    steps = max(len(space.heads), len(space.ffn_hidden_size))
    family = {}
    for step in range(steps):
        heads = space.heads[-(-(step + 1) * len(space.heads) // steps) - 1]
        width = space.ffn_hidden_size[-(-(step + 1) * len(space.ffn_hidden_size) // steps) - 1]
        name = f"uniform {_percent(heads, model.num_attention_heads)} heads {_percent(width, model.ffn_hidden_size)} ffn"
        full = (heads, width) == (model.num_attention_heads, model.ffn_hidden_size)
        family["full" if full else name] = space.uniform(model, heads, width)
    return family


def _percent(size: int, full: int) -> str:
    return f"{100 * size / full:.3g}%"
