"""Random sub-networks of a training step (Flextron, section 3.1).

Draws depend on (seed, step) only, so they are the same on every rank and after a resume.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from flextron_mcore.axes import AXES, added_tensors
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families.tensors import of_model
from flextron_mcore.space import ElasticSpace, SubNetwork, count_parameters

MODES = ("flextron", "matformer")
STEEPEST = 1000.0  # largest tilt of the candidates' probabilities: the smallest or the largest candidate is then certain


@dataclass(frozen=True)
class Mixture:
    """Distribution of random sub-networks in which budgets have probabilities.

    Attributes:
        budgets: shares of the full model's parameters, increasing.
        probabilities: probability of each budget; their sum is 1.
        candidates: for each budget the probabilities of the candidates of each axis, {axis: [candidates]}. All layers share them,
            and the expected number of parameters is the budget.
    """

    budgets: tuple[float, ...]
    probabilities: tuple[float, ...]
    candidates: tuple[Mapping[str, np.ndarray], ...]

    def drawn(self, seed: int, step: int, count: int) -> list[float]:
        """Budgets of the sub-networks that `draw` draws for a step of the training.

        Args:
            seed: seed of the run.
            step: number of the step, from 0.
            count: number of sub-networks.
        """
        return [self.budgets[i] for i in _indices(self.probabilities, _generator(seed, 0, step), count)]


def mixture(model: ModelConfig, space: ElasticSpace, weights: Mapping[str, float]) -> Mixture:
    """Distribution of random sub-networks from {budget: weight}; the probabilities are the weights over their sum.

    Of all distributions whose axes are independent, one that grows exponentially with each axis's size is taken: a candidate of
    size s has a probability in proportion to exp(tilt * s / largest s), with one tilt for all axes, 0 for a uniform draw.

    Args:
        model: architecture of the full model.
        space: space to draw from.
        weights: budgets as shares of the full model's parameters, and how often each is drawn.

    Raises:
        FlextronError: a budget that is no number within the shares of the smallest and the full network, or no weight above 0.
    """
    smallest = space.uniform(model, *(sizes[0] for sizes in space.sizes.values()))
    full = count_parameters(model)
    least, found = count_parameters(model, smallest) / full, {}
    for name, weight in weights.items():
        try:
            budget = float(name)
        except ValueError:
            budget = math.nan
        if not least - 1e-9 <= budget <= 1:
            raise FlextronError(
                f"budget_weights: {name} is not within {least:.4f} (the smallest network's share of the parameters) and 1: "
                "choose budgets that are"
            )
        found[budget] = found.get(budget, 0.0) + weight
    if not 0 < sum(found.values()) < math.inf:
        raise FlextronError("budget_weights: has no finite weight above 0: give at least one budget one, or set the key to null")
    budgets = tuple(budget for budget in sorted(found) if found[budget] > 0)
    total = sum(found.values())
    tilted = tuple(_tilted(space, _tilt(model, space, budget * full)) for budget in budgets)
    return Mixture(budgets, tuple(found[budget] / total for budget in budgets), tilted)


def expected(space: ElasticSpace, candidates: Mapping[str, np.ndarray]) -> Iterator[tuple[float, int, float, tuple[int, ...]]]:
    """(probability, hidden size, expected depth, sizes of a layer) of every choice of hidden size and one layer's widths.

    candidates: {axis: probabilities of its candidates}, the same for all layers.
    """
    names = [axis.name for axis in space.layer_axes]
    depth = float(np.dot(candidates["depth"], space.sizes["depth"]))
    axes = [list(zip(space.sizes[name], candidates[name], strict=True)) for name in ("hidden_size", *names)]
    for (hidden, p), *layer in itertools.product(*axes):
        yield p * math.prod(q for _, q in layer), hidden, depth, tuple(size for size, _ in layer)


def _tilted(space: ElasticSpace, tilt: float) -> dict[str, np.ndarray]:
    """Probabilities of the candidates of each axis for a tilt (`mixture`): {axis: [candidates]}."""
    found = {}
    for name, sizes in space.sizes.items():
        power = tilt * np.array(sizes, dtype=np.float64) / sizes[-1]
        weights = np.exp(power - power.max())
        found[name] = weights / weights.sum()
    return found


def _tilt(model: ModelConfig, space: ElasticSpace, wanted: float) -> float:
    """Tilt with which a random sub-network is expected to have `wanted` parameters, by bisection.

    Args:
        model: architecture of the full model.
        space: space to draw from.
        wanted: number of parameters.
    """

    def parameters(place: str, hidden: int, sizes: tuple[int, ...] | None = None) -> int:
        layer = space.layer_choice(model, *sizes) if sizes else None
        return sum(tensor.numel(model, hidden, layer) for tensor in of_model(model, place, added_tensors()))

    ends = {h: parameters("before", h) + parameters("after", h) for h in space.hidden_size}
    layers = {(h, sizes): parameters("layer", h, sizes) for _, h, _, sizes in expected(space, _tilted(space, 0.0))}

    def mean(tilt: float) -> float:
        return sum(p * (ends[h] + depth * layers[h, sizes]) for p, h, depth, sizes in expected(space, _tilted(space, tilt)))

    low, high = -STEEPEST, STEEPEST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < wanted else (low, middle)
    return (low + high) / 2


def _generator(seed: int, stream: int, step: int) -> np.random.Generator:
    """Random generator that depends on (seed, stream, step) only. stream: 0 for training, 1 for validation."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, step])))


def _indices(
    probabilities: np.ndarray | tuple[float, ...], generator: np.random.Generator, shape: int | tuple[int, ...]
) -> np.ndarray:
    """Array of a shape with random indices, each drawn with its probability."""
    ends = np.cumsum(probabilities)
    return np.minimum(np.searchsorted(ends, generator.random(shape), side="right"), len(ends) - 1)


def draw(
    model: ModelConfig,
    space: ElasticSpace,
    seed: int,
    step: int,
    count: int,
    mode: str = "flextron",
    stream: int = 0,
    of: Mixture | None = None,
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
        of: distribution to draw from in mode `flextron`; None: uniform.
    """
    if mode not in MODES:
        raise FlextronError(f"mode={mode!r} is not known: use one of {', '.join(MODES)}")
    generator = _generator(seed, stream, step)
    if mode == "matformer":
        smaller = space.ffn_hidden_size[:-1] or space.ffn_hidden_size
        rounds = [generator.permutation(len(smaller)) for _ in range(-(-count // len(smaller)))]
        widths = [smaller[i] for i in np.concatenate(rounds)[:count]] if count else []
        return [space.uniform(model, ffn_hidden_size=width) for width in widths]
    drawn = {}
    budgets = _indices(of.probabilities, generator, count) if of else None
    for name, sizes in space.sizes.items():
        shape = (count, model.num_layers) if AXES[name].of_layer else (count,)
        if of:
            rows = [_indices(of.candidates[budget][name], generator, shape[1:]) for budget in budgets]
            indices = np.array(rows, dtype=np.int64).reshape(shape)
        else:
            indices = generator.integers(len(sizes), size=shape)
        drawn[name] = np.array(sizes)[indices]
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
