"""Splitting tokens over replicas and choosing replicas, compiled by numba; imported where somebody plans only.

Everything here breaks ties to the lowest number, so that plans are the same everywhere.
Shape letters: E experts, G GPUs, S slots of one layer on a GPU, H GPUs that hold an expert, P pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.traces.compiled import compiled

LEAST_GAIN = 0.01
"""Share of the mean GPU load that a replica must move to be worth a slot."""
KEEP = 1.05
"""How much more a replica counts that is there already, since it costs no copy."""


@compiled()
def exact_split(load_E: Any, usable_EG: Any, slowdown_G: Any, uneven: bool, tokens_EG: Any) -> None:
    """Fill `tokens_EG`, zeros when called; see `dispatch.exact_split`. `uneven`: not all GPUs are as fast."""
    E, G = usable_EG.shape
    copies_E = np.zeros(E, np.int64)
    load_G = np.zeros(G, np.int64)
    total = 0
    for e in range(E):
        only = -1
        for g in range(G):
            if usable_EG[e, g]:
                copies_E[e] += 1
                only = g
        if copies_E[e] == 1:
            tokens_EG[e, only] = load_E[e]
            load_G[only] += load_E[e]
        total += load_E[e]
    least = 0 if uneven else max(load_G.max(), -(-total // G))
    shared = np.flatnonzero((copies_E > 1) & (load_E > 0))
    for x in np.argsort(-load_E[shared], kind="mergesort"):
        expert = shared[x]
        hosts = np.flatnonzero(usable_EG[expert])
        _pour(load_E[expert], hosts, load_G, tokens_EG[expert])
    came_from_G2 = np.empty((G, 2), np.int64)
    while load_G.max() > least and _relieve(tokens_EG, load_G, usable_EG, shared, slowdown_G, came_from_G2):
        pass


@compiled()
def _pour(tokens: int, hosts: Any, load_G: Any, tokens_G: Any) -> None:
    """Whole tokens onto the hosts, lowest first, as water finds its level."""
    order = hosts[np.argsort(load_G[hosts], kind="mergesort")]
    wet, below = 0, 0
    # How many hosts end under water: all whose bottom lies under the level that the ones before would reach.
    for i in range(len(order)):
        if (i + 1) * load_G[order[i]] - (below + load_G[order[i]]) < tokens:
            wet = i + 1
        below += load_G[order[i]]
    held = 0
    for i in range(wet):
        held += load_G[order[i]]
    height, rest = divmod(tokens + held, wet)
    for i in range(wet):
        g = order[i]
        added = height - load_G[g] + (1 if i < rest else 0)
        tokens_G[g] = added
        load_G[g] += added


@compiled()
def _relieve(tokens_EG: Any, load_G: Any, usable_EG: Any, shared: Any, slowdown_G: Any, came_from_G2: Any) -> bool:
    """Move tokens from the busiest GPU along the shortest chain of shared experts to one that is less busy even with a
    token more; False where there is no such chain."""
    G = len(load_G)
    start = 0
    for g in range(1, G):
        if load_G[g] * slowdown_G[g] > load_G[start] * slowdown_G[start]:
            start = g
    busiest = load_G[start] * slowdown_G[start]
    came_from_G2[:] = -1
    reached = np.empty(G, np.int64)
    reached[0], count, i = start, 1, 0
    while i < count:
        gpu = reached[i]
        i += 1
        for expert in shared:
            if tokens_EG[expert, gpu] <= 0:
                continue
            for to in range(G):
                if not usable_EG[expert, to] or to == start or came_from_G2[to, 0] >= 0:
                    continue
                came_from_G2[to, 0], came_from_G2[to, 1] = gpu, expert
                reached[count] = to
                count += 1
                busy = load_G[to] * slowdown_G[to]
                if busy + slowdown_G[to] < busiest:
                    most = int((busiest - busy) / (slowdown_G[start] + slowdown_G[to]))
                    _move_along(tokens_EG, load_G, came_from_G2, start, to, max(most, 1))
                    return True
    return False


@compiled()
def _move_along(tokens_EG: Any, load_G: Any, came_from_G2: Any, start: int, end: int, most: int) -> None:
    amount, gpu = most, end
    while gpu != start:
        before, expert = came_from_G2[gpu]
        amount = min(amount, tokens_EG[expert, before])
        gpu = before
    gpu = end
    while gpu != start:
        before, expert = came_from_G2[gpu]
        tokens_EG[expert, before] -= amount
        tokens_EG[expert, gpu] += amount
        gpu = before
    load_G[start] -= amount
    load_G[end] += amount


@compiled()
def greedy_replicas(load_E: Any, home_EG: Any, have_EG: Any, room_G: Any, slowdown_G: Any, pairs_P2: Any) -> int:
    """Write (expert, GPU) into `pairs_P2` and return how many there are; see `planner.replicas`. Changes `room_G`."""
    E, G = home_EG.shape
    share_EG = np.zeros((E, G))
    open_EG = np.ones((E, G), np.bool_)
    load_G = np.zeros(G)
    for e in range(E):
        for g in range(G):
            if home_EG[e, g]:
                share_EG[e, g] = load_E[e]
                load_G[g] += load_E[e]
                open_EG[e, g] = False
    least = LEAST_GAIN * load_E.sum() / G
    chosen = 0
    while room_G.max() > 0:
        busiest = 0
        for g in range(1, G):
            if load_G[g] * slowdown_G[g] > load_G[busiest] * slowdown_G[busiest]:
                busiest = g
        busy = load_G[busiest] * slowdown_G[busiest]
        best, expert, gpu = 0.0, -1, -1
        for e in range(E):
            if share_EG[e, busiest] <= 0:
                continue
            for g in range(G):
                if not open_EG[e, g] or room_G[g] <= 0:
                    continue
                # Levelling the pair is the most that one replica can do for the busiest GPU.
                level = (busy - load_G[g] * slowdown_G[g]) / (slowdown_G[busiest] + slowdown_G[g])
                worth = min(share_EG[e, busiest], level) * (KEEP if have_EG[e, g] else 1.0)
                if worth > best:
                    best, expert, gpu = worth, e, g
        if best <= least:
            break
        gain = best / (KEEP if have_EG[expert, gpu] else 1.0)
        share_EG[expert, busiest] -= gain
        share_EG[expert, gpu] += gain
        load_G[busiest] -= gain
        load_G[gpu] += gain
        open_EG[expert, gpu] = False
        room_G[gpu] -= 1
        pairs_P2[chosen, 0], pairs_P2[chosen, 1] = expert, gpu
        chosen += 1
    return chosen
