"""Which replica computes which tokens, exactly: every routed token goes to one GPU that holds its expert.

Shape letters: E experts, G GPUs; a GPU is also the rank that holds tokens under data-parallel attention. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.sim.rates import Rates
from moesim.traces.errors import PolicyError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What a split may know beyond loads."""

    counts_GE: Ints
    """[G, E] tokens that each rank holds for each expert."""
    node_G: NDArray[np.integer]
    """[G] the node of each GPU."""
    rates: Rates | None = None
    """How fast the executor is, where it says so."""


Split = Callable[[Ints, NDArray[np.bool_], Floats, Site], Ints]
"""(load_E, usable_EG, slowdown_G, site) -> tokens_EG with row sums load_E and zeros where an expert is not usable."""


def even_split(
    load_E: Ints, usable_EG: NDArray[np.bool_], _slowdown_G: Floats | None = None, _site: Site | None = None
) -> Ints:
    """Each expert's tokens in equal parts over its replicas, the remainder to the lowest GPUs (EPLB, vLLM, SGLang);
    how fast the GPUs are does not matter to it."""
    copies_E = usable_EG.sum(axis=1)
    _need_a_copy(load_E, copies_E)
    share_E, rest_E = np.divmod(load_E, np.maximum(copies_E, 1))
    order_EG = np.cumsum(usable_EG, axis=1) - 1
    return np.where(usable_EG, share_E[:, None] + (order_EG < rest_E[:, None]), 0).astype(np.int64)


def exact_split(
    load_E: Ints, usable_EG: NDArray[np.bool_], slowdown_G: Floats | None = None, _site: Site | None = None
) -> Ints:
    """The split with the smallest possible busiest GPU, in whole tokens (the optimum of LPLB's linear program).

    Experts with several copies are poured, heaviest first, into their GPUs; then tokens are moved along chains of
    shared experts away from the busiest GPU until no chain leads to one that would be less busy with one more. Then no
    split is better: the GPUs that a chain reaches hold at least max - 1 tokens each, which can go nowhere else. Where
    GPUs differ in speed, how busy one is is its tokens times its slowdown.
    """
    from moesim.sim.planning_kernels import exact_split as kernel  # compiled: only who splits pays for it

    slowdown_G = np.ones(usable_EG.shape[1]) if slowdown_G is None else slowdown_G
    _need_a_copy(load_E, usable_EG.sum(axis=1))
    tokens_EG = np.zeros(usable_EG.shape, np.int64)
    kernel(np.asarray(load_E, np.int64), usable_EG, slowdown_G, bool((slowdown_G != 1).any()), tokens_EG)
    return tokens_EG


def send_matrix(counts_GE: Ints, tokens_EG: Ints, node_G: NDArray[np.integer] | None = None) -> Ints:
    """[G_from, E, G_to] how many of each rank's tokens go to each replica.

    A rank uses its own replica first, then those of its node (`node_G`, left out: all are in one); what is left is
    matched in order of rank. Row and column sums are kept exactly.
    """
    gpus, experts = counts_GE.shape
    assert (counts_GE.sum(axis=0) == tokens_EG.sum(axis=1)).all(), "the split does not carry the tokens"
    send = np.zeros((gpus, experts, gpus), np.int64)
    at_once = (tokens_EG > 0).sum(axis=1) == 1
    send[:, at_once, tokens_EG[at_once].argmax(axis=1)] = counts_GE[:, at_once]
    split = np.flatnonzero((tokens_EG > 0).sum(axis=1) > 1)
    if len(split):
        nodes = [] if node_G is None else [np.flatnonzero(node_G == node) for node in np.unique(node_G)]
        send[:, split] = _match(counts_GE[:, split], tokens_EG[split], nodes if len(nodes) > 1 else [])
    return send


def _match(counts_GX: Ints, tokens_XG: Ints, nodes: list[NDArray[np.intp]]) -> Ints:
    """[G_from, X, G_to] the sends of experts whose tokens are split."""
    gpus = len(counts_GX)
    local_GX = np.minimum(counts_GX, tokens_XG.T)
    have_GX, want_XG = counts_GX - local_GX, tokens_XG - local_GX.T
    send = np.zeros((gpus, len(tokens_XG), gpus), np.int64)
    for mine in nodes:
        inside = _overlap(have_GX[mine], want_XG[:, mine])
        send[np.ix_(mine, np.arange(len(tokens_XG)), mine)] = inside
        have_GX[mine] -= inside.sum(axis=2)
        want_XG[:, mine] -= inside.sum(axis=0)
    send += _overlap(have_GX, want_XG)
    send[np.arange(gpus), :, np.arange(gpus)] += local_GX
    return send


def _overlap(have_GX: Ints, want_XG: Ints) -> Ints:
    """[G_from, X, G_to] both sides laid end to end per expert: the overlap of two intervals is what one rank sends to
    one replica."""
    have_end, want_end = np.cumsum(have_GX, axis=0), np.cumsum(want_XG, axis=1)
    upper = np.minimum(have_end[:, :, None], want_end[None, :, :])
    lower = np.maximum((have_end - have_GX)[:, :, None], (want_end - want_XG)[None, :, :])
    return np.asarray(np.maximum(upper - lower, 0))


def _need_a_copy(load_E: Ints, copies_E: NDArray[np.integer]) -> None:
    lost = np.flatnonzero((load_E > 0) & (copies_E == 0))
    if len(lost):
        raise PolicyError(f"expert {int(lost[0])} has {int(load_E[lost[0]])} tokens and no usable copy")
