"""Residency: capacity, no duplicates, nothing lost, usable only after arrival; a refused change changes nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.sim.planner import contiguous
from moesim.sim.residency import EMPTY, Cluster, Residency, Transfer
from moesim.traces import InputError, PolicyError

CLUSTER = Cluster(layers=2, experts=4, gpus=2, extra_slots=1)


def placed(cluster=CLUSTER):
    residency = Residency(cluster)
    one = contiguous(cluster.experts, cluster.gpus, cluster.layer_slots)
    residency.place(np.broadcast_to(one, (cluster.layers, *one.shape)))
    return residency


def move(**changes):
    return Transfer(**{"layer": 0, "expert": 0, "source": 0, "target": 1, "slot": 2, **changes})


def test_a_replica_is_usable_only_after_it_has_arrived():
    residency = placed()
    t = move()
    residency.begin([t])
    assert not residency.usable_LEG[0, 0, 1] and residency.coming_LEG[0, 0, 1]
    assert residency.arrived(t)
    assert residency.usable_LEG[0, 0, 1] and not residency.coming_LEG[0, 0, 1]


def test_a_late_copy_is_not_taken_for_an_equal_one_that_was_issued_after_it():
    residency = placed()
    first, other, again = move(serial=1), move(expert=1, serial=2), move(serial=3)
    for t in (first, other, again):
        residency.begin([t])
    assert not residency.arrived(first)
    assert not residency.usable_LEG[0, 0, 1]
    assert residency.arrived(again)


def test_a_copy_whose_slot_was_given_away_never_arrives():
    residency = placed()
    first, second = move(), move(expert=1)
    residency.begin([first])
    residency.begin([second])
    assert not residency.arrived(first)
    assert residency.arrived(second)
    assert residency.usable_LEG[0, :2, 1].tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert": 9}, "no such expert"),
        ({"target": 2}, "no such GPU"),
        ({"slot": 6}, "no such slot"),
        ({"source": 1}, "source does not hold it"),
        ({"expert": 2, "source": 1}, "would be twice on GPU 1"),
        ({"expert": 0, "slot": 0}, "no GPU would hold expert 2"),
    ],
)
def test_the_impossible_is_refused_and_changes_nothing(change, message):
    residency = placed()
    before = (residency.expert_GS.copy(), residency.usable_LEG.copy(), residency.coming_LEG.copy())
    with pytest.raises(PolicyError, match=message):
        residency.begin([move(**change)])
    after = (residency.expert_GS, residency.usable_LEG, residency.coming_LEG)
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_two_transfers_may_swap_experts_between_gpus():
    residency = placed()
    swap = [move(expert=0, slot=0), move(expert=2, source=1, target=0, slot=0)]
    residency.begin(swap)
    assert residency.experts_GS(0).tolist() == [[2, 1, EMPTY], [0, 3, EMPTY]]


def test_placement_must_hold_every_expert_once_per_gpu():
    residency = Residency(CLUSTER)
    twice = np.array([[[0, 0, 1], [2, 3, EMPTY]]] * 2)
    with pytest.raises(PolicyError, match="expert 0 is twice on GPU 0"):
        residency.place(twice)
    with pytest.raises(PolicyError, match="no GPU would hold expert 3"):
        Residency(CLUSTER).place(np.array([[[0, 1, 2], [2, EMPTY, EMPTY]]] * 2))


@pytest.mark.parametrize(("gpus", "extra"), [(0, 1), (5, 1), (2, -1)])
def test_impossible_clusters(gpus, extra):
    with pytest.raises(InputError):
        Cluster(layers=1, experts=4, gpus=gpus, extra_slots=extra)


@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_invariants_hold_under_random_transfers(seed, gpus, extra):
    rng = np.random.default_rng(seed)
    cluster = Cluster(layers=2, experts=6, gpus=gpus, extra_slots=extra)
    residency = placed(cluster)
    begun = []
    for _ in range(40):
        if begun and rng.random() < 0.4:
            residency.arrived(begun.pop(rng.integers(len(begun))))
            continue
        numbers = rng.integers(0, [2, 6, gpus, gpus, 2 * cluster.layer_slots])
        t = Transfer(**dict(zip(("layer", "expert", "source", "target", "slot"), map(int, numbers), strict=True)))
        try:
            residency.begin([t])
            begun.append(t)
        except PolicyError:
            pass
        held = residency.usable_LEG | residency.coming_LEG
        assert not (residency.usable_LEG & residency.coming_LEG).any()
        assert held.any(axis=2).all(), "an expert was lost"
        for gpu in range(gpus):
            full = residency.layer_GS[gpu] != EMPTY
            contents = set(zip(residency.layer_GS[gpu][full], residency.expert_GS[gpu][full], strict=True))
            assert len(contents) == full.sum() == held[:, :, gpu].sum(), "a slot and the index disagree"
