"""Eviction rules against caches written for the test: one pool, one expert after the other."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.sim.eviction import EVICTIONS, Setting, shallow_layers
from moesim.sim.residency import Cluster
from moesim.traces import InputError

POOL = (0, 0)
wanted = st.lists(st.integers(0, 7), min_size=1, max_size=120)


def rule(name, sequence=(), layers=1, experts=8, slots=4, **cluster):
    return EVICTIONS[name](
        Setting(
            cluster=Cluster(layers=layers, experts=experts, gpus=1, resident=slots, **cluster),
            popularity_LE=np.arange(layers * experts).reshape(layers, experts),
            future=[[np.array([expert]) for expert in sequence]],
        )
    )


def hits(name, sequence, slots):
    """[bool] whether each of the sequence was there, in a cache that begins empty."""
    evict, held, found = rule(name, sequence), [], []
    for expert in sequence:
        key = (0, expert)
        evict.visited(0)
        evict.used(key, POOL, hit=key in held, full=True)
        found.append(key in held)
        if key in held:
            continue
        if len(held) == slots:
            held[held.index(evict.victim(POOL, held, key))] = key
        else:
            held.append(key)
        evict.loaded(key, POOL, ahead=False)
    return found


def plain_lru(sequence, slots):
    held, found = OrderedDict(), []
    for expert in sequence:
        found.append(expert in held)
        held[expert] = held.pop(expert, None)
        if len(held) > slots:
            held.popitem(last=False)
    return found


def plain_lfu(sequence, slots):
    held, found = set(), []
    for i, expert in enumerate(sequence):
        found.append(expert in held)
        if expert not in held and len(held) == slots:
            past = list(sequence[:i])
            held.remove(min(held, key=lambda e: (past.count(e), i - past[::-1].index(e))))
        held.add(expert)
    return found


def plain_belady(sequence, slots):
    held, found = set(), []
    for i, expert in enumerate(sequence):
        found.append(expert in held)
        if expert not in held and len(held) == slots:
            rest = list(sequence[i + 1 :])
            held.remove(max(held, key=lambda e: rest.index(e) if e in rest else len(rest)))
        held.add(expert)
    return found


def plain_arc(sequence, c):
    """Figure 4 of Megiddo and Modha, with its names: lists, the least recently used first."""
    p, T1, T2, B1, B2, found = 0, [], [], [], [], []

    def replace(x):
        if T1 and (len(T1) > p or (x in B2 and len(T1) == p)):
            B1.append(T1.pop(0))
        else:
            B2.append(T2.pop(0))

    for x in sequence:
        found.append(x in T1 or x in T2)
        if found[-1]:
            (T1 if x in T1 else T2).remove(x)
            T2.append(x)
        elif x in B1:
            p = min(c, p + max(len(B2) / len(B1), 1))
            replace(x)
            B1.remove(x)
            T2.append(x)
        elif x in B2:
            p = max(0, p - max(len(B1) / len(B2), 1))
            replace(x)
            B2.remove(x)
            T2.append(x)
        else:
            if len(T1) + len(B1) == c:
                if len(T1) < c:
                    B1.pop(0)
                    replace(x)
                else:
                    T1.pop(0)
            elif len(T1) + len(T2) + len(B1) + len(B2) >= c:
                if len(T1) + len(T2) + len(B1) + len(B2) == 2 * c:
                    B2.pop(0)
                if len(T1) + len(T2) == c:
                    replace(x)
            T1.append(x)
    return found


@pytest.mark.parametrize(
    ("name", "plain"), [("lru", plain_lru), ("lfu", plain_lfu), ("arc", plain_arc), ("belady", plain_belady)]
)
@given(sequence=wanted, slots=st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_hits_equal_those_of_a_cache_written_for_the_test(name, plain, sequence, slots):
    assert sum(hits(name, sequence, slots)) == sum(plain(sequence, slots))
    if name != "belady":  # whose ties may go either way
        assert hits(name, sequence, slots) == plain(sequence, slots)


@pytest.mark.parametrize("name", [name for name in EVICTIONS if name != "belady"])
@given(sequence=wanted, slots=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_belady_bounds_every_rule(name, sequence, slots):
    assert sum(hits("belady", sequence, slots)) >= sum(hits(name, sequence, slots))


@given(sequence=wanted, slots=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_more_slots_never_miss_more_with_lru_and_belady(sequence, slots):
    for name in ("lru", "belady"):
        assert sum(hits(name, sequence, slots)) <= sum(hits(name, sequence, slots + 1))


def test_arc_holds_against_a_scan_what_lru_loses():
    often = [0, 1] * 6
    scan = list(range(2, 8))
    sequence = often + scan + [0, 1]
    assert hits("arc", sequence, 4)[-2:] == [True, True]
    assert hits("lru", sequence, 4)[-2:] == [False, False]


def test_arc_takes_a_prefetched_expert_s_first_use_for_a_first_use():
    evict = rule("arc")
    for expert in (0, 1):
        evict.loaded((0, expert), POOL, ahead=expert == 1)
        evict.used((0, expert), POOL, hit=True, full=True)
    assert list(evict.lists[POOL].often) == [(0, 0)] and list(evict.lists[POOL].once) == [(0, 1)]


def test_next_use_counts_layers_and_forecast_rounds():
    evict = rule("next-use", layers=4)
    evict.visited(1)
    evict.forecast(2, np.array([1.0, 0.5, 0, 0, 0, 0, 0, 0]))
    evict.forecast(0, np.array([1.0, 0, 0, 0, 0, 0, 0, 0]))
    assert evict.distance((2, 0)) == 0, "the next layer, surely"
    assert evict.distance((0, 0)) == 2, "two layers lie between"
    assert evict.distance((2, 1)) == 4, "every other round of four layers"
    assert evict.victim(POOL, [(2, 0), (2, 1), (0, 0)], (3, 0)) == (2, 1)


def test_weighted_prefers_recent_frequent_full_and_near_and_forgets_with_the_sequence():
    evict = rule("weighted", layers=4)
    evict.begin_step([1])
    for _ in range(2):
        for layer in range(4):
            evict.visited(layer)
            evict.used((layer, 0), POOL, hit=True, full=layer % 2 == 0)
    evict.used((3, 1), POOL, hit=True, full=False)
    # At layer 3: recency and frequency 1 each, full precision 1 or 0, nearness 1 - distance / 4.
    assert evict.worth((0, 0)) == pytest.approx((1 + 1 + 1 + 0.75) / 4)
    assert evict.worth((3, 0)) == pytest.approx((1 + 1 + 0 + 1) / 4)
    assert evict.worth((3, 1)) == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    evict.begin_step([1, 2])
    assert evict.worth((0, 0)) > 0.9
    evict.begin_step([3])
    assert evict.worth((0, 0)) == pytest.approx(0.75 / 4), "a sequence of which nothing is known"


def test_what_is_pinned():
    assert shallow_layers(Cluster(layers=6, experts=8, gpus=1, resident=4)) == 1, "12 of 24 slots hold one layer"
    shallow = rule("shallow-arc", layers=6, pooled=True).pinned_LE()
    assert shallow[0].all() and not shallow[1:].any()
    hot = rule("pinned-lru", layers=2).pinned_LE()
    assert [np.flatnonzero(row).tolist() for row in hot] == [[6, 7], [6, 7]], "half of four slots, the most popular"


def test_belady_without_a_future_says_what_it_needs():
    evict = EVICTIONS["belady"](
        Setting(cluster=Cluster(layers=1, experts=4, gpus=1, resident=2), popularity_LE=np.ones((1, 4), np.int64))
    )
    with pytest.raises(InputError, match="shown the future: it needs a recording"):
        evict.victim(POOL, [(0, 0)], (0, 1))


def test_what_failed_with_its_gpu_is_forgotten_by_arc():
    evict = rule("arc")
    evict.loaded((0, 3), POOL, ahead=True)
    evict.gone((0, 3))
    evict.loaded((0, 3), POOL, ahead=False)  # it comes again, from the host
    evict.used((0, 3), POOL, hit=True, full=True)  # a hit, and not the use that a prefetch waits for
    assert list(evict.lists[POOL].often) == [(0, 3)]
