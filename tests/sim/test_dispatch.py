"""Exact dispatch: conservation, optimality, and the sends between ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moesim.sim.dispatch import even_split, exact_split, send_matrix
from moesim.traces import PolicyError


@st.composite
def loads(draw):
    gpus, experts = draw(st.integers(1, 6)), draw(st.integers(1, 10))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    usable = rng.random((experts, gpus)) < draw(st.sampled_from([0.1, 0.3, 0.7]))
    usable[np.arange(experts), rng.integers(0, gpus, experts)] = True
    load = rng.integers(0, draw(st.sampled_from([2, 30, 5000])), experts)
    return load.astype(np.int64), usable


def lp_optimum(load_E, usable_EG):
    """Smallest busiest GPU when tokens may be divided: a linear program, solved independently of our code."""
    E, G = usable_EG.shape
    pairs = np.argwhere(usable_EG)
    n = len(pairs)
    carry = np.zeros((E, n + 1))
    carry[pairs[:, 0], np.arange(n)] = 1
    cap = np.zeros((G, n + 1))
    cap[pairs[:, 1], np.arange(n)] = 1
    cap[:, n] = -1
    cost = np.zeros(n + 1)
    cost[n] = 1
    return linprog(cost, A_ub=cap, b_ub=np.zeros(G), A_eq=carry, b_eq=load_E, method="highs").fun


@given(loads())
@settings(max_examples=150, deadline=None)
def test_exact_split_carries_every_token_and_is_optimal(case):
    load_E, usable_EG = case
    tokens_EG = exact_split(load_E, usable_EG)
    assert (tokens_EG >= 0).all() and (tokens_EG[~usable_EG] == 0).all()
    assert (tokens_EG.sum(axis=1) == load_E).all()
    # Whole tokens: the integer optimum is the linear one rounded up (the constraints are a network).
    assert tokens_EG.sum(axis=0).max() == np.ceil(lp_optimum(load_E, usable_EG) - 1e-6)


@given(loads())
@settings(max_examples=100, deadline=None)
def test_even_split_carries_every_token(case):
    load_E, usable_EG = case
    tokens_EG = even_split(load_E, usable_EG)
    assert (tokens_EG.sum(axis=1) == load_E).all() and (tokens_EG[~usable_EG] == 0).all()
    spread = np.where(usable_EG, tokens_EG, -1)
    for expert in range(len(load_E)):
        parts = spread[expert][usable_EG[expert]]
        assert parts.max() - parts.min() <= 1


@given(loads(), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_send_matrix_keeps_both_margins_and_prefers_the_local_replica(case, seed):
    load_E, usable_EG = case
    gpus = usable_EG.shape[1]
    tokens_EG = exact_split(load_E, usable_EG)
    rng = np.random.default_rng(seed)
    counts_GE = np.stack([rng.multinomial(n, np.ones(gpus) / gpus) for n in load_E], axis=1)
    send = send_matrix(counts_GE, tokens_EG)
    assert (send >= 0).all()
    assert (send.sum(axis=2) == counts_GE).all()
    assert (send.sum(axis=0) == tokens_EG).all()
    local = np.stack([send[g, :, g] for g in range(gpus)])
    assert (local == np.minimum(counts_GE, tokens_EG.T)).all()


def test_golden_split():
    usable = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 1]], bool)
    # 22 tokens on 3 GPUs: none needs more than 8, though expert 1 keeps GPU 1 busy with 5.
    assert exact_split(np.array([9, 5, 8]), usable).tolist() == [[7, 2, 0], [0, 5, 0], [0, 0, 8]]


def test_expert_without_a_copy_is_an_error():
    with pytest.raises(PolicyError, match=r"expert 1 has 3 tokens and no usable copy"):
        exact_split(np.array([1, 3]), np.array([[True], [False]]))
