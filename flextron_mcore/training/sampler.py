"""Random sub-networks of a training step (Flextron, section 3.1).

Draws depend on (seed, step) only, so they are the same on every rank and after a resume.
"""

from __future__ import annotations

import numpy as np

from flextron_mcore.axes import AXES
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import ElasticSpace, SubNetwork

MODES = ("flextron", "matformer")


def draw(
    model: ModelConfig, space: ElasticSpace, seed: int, step: int, count: int, mode: str = "flextron", stream: int = 0
) -> list[SubNetwork]:
    """Draw the random sub-networks of a step, `count` of them. Raises FlextronError for an unknown mode.

    Args:
        model: architecture of the full model.
        space: space to draw from.
        seed: seed of the run.
        step: number of the step, from 0.
        count: number of sub-networks.
        mode: `flextron`: every axis is drawn independently and uniformly, in each layer or for the network. `matformer`: all
            layers share a smaller FFN width, and all else is full; widths within a step differ while there are enough of them
            (MatFormer, arXiv:2310.07707).
        stream: separates independent draws of the same seed and step: 0 for training, 1 for validation.
    """
    if mode not in MODES:
        raise FlextronError(f"mode={mode!r} is not known: use one of {', '.join(MODES)}")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, step])))
    if mode == "matformer":
        smaller = space.ffn_hidden_size[:-1] or space.ffn_hidden_size
        rounds = [generator.permutation(len(smaller)) for _ in range(-(-count // len(smaller)))]
        widths = [smaller[i] for i in np.concatenate(rounds)[:count]] if count else []
        return [space.uniform(model, ffn_hidden_size=width) for width in widths]
    drawn = {
        name: np.array(sizes)[generator.integers(len(sizes), size=(count, model.num_layers) if AXES[name].of_layer else count)]
        for name, sizes in space.sizes.items()
    }
    of_layers = np.stack([drawn[axis.name] for axis in space.layer_axes], -1)  # [count, layers, axes]
    return [
        space.network(
            model,
            [space.layer_choice(model, *sizes) for sizes in of_layers[j].tolist()],
            int(drawn["hidden_size"][j]),
            int(drawn["depth"][j]),
        )
        for j in range(count)
    ]


def random_family(
    model: ModelConfig, space: ElasticSpace, seed: int, step: int, count: int, mode: str = "flextron"
) -> dict[str, SubNetwork]:
    """Random sub-networks by name, "random 1" and so on, independent of the draws of training.

    Raises FlextronError for an unknown mode.

    Args:
        model: architecture of the full model.
        space: space to draw from.
        seed: seed of the run.
        step: number of finished steps; each gives other networks.
        count: number of sub-networks.
        mode: `flextron` (every axis independently, in each layer) or `matformer` (the same smaller FFN width in all layers).
    """
    return {f"random {i + 1}": net for i, net in enumerate(draw(model, space, seed, step, count, mode, stream=1))}
