"""Exact multiple-choice knapsack: one candidate for each choice, of least total value, within budgets. No torch import.

Shape suffixes: N choices, K candidates.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from flextron_mcore.choices import Choices
from flextron_mcore.cost import Cost
from flextron_mcore.space import SubNetwork

Limit = tuple[Cost, float, float]  # (cost, least value, largest value)


def cheapest(choices: Choices, values_NK: np.ndarray, limits: Sequence[Limit]) -> SubNetwork | None:
    """Network with the least sum of values whose costs are all within limits; None if there is none.

    A value is a number of each candidate, such as its loss; lower is better. HiGHS solves an integer program to optimality. If
    hidden size and depth are choices too, there is one program for every pair of them that may hold the optimum; skipped layers
    then have no value, and values must not be negative.

    Args:
        choices: choices of the network (space as a list of candidates, one to be chosen of each).
        values_NK: value of each candidate.
        limits: (cost, least, largest) of each bounded cost, in the cost's unit.
    """
    network_values = [values_NK[row, : len(sizes)] for row, sizes in enumerate(_network_sizes(choices))]
    best, found = np.inf, None
    for of_network in sorted(
        _network_combinations(choices), key=lambda indices: (sum(map(operator.getitem, network_values, indices)), indices)
    ):
        if sum(map(operator.getitem, network_values, of_network)) >= best:
            break
        net = _cheapest_of_size(choices, values_NK, limits, of_network)
        if net and (total := choices.total(values_NK, net)) < best:
            best, found = total, net
    return found


def every_size(choices: Choices, values_NK: np.ndarray, limits: Sequence[Limit]) -> list[SubNetwork]:
    """Network with the least sum of values whose costs are all within limits, for every pair of hidden size and depth.

    Pairs without such a network are left out.

    Args:
        choices: choices of the networks (space as a list of candidates, one to be chosen of each).
        values_NK: value of each candidate, such as its loss; lower is better.
        limits: (cost, least, largest) of each bounded cost, in the cost's unit.
    """
    found = [_cheapest_of_size(choices, values_NK, limits, of_network) for of_network in _network_combinations(choices)]
    return [net for net in found if net]


def _network_sizes(choices: Choices) -> list[tuple[int, ...]]:
    """Candidates of the hidden size and of the depth; empty if `choices` are only those of the layers."""
    return choices.sizes[: len(choices.network_axes)]


def _network_combinations(choices: Choices) -> list[tuple[int, ...]]:
    """Candidate indices of all pairs of hidden size and depth; one empty tuple if these are no choices."""
    return list(itertools.product(*(range(len(sizes)) for sizes in _network_sizes(choices))))


def _cheapest_of_size(
    choices: Choices, values_NK: np.ndarray, limits: Sequence[Limit], of_network: tuple[int, ...]
) -> SubNetwork | None:
    """Network of least value within the limits with a given hidden size and depth; None if there is none.

    Args:
        choices: choices of the network.
        values_NK: value of each candidate.
        limits: (cost, least, largest) of each bounded cost, in the cost's unit.
        of_network: candidate indices of the hidden size and depth; empty if these are no choices.
    """
    first = len(of_network)
    if choices.uniform:
        every = itertools.product(*(range(len(sizes)) for sizes in choices.sizes[first:]))
        networks = [choices.network([*of_network, *indices]) for indices in every]
        fitting = [net for net in networks if all(low <= cost.of(net) <= high * (1 + 1e-12) for cost, low, high in limits)]
        return min(fitting, key=lambda net: choices.total(values_NK, net), default=None)
    some = choices.network([*of_network, *[0] * (choices.count - first)])
    rows = choices.rows(i for i, layer in enumerate(some.layers) if layer.executed)

    def network(indices: Sequence[int]) -> SubNetwork:
        whole = np.zeros(choices.count, dtype=int)
        whole[:first], whole[rows] = of_network, indices
        return choices.network(whole.tolist())

    parts = [(cost.at(some.hidden_size), *bounds) for cost, *bounds in limits]
    if not all(cost.reaches(some.depth, *bounds) for cost, *bounds in parts):
        return None
    costs = [(choices.costs_NK(cost)[rows], cost, *bounds) for cost, *bounds in parts]
    return _solve(values_NK[rows], choices.exists_NK[rows], costs, network, limits)


def _solve(
    values_NK: np.ndarray,
    exists_NK: np.ndarray,
    costs: Sequence[tuple[np.ndarray, Cost, float, float]],
    network: Callable[[Sequence[int]], SubNetwork],
    limits: Sequence[Limit],
) -> SubNetwork | None:
    """Network of least value within the limits, by one integer program; None if there is none.

    Args:
        values_NK: value of each candidate.
        exists_NK: True for candidates that exist.
        costs: (cost of each candidate [N, K], the Cost, its least and its largest value) of each bounded cost.
        network: function from the candidate index of each of the N choices to the network.
        limits: (cost, least, largest) of each bounded cost, which the network found is checked against.
    """
    # Every stage imports this module for its estimate of memory; the solver takes a tenth of a process's start.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    exists = np.flatnonzero(exists_NK)
    count, width = exists_NK.shape
    one_each = csr_array((np.ones(len(exists)), (exists // width, np.arange(len(exists)))), shape=(count, len(exists)))
    values = values_NK.ravel()[exists]
    values = (values - values.mean()) / (np.abs(values - values.mean()).max() or 1.0)
    slack = 0.0
    while slack < 1e-4:
        constraints = [LinearConstraint(one_each, 1, 1)]
        for costs_NK, cost, least, most in costs:
            # Shares of the full model's cost: bytes and milliseconds are then both of the order of one.
            row = costs_NK.ravel()[exists] / cost.full
            low, high = ((bound - cost.constant) / cost.full for bound in (least, most))
            constraints.append(LinearConstraint(row, low, max(low, high - slack)))
        with _quiet():
            found = milp(
                values,
                constraints=constraints,
                integrality=np.ones(len(exists)),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 0.0},
            )
        if found.x is None:
            return None
        net = network((exists[found.x.round().astype(bool)] % width).tolist())
        if all(cost.of(net) <= most * (1 + 1e-12) for cost, _, most in limits):
            return net
        slack = slack * 4 or 2e-7  # the solution exceeds a limit by the solver's tolerance: tighten the limits and solve again
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context that discards what HiGHS prints to the terminal from C."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
