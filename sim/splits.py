"""Splits that look at more than loads: near first, and by time. Shape letters: E experts, G GPUs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.sim.dispatch import Floats, Ints, Site, exact_split
from moesim.sim.rates import Rates
from moesim.sim.shifting import best_shift, seconds_of

SLACK = 0.1
"""How much busier than under the exact split `nearest_split` lets the busiest GPU be."""
MOST_SHIFTS = 256

Bools = NDArray[np.bool_]


def nearest_split(load_E: Ints, usable_EG: Bools, slowdown_G: Floats | None = None, site: Site | None = None) -> Ints:
    """Every token to the copy on its own GPU, else to those of its node, else to all, in equal parts; then tokens leave
    the GPUs that would be over 1 + SLACK times as busy as the busiest under the exact split. The exact split itself
    where that does not succeed, or where nobody says which GPU holds which tokens.

    Source: local first, as in Libra, and the locality-aware choice of replicas of servers that run EPLB; the bound is
    this project's.
    """
    exact_EG = exact_split(load_E, usable_EG, slowdown_G)
    if site is None:
        return exact_EG
    slow_G = np.ones(usable_EG.shape[1]) if slowdown_G is None else slowdown_G
    most = float((exact_EG.sum(axis=0) * slow_G).max()) * (1 + SLACK)
    tokens_EG = _nearest(site.counts_GE, usable_EG, site.node_G)
    return tokens_EG if _relieved(tokens_EG, usable_EG, slow_G, most) else exact_EG


def timed_split(load_E: Ints, usable_EG: Bools, slowdown_G: Floats | None = None, site: Site | None = None) -> Ints:
    """The split whose slowest GPU ends first by the executor's rates: the exact one, or one that starts from every
    expert on a single GPU and divides an expert only where that saves more time than reading its weights once more
    costs. The exact split where the rates are not known."""
    exact_EG = exact_split(load_E, usable_EG, slowdown_G)
    if site is None or site.rates is None:
        return exact_EG
    slow_G = np.ones(usable_EG.shape[1]) if slowdown_G is None else slowdown_G
    whole_EG = _undivided(load_E, usable_EG, site.rates, slow_G)
    for _ in range(MOST_SHIFTS):
        shift = best_shift(whole_EG, usable_EG, site.rates, slow_G)
        if shift is None:
            break
        whole_EG[shift.expert, shift.source] -= int(shift.amount)
        whole_EG[shift.expert, shift.target] += int(shift.amount)
    found = (exact_EG, whole_EG)
    return found[int(np.argmin([seconds_of(tokens_EG, site.rates, slow_G).max() for tokens_EG in found]))]


def _nearest(counts_GE: Ints, usable_EG: Bools, node_G: NDArray[np.integer]) -> Ints:
    """[E, G] tokens where they are nearest, balance aside."""
    near_EG = counts_GE.T.copy()
    local_EG = np.where(usable_EG, near_EG, 0)
    tokens_EG, left_EG = local_EG.copy(), near_EG - local_EG
    for node in np.unique(node_G):
        mine_G = node_G == node
        here_EG = usable_EG & mine_G
        copies_E = here_EG.sum(axis=1)
        waiting_E = np.where(copies_E > 0, left_EG[:, mine_G].sum(axis=1), 0)
        tokens_EG += _evenly(waiting_E, here_EG)
        left_EG[np.ix_(copies_E > 0, mine_G)] = 0
    return tokens_EG + _evenly(left_EG.sum(axis=1), usable_EG)


def _evenly(tokens_E: Ints, over_EG: Bools) -> Ints:
    """[E, G] tokens in equal parts over the GPUs of each row, the remainder to the lowest."""
    share_E, rest_E = np.divmod(tokens_E, np.maximum(over_EG.sum(axis=1), 1))
    order_EG = np.cumsum(over_EG, axis=1) - 1
    return np.where(over_EG, share_E[:, None] + (order_EG < rest_E[:, None]), 0).astype(np.int64)


def _relieved(tokens_EG: Ints, usable_EG: Bools, slowdown_G: Floats, most: float) -> bool:
    """Move tokens from GPUs that are busier than `most` to the least busy copy, largest part first, until none is;
    False where some GPU's tokens have nowhere to go. Changes `tokens_EG`."""
    busy_G = tokens_EG.sum(axis=0) * slowdown_G
    while busy_G.max() > most:
        gpu = int(np.argmax(busy_G))
        room_G = np.maximum(np.floor((most - busy_G) / slowdown_G), 0).astype(np.int64)
        room_EG = np.where(usable_EG & (tokens_EG[:, gpu] > 0)[:, None], room_G, 0)
        expert, to = divmod(int(np.argmax(np.minimum(room_EG, tokens_EG[:, gpu, None]))), len(busy_G))
        over = int(np.ceil((busy_G[gpu] - most) / slowdown_G[gpu]))
        amount = min(int(room_EG[expert, to]), int(tokens_EG[expert, gpu]), over)
        if amount < 1:
            return False
        tokens_EG[expert, gpu] -= amount
        tokens_EG[expert, to] += amount
        busy_G = tokens_EG.sum(axis=0) * slowdown_G
    return True


def _undivided(load_E: Ints, usable_EG: Bools, rates: Rates, slowdown_G: Floats) -> Ints:
    """[E, G] every expert's tokens on one GPU: those with one copy first, then the heaviest on the copy whose GPU ends
    first with it, ties to the one with fewer tokens."""
    copies_E = usable_EG.sum(axis=1)
    tokens_EG = np.where(usable_EG & (copies_E == 1)[:, None], load_E[:, None], 0).astype(np.int64)
    distinct_G, rows_G = (tokens_EG > 0).sum(axis=0), rates.rows(tokens_EG).sum(axis=0)
    shared = np.flatnonzero((copies_E > 1) & (load_E > 0))
    for expert in shared[np.argsort(-load_E[shared], kind="stable")]:
        rows = rates.rows(int(load_E[expert]))
        after_G = rates.seconds(distinct_G + 1, rows_G + rows) * slowdown_G
        gpu = int(np.lexsort((rows_G, np.where(usable_EG[expert], after_G, np.inf)))[0])
        tokens_EG[expert, gpu] = load_E[expert]
        distinct_G[gpu] += 1
        rows_G[gpu] += rows
    return tokens_EG
