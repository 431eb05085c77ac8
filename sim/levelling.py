"""The busiest GPU under the best split of loads over replicas, compiled by numba; imported where it is needed only.

Shape letters: N drawn loads, E experts, G GPUs, P replicas beside the homes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.traces.compiled import compiled

PASSES = 50
"""Times at most that the replicated experts' tokens are poured anew; it ends when a turn moves less than STILL."""
STILL = 2e-3
"""Share of the mean GPU load."""


@compiled()
def busiest(load_NE: Any, home_E: Any, pair_P2: Any, gpus: int) -> float:
    """Mean over the drawn loads of the busiest GPU's load over the mean load, tokens divisible.

    `pair_P2` are (expert, GPU), sorted by expert. Experts with replicas are taken in turn, and each one's tokens are
    poured anew into its GPUs, lowest first; that lowers the sum of squares until no split is more level, which is also
    the split with the lowest maximum.
    """
    total = 0.0
    P = len(pair_P2)
    share_P = np.empty(P)
    hosts = np.empty(gpus + 1, np.int64)
    for n in range(len(load_NE)):
        load_G = np.zeros(gpus)
        share_P[:] = 0.0
        everything = 0.0
        for e in range(len(home_E)):
            load_G[home_E[e]] += load_NE[n, e]
            everything += load_NE[n, e]
        for _ in range(PASSES):
            p, moved = 0, 0.0
            while p < P:
                expert, end = pair_P2[p, 0], p
                while end < P and pair_P2[end, 0] == expert:
                    end += 1
                home = home_E[expert]
                kept = load_NE[n, expert]
                hosts[0] = home
                for q in range(p, end):
                    hosts[q - p + 1] = pair_P2[q, 1]
                    load_G[pair_P2[q, 1]] -= share_P[q]
                    kept -= share_P[q]
                load_G[home] -= kept
                level = water_level(load_G[hosts[: end - p + 1]], load_NE[n, expert])
                for q in range(p, end):
                    share = max(level - load_G[pair_P2[q, 1]], 0.0)
                    moved = max(moved, abs(share - share_P[q]))
                    share_P[q] = share
                    load_G[pair_P2[q, 1]] += share
                load_G[home] += max(level - load_G[home], 0.0)
                p = end
            if moved * gpus <= STILL * everything:
                break
        if everything > 0:
            total += load_G.max() * gpus / everything
    mean: float = total / len(load_NE)
    return mean


@compiled()
def water_level(bottom_H: Any, amount: float) -> Any:
    """Height to which `amount` fills hosts that stand at `bottom_H`."""
    if len(bottom_H) == 2:  # the usual case
        low, high = min(bottom_H[0], bottom_H[1]), max(bottom_H[0], bottom_H[1])
        return low + amount if low + amount <= high else (low + high + amount) / 2
    heights = np.sort(bottom_H)
    below, level = 0.0, 0.0
    for i in range(len(heights)):
        below += heights[i]
        level = (below + amount) / (i + 1)
        if i + 1 == len(heights) or level <= heights[i + 1]:
            break
    return level
