"""Placement and replication from loads: contiguous, balanced, EPLB, layouts that are changed by few copies, replicas
for what is about to be hot. Other programs may use it, too.

Knows nothing about time, files or devices; what runs in an execution loop is compiled (planning_kernels.py,
planning_layout.py). Shape letters: L layers, E experts, G GPUs, S slots of one layer on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moesim.sim.dispatch import exact_split
from moesim.sim.residency import EMPTY
from moesim.traces.errors import PolicyError

Ids = NDArray[np.int32]
LEVEL = 8e-4
"""How far over the mean the busiest GPU of a new layout may be before experts stop changing places."""
LEAST_GAIN = 2e-3
"""Share of the mean GPU load that a copy must take off the busiest GPU to be worth its bytes."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A layout of every layer, and how its tokens are split."""

    placed_LGS: Ids
    """[L, G, S] expert in each slot, EMPTY where it is free."""
    copies_L: NDArray[np.int64]
    """[L] slots whose expert has to be copied there; all that are filled where nothing was there."""
    usable_LEG: NDArray[np.bool_]
    """[L, E, G] which GPU holds which expert."""

    def dispatch(self, layer: int, load_E: NDArray[np.integer]) -> NDArray[np.int64]:
        """[E, G] tokens of each expert for each GPU, with the lowest busiest GPU that the layout allows."""
        return exact_split(np.asarray(load_E, np.int64), self.usable_LEG[layer])


def plan(
    load_LE: NDArray[np.floating] | NDArray[np.integer],
    gpus: int,
    slots: int,
    placed_LGS: NDArray[np.integer] | None = None,
    *,
    moves: int | None = None,
    least_gain: float = LEAST_GAIN,
) -> Planned:
    """Replicas, their GPUs and the dispatch for loads or forecasts `load_LE` [L, E].

    Without `placed_LGS` [L, G, slots] every layer is laid out from nothing. With it, what is there is kept but for at
    most `moves` copies a layer (None: as many as pay), each of which must take `least_gain` of the mean GPU load off
    the busiest GPU; the busiest GPU under the best split is never busier than it was. `moves` is how many copies can be
    hidden. No expert is twice on a GPU and none is lost. Raises PolicyError where the slots do not hold every expert,
    or the incoming layout has another shape, lacks an expert or has one twice on a GPU.
    """
    from moesim.sim.planning_layout import improve  # compiled: only who plans pays for it

    loads: NDArray[np.float64] = np.ascontiguousarray(load_LE, dtype=np.float64)
    layers, experts = loads.shape
    _check_plan(loads, gpus, slots)
    if placed_LGS is None:
        placed = _laid_out(loads, gpus, slots)
        return Planned(placed_LGS=placed, copies_L=(placed != EMPTY).sum(axis=(1, 2)), usable_LEG=held(placed, experts))
    _check_incoming(placed_LGS, layers, experts, gpus, slots)
    placed = np.array(placed_LGS, np.int32)
    for layer in range(layers):
        improve(loads[layer], gpus * slots if moves is None else moves, least_gain, placed[layer])
    if moves is None:
        _renew(loads, placed, placed_LGS, least_gain)
    copies_L = ((placed != placed_LGS) & (placed != EMPTY)).sum(axis=(1, 2))
    return Planned(placed_LGS=placed, copies_L=copies_L, usable_LEG=held(placed, experts))


def held(placed_LGS: NDArray[np.integer], experts: int) -> NDArray[np.bool_]:
    """[L, E, G] which GPU holds which expert."""
    layer, gpu, slot = np.nonzero(placed_LGS != EMPTY)
    usable = np.zeros((len(placed_LGS), experts, placed_LGS.shape[1]), np.bool_)
    usable[layer, placed_LGS[layer, gpu, slot], gpu] = True
    return usable


def busiest_L(load_LE: NDArray[np.floating], usable_LEG: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[L] the busiest GPU's load under the best split, tokens divisible; within 0.1% or so of the mean load."""
    from moesim.sim.planning_layout import level_shares

    _, experts, gpus = usable_LEG.shape
    share_EG, load_G, busiest = np.empty((experts, gpus)), np.empty(gpus), np.empty(len(load_LE))
    for layer, load_E in enumerate(np.ascontiguousarray(load_LE, dtype=float)):
        level_shares(load_E, usable_LEG[layer], share_EG, load_G)
        busiest[layer] = load_G.max()
    return busiest


def _laid_out(load_LE: NDArray[np.float64], gpus: int, slots: int) -> Ids:
    from moesim.sim.planning_layout import lay_out

    placed = np.full((len(load_LE), gpus, slots), EMPTY, np.int32)
    for layer, load_E in enumerate(load_LE):
        lay_out(load_E, LEVEL, placed[layer])
    return placed


def _renew(load_LE: NDArray[np.float64], placed: Ids, before: NDArray[np.integer], least_gain: float) -> None:
    """Take a layout made from nothing where that pays for the copies it takes more; GPUs are renamed and slots ordered
    so that as much as possible stays where it is."""
    experts, (_, gpus, slots) = load_LE.shape[1], placed.shape
    fresh = _laid_out(load_LE, gpus, slots)
    old, new = held(before, experts), held(fresh, experts)
    now_L, then_L = busiest_L(load_LE, held(placed, experts)), busiest_L(load_LE, new)
    for layer in range(len(load_LE)):
        _, order = linear_sum_assignment(-(old[layer].T.astype(int) @ new[layer]))
        renewed = np.stack([_in_place(before[layer, g], fresh[layer, order[g]]) for g in range(gpus)])
        more = int((renewed != before[layer]).sum()) - int((placed[layer] != before[layer]).sum())
        if now_L[layer] - then_L[layer] > least_gain * load_LE[layer].sum() / gpus * max(more, 1):
            placed[layer] = renewed


def _in_place(before_S: NDArray[np.integer], after_S: NDArray[np.integer]) -> Ids:
    """[S] the experts of `after_S`, those that were there in the slots that they had."""
    ordered = np.where(np.isin(before_S, after_S), before_S, EMPTY).astype(np.int32)
    new = [e for e in after_S if e != EMPTY and e not in before_S]
    ordered[np.flatnonzero(ordered == EMPTY)[: len(new)]] = new
    return ordered


def _check_plan(load_LE: NDArray[np.float64], gpus: int, slots: int) -> None:
    if gpus < 1 or slots < 1 or gpus * slots < load_LE.shape[1]:
        raise PolicyError(f"{gpus} GPUs with {slots} slots a layer do not hold {load_LE.shape[1]} experts")
    if not np.isfinite(load_LE).all() or (load_LE < 0).any():
        raise PolicyError("loads must be finite and not negative")


def _check_incoming(placed_LGS: NDArray[np.integer], layers: int, experts: int, gpus: int, slots: int) -> None:
    if placed_LGS.shape != (layers, gpus, slots):
        raise PolicyError(f"the incoming layout has shape {placed_LGS.shape}, not {(layers, gpus, slots)}")
    if ((placed_LGS != EMPTY) & ((placed_LGS < 0) | (placed_LGS >= experts))).any():
        raise PolicyError(f"the incoming layout holds an expert that is not one of 0..{experts - 1}")
    usable = held(placed_LGS, experts)
    if usable.sum() != (placed_LGS != EMPTY).sum():
        raise PolicyError("the incoming layout has an expert twice on a GPU")
    if not usable.any(axis=2).all():
        layer, expert = np.argwhere(~usable.any(axis=2))[0]
        raise PolicyError(f"the incoming layout lacks expert {expert} of layer {layer}")
