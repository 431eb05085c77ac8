"""The planner that other programs may use: layouts from nothing and by few copies, against linear programs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moesim.sim.planner import busiest_L, held, plan
from moesim.sim.residency import EMPTY
from moesim.traces.errors import PolicyError

seeds = st.integers(0, 2**32 - 1)


def zipf(rng, layers, experts, power=0.8):
    share = 1 / np.arange(1, experts + 1) ** power
    return np.stack([rng.permutation(share / share.sum()) for _ in range(layers)])


def optimum(load_E, usable_EG):
    """The lowest busiest GPU, by linear programming."""
    experts, gpus = usable_EG.shape
    pairs = np.argwhere(usable_EG)
    rows = np.zeros((gpus, len(pairs) + 1))
    rows[pairs[:, 1], np.arange(len(pairs))] = 1
    rows[:, -1] = -1
    sums = np.zeros((experts, len(pairs) + 1))
    sums[pairs[:, 0], np.arange(len(pairs))] = 1
    cost = np.append(np.zeros(len(pairs)), 1.0)
    return linprog(cost, A_ub=rows, b_ub=np.zeros(gpus), A_eq=sums, b_eq=load_E, method="highs").fun


def cases(seed):
    rng = np.random.default_rng(seed)
    gpus = int(rng.integers(1, 9))
    experts = int(rng.integers(gpus, 48))
    slots = -(-experts // gpus) + int(rng.integers(0, 4))
    return rng, experts, gpus, slots, rng.pareto(1, (2, experts))


def check_layout(placed_LGS, experts):
    usable = held(placed_LGS, experts)
    assert usable.sum() == (placed_LGS != EMPTY).sum(), "an expert is twice on a GPU"
    assert usable.any(axis=2).all(), "an expert is lost"


@given(seeds)
@settings(max_examples=80, deadline=None)
def test_a_layout_holds_every_expert_and_none_twice_on_a_gpu(seed):
    _, experts, gpus, slots, load = cases(seed)
    planned = plan(load, gpus, slots)
    check_layout(planned.placed_LGS, experts)
    assert (planned.copies_L == min(gpus * slots, experts * gpus)).all()


@given(seeds, st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_few_copies_never_make_it_worse_and_stay_within_their_number(seed, moves):
    rng, experts, gpus, slots, load = cases(seed)
    before = plan(rng.pareto(1, load.shape), gpus, slots).placed_LGS
    planned = plan(load, gpus, slots, before, moves=moves, least_gain=0.0)
    check_layout(planned.placed_LGS, experts)
    assert (planned.copies_L <= moves).all()
    assert (planned.placed_LGS != before).sum() == planned.copies_L.sum()
    for layer in range(2):
        was = optimum(load[layer], held(before, experts)[layer])
        assert optimum(load[layer], planned.usable_LEG[layer]) <= was * (1 + 2e-3)


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_as_many_copies_as_pay_are_never_worse_and_each_pays(seed):
    rng, experts, gpus, slots, load = cases(seed)
    before = plan(rng.pareto(1, load.shape), gpus, slots).placed_LGS
    planned = plan(load, gpus, slots, before, least_gain=0.01)
    check_layout(planned.placed_LGS, experts)
    gain_L = busiest_L(load, held(before, experts)) - busiest_L(load, planned.usable_LEG)
    assert (gain_L >= (0.01 * planned.copies_L - 2e-3) * load.sum(axis=1) / gpus).all()


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_the_busiest_gpu_is_that_of_the_linear_program(seed):
    _, _, gpus, slots, load = cases(seed)
    usable = plan(load, gpus, slots).usable_LEG
    best = [optimum(load[layer], usable[layer]) for layer in range(2)]
    assert busiest_L(load, usable) == pytest.approx(best, rel=1e-9, abs=5e-3 * load.sum(axis=1).max() / gpus)


def test_the_shape_of_deepseek_v3_is_balanced_to_a_thousandth_without_a_duplicate():
    load = zipf(np.random.default_rng(0), 3, 256)
    planned = plan(load, 32, 9)
    check_layout(planned.placed_LGS, 256)
    even = (planned.usable_LEG * (load / planned.usable_LEG.sum(axis=2))[..., None]).sum(axis=1)
    assert (even.mean(axis=1) / even.max(axis=1)).min() >= 0.999
    tokens = np.random.default_rng(1).multinomial(4096, load[0])
    split = planned.dispatch(0, tokens)
    assert (split.sum(axis=1) == tokens).all() and not split[~planned.usable_LEG[0]].any()


def test_what_is_balanced_already_stays_as_it_is():
    load = zipf(np.random.default_rng(3), 4, 64)
    before = plan(load, 8, 9).placed_LGS
    again = plan(load, 8, 9, before)
    assert (again.placed_LGS == before).all() and not again.copies_L.any()


def test_one_copy_goes_where_it_relieves_most():
    before = np.array([[[0, 1, EMPTY], [2, 3, EMPTY], [4, 5, EMPTY]]])
    load = np.array([[60.0, 10, 10, 10, 5, 5]])
    planned = plan(load, 3, 3, before, moves=1)
    assert planned.placed_LGS[0].tolist() == [[0, 1, EMPTY], [2, 3, EMPTY], [4, 5, 0]]


def test_two_experts_change_places_where_there_is_no_empty_slot():
    before = np.array([[[0, 1], [2, 3]]])
    load = np.array([[50.0, 30, 10, 10]])
    assert not plan(load, 2, 2, before, moves=1).copies_L.any()
    planned = plan(load, 2, 2, before, moves=2)
    assert planned.copies_L.tolist() == [2]
    assert busiest_L(load, planned.usable_LEG).tolist() == [60.0]


@pytest.mark.parametrize(
    ("load", "gpus", "slots", "placed", "what"),
    [
        (np.ones((1, 4)), 2, 1, None, "do not hold 4 experts"),
        (np.array([[1.0, np.nan]]), 2, 1, None, "finite"),
        (np.array([[1.0, -1.0]]), 2, 1, None, "negative"),
        (np.ones((1, 2)), 2, 1, np.zeros((1, 1, 2), int), "has shape"),
        (np.ones((1, 2)), 1, 3, np.array([[[0, 0, 1]]]), "twice"),
        (np.ones((1, 2)), 1, 2, np.array([[[0, EMPTY]]]), "lacks expert 1 of layer 0"),
        (np.ones((1, 2)), 1, 2, np.array([[[0, 2]]]), "not one of"),
    ],
)
def test_what_cannot_be_planned_is_refused(load, gpus, slots, placed, what):
    with pytest.raises(PolicyError, match=what):
        plan(load, gpus, slots, placed)
