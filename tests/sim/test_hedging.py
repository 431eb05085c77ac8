"""Hedged replicas: within their limits always, and better than the greedy plan where the forecast is not sure."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moesim.sim.dispatch import exact_split
from moesim.sim.hedging import hedged_replicas
from moesim.sim.levelling import busiest
from moesim.sim.planner import pack, replicas


def homes(experts, gpus, load):
    placed = pack(load, np.arange(experts), gpus, -(-experts // gpus))
    return np.stack([(placed == e).any(axis=1) for e in range(experts)])


def lowest_maximum(load_E, usable_EG):
    """The optimum of the linear program, tokens divisible."""
    pairs = np.argwhere(usable_EG)
    gpus = usable_EG.shape[1]
    cost = np.append(np.zeros(len(pairs)), 1.0)
    per_gpu = np.array([[float(g == gpu) for _, g in pairs] + [-1.0] for gpu in range(gpus)])
    per_expert = np.array([[float(e == expert) for e, _ in pairs] + [0.0] for expert in range(len(load_E))])
    found = linprog(cost, A_ub=per_gpu, b_ub=np.zeros(gpus), A_eq=per_expert, b_eq=load_E)
    return found.fun


@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_the_busiest_gpu_is_that_of_the_linear_program(seed, gpus, room):
    rng = np.random.default_rng(seed)
    load = rng.gamma(0.5, 20.0, 16)
    home = homes(16, gpus, rng.random(16))
    pairs = sorted({(int(e), int(g)) for e, g in rng.integers(0, (16, gpus), (room * gpus, 2)) if not home[e, g]})
    usable = home.copy()
    for expert, gpu in pairs:
        usable[expert, gpu] = True
    found = busiest(load[None], home.argmax(axis=1), np.array(pairs, np.int64).reshape(-1, 2), gpus)
    best = lowest_maximum(load, usable) * gpus / load.sum()
    assert best - 1e-9 <= found <= best * 1.03 + 1e-9


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_a_plan_keeps_to_its_slots(seed, gpus, room):
    rng = np.random.default_rng(seed)
    load = rng.gamma(0.3, 20.0, 24)
    home = homes(24, gpus, rng.random(24))
    spread = None if seed % 2 else rng.random(24) * 5
    plan = hedged_replicas(load, spread, home, room)
    assert len(set(plan)) == len(plan)
    assert not any(home[e, g] for e, g in plan)
    assert (np.bincount([g for _, g in plan], minlength=gpus) <= room).all()
    assert plan == hedged_replicas(load, spread, home, room)


def balance(load, home, plan):
    usable = home.copy()
    for expert, gpu in plan:
        usable[expert, gpu] = True
    load_G = exact_split(load, usable).sum(axis=0)
    return load_G.mean() / load_G.max()


def drawn_balances(noise):
    """Mean balance of the greedy plan and of the hedged one when loads come out as the forecast times noise."""
    rng = np.random.default_rng(0)
    greedy, hedged = [], []
    for _ in range(40):
        expected = rng.gamma(2.0, 10.0, 64)
        home = homes(64, 8, expected + rng.normal(0, 5, 64))
        truth = np.maximum(rng.normal(expected, noise * np.sqrt(expected)), 0).astype(np.int64)
        greedy.append(balance(truth, home, replicas(expected, home, np.zeros_like(home), 1)))
        hedged.append(balance(truth, home, hedged_replicas(expected, noise * np.sqrt(expected), home, 1)))
    return np.mean(greedy), np.mean(hedged)


def test_hedging_pays_where_forecasts_are_wrong_and_costs_nothing_where_they_are_right():
    greedy, hedged = drawn_balances(1.0)
    assert hedged > greedy + 0.03
    greedy, hedged = drawn_balances(0.0)
    assert hedged >= greedy - 0.002


def test_what_is_there_stays_unless_something_is_better():
    rng = np.random.default_rng(0)
    load = rng.gamma(2.0, 10.0, 64)
    home = homes(64, 8, load)
    plan = hedged_replicas(load, None, home, 1)
    moved = load * rng.normal(1.0, 0.02, 64)
    assert set(hedged_replicas(moved, None, home, 1)) != set(plan), "the forecast has changed a little"
    assert hedged_replicas(moved, None, home, 1, held=plan) == plan
    other = rng.permutation(load)
    kept = hedged_replicas(other, None, home, 1, held=plan)
    assert kept == hedged_replicas(other, None, home, 1) != plan


def test_one_gpu_has_nowhere_to_put_a_replica():
    assert hedged_replicas(np.ones(4), None, np.ones((4, 1), bool), 2) == []


def test_nothing_is_expected():
    home = homes(8, 4, np.ones(8))
    assert hedged_replicas(np.zeros(8), None, home, 1) == []


def test_loads_without_a_token_have_no_busiest_gpu():
    assert busiest(np.zeros((2, 4)), np.array([0, 0, 1, 1]), np.zeros((0, 2), np.int64), 2) == pytest.approx(0.0)
