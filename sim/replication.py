"""Which experts to copy where, beside their homes: the plans of published systems, and one that weighs a copy by time.

Pure numpy; knows rates where an executor gives them, never the time. Shape letters: E experts, G GPUs, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.sim.hedging import hedged_replicas
from moesim.sim.planner import eplb, pack, replicas
from moesim.sim.rates import TOKENS_ONLY, Floats, Rates
from moesim.sim.residency import EMPTY
from moesim.sim.shifting import best_shift

HOT = 2.0
"""An expert is overloaded when more than so many times the mean load is forecast for it."""
STAY = 1.05
"""How much more a copy is worth that is there already, since it costs no transfer."""
WORTH = 0.01
"""Share of the mean GPU's load, or time, that a copy has to relieve the busiest GPU of."""

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Pairs = list[tuple[int, int]]
"""(expert, GPU) that should hold a copy, most useful first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a plan is made for."""

    load_E: Floats
    """Expected tokens."""
    sd_E: Floats | None
    """Their standard deviations, where the forecast knows them."""
    home_EG: Bools
    """At most one True a row."""
    have_EG: Bools
    """Copies that are there, or on their way, beside the homes."""
    room_G: Ints
    """Copies that each GPU takes."""
    new_G: Ints
    """Of which so many may begin now."""
    moves: int
    """Copies that may begin now on all GPUs together."""
    cap: int
    """Copies of an expert at most, its home included."""
    slowdown_G: Floats
    rates: Rates | None = None

    def limited(self, plan: Pairs) -> Pairs:
        """What of `plan` may be done, first come, first served."""
        room_G, new_G, moves = self.room_G.copy(), self.new_G.copy(), self.moves
        copies_E = self.home_EG.sum(axis=1)
        kept = []
        for expert, gpu in plan:
            begins = int(not self.have_EG[expert, gpu])
            if room_G[gpu] < 1 or copies_E[expert] >= self.cap or begins > min(new_G[gpu], moves):
                continue
            room_G[gpu] -= 1
            new_G[gpu] -= begins
            moves -= begins
            copies_E[expert] += 1
            kept.append((expert, gpu))
        return kept


Plan = Callable[[Need], Pairs]


def greedy(need: Need) -> Pairs:
    """The busiest GPU gives tokens to another again and again (planner.replicas)."""
    return replicas(need.load_E, need.home_EG, need.have_EG, need.room_G, need.slowdown_G)


def hedged(need: Need) -> Pairs:
    """The plan that is best on loads drawn from the forecast (hedging.py); greedy where GPUs are not alike."""
    room = int(need.room_G.max())
    if (need.room_G != room).any() or (need.slowdown_G != 1).any() or not need.home_EG.any(axis=1).all():
        return greedy(need)
    held: Pairs = [(int(expert), int(gpu)) for expert, gpu in np.argwhere(need.have_EG)]
    return hedged_replicas(need.load_E, need.sd_E, need.home_EG, room, held if _within(held, room) else None)


def weighed(need: Need) -> Pairs:
    """The slowest GPU gives tokens to another as long as the slower of the two then ends sooner by WORTH of the mean,
    the copy's weights being read, too: at few tokens a copy costs more than it saves, and none is made.

    Source: the greedy planner of PROBE (arXiv 2602.00509), which minimises the bottleneck rank's latency with as many
    moves as can be hidden. Without rates a GPU is as busy as it has tokens.
    """
    rates = need.rates or TOKENS_ONLY
    share_EG = np.where(need.home_EG, need.load_E[:, None], 0.0)
    room_G, new_G, moves = need.room_G.copy(), need.new_G.copy(), need.moves
    copies_E, chosen_EG = need.home_EG.sum(axis=1), np.zeros_like(need.home_EG)
    least = WORTH * float(rates.seconds((share_EG > 0).sum(axis=0), rates.rows(share_EG).sum(axis=0)).mean())
    bonus_EG = np.where(need.have_EG, STAY, 1.0)
    chosen: Pairs = []
    # A shift over a copy that is there costs no slot, so their number is bounded here and not by slots.
    for _ in range(4 * int(need.room_G.sum())):
        opens_EG = (need.have_EG | ((new_G > 0) & (moves > 0))) & (room_G > 0) & (copies_E < need.cap)[:, None]
        shift = best_shift(share_EG, chosen_EG | need.home_EG | opens_EG, rates, need.slowdown_G, bonus_EG)
        if shift is None or shift.gain_s <= least:
            break
        expert, gpu = shift.expert, shift.target
        share_EG[expert, shift.source] -= shift.amount
        share_EG[expert, gpu] += shift.amount
        if not (chosen_EG[expert, gpu] or need.home_EG[expert, gpu]):
            begins = int(not need.have_EG[expert, gpu])
            chosen_EG[expert, gpu] = True
            room_G[gpu] -= 1
            new_G[gpu] -= begins
            moves -= begins
            copies_E[expert] += 1
            chosen.append((expert, gpu))
    return chosen


def enough(need: Need) -> Pairs:
    """Overloaded experts (over HOT times the mean) get just enough copies for none to be overloaded, the hottest first,
    each on the GPU with the least load. Source: predictive replication (arXiv 2605.11537), copies "just enough to
    saturate the GPU" under a cap; that a copy is saturated by HOT times the mean load is this project's reading."""
    full = HOT * float(need.load_E.mean())
    wanted_E = np.ceil(need.load_E / full).astype(np.int64) if full > 0 else np.ones(len(need.load_E), np.int64)
    return _spread(need, np.minimum(wanted_E, need.cap))


def popular(need: Need) -> Pairs:
    """Every free slot to the expert with the largest load per copy, on the GPU with the least load that lacks it.
    Source: Lina (ATC'23), which replicates in proportion to the forecast popularity."""
    copies_E, most = need.home_EG.sum(axis=1), np.minimum(need.cap, int((need.room_G > 0).sum()) + 1)
    for _ in range(int(need.room_G.sum())):
        worth_E = np.where(copies_E < most, need.load_E / np.maximum(copies_E, 1), 0.0)
        expert = int(np.argmax(worth_E))
        if worth_E[expert] <= 0:
            break
        copies_E[expert] += 1
    return _spread(need, copies_E)


def shadow(need: Need) -> Pairs:
    """Overloaded experts on all GPUs, the hottest first, as long as every GPU has a slot for one. Source: FasterMoE's
    shadowing; Prophet and FlexMoE do the like. What is hot is this project's reading."""
    room_G = need.room_G.copy()
    plan: Pairs = []
    for expert in _hottest(need.load_E):
        others = np.flatnonzero(~need.home_EG[expert] & (need.room_G > 0))
        if need.load_E[expert] <= HOT * need.load_E.mean() or not len(others) or (room_G[others] < 1).any():
            break
        room_G[others] -= 1
        plan += [(int(expert), int(gpu)) for gpu in others]
    return plan


PLANS: dict[str, Plan] = {
    "greedy": greedy,
    "hedged": hedged,
    "weighed": weighed,
    "enough": enough,
    "popular": popular,
    "shadow": shadow,
}
"""By the name that a policy file gives them."""
UNSURE = ("hedged",)
"""Those that ask how sure the loads are; the deviations of thousands of tokens take longer than any plan."""


def planned(name: str, need: Need) -> Pairs:
    """The named plan, within what `need` allows."""
    return need.limited(PLANS[name](need))


def _within(held: Pairs, room: int) -> bool:
    """Whether no GPU holds more than `room`."""
    return bool(held) and int(np.bincount([gpu for _, gpu in held]).max()) <= room


def _hottest(load_E: Floats) -> NDArray[np.intp]:
    return np.argsort(-load_E, kind="stable")


def _spread(need: Need, copies_E: Ints) -> Pairs:
    """Places for `copies_E` copies of each expert, homes included: where one is, else the GPU with the least load; an
    expert's load is divided evenly over the copies that it is to have."""
    share_E = need.load_E / np.maximum(copies_E, 1)
    load_G, room_G, held_EG = share_E @ need.home_EG, need.room_G.copy(), need.home_EG.copy()
    plan: Pairs = []
    for expert in _hottest(need.load_E):
        for _ in range(int(copies_E[expert] - need.home_EG[expert].sum())):
            open_G = ~held_EG[expert] & (room_G > 0)
            if not open_G.any():
                break
            order = np.lexsort((load_G * need.slowdown_G, ~need.have_EG[expert], ~open_G))
            gpu = int(order[0])
            held_EG[expert, gpu] = True
            room_G[gpu] -= 1
            load_G[gpu] += share_E[expert]
            plan.append((int(expert), gpu))
    return plan


def grouped_eplb(load_E: Floats, gpus: int, slots: int, nodes: int, groups: int) -> NDArray[np.int32]:
    """[G, S] EPLB in three steps: groups of experts packed onto nodes by load, equally many on each; within a node
    hottest experts replicated; within a node copies packed onto GPUs. The flat variant where groups or GPUs cannot be
    divided by the nodes.

    Source: DeepSeek's expert-parallel load balancer, hierarchical variant. Deviation as in `eplb`.
    """
    node_E = nodes_of_groups(load_E, nodes, groups)
    if node_E is None or gpus % nodes:
        return eplb(load_E, gpus, slots)
    size = gpus // nodes
    placed = np.full((gpus, slots), EMPTY, np.int32)
    for node in range(nodes):
        mine = np.flatnonzero(node_E == node).astype(np.int32)
        local = eplb(load_E[mine], size, slots)
        placed[node * size : (node + 1) * size] = np.where(local == EMPTY, EMPTY, mine[local])
    return placed


def nodes_of_groups(load_E: Floats, nodes: int, groups: int) -> NDArray[np.int64] | None:
    """[E] the node of each expert where groups of neighbouring experts stay together and every node has equally many
    groups, packed by load; None where that cannot be divided."""
    if groups % nodes or len(load_E) % groups:
        return None
    group_X = pack(load_E.reshape(groups, -1).sum(axis=1), np.arange(groups), nodes, groups // nodes)
    node_X = np.empty(groups, np.int64)
    node_X[group_X] = np.arange(nodes)[:, None]
    return node_X.repeat(len(load_E) // groups)
