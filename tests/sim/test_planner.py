"""Placement and replication: shapes, no duplicates, balance; golden tables."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.sim.dispatch import exact_split
from moesim.sim.planner import contiguous, eplb, pack, replicas
from moesim.sim.residency import EMPTY


def one_hot(placed_GS, experts):
    held = np.zeros((experts, len(placed_GS)), bool)
    for gpu, row in enumerate(placed_GS):
        held[row[row != EMPTY], gpu] = True
    return held


def test_contiguous_golden():
    assert contiguous(5, 2, 4).tolist() == [[0, 1, 2, -1], [3, 4, -1, -1]]


def test_pack_golden():
    load = np.array([8.0, 7, 6, 5, 4, 3])
    assert pack(load, np.arange(6), 2, 3).tolist() == [[0, 3, 4], [1, 2, 5]]


def test_eplb_golden():
    # Expert 0 is four times its neighbours: it gets both extra slots.
    assert eplb(np.array([12.0, 3, 3, 3]), 3, 2).tolist() == [[0, 1], [0, 2], [0, 3]]


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_eplb_fills_every_slot_without_a_duplicate_on_a_gpu(seed, gpus, extra):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(gpus, 40))
    slots = -(-experts // gpus) + extra
    placed = eplb(rng.pareto(1, experts), gpus, slots)
    for row in placed:
        held = row[row != EMPTY]
        assert len(set(held.tolist())) == len(held)
    assert set(placed[placed != EMPTY].tolist()) == set(range(experts))
    assert (placed != EMPTY).sum() == min(gpus * slots, experts * gpus)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_replicas_fit_their_slots_and_never_make_it_worse(seed, gpus, extra):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(gpus, 40))
    load = rng.integers(0, 1000, experts) ** 2
    home = one_hot(contiguous(experts, gpus, -(-experts // gpus)), experts)
    wanted = replicas(load.astype(float), home, np.zeros_like(home), extra)
    held = home.copy()
    for expert, gpu in wanted:
        assert not held[expert, gpu]
        held[expert, gpu] = True
    assert ((held & ~home).sum(axis=0) <= extra).all()
    assert exact_split(load, held).sum(axis=0).max() <= exact_split(load, home).sum(axis=0).max()


def test_replicas_relieve_the_hot_gpu_and_keep_what_is_there():
    home = one_hot(contiguous(4, 2, 2), 4)
    load = np.array([90.0, 10, 10, 10])
    assert replicas(load, home, np.zeros_like(home), 1) == [(0, 1)]
    # Experts 0 and 1 help alike; the one that is there already wins, and is not copied again.
    have = np.zeros_like(home)
    have[1, 1] = True
    assert replicas(np.array([50.0, 50, 10, 10]), home, have, 1) == [(1, 1)]


def test_even_load_needs_no_replica():
    home = one_hot(contiguous(8, 4, 2), 8)
    assert replicas(np.full(8, 10.0), home, np.zeros_like(home), 2) == []
