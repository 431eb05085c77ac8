"""The best bins by affinity as an integer program, solved exactly (HiGHS): for small models, and as a reference.

Shape letters: L layers, E experts, B bins; V variables "expert e of layer l is in bin b"; P variables "both experts of
a pair are in bin b". All V come before all P.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from moesim.sim.affinity import Affinity, Floats, Ints


def optimum(wanted: Affinity) -> Ints:
    """[L, E] the bins that keep most together. Raises AssertionError where nothing is within slots and loads.

    Every expert has one bin, bins keep within slots and loads, and a pair counts only where both of its experts are.
    Two things follow that make the solver fast: of one expert's pairs with a layer at most as many count in a bin as it
    has slots; and as bins are alike, expert e of the first layer is in one of the first e + 1.
    """
    (L, E), B = wanted.load_LE.shape, wanted.bins
    at_LEB = np.arange(L * E * B).reshape(L, E, B)
    worth_P, ends_2P, relation_P = _pairs(wanted, at_LEB)
    V, P = at_LEB.size, len(worth_P)
    pair_P = V + np.arange(P)

    def rows(row: Any, column: Any, entry: Any, low: Any, high: Any) -> LinearConstraint:
        count = int(np.max(row)) + 1 if np.size(row) else 0
        matrix = coo_array((np.ravel(entry), (np.ravel(row), np.ravel(column))), shape=(count, V + P))
        return LinearConstraint(matrix.tocsc(), np.broadcast_to(low, count), np.broadcast_to(high, count))

    bin_LEB = np.broadcast_to(np.arange(L)[:, None, None] * B + np.arange(B), at_LEB.shape)
    load_LEB = np.broadcast_to(wanted.load_LE[:, :, None], at_LEB.shape)
    constraints = [
        rows(np.arange(L * E).repeat(B), at_LEB, np.ones(V), 1, 1),
        rows(bin_LEB, at_LEB, np.ones(V), 0, wanted.slots),
        rows(bin_LEB, at_LEB, load_LEB, 0, wanted.most_L.repeat(B)),
    ]
    for end_P in ends_2P if P else ():
        number_P = np.arange(P)
        both = (np.stack([number_P, number_P]), np.stack([pair_P, end_P]), np.repeat([1.0, -1.0], P))
        constraints.append(rows(*both, -np.inf, 0))
        _, first, group_P = np.unique(relation_P * V + end_P, return_index=True, return_inverse=True)
        row = np.concatenate([group_P, np.arange(len(first))])
        column, entry = np.concatenate([pair_P, end_P[first]]), np.repeat([1.0, -wanted.slots], [P, len(first)])
        constraints.append(rows(row, column, entry, -np.inf, 0))
    high = np.ones(V + P)
    high[at_LEB[0][np.arange(B) > np.arange(E)[:, None]]] = 0
    found = milp(
        -np.concatenate([np.zeros(V), worth_P]),
        constraints=constraints,
        integrality=np.repeat([1, 0], [V, P]),
        bounds=Bounds(0, high),
    )
    assert found.x is not None, f"nothing is within slots and loads: {found.message}"
    return np.asarray(found.x[:V].reshape(L, E, B).argmax(axis=2), np.int64)


def _pairs(wanted: Affinity, at_LEB: Ints) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """([P] worth, [2, P] the V of both experts, [P] which layers they are of), for pairs that are worth something."""
    related = [(w_EE, layer, layer + 1) for layer, w_EE in enumerate(wanted.between_LEE)]
    if wanted.within_LEE is not None:
        related += [(np.triu(w_EE, 1), layer, layer) for layer, w_EE in enumerate(wanted.within_LEE)]
    worth, one, other, relation = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], []
    for w_EE, a, b in related:
        e, f = np.nonzero(w_EE)
        worth.append(w_EE[e, f].repeat(wanted.bins))
        one.append(at_LEB[a, e].ravel())
        other.append(at_LEB[b, f].ravel())
        relation.append(worth[-1].size)
    ends_2P = np.stack([np.concatenate(one), np.concatenate(other)])
    return np.concatenate(worth), ends_2P, np.arange(len(relation)).repeat(relation)
