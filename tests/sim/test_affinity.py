"""Placements by affinity: within slots and loads, the optimum where that is computed, never worse than their start."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import make_table
from moesim.sim.affinity import Affinity, arranged, companions, followers, searched
from moesim.sim.affinity_program import optimum
from moesim.sim.policies.placements import PLACEMENTS
from moesim.sim.residency import EMPTY, Cluster
from moesim.traces import InputError, LoadTable, load_LE


def crossing(between_LEE, bin_LE):
    """Share of the transitions from a layer to the next that change the bin; 0 where there is one layer."""
    if not len(between_LEE):
        return 0.0
    change = [float(w[a[:, None] != b].sum()) for w, a, b in zip(between_LEE, bin_LE, bin_LE[1:], strict=False)]
    return float(np.mean(change))


@st.composite
def problems(draw, layers=3, experts=6, bins=3):
    """(affinity, a start within it), at most so large."""
    L, E, B = draw(st.integers(1, layers)), draw(st.integers(4, experts)), draw(st.integers(2, bins))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    start_LE = np.stack([rng.permutation(np.arange(E) % B) for _ in range(L)])
    load_LE_ = rng.integers(0, 50, (L, E)).astype(float)
    heaviest_L = [np.bincount(b, load, B).max() for b, load in zip(start_LE, load_LE_, strict=True)]
    within_LEE = rng.random((L, E, E)) ** 4
    within_LEE = (within_LEE + within_LEE.transpose(0, 2, 1)) * (1 - np.eye(E))
    return Affinity(
        between_LEE=rng.random((L - 1, E, E)) ** 4,
        within_LEE=draw(st.sampled_from([None, within_LEE])),
        load_LE=load_LE_,
        bins=B,
        slots=-(-E // B),
        most_L=np.array(heaviest_L) * draw(st.sampled_from([1.0, 1.1, np.inf])),
    ), start_LE


def allowed(wanted, bin_LE):
    for bin_E, load_E, most in zip(bin_LE, wanted.load_LE, wanted.most_L, strict=True):
        if np.bincount(bin_E, minlength=wanted.bins).max() > wanted.slots:
            return False
        if np.bincount(bin_E, load_E, wanted.bins).max() > most + 1e-9:
            return False
    return True


def kept(wanted, bin_LE):
    """Pair by pair, as the words say it."""
    L, E = bin_LE.shape
    total = 0.0
    for layer, e, f in product(range(L), range(E), range(E)):
        if layer + 1 < L and bin_LE[layer, e] == bin_LE[layer + 1, f]:
            total += wanted.between_LEE[layer, e, f]
        if wanted.within_LEE is not None and e < f and bin_LE[layer, e] == bin_LE[layer, f]:
            total += wanted.within_LEE[layer, e, f]
    return total


def brute_force(wanted):
    """The best of all arrangements within slots and loads."""
    L, E = wanted.load_LE.shape
    every = np.array(list(product(range(wanted.bins), repeat=L * E))).reshape(-1, L, E)
    return max(kept(wanted, bin_LE) for bin_LE in every if allowed(wanted, bin_LE))


@given(problems(layers=2, experts=4, bins=2))
@settings(max_examples=25, deadline=None)
def test_the_integer_program_finds_what_trying_everything_finds(case):
    wanted, _ = case
    found = optimum(wanted)
    assert allowed(wanted, found)
    assert wanted.kept(found) == pytest.approx(kept(wanted, found))
    assert kept(wanted, found) == pytest.approx(brute_force(wanted), abs=1e-6)


@given(problems())
@settings(max_examples=40, deadline=None)
def test_the_local_search_stays_within_limits_and_is_never_worse_than_its_start(case):
    wanted, start_LE = case
    before = start_LE.copy()
    found = searched(wanted, start_LE)
    assert (start_LE == before).all() and allowed(wanted, found)
    assert wanted.kept(found) >= wanted.kept(start_LE) - 1e-9


def test_the_local_search_comes_close_to_the_optimum():
    """Mean over random problems, in which experts have no structure to find; a random arrangement keeps half."""
    rng, shares = np.random.default_rng(0), []
    for _ in range(12):
        wanted = Affinity(
            between_LEE=rng.random((1, 6, 6)) ** 4,
            within_LEE=None,
            load_LE=np.ones((2, 6)),
            bins=2,
            slots=3,
            most_L=np.full(2, np.inf),
        )
        start_LE = np.tile(np.arange(6) % 2, (2, 1))
        shares.append(wanted.kept(searched(wanted, start_LE)) / wanted.kept(optimum(wanted)))
    assert max(shares) <= 1 + 1e-6 and np.mean(shares) > 0.93


def test_followers_and_companions_are_counted_pair_by_pair():
    table = make_table(requests=1, length=3, layers=2, experts=4, top_k=2)
    ids = np.array([[[0, 1], [2, 3]], [[0, 1], [2, 0]], [[3, 0], [2, 3]]], np.uint8)
    table = replace(table, topk_ids=ids)
    between_LEE, within_LEE = followers(table, 4), companions(table, 4)
    assert between_LEE.shape == (1, 4, 4) and between_LEE[0] * 12 == pytest.approx(
        np.array([[1, 0, 3, 2], [1, 0, 2, 1], [0, 0, 0, 0], [0, 0, 1, 1]])
    )
    assert within_LEE[0, 0, 1] == within_LEE[0, 1, 0] == pytest.approx(1 / 3)
    assert within_LEE.sum(axis=(1, 2)) == pytest.approx(np.ones(2))
    # Experts 0 and 1 on GPU 0, then 2 and 3 on GPU 0: only what comes from 3 or goes to 0 or 1 changes.
    assert crossing(between_LEE, np.array([[0, 0, 1, 1], [1, 1, 0, 0]])) == pytest.approx((1 + 1 + 2) / 12)


def gpus_of(placed_LGS, experts):
    found = np.full((len(placed_LGS), experts), -1)
    for layer, gpu, slot in np.argwhere(placed_LGS != EMPTY):
        found[layer, placed_LGS[layer, gpu, slot]] = gpu
    return found


AFFINE = ("affinity", "affinity-balanced", "node-aware")


@pytest.mark.parametrize("name", ["contiguous", "balanced", *AFFINE, "group-limited"])
@given(seed=st.integers(0, 999), gpus=st.sampled_from([1, 2, 3, 4]), experts=st.sampled_from([5, 8, 12]))
@settings(max_examples=12, deadline=None)
def test_every_placement_holds_every_expert_once_within_its_slots(name, seed, gpus, experts):
    table = make_table(requests=8, length=16, layers=3, experts=experts, top_k=2, seed=seed)
    cluster = Cluster(layers=3, experts=experts, gpus=gpus, extra_slots=1, node_size=max(gpus // 2, 1), groups=2)
    placed_LGS = PLACEMENTS[name](cluster, table)
    assert placed_LGS.shape == (3, gpus, cluster.layer_slots)
    assert (placed_LGS[:, :, cluster.home_slots :] == EMPTY).all()
    for placed_GS in placed_LGS:
        assert sorted(placed_GS[placed_GS != EMPTY].tolist()) == list(range(experts))


def test_affinity_follows_an_affine_recording_and_its_load_is_bounded():
    """Each expert is followed by one other, so with as many experts as GPUs have slots nothing needs to cross."""
    table = make_table(requests=40, length=16, layers=4, experts=16, noise=0.1)
    cluster = Cluster(layers=4, experts=16, gpus=4)
    between_LEE = followers(table, 16)
    load_LE_ = load_LE(table.topk_ids, 16)
    crosses, heaviest = {}, {}
    for name in ("contiguous", "balanced", "affinity", "affinity-balanced"):
        gpu_LE = gpus_of(PLACEMENTS[name](cluster, table), 16)
        crosses[name] = crossing(between_LEE, gpu_LE)
        heaviest[name] = np.array([np.bincount(g, w, 4).max() for g, w in zip(gpu_LE, load_LE_, strict=True)])
    assert crosses["affinity"] < 0.2 and crosses["contiguous"] > 0.5
    assert crosses["affinity"] <= crosses["affinity-balanced"] < 0.6 * crosses["balanced"]
    assert (heaviest["affinity-balanced"] <= 1.05 * heaviest["balanced"] + 1e-9).all()


def test_node_aware_keeps_chosen_pairs_in_a_node():
    """Experts e and e + 1 are chosen together; dealt out by load they lie anywhere."""
    table = make_table(requests=40, length=16, layers=3, experts=16, top_k=2, noise=0.9)
    cluster = Cluster(layers=3, experts=16, gpus=4, node_size=2)
    within_LEE = companions(table, 16)

    def apart(name):
        node_LE = gpus_of(PLACEMENTS[name](cluster, table), 16) // 2
        return np.mean([w[n[:, None] != n].sum() for w, n in zip(within_LEE, node_LE, strict=True)])

    assert apart("node-aware") < 0.6 * apart("balanced")


def test_groups_stay_in_one_node():
    table = make_table(requests=16, experts=16)
    cluster = Cluster(layers=3, experts=16, gpus=4, node_size=2, groups=4)
    node_LE = gpus_of(PLACEMENTS["group-limited"](cluster, table), 16) // 2
    groups = node_LE.reshape(3, 4, 4)
    assert (groups == groups[:, :, :1]).all() and (groups[:, :, 0].sum(axis=1) == 2).all()


def test_a_small_model_gets_the_optimum_and_a_large_one_what_is_found():
    wanted = Affinity(
        between_LEE=np.eye(4)[None],
        within_LEE=None,
        load_LE=np.ones((2, 4)),
        bins=2,
        slots=2,
        most_L=np.full(2, np.inf),
    )
    start_LE = np.array([[0, 0, 1, 1], [0, 1, 0, 1]])
    assert wanted.kept(arranged(wanted, start_LE)) == pytest.approx(4)
    many = replace(wanted, between_LEE=np.eye(40)[None], load_LE=np.ones((2, 40)), slots=20)
    assert many.kept(arranged(many, np.stack([np.arange(40) % 2, np.arange(40) // 20]))) == pytest.approx(40)


@pytest.mark.parametrize("name", AFFINE)
def test_loads_alone_have_no_affinity(name):
    loads = LoadTable(load=np.ones((2, 3, 8), np.int64), step=np.arange(2, dtype=np.int32), phase=np.zeros(2, np.uint8))
    with pytest.raises(InputError, match=f"placement '{name}' learns from what every token chose"):
        PLACEMENTS[name](Cluster(layers=3, experts=8, gpus=2), loads)
