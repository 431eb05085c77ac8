"""Replicas for loads that are not known exactly: plans that stay good when the forecast is off.

The greedy plan (planner.replicas) relieves the GPUs that are forecast to be busiest, and leaves slots empty where
nothing more is forecast to be won. A ring of replicas, from each GPU to the next, lets load flow from any GPU to any
other, whichever turns out to be busy. Which of the two is better depends on how sure the forecast is, so both are tried
on loads drawn from it. Shape letters: E experts, G GPUs, N drawn loads.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from moesim.sim.planner import replicas

DRAWS = 6
"""Loads that a plan is tried on."""
GAIN = 0.01
"""By what share of the busiest GPU's load a new plan must be better than the replicas that are there."""
Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Pairs = list[tuple[int, int]]
"""(expert, GPU) that should hold a replica."""


def hedged_replicas(
    load_E: Floats, sd_E: Floats | None, home_EG: NDArray[np.bool_], room: int, held: Pairs | None = None
) -> Pairs:
    """(expert, GPU) pairs beside the home placement, at most `room` on a GPU.

    load_E expected tokens and sd_E their standard deviation (None: that of a Poisson load), home_EG [E, G] exactly one
    True a row. The plan with the lowest mean of the busiest GPU over the drawn loads wins; ties to the greedy one.
    `held`: replicas that are there, within the same limits; they stay where the winner is not better by GAIN.
    Source of the ring: the long chain of flexible manufacturing (Jordan and Graves, Management Science 41(4), 1995).
    """
    from moesim.sim.levelling import busiest  # compiled: only who plans pays for it

    sd_E = np.sqrt(load_E) if sd_E is None else sd_E
    drawn_NE = np.maximum(load_E + sd_E * _normal(len(load_E)), 0.0)
    greedy = replicas(load_E, home_EG, np.zeros_like(home_EG), room)
    load_G, hottest_G = load_E @ home_EG, _hottest(load_E, home_EG, room)
    rings = [_rings(ring_G, hottest_G) for ring_G in (_alternating(load_G), _levelled(load_G))]
    plans = [_filled(greedy, rings[0], home_EG.shape[1], room), *rings, *([held] if held else [])]
    home_E = home_EG.argmax(axis=1)
    costs = []
    for plan in plans:
        pairs = np.array(sorted(plan), np.int64).reshape(-1, 2)
        costs.append(busiest(drawn_NE, home_E, pairs, home_EG.shape[1]))
    best = int(np.argmin(costs))
    return plans[-1] if held and costs[-1] <= costs[best] * (1 + GAIN) else plans[best]


@cache
def _normal(experts: int) -> Floats:
    """[N, E] the same draws every time, each with its mirror image; the first row is the forecast itself."""
    half = np.random.default_rng(0).standard_normal((DRAWS // 2, experts))
    return np.concatenate([np.zeros((1, experts)), half, -half])


def _filled(plan: Pairs, ring: Pairs, gpus: int, room: int) -> Pairs:
    """The greedy plan, and in what it leaves empty the hottest experts of the ring's neighbour."""
    used_G = np.bincount([gpu for _, gpu in plan], minlength=gpus)
    taken = {expert for expert, _ in plan}
    filled = list(plan)
    for expert, gpu in ring:
        if used_G[gpu] < room and expert not in taken:
            filled.append((expert, gpu))
            used_G[gpu] += 1
    return filled


def _alternating(load_G: Floats) -> Ints:
    """GPUs in a ring in which busy ones stand beside idle ones."""
    order = np.argsort(-load_G, kind="stable")
    ring = np.empty_like(order)
    ring[::2], ring[1::2] = order[: -(-len(order) // 2)], order[::-1][: len(order) // 2]
    return ring


def _levelled(load_G: Floats) -> Ints:
    """GPUs in a ring along which as little as possible is to be carried on: what came so far stays near the mean."""
    excess_G = load_G - load_G.mean()
    ring = [int(np.argmax(excess_G))]
    left = [g for g in range(len(load_G)) if g != ring[0]]
    carried = float(excess_G[ring[0]])
    while left:
        gpu = min(left, key=lambda g: abs(carried + excess_G[g]))
        left.remove(gpu)
        ring.append(gpu)
        carried += float(excess_G[gpu])
    return np.array(ring)


def _rings(ring_G: Ints, hottest_G: list[Ints]) -> Pairs:
    """Each GPU's hottest expert, on the next GPU; the second ring takes the second hottest and skips one, and so on."""
    gpus = len(ring_G)
    return [
        (int(hottest_G[gpu][ring]), int(ring_G[(i + 1 + ring) % gpus]))
        for ring in range(min(max(map(len, hottest_G)), gpus - 1))
        for i, gpu in enumerate(ring_G)
        if ring < len(hottest_G[gpu])
    ]


def _hottest(load_E: Floats, home_EG: NDArray[np.bool_], room: int) -> list[Ints]:
    """Per GPU its experts with a load, hottest first, at most `room` of them."""
    order = np.argsort(-load_E, kind="stable")
    order = order[load_E[order] > 0]
    home_E = home_EG.argmax(axis=1)[order]
    return [order[home_E == gpu][:room] for gpu in range(home_EG.shape[1])]
