"""Placement and replication from loads: contiguous, balanced, EPLB, and replicas for what is about to be hot.

Pure numpy, knows nothing about time, files or devices. Shape letters: E experts, G GPUs, S slots of one layer on a GPU.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.sim.residency import EMPTY

Ids = NDArray[np.int32]


def contiguous(experts: int, gpus: int, slots: int) -> Ids:
    """[G, S] experts 0, 1, 2, ... in equal runs, replica slots empty: how serving systems load a model."""
    placed = np.full((gpus, slots), EMPTY, np.int32)
    for gpu, block in enumerate(np.array_split(np.arange(experts), gpus)):
        placed[gpu, : len(block)] = block
    return placed


def pack(load_X: NDArray[np.floating], expert_X: NDArray[np.integer], gpus: int, slots: int) -> Ids:
    """[G, S] every item X once, heaviest first, on the lightest GPU with a free slot that lacks the expert.

    Longest processing time first; ties to the lowest expert and GPU. Where only a GPU that has the expert is left, an
    item changes places with one elsewhere, so that no expert is twice on a GPU.
    """
    placed = np.full((gpus, slots), EMPTY, np.int32)
    used_G, load_G = np.zeros(gpus, int), np.zeros(gpus)
    for x in np.lexsort((expert_X, -load_X)):
        expert = int(expert_X[x])
        free_G = (used_G < slots) & ~(placed == expert).any(axis=1)
        if not free_G.any():
            gpu = _make_room(placed, used_G, expert)
        else:
            gpu = int(np.argmin(np.where(free_G, load_G, np.inf)))
        placed[gpu, used_G[gpu]] = expert
        used_G[gpu] += 1
        load_G[gpu] += load_X[x]
    return placed


def _make_room(placed: Ids, used_G: NDArray[np.integer], expert: int) -> int:
    """Move an item from a full GPU without `expert` to one with a free slot; returns the GPU that now has room."""
    slots = placed.shape[1]
    for receiver in np.flatnonzero(used_G < slots):
        for gpu in np.flatnonzero(~(placed == expert).any(axis=1)):
            movable = np.flatnonzero(~np.isin(placed[gpu], placed[receiver]))
            if len(movable):
                placed[receiver, used_G[receiver]] = placed[gpu, movable[-1]]
                used_G[receiver] += 1
                placed[gpu, movable[-1] :] = np.append(placed[gpu, movable[-1] + 1 :], EMPTY)
                used_G[gpu] -= 1
                return int(gpu)
    raise AssertionError("more copies of an expert than GPUs")


def eplb(load_E: NDArray[np.floating], gpus: int, slots: int) -> Ids:
    """[G, S] all G x S slots filled: hottest experts replicated, then packed.

    Source: DeepSeek's expert-parallel load balancer, flat variant: a further replica goes to the expert with the
    largest load per replica. Deviation: an expert has at most one replica on a GPU, the published code may put two.
    """
    experts = len(load_E)
    if experts > gpus * slots:  # after failures: the coldest stay out
        kept = np.sort(np.argsort(-load_E, kind="stable")[: gpus * slots])
        return pack(load_E[kept], kept, gpus, slots)
    copies_E = np.ones(experts, np.int64)
    for _ in range(min(gpus * slots, experts * gpus) - experts):
        copies_E[int(np.argmax(np.where(copies_E < gpus, load_E / copies_E, -1.0)))] += 1
    expert_X = np.repeat(np.arange(experts), copies_E)
    return pack((load_E / copies_E)[expert_X], expert_X, gpus, slots)


def replicas(
    load_E: NDArray[np.floating],
    home_EG: NDArray[np.bool_],
    have_EG: NDArray[np.bool_],
    room: NDArray[np.integer] | int,
    slowdown_G: NDArray[np.floating] | None = None,
) -> list[tuple[int, int]]:
    """(expert, GPU) pairs that should hold a replica beside the home placement, most useful first.

    Greedy: again and again the busiest GPU gives tokens of one expert to another GPU, the pair that moves most, until
    less than 1% of the mean load would move. A replica that is there already (`have_EG`) counts 5% more, since it costs
    no copy. Inputs: load_E expected tokens, home_EG [E, G] at most one True a row, room replicas that each GPU takes,
    slowdown_G how many times longer each GPU computes than it should.
    """
    from moesim.sim.planning_kernels import greedy_replicas  # compiled: only who plans pays for it

    gpus = home_EG.shape[1]
    room_G = np.array(np.broadcast_to(room, gpus), np.int64)
    slowdown_G = np.ones(gpus) if slowdown_G is None else slowdown_G
    pairs = np.empty((int(room_G.sum()), 2), np.int64)
    chosen = greedy_replicas(load_E.astype(float), home_EG, have_EG, room_G, slowdown_G.astype(float), pairs)
    return [(int(expert), int(gpu)) for expert, gpu in pairs[:chosen]]
