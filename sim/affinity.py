"""Which experts follow or accompany each other, and bins (GPUs or nodes) that keep such experts together.

Pure numpy and scipy, knows nothing about time or devices. Shape letters: L layers, E experts, B bins, K experts per
token. `bin_LE` says in which bin each expert of each layer lies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moesim.traces import TokenTable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MOST_TOKENS = 65_536
"""Tokens that are counted at most, evenly spaced over the recording."""
SWEEPS = 8
"""Times at most that all layers are gone through."""
EXACT = 24
"""Layers x experts x bins up to which the integer program is solved: it takes seconds at twice as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Affinity:
    """What is to lie together."""

    between_LEE: Floats
    """[L - 1, E, E] how much is lost where expert e of a layer and f of the next lie in different bins."""
    within_LEE: Floats | None
    """[L, E, E] the same for two experts of one layer, symmetric, each pair counted in both halves; None: nothing."""
    load_LE: Floats
    bins: int
    slots: int
    """Experts of a layer that a bin has room for."""
    most_L: Floats
    """[L] load that no bin may exceed, infinite where only the counts have to be equal."""

    def kept(self, bin_LE: Ints) -> float:
        """The affinity of all pairs that lie in one bin."""
        pairs = zip(self.between_LEE, bin_LE, bin_LE[1:], strict=False)
        same = sum(float(w[a[:, None] == b].sum()) for w, a, b in pairs)
        if self.within_LEE is not None:
            same += sum(float(w[a[:, None] == a].sum()) for w, a in zip(self.within_LEE, bin_LE, strict=True)) / 2
        return same


def followers(table: TokenTable, experts: int) -> Floats:
    """[L - 1, E, E] share of the tokens' pairs (chosen in a layer, chosen in the next) that are (e, f); each [E, E]
    sums to 1. Source: the expert affinity of ExFlow."""
    ids_TLK = _some(table)
    between = [_pairs(ids_TLK[:, i], ids_TLK[:, i + 1], experts) for i in range(ids_TLK.shape[1] - 1)]
    return np.stack(between) if between else np.zeros((0, experts, experts))


def companions(table: TokenTable, experts: int) -> Floats:
    """[L, E, E] share of the pairs of different experts of one token that are {e, f}; each [E, E] is symmetric and sums
    to 1, or is 0 where a token has one expert."""
    ids_TLK = _some(table)
    together_LEE = np.stack([_pairs(ids_TK, ids_TK, experts) for ids_TK in ids_TLK.transpose(1, 0, 2)])
    together_LEE[:, np.arange(experts), np.arange(experts)] = 0.0
    return np.asarray(together_LEE / np.maximum(together_LEE.sum(axis=(1, 2), keepdims=True), 1e-30))


def arranged(wanted: Affinity, start_LE: Ints) -> Ints:
    """[L, E] bins that keep at least as much together as `start_LE` does: the optimum where that is small enough to be
    computed, else what a local search finds. `start_LE` must be within slots and loads."""
    layers, experts = start_LE.shape
    if layers * experts * wanted.bins <= EXACT:
        from moesim.sim.affinity_program import optimum

        return optimum(wanted)
    return searched(wanted, start_LE)


def searched(wanted: Affinity, start_LE: Ints) -> Ints:
    """Local search: bins change their names so that layers fit each other, then layer by layer the best assignment
    given the neighbours (where only counts matter, Hungarian), or the best swap of two experts again and again."""
    bin_LE = _renamed(wanted, start_LE)
    linear = wanted.within_LEE is None and not np.isfinite(wanted.most_L).any()
    best, best_LE = wanted.kept(bin_LE), bin_LE.copy()
    for _ in range(SWEEPS):
        for layer in [*range(len(bin_LE)), *reversed(range(len(bin_LE)))]:
            bin_LE[layer] = _assigned(wanted, bin_LE, layer) if linear else _swapped(wanted, bin_LE, layer)
        now = wanted.kept(bin_LE)
        if now <= best + 1e-12:
            break
        best, best_LE = now, bin_LE.copy()
    return best_LE


def _pull(wanted: Affinity, bin_LE: Ints, layer: int) -> Floats:
    """[E, B] what each expert of `layer` would have with it in each bin, the others staying where they are."""

    def in_bins(layer: int) -> Floats:
        return np.asarray(bin_LE[layer][:, None] == np.arange(wanted.bins), np.float64)

    pull_EB = np.zeros((bin_LE.shape[1], wanted.bins))
    if layer > 0:
        pull_EB += wanted.between_LEE[layer - 1].T @ in_bins(layer - 1)
    if layer + 1 < len(bin_LE):
        pull_EB += wanted.between_LEE[layer] @ in_bins(layer + 1)
    if wanted.within_LEE is not None:
        pull_EB += wanted.within_LEE[layer] @ in_bins(layer)
    return pull_EB


def _assigned(wanted: Affinity, bin_LE: Ints, layer: int) -> Ints:
    """[E] the best bins for one layer with the counts that they have."""
    seats = np.repeat(np.arange(wanted.bins), np.bincount(bin_LE[layer], minlength=wanted.bins))
    expert, seat = linear_sum_assignment(_pull(wanted, bin_LE, layer)[:, seats], maximize=True)
    moved_E: Ints = np.empty_like(bin_LE[layer])
    moved_E[expert] = seats[seat]
    return moved_E


def _swapped(wanted: Affinity, bin_LE: Ints, layer: int) -> Ints:
    """[E] bins of one layer after the best swaps of two experts, one after the other, within the loads."""
    bin_LE = bin_LE.copy()
    bin_E: Ints = bin_LE[layer]
    load_E, most = wanted.load_LE[layer], wanted.most_L[layer]
    within_EE = np.zeros((len(bin_E),) * 2) if wanted.within_LEE is None else wanted.within_LEE[layer]
    load_B = np.bincount(bin_E, load_E, wanted.bins)
    for _ in range(4 * len(bin_E)):
        pull_EB = _pull(wanted, bin_LE, layer)
        stay_E, there_EE = pull_EB[np.arange(len(bin_E)), bin_E], pull_EB[:, bin_E]
        gain_EE = there_EE + there_EE.T - stay_E[:, None] - stay_E - 2 * within_EE
        after_EE = load_B[bin_E][:, None] - load_E[:, None] + load_E  # of e's bin once it has f instead
        fits_EE = (np.maximum(after_EE, after_EE.T) <= most) & (bin_E[:, None] != bin_E)
        e, f = np.unravel_index(int(np.argmax(np.where(fits_EE, gain_EE, -np.inf))), gain_EE.shape)
        if not fits_EE[e, f] or gain_EE[e, f] <= 1e-12:
            break
        load_B[bin_E[e]], load_B[bin_E[f]] = after_EE[e, f], after_EE[f, e]
        bin_E[e], bin_E[f] = bin_E[f], bin_E[e]
    return bin_E


def _renamed(wanted: Affinity, bin_LE: Ints) -> Ints:
    """The same groups of experts, each layer's bins named so that as much as possible follows from the layer before,
    an assignment problem for each."""
    bin_LE = bin_LE.copy()
    for layer in range(1, len(bin_LE)):
        flow_BB = np.zeros((wanted.bins, wanted.bins))
        np.add.at(flow_BB, (bin_LE[layer][None, :], bin_LE[layer - 1][:, None]), wanted.between_LEE[layer - 1])
        old, new = linear_sum_assignment(flow_BB, maximize=True)
        name_B = np.empty(wanted.bins, np.int64)
        name_B[old] = new
        bin_LE[layer] = name_B[bin_LE[layer]]
    return bin_LE


def _some(table: TokenTable) -> NDArray[np.integer]:
    """[T, L, K] ids of at most MOST_TOKENS tokens."""
    rows = np.unique(np.linspace(0, len(table) - 1, min(len(table), MOST_TOKENS)).astype(np.int64))
    return np.asarray(table.topk_ids[rows])


def _pairs(a_TK: NDArray[np.integer], b_TK: NDArray[np.integer], experts: int) -> Floats:
    """[E, E] share of the pairs of a token's entries that are (e, f)."""
    key = a_TK.astype(np.int64)[:, :, None] * experts + b_TK.astype(np.int64)[:, None, :]
    counts = np.bincount(key.ravel(), minlength=experts * experts).reshape(experts, experts)
    return counts / max(key.size, 1)
