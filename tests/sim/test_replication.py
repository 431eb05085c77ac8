"""Plans of replicas: within what is allowed always; each does what its system says; time is weighed where known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.sim.dispatch import exact_split
from moesim.sim.planner import contiguous, eplb
from moesim.sim.rates import Rates
from moesim.sim.replication import HOT, PLANS, Need, grouped_eplb, nodes_of_groups, planned
from moesim.sim.residency import EMPTY
from moesim.sim.shifting import best_shift, seconds_of

WEIGHTS_DOMINATE = Rates(read_s=1.0, row_s=0.001)
FLOPS_DOMINATE = Rates(read_s=0.001, row_s=1.0)


def one_hot(placed_GS, experts):
    held = np.zeros((experts, len(placed_GS)), bool)
    for gpu, row in enumerate(placed_GS):
        held[row[row != EMPTY], gpu] = True
    return held


def need(load, gpus, room=1, **changes):
    experts = len(load)
    home = one_hot(contiguous(experts, gpus, -(-experts // gpus)), experts)
    room_G = np.full(gpus, room)
    fields = {
        "load_E": np.asarray(load, float),
        "sd_E": None,
        "home_EG": home,
        "have_EG": np.zeros_like(home),
        "room_G": room_G,
        "new_G": room_G,
        "moves": gpus * room,
        "cap": gpus,
        "slowdown_G": np.ones(gpus),
    }
    return Need(**{**fields, **changes})


@st.composite
def needs(draw):
    gpus, rng = draw(st.integers(1, 6)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts, room = int(rng.integers(gpus, 24)), draw(st.integers(0, 3))
    made = need(rng.gamma(0.4, 30.0, experts), gpus, room)
    have_EG = (rng.random((experts, gpus)) < 0.1) & ~made.home_EG
    limits = {
        "have_EG": have_EG,
        "room_G": np.where(rng.random(gpus) < draw(st.sampled_from([0.0, 0.2])), 0, made.room_G),
        "new_G": np.full(gpus, draw(st.integers(0, 3))),
        "moves": draw(st.integers(0, 16)),
        "cap": draw(st.integers(1, 4)),
        "rates": draw(st.sampled_from([None, WEIGHTS_DOMINATE, FLOPS_DOMINATE])),
    }
    return need(made.load_E, gpus, room, **limits)


@pytest.mark.parametrize("name", PLANS)
@given(needs())
@settings(max_examples=60, deadline=None)
def test_a_plan_keeps_to_slots_moves_and_cap(name, case):
    plan = planned(name, case)
    assert len(set(plan)) == len(plan) and not any(case.home_EG[pair] for pair in plan)
    held_EG, new_EG = np.zeros_like(case.home_EG), np.zeros_like(case.home_EG)
    for pair in plan:
        held_EG[pair], new_EG[pair] = True, not case.have_EG[pair]
    assert (held_EG.sum(axis=0) <= case.room_G).all()
    assert (new_EG.sum(axis=0) <= case.new_G).all() and new_EG.sum() <= case.moves
    assert (held_EG.sum(axis=1) + case.home_EG.sum(axis=1) <= max(case.cap, 1)).all()
    assert plan == planned(name, case)


@pytest.mark.parametrize("name", PLANS)
def test_no_plan_without_a_second_gpu_or_a_load(name):
    assert planned(name, need([3.0, 1.0, 0.0], 1)) == []
    assert planned(name, need(np.zeros(8), 4)) == []


def test_golden_plans():
    """Loads of GPUs: 90, 30, 20, 20; the mean expert has 20."""
    load = [80, 10, 20, 10, 10, 10, 10, 10]
    assert planned("enough", need(load, 4)) == [(0, 2)]
    assert planned("enough", need(load, 4, cap=1)) == []
    assert planned("enough", need([160, 1, 1, 1, 1, 1, 1, 1], 4)) == [(0, 1), (0, 2), (0, 3)]
    # 80, 40, 26.7 a copy: expert 0 gets three of four slots, the last goes to the next, which has 20.
    assert planned("popular", need(load, 4)) == [(0, 1), (0, 2), (0, 3), (2, 0)]
    assert planned("shadow", need(load, 4)) == [(0, 1), (0, 2), (0, 3)]
    assert planned("shadow", need([30] * 8, 4)) == []
    assert planned("greedy", need(load, 4)) == [(0, 2), (0, 3), (0, 1), (2, 0)]


def test_enough_relieves_every_overloaded_expert_and_no_more():
    load = np.array([90.0, 50, 10, 10, 10, 10, 10, 10])
    plan = planned("enough", need(load, 4, room=4))
    copies = 1 + np.bincount([e for e, _ in plan], minlength=8)
    assert (load / copies <= HOT * load.mean() + 1e-9).all()
    assert (load[copies > 1] / (copies[copies > 1] - 1) > HOT * load.mean()).all()


@pytest.mark.parametrize("moves", [0, 1, 2, 16])
def test_at_most_so_many_moves_and_what_is_there_is_none(moves):
    load = np.arange(32.0) ** 2
    plan = planned("weighed", need(load, 8, room=3, moves=moves))
    assert len(plan) == moves if moves < 16 else len(plan) <= 16
    everywhere = ~need(load, 8).home_EG
    assert planned("weighed", need(load, 8, room=3, moves=0, new_G=np.zeros(8, int), have_EG=everywhere))


def busiest_s(case, plan):
    """The slowest GPU when tokens are split so that the busiest has the fewest tokens."""
    held_EG = case.home_EG.copy()
    for pair in plan:
        held_EG[pair] = True
    return seconds_of(exact_split(case.load_E.astype(int), held_EG), case.rates, case.slowdown_G).max()


def test_where_weights_dominate_a_replica_is_not_made():
    load = np.array([50, 5, 5, 5, 5, 5, 5, 5])
    flops, weights = need(load, 4, rates=FLOPS_DOMINATE), need(load, 4, rates=WEIGHTS_DOMINATE)
    assert planned("weighed", flops) and planned("weighed", weights) == []
    # The greedy plan, which counts tokens, helps the one and harms the other.
    plan = planned("greedy", flops)
    assert busiest_s(flops, plan) < busiest_s(flops, []) and busiest_s(weights, plan) > busiest_s(weights, [])


def test_an_expert_may_move_as_a_whole_where_that_saves_a_read():
    """GPU 0 has three experts with tokens and GPU 1 one: two each is what reading weights takes least time for."""
    case = need([5, 5, 5, 5, 0, 0], 2, rates=WEIGHTS_DOMINATE)
    assert planned("weighed", case) == [(0, 1)]


def test_without_rates_a_gpu_is_as_busy_as_it_has_tokens():
    load = np.random.default_rng(0).gamma(0.5, 40.0, 32).round()
    case = need(load, 8, rates=None)
    held_EG = case.home_EG.copy()
    for pair in planned("weighed", case):
        held_EG[pair] = True
    before, after = (exact_split(load.astype(int), held).sum(axis=0).max() for held in (case.home_EG, held_EG))
    assert after < 0.8 * before


def test_the_best_shift_is_the_best_of_all_amounts():
    """Against trying every whole amount of every expert on every GPU."""
    rng = np.random.default_rng(3)
    for rates in (FLOPS_DOMINATE, WEIGHTS_DOMINATE, Rates(read_s=1.0, row_s=0.2)):
        for _ in range(20):
            tokens_EG = rng.integers(0, 12, (5, 3)) * (rng.random((5, 3)) < 0.6)
            slow_G, allowed = np.ones(3), np.ones((5, 3), bool)
            busy_G = seconds_of(tokens_EG, rates, slow_G)
            source = int(busy_G.argmax())
            best = 0.0
            for e, to in np.ndindex(5, 3):
                for amount in range(1, int(tokens_EG[e, source]) + 1):
                    after_EG = tokens_EG.copy()
                    after_EG[e, source] -= amount
                    after_EG[e, to] += amount
                    if to != source:
                        pair_s = seconds_of(after_EG, rates, slow_G)[[source, to]].max()
                        best = max(best, busy_G[source] - pair_s)
            shift = best_shift(tokens_EG, allowed, rates, slow_G)
            found = 0.0 if shift is None else shift.gain_s
            assert found <= best + 1e-9
            # All of an expert, or what makes both hold equally many: enough where one term of the time dominates.
            assert found >= 0.6 * best


def reference(load_E, gpus, slots, nodes, groups):
    """Hierarchical EPLB from its description: equally many groups on every node, heaviest group to the lightest node
    with room; within a node, copy after copy to the expert with most load per copy; then heaviest copy to the lightest
    GPU of the node that has room and lacks the expert. Returns {GPU: set of experts}."""
    size, per_group, per_node = gpus // nodes, len(load_E) // groups, groups // nodes
    of_group = {g: list(range(g * per_group, (g + 1) * per_group)) for g in range(groups)}
    node_load, node_groups = [0.0] * nodes, [[] for _ in range(nodes)]
    for g in sorted(of_group, key=lambda g: (-sum(load_E[e] for e in of_group[g]), g)):
        node = min((n for n in range(nodes) if len(node_groups[n]) < per_node), key=lambda n: (node_load[n], n))
        node_groups[node].append(g)
        node_load[node] += sum(load_E[e] for e in of_group[g])
    found = {}
    for node in range(nodes):
        experts = sorted(e for g in node_groups[node] for e in of_group[g])
        copies = dict.fromkeys(experts, 1)
        while sum(copies.values()) < min(size * slots, size * len(experts)):
            copies[max((e for e in experts if copies[e] < size), key=lambda e: (load_E[e] / copies[e], -e))] += 1
        gpu_load, held = [0.0] * size, [set() for _ in range(size)]
        items = [(load_E[e] / copies[e], e) for e in experts for _ in range(copies[e])]
        for load, e in sorted(items, key=lambda item: (-item[0], item[1])):
            room = [g for g in range(size) if len(held[g]) < slots and e not in held[g]]
            if not room:
                return None  # the description does not say what then
            gpu = min(room, key=lambda g: (gpu_load[g], g))
            held[gpu].add(e)
            gpu_load[gpu] += load
        found.update({node * size + g: held[g] for g in range(size)})
    return found


def test_hierarchical_eplb_is_what_its_description_says():
    rng, compared = np.random.default_rng(1), 0
    for _ in range(60):
        nodes, size = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        groups = nodes * int(rng.integers(1, 4))
        per_group = size * int(rng.integers(1, 3))
        load_E = rng.gamma(0.5, 30.0, groups * per_group)
        gpus = nodes * size
        slots = len(load_E) // gpus + int(rng.integers(0, 3))
        placed_GS = grouped_eplb(load_E, gpus, slots, nodes, groups)
        wanted = reference(load_E, gpus, slots, nodes, groups)
        if wanted is None:
            continue
        compared += 1
        assert [set(row[row != EMPTY].tolist()) for row in placed_GS] == [wanted[g] for g in range(gpus)]
    assert compared > 40


def test_groups_that_nodes_do_not_divide_are_packed_flat():
    load_E = np.random.default_rng(2).random(12)
    assert nodes_of_groups(load_E, 2, 3) is None and nodes_of_groups(load_E, 2, 8) is None
    assert (grouped_eplb(load_E, 4, 4, 2, 3) == eplb(load_E, 4, 4)).all()
