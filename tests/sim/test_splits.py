"""Splits that look at more than loads: every token carried, the stated bounds kept, near before far."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.sim.dispatch import Site, exact_split, send_matrix
from moesim.sim.rates import Rates
from moesim.sim.shifting import seconds_of
from moesim.sim.splits import SLACK, nearest_split, timed_split


@st.composite
def cases(draw):
    """(counts_GE, usable_EG, slowdown_G, node_G)."""
    gpus, experts = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    usable_EG = rng.random((experts, gpus)) < draw(st.sampled_from([0.1, 0.3, 0.8]))
    usable_EG[np.arange(experts), rng.integers(0, gpus, experts)] = True
    counts_GE = rng.integers(0, draw(st.sampled_from([2, 30, 3000])), (gpus, experts))
    slow_G = np.where(rng.random(gpus) < draw(st.sampled_from([0.0, 0.3])), 2.0, 1.0)
    return counts_GE, usable_EG, slow_G, np.arange(gpus) // draw(st.sampled_from([1, 2, 8]))


@given(cases())
@settings(max_examples=150, deadline=None)
def test_nearest_carries_every_token_within_its_bound(case):
    counts_GE, usable_EG, slow_G, node_G = case
    load_E = counts_GE.sum(axis=0)
    site = Site(counts_GE=counts_GE, node_G=node_G)
    tokens_EG = nearest_split(load_E, usable_EG, slow_G, site)
    assert (tokens_EG >= 0).all() and (tokens_EG[~usable_EG] == 0).all()
    assert (tokens_EG.sum(axis=1) == load_E).all()
    exact_G = exact_split(load_E, usable_EG, slow_G).sum(axis=0) * slow_G
    assert (tokens_EG.sum(axis=0) * slow_G).max() <= (1 + SLACK) * exact_G.max() + 1e-9
    if (usable_EG.sum(axis=1) == 1).all():
        assert (tokens_EG == exact_split(load_E, usable_EG)).all()


@given(cases(), st.sampled_from([(1.0, 0.001), (0.001, 1.0), (4.0, 1.0)]), st.sampled_from([1, 16]))
@settings(max_examples=150, deadline=None)
def test_timed_carries_every_token_and_is_never_slower_than_exact(case, seconds, tile):
    counts_GE, usable_EG, slow_G, node_G = case
    load_E = counts_GE.sum(axis=0)
    rates = Rates(read_s=seconds[0], row_s=seconds[1], tile_rows=tile)
    tokens_EG = timed_split(load_E, usable_EG, slow_G, Site(counts_GE=counts_GE, node_G=node_G, rates=rates))
    assert (tokens_EG >= 0).all() and (tokens_EG[~usable_EG] == 0).all()
    assert (tokens_EG.sum(axis=1) == load_E).all()
    exact_EG = exact_split(load_E, usable_EG, slow_G)
    assert seconds_of(tokens_EG, rates, slow_G).max() <= seconds_of(exact_EG, rates, slow_G).max() + 1e-9


def test_near_before_far():
    """Two nodes of two GPUs. Expert 0 lies on GPUs 1 and 3, expert 1 everywhere; every rank has ten tokens for each."""
    counts_GE = np.full((4, 2), 10)
    usable_EG = np.array([[0, 1, 0, 1], [1, 1, 1, 1]], bool)
    site = Site(counts_GE=counts_GE, node_G=np.array([0, 0, 1, 1]))
    # Balanced it would be 20 a GPU; local and node first loads GPUs 1 and 3 with 30, over the bound of 22.
    tokens_EG = nearest_split(counts_GE.sum(axis=0), usable_EG, np.ones(4), site)
    assert tokens_EG.sum(axis=0).max() == 22
    send = send_matrix(counts_GE, tokens_EG, site.node_G)
    assert send[:2, :, 2:].sum() == send[2:, :, :2].sum() == 0, "nothing needs to cross"
    # With room for it, tokens stay where they are.
    light = Site(counts_GE=np.array([[10, 0], [10, 0]]), node_G=np.zeros(2, int))
    assert nearest_split(np.array([20, 0]), np.ones((2, 2), bool), np.ones(2), light).tolist() == [[10, 10], [0, 0]]


def test_without_a_site_or_rates_it_is_the_exact_split():
    rng = np.random.default_rng(0)
    load_E, usable_EG = rng.integers(0, 50, 8), rng.random((8, 4)) < 0.5
    usable_EG[:, 0] = True
    wanted = exact_split(load_E, usable_EG)
    site = Site(counts_GE=np.stack([load_E, *np.zeros((3, 8), int)]), node_G=np.zeros(4, int))
    assert (nearest_split(load_E, usable_EG) == wanted).all()
    assert (timed_split(load_E, usable_EG, None, site) == wanted).all()


def test_a_copy_is_left_alone_where_weights_dominate_and_used_where_flops_do():
    load_E, usable_EG = np.array([40, 4]), np.array([[1, 1], [0, 1]], bool)
    site = Site(counts_GE=np.stack([load_E, 0 * load_E]), node_G=np.zeros(2, int), rates=Rates(read_s=100, row_s=1))
    assert timed_split(load_E, usable_EG, np.ones(2), site).tolist() == [[40, 0], [0, 4]]
    flops = Site(counts_GE=site.counts_GE, node_G=site.node_G, rates=Rates(read_s=1, row_s=1))
    assert timed_split(load_E, usable_EG, np.ones(2), flops).tolist() == [[22, 18], [0, 4]]


@given(cases(), st.sampled_from([1, 2, 3]))
@settings(max_examples=80, deadline=None)
def test_sends_stay_in_their_node_as_far_as_the_split_allows(case, size):
    counts_GE, usable_EG, slow_G, _ = case
    gpus = len(counts_GE)
    node_G = np.arange(gpus) // size
    tokens_EG = exact_split(counts_GE.sum(axis=0), usable_EG, slow_G)
    send = send_matrix(counts_GE, tokens_EG, node_G)
    assert (send >= 0).all() and (send.sum(axis=2) == counts_GE).all() and (send.sum(axis=0) == tokens_EG).all()
    for node in np.unique(node_G):
        mine = node_G == node
        inside = send[mine][:, :, mine].sum(axis=(0, 2))
        assert (inside == np.minimum(counts_GE[mine].sum(axis=0), tokens_EG[:, mine].sum(axis=1))).all()


@pytest.mark.parametrize("nodes", [None, np.zeros(4, int)])
def test_one_node_is_no_different_from_none(nodes):
    counts_GE = np.arange(12).reshape(4, 3)
    tokens_EG = exact_split(counts_GE.sum(axis=0), np.ones((3, 4), bool))
    assert (send_matrix(counts_GE, tokens_EG, nodes) == send_matrix(counts_GE, tokens_EG)).all()
