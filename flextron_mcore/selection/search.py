"""Local search: which networks to evaluate next, near the best evaluated ones. No torch import.

The losses of networks of one hidden size and depth are fitted by a polynomial of the cost plus an effect of every candidate, with
ridge regression. The fit then predicts the loss of networks that differ from a good one in at most two blocks. Such networks are
near to evaluated ones, so a simple fit is enough. Evaluating them and fitting again is one round of the search.

Shape suffixes: S networks, N choices, K candidates, D coefficients of the polynomial, M moves, each of one block to another
candidate.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import numpy as np

from flextron_mcore.choices import Choices
from flextron_mcore.cost import Cost
from flextron_mcore.space import SubNetwork

_RIDGE = 0.1  # ridge penalty of the candidates' effects, in units of one network
_TREND = 3  # coefficients of the polynomial


def worth_evaluating(
    choices: Choices, cost: Cost, losses: Mapping[SubNetwork, float], near: Iterable[SubNetwork], span: float
) -> list[SubNetwork]:
    """Networks to evaluate next: for each good network the two neighbours of least predicted loss that were not evaluated.

    A neighbour has the same hidden size and depth, and differs in at most two blocks. One of the two costs at most as much as the
    good network, the other at least as much. Either may be missing.

    Args:
        choices: choices of the networks.
        cost: cost of the networks.
        losses: {network: loss} of evaluated networks, from which losses of neighbours are predicted.
        near: good networks, whose neighbours are searched.
        span: largest difference of cost between a network and its neighbour, in the cost's unit.
    """
    fits: dict[tuple[int, int], _Fit] = {}
    known, found = set(losses), []
    for net in near:
        size = net.hidden_size, net.depth
        if size not in fits:
            fits[size] = _Fit(
                choices, cost, {other: losses[other] for other in losses if (other.hidden_size, other.depth) == size}
            )
        for low, high in ((-span, 0.0), (0.0, span)):
            other = fits[size].best_near(net, low, high, known)
            if other:
                found.append(other)
                known.add(other)
    return found


class _Fit:
    """Fit of the losses of networks of one hidden size and depth, by a polynomial of the cost plus an effect of each candidate.

    Args:
        choices: choices of the networks.
        cost: cost that the polynomial depends on.
        losses: {network: loss} of evaluated networks of this hidden size and depth.
    """

    def __init__(self, choices: Choices, cost: Cost, losses: Mapping[SubNetwork, float]) -> None:
        self.choices, self.cost = choices, cost
        self.exists_NK = choices.exists_NK
        rows_SN = np.array([choices.indices(net) for net in losses])
        has_SM = np.eye(self.exists_NK.shape[1])[rows_SN].reshape(len(losses), -1)
        shares_S, loss_S = np.array([cost.of(net) / cost.full for net in losses]), np.array(list(losses.values()))
        trend_SD = np.vander(shares_S, min(_TREND, len(losses)))
        # The polynomial has no penalty: project it out of losses and candidates, then do the ridge regression.
        base_SD, _ = np.linalg.qr(trend_SD)
        left_SM, left_S = (x - base_SD @ (base_SD.T @ x) for x in (has_SM, loss_S))
        effect_M = np.linalg.solve(left_SM.T @ left_SM + _RIDGE * np.eye(left_SM.shape[1]), left_SM.T @ left_S)
        self.effect_NK = effect_M.reshape(self.exists_NK.shape)
        self.trend_D = np.linalg.lstsq(trend_SD, loss_S - has_SM @ effect_M, rcond=None)[0]

    def best_near(self, net: SubNetwork, low: float, high: float, known: Container[SubNetwork]) -> SubNetwork | None:
        """Neighbour of `net` with the least predicted loss, which differs in at most two blocks; None if there is none.

        Args:
            net: network whose neighbours are searched.
            low, high: bounds of the neighbour's cost minus the cost of `net`, in the cost's unit.
            known: networks that are not returned.
        """
        own_N = np.array(self.choices.indices(net))
        costs_NK = self.choices.moves_NK(net, self.cost)
        changes_NK = self.effect_NK - np.take_along_axis(self.effect_NK, own_N[:, None], 1)
        block_M, candidate_M = np.nonzero(np.isfinite(costs_NK))
        i, j = np.triu_indices(len(block_M))  # pairs of moves; i = j stands for a single move
        twice, cost_M, change_M = i != j, costs_NK[block_M, candidate_M], changes_NK[block_M, candidate_M]
        spent = cost_M[i] + cost_M[j] * twice
        apart = (block_M[i] != block_M[j]) | ~twice
        fitting = np.flatnonzero(apart & (spent >= low) & (spent <= high))
        i, j, twice = i[fitting], j[fitting], twice[fitting]
        shares = (self.cost.of(net) + spent[fitting]) / self.cost.full
        expected = np.polyval(self.trend_D, shares) + change_M[i] + change_M[j] * twice
        for pair in np.argsort(expected, kind="stable"):
            row_N = own_N.copy()
            for move in (i[pair], j[pair]):
                row_N[block_M[move]] = candidate_M[move]
            other = self.choices.network(row_N.tolist())
            if other not in known:
                return other
        return None
