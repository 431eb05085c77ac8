"""Laying out one layer's experts and replicas, from nothing or from what is there, compiled by numba; imported where
somebody plans only.

Shape letters: E experts, G GPUs, S slots of one layer on a GPU. Loads are real numbers; ties go to the lowest number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.sim.levelling import water_level
from moesim.traces.compiled import compiled

EMPTY = -1
SWAPS = 400
"""Pairs of experts at most that change places after packing."""
PASSES = 10
"""Times at most that the tokens of experts with several copies are poured anew; a turn that moves less than STILL of
the mean is the last."""
STILL = 1e-3
TRIES = 6
"""Changes that are tried in vain before a layout counts as good as it gets."""


@compiled()
def lay_out(load_E: Any, level: float, placed_GS: Any) -> None:
    """Fill `placed_GS`, EMPTY when called, for an even split.

    A further replica goes to the expert with the largest load per replica, replicas are packed heaviest first onto the
    lightest GPU that lacks the expert, then the busiest GPU changes one against another GPU's until its load is at most
    1 + `level` of the mean or no change helps.
    """
    G, S = placed_GS.shape
    E = len(load_E)
    copies_E, part_E = np.ones(E, np.int64), load_E.copy()
    for _ in range(min(G * S, E * G) - E):
        hottest = -1
        for e in range(E):
            if copies_E[e] < G and (hottest < 0 or part_E[e] > part_E[hottest]):
                hottest = e
        copies_E[hottest] += 1
        part_E[hottest] = load_E[hottest] / copies_E[hottest]
    load_G, used_G = np.zeros(G), np.zeros(G, np.int64)
    held_EG = np.zeros((E, G), np.bool_)
    for e in np.argsort(-part_E, kind="mergesort"):
        for _ in range(copies_E[e]):
            gpu = -1
            for g in range(G):
                if used_G[g] < S and not held_EG[e, g] and (gpu < 0 or load_G[g] < load_G[gpu]):
                    gpu = g
            if gpu < 0:
                gpu = _make_room(placed_GS, used_G, load_G, held_EG, part_E, e)
            placed_GS[gpu, used_G[gpu]] = e
            used_G[gpu] += 1
            load_G[gpu] += part_E[e]
            held_EG[e, gpu] = True
    _swap(placed_GS, used_G, load_G, held_EG, part_E, level)


@compiled()
def _make_room(placed_GS: Any, used_G: Any, load_G: Any, held_EG: Any, part_E: Any, expert: int) -> int:
    """Where every GPU with room has the expert: move something from one that lacks it to one with room."""
    G, S = placed_GS.shape
    for receiver in range(G):
        if used_G[receiver] == S:
            continue
        for gpu in range(G):
            if held_EG[expert, gpu]:
                continue
            for s in range(used_G[gpu] - 1, -1, -1):
                moved = placed_GS[gpu, s]
                if held_EG[moved, receiver]:
                    continue
                placed_GS[receiver, used_G[receiver]] = moved
                used_G[receiver] += 1
                used_G[gpu] -= 1
                placed_GS[gpu, s] = placed_GS[gpu, used_G[gpu]]
                placed_GS[gpu, used_G[gpu]] = EMPTY
                held_EG[moved, gpu], held_EG[moved, receiver] = False, True
                load_G[gpu] -= part_E[moved]
                load_G[receiver] += part_E[moved]
                return gpu
    return -1


@compiled()
def _swap(placed_GS: Any, used_G: Any, load_G: Any, held_EG: Any, part_E: Any, level: float) -> None:
    """Let the busiest GPU change places with others until it is near the mean; every change lowers its load."""
    G = len(load_G)
    most = load_G.sum() / G * (1 + level)
    for _ in range(SWAPS):
        busiest = np.argmax(load_G)
        if load_G[busiest] <= most:
            return
        best, mine, other, theirs = 0.0, -1, -1, -1
        enough = False
        for g in range(G):
            gap = load_G[busiest] - load_G[g]
            if gap <= 0 or enough:
                continue
            for i in range(used_G[busiest]):
                given = placed_GS[busiest, i]
                if held_EG[given, g]:
                    continue
                for j in range(used_G[g]):
                    taken = placed_GS[g, j]
                    x = part_E[given] - part_E[taken]
                    gain = min(x, gap - x)
                    if gain > best and not held_EG[taken, busiest]:
                        best, mine, other, theirs = gain, i, g, j
                        enough = load_G[busiest] - x <= most and load_G[g] + x <= most
        if mine < 0:
            return
        given, taken = placed_GS[busiest, mine], placed_GS[other, theirs]
        placed_GS[busiest, mine], placed_GS[other, theirs] = taken, given
        held_EG[given, busiest], held_EG[given, other] = False, True
        held_EG[taken, busiest], held_EG[taken, other] = True, False
        load_G[busiest] += part_E[taken] - part_E[given]
        load_G[other] += part_E[given] - part_E[taken]


@compiled()
def level_shares(load_E: Any, held_EG: Any, share_EG: Any, load_G: Any) -> None:
    """Split the loads over the GPUs that hold each expert so that the busiest is as low as can be.

    Writes `share_EG` [E, G] and `load_G` [G].
    """
    share_EG[:] = 0.0
    load_G[:] = 0.0
    for e in range(len(load_E)):
        hosts = np.flatnonzero(held_EG[e])
        share_EG[e, hosts] = load_E[e] / len(hosts)
        load_G[hosts] += load_E[e] / len(hosts)
    _settle(load_E, held_EG, held_EG.sum(axis=1), share_EG, load_G)


@compiled()
def _settle(load_E: Any, held_EG: Any, copies_E: Any, share_EG: Any, load_G: Any) -> None:
    """Take the experts with several copies in turn and pour their tokens anew, lowest GPU first. That lowers the sum of
    squares until no split is more level, which is also the one with the lowest maximum."""
    shared = np.flatnonzero((copies_E > 1) & (load_E > 0))
    mean = load_G.sum() / len(load_G)
    for _ in range(PASSES if len(shared) else 0):
        moved = 0.0
        for e in shared:
            moved = max(moved, _pour(e, load_E[e], held_EG, share_EG, load_G))
        if moved <= STILL * mean:
            break


@compiled()
def _pour(expert: Any, amount: float, held_EG: Any, share_EG: Any, load_G: Any) -> float:
    """One expert's tokens onto its GPUs, lowest first; returns how much its largest part changed."""
    hosts = np.flatnonzero(held_EG[expert])
    bottom = np.empty(len(hosts))
    for i in range(len(hosts)):
        bottom[i] = load_G[hosts[i]] - share_EG[expert, hosts[i]]
    level = water_level(bottom, amount)
    changed = 0.0
    for i in range(len(hosts)):
        share = max(level - bottom[i], 0.0)
        changed = max(changed, abs(share - share_EG[expert, hosts[i]]))
        share_EG[expert, hosts[i]] = share
        load_G[hosts[i]] = bottom[i] + share
    return changed


@compiled()
def improve(load_E: Any, moves: int, least: float, placed_GS: Any) -> int:
    """Change `placed_GS` by at most `moves` copies and return how many; unchanged, and 0, where the busiest GPU under
    the best split would not lose at least `least` of the mean load a copy.

    A change gives one of the busiest GPU's experts a further copy, in a slot that is empty or whose expert has another
    copy (one copy), or lets two experts change places (two). Single changes are judged by the sum of squares, since
    after levelling many GPUs are the busiest together and no change lowers all of them.
    """
    G, S = placed_GS.shape
    E = len(load_E)
    held_EG, copies_E = np.zeros((E, G), np.bool_), np.zeros(E, np.int64)
    for g in range(G):
        for s in range(S):
            if placed_GS[g, s] != EMPTY:
                held_EG[placed_GS[g, s], g] = True
                copies_E[placed_GS[g, s]] += 1
    share_EG, load_G = np.empty((E, G)), np.empty(G)
    level_shares(load_E, held_EG, share_EG, load_G)
    incoming_GS, incoming, mean = placed_GS.copy(), load_G.max(), load_G.sum() / G
    kept_EG, kept_G = share_EG.copy(), load_G.copy()
    refused_EGS = np.zeros((E, G, S), np.bool_)
    done, tries = 0, 0
    while done < moves and tries < TRIES:
        expert, gpu, slot, swap = _best_change(
            load_G, share_EG, held_EG, copies_E, placed_GS, refused_EGS, moves - done
        )
        if expert < 0:
            break
        busiest, gone = np.argmax(load_G), placed_GS[gpu, slot]
        _change(placed_GS, held_EG, copies_E, share_EG, load_G, expert, busiest, gpu, slot, swap)
        _pour(expert, load_E[expert], held_EG, share_EG, load_G)
        if gone != EMPTY:
            _pour(gone, load_E[gone], held_EG, share_EG, load_G)
        _settle(load_E, held_EG, copies_E, share_EG, load_G)
        copies = 2 if swap else 1
        gain = (kept_G**2).sum() - (load_G**2).sum()
        if gain >= 2 * least * mean * copies * (kept_G.max() - mean) and load_G.max() <= kept_G.max():
            kept_EG[:], kept_G[:] = share_EG, load_G
            refused_EGS[:] = False
            done, tries = done + copies, 0
            continue
        _change_back(placed_GS, held_EG, copies_E, expert, gone, busiest, gpu, slot, swap)
        share_EG[:], load_G[:] = kept_EG, kept_G
        refused_EGS[expert, gpu, slot] = True
        tries += 1
    if incoming - load_G.max() < least * mean * done or done == 0:
        placed_GS[:] = incoming_GS
        return 0
    return done


@compiled()
def _best_change(
    load_G: Any, share_EG: Any, held_EG: Any, copies_E: Any, placed_GS: Any, refused_EGS: Any, moves: int
) -> tuple[int, int, int, bool]:
    """(expert of the busiest GPU, other GPU, its slot, whether they change places) that promises the most a copy."""
    G, S = placed_GS.shape
    busiest = np.argmax(load_G)
    best = 0.0
    found = (-1, -1, -1, False)
    for i in range(S):
        expert = placed_GS[busiest, i]
        if expert == EMPTY or share_EG[expert, busiest] <= 0:
            continue
        for g in range(G):
            if held_EG[expert, g]:
                continue
            gap = load_G[busiest] - load_G[g]
            for s in range(S):
                if refused_EGS[expert, g, s]:
                    continue
                there = placed_GS[g, s]
                theirs = 0.0 if there == EMPTY else share_EG[there, g]
                if there == EMPTY or copies_E[there] > 1:
                    # What its other copies take over may lie on GPUs that are busy, too: tried before it is believed.
                    gain = min(share_EG[expert, busiest], (gap + theirs) / 2) - theirs / 2
                    if gain > best:
                        best, found = gain, (expert, g, s, False)
                if there != EMPTY and not held_EG[there, busiest] and moves > 1:
                    x = share_EG[expert, busiest] - theirs
                    gain = min(x, gap - x) / 2
                    if gain > best:
                        best, found = gain, (expert, g, s, True)
    return found


@compiled()
def _change(
    placed_GS: Any,
    held_EG: Any,
    copies_E: Any,
    share_EG: Any,
    load_G: Any,
    expert: int,
    busiest: Any,
    gpu: int,
    slot: int,
    swap: bool,
) -> None:
    """Make the change; what leaves a GPU computes nothing there, and is poured onto its others by the caller."""
    gone = placed_GS[gpu, slot]
    if gone != EMPTY:
        load_G[gpu] -= share_EG[gone, gpu]
        share_EG[gone, gpu], held_EG[gone, gpu] = 0.0, False
        copies_E[gone] -= 1
    placed_GS[gpu, slot], held_EG[expert, gpu] = expert, True
    copies_E[expert] += 1
    if swap:
        load_G[busiest] -= share_EG[expert, busiest]
        share_EG[expert, busiest], held_EG[expert, busiest] = 0.0, False
        placed_GS[busiest, _slot_of(placed_GS, busiest, expert)], held_EG[gone, busiest] = gone, True
        copies_E[expert] -= 1
        copies_E[gone] += 1


@compiled()
def _change_back(
    placed_GS: Any, held_EG: Any, copies_E: Any, expert: int, gone: int, busiest: Any, gpu: int, slot: int, swap: bool
) -> None:
    """As it was before `_change`, shares and loads excepted."""
    if swap:
        placed_GS[busiest, _slot_of(placed_GS, busiest, gone)] = expert
        held_EG[expert, busiest], held_EG[gone, busiest] = True, False
        copies_E[expert] += 1
        copies_E[gone] -= 1
    held_EG[expert, gpu], placed_GS[gpu, slot] = False, gone
    copies_E[expert] -= 1
    if gone != EMPTY:
        held_EG[gone, gpu] = True
        copies_E[gone] += 1


@compiled()
def _slot_of(placed_GS: Any, gpu: int, expert: int) -> int:
    for s in range(placed_GS.shape[1]):
        if placed_GS[gpu, s] == expert:
            return s
    return -1
