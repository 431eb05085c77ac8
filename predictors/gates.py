"""The gates of later layers, asked early: recorded answers to a layer's router input.

Needs recordings with lookahead. Shape letters: T tokens, L layers, E experts, K experts per token, D lookahead
distances, M lookahead width, N opinions about a layer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from moesim.predictors.base import (
    Cost,
    Floats,
    Forecast,
    Ids,
    Need,
    RouterSpec,
    Seen,
    filled,
    from_probabilities,
    inclusion_of,
    learnable,
    most_probable,
)
from moesim.predictors.counting import Frequency
from moesim.traces import InputError, LoadTable, TokenTable

FIT_TOKENS = 1024
"""Tokens that weights of opinions are fitted on, spread over the recording: there are few weights and many tokens."""


class CrossGate:
    """The first K ids that the gate of `layer` names for the router input of the last routed layer.

    With `over`, all M recorded ids are fetched, in the order of their chance, and not just the first K. Each rank of
    the gate's ranking has a chance of being chosen, by counting per layer and distance; what is missing to K is divided
    by frequency. Distances beyond the recorded ones get the frequency. Source: Fate (arXiv 2502.12224), cross-layer
    gate, and Libra; PROBE's frozen gate without its residual network. Deviation: Fate over-fetches up to a percentile
    of the weights; here the width is what was recorded, and the chances say how far to go.
    """

    needs: tuple[Need, ...] = ("tokens", "lookahead")

    def __init__(self, over: bool = False, name: str = "cross-gate") -> None:
        self.over = over
        self.name = name
        self._prior = Frequency()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Count hits: hit_LDM[l, d, m] = P(rank m of what layer l's input said of layer l+1+d is chosen there).

        Raises InputError where fewer than K ids of each gate were recorded."""
        self._prior.fit(table, router)
        table = learnable(table, router, self)
        ahead = _lookahead(table, router, self.name)
        ids, (T, L, D, M) = table.topk_ids, ahead.shape
        self.usual_LE = inclusion_of(self._prior.share_LE, router.top_k)
        self.gate_flops = _gate_flops(router)
        self.hit_LDM = np.zeros((L, D, M if self.over else router.top_k))
        for layer in range(L - 1):
            for d in range(min(D, L - 1 - layer)):
                hits_M = _hits(ahead[:, layer, d], ids[:, layer + 1 + d])[: self.hit_LDM.shape[2]]
                self.hit_LDM[layer, d] = (hits_M + router.top_k / router.num_experts) / (T + 1)

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """What the last routed layer's input says of `layer`."""
        told = None if queued else _told(seen, len(seen.routed) - 1, layer)
        if told is None:
            return self._prior.forecast(seen, layer, queued=queued)
        last, M = len(seen.routed) - 1, self.hit_LDM.shape[2]
        told_TM, top_k = told[:, :M], self._prior.top_k
        known_TE = np.zeros((len(told_TM), self.usual_LE.shape[1]))
        np.put_along_axis(known_TE, told_TM, self.hit_LDM[last, layer - last - 1], axis=1)
        inclusion_TE = filled(known_TE, self.usual_LE[layer], top_k)
        return Forecast(
            load=inclusion_TE.sum(axis=0),
            topk=most_probable(inclusion_TE, M) if self.over else told_TM,
            inclusion_UE=inclusion_TE,
        )

    def cost(self) -> Cost:
        """The gate, where the recording holds it, and the filling up."""
        return Cost(flops=self.gate_flops + self.usual_LE.shape[1], parameters=self.hit_LDM.size + self.usual_LE.size)


class StackedGate:
    """All that gates have said of `layer` so far: each of the last D routed layers' inputs has been put to its gate.

    An opinion gives each rank of its ranking, and the ranks beyond M as one, a lift: P(chosen | rank) / P(chosen).
    Naive Bayes would multiply the expert's frequency by all of them. But opinions are of nearly the same input, so they
    agree more often than independent ones: each of them, and the frequency, has an exponent (an inverse temperature),
    fitted by maximum likelihood per layer and per nearest opinion that there is. Distances beyond the recorded ones get
    the frequency. Source: HOBBIT (arXiv 2411.01433), stacked gating. Deviation: there the latest opinion is trusted,
    and earlier ones are for prefetching deeper.
    """

    name = "stacked-gate"
    needs: tuple[Need, ...] = ("tokens", "lookahead")

    def __init__(self) -> None:
        self._prior = Frequency()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Logarithms of lifts, lift_NM[layer][n, m] (opinion n is of layer - 1 - n), and the opinions' exponents.

        Raises InputError where fewer than K ids of each gate were recorded."""
        self._prior.fit(table, router)
        table = learnable(table, router, self)
        ahead = _lookahead(table, router, self.name)
        self.gate_flops = _gate_flops(router) * ahead.shape[2]
        rows = slice(None, None, -(-len(table) // FIT_TOKENS))
        choices, E = len(table) * router.top_k, router.num_experts
        self.usual_LE = np.log((self._prior.share_LE * choices + 1) / (choices + E))
        """Logarithm of the frequency, one choice of each expert added: what never was can still be told."""
        self.lift_NM: list[Floats] = []
        self.exponent_N: dict[tuple[int, int], Floats] = {}
        """(layer, index of the nearest opinion) to the exponents of the frequency, that opinion and each older one."""
        for layer in range(table.num_layers):
            opinions = [ahead[:, layer - 1 - n, n] for n in range(min(ahead.shape[2], layer))]
            chosen_TK = table.topk_ids[:, layer].astype(np.int64)
            self.lift_NM.append(np.array([_lift(told, chosen_TK, E) for told in opinions]))
            for nearest in range(len(opinions)):
                x_NTE = self._evidence([told[rows] for told in opinions[nearest:]], layer, nearest)
                self.exponent_N[layer, nearest] = _likeliest(x_NTE, chosen_TK[rows])

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """The frequency times the lifts of all opinions that there are."""
        last, oldest = len(seen.routed) - 1, layer - len(self.lift_NM[layer])
        told = [] if queued else [_told(seen, source, layer) for source in range(last, oldest - 1, -1)]
        opinions = [ids for ids in told if ids is not None]
        if not opinions or len(opinions) < len(told):
            return self._prior.forecast(seen, layer, queued=queued)
        nearest = layer - 1 - last
        log_p_TE = np.tensordot(self.exponent_N[layer, nearest], self._evidence(opinions, layer, nearest), axes=1)
        return from_probabilities(softmax(log_p_TE, axis=1), self._prior.top_k)

    def _evidence(self, opinions: list[Ids], layer: int, nearest: int) -> Floats:
        """[1 + N, T, E] logarithms of the frequency and of the lift that each opinion gives each expert."""
        x_NTE = np.empty((1 + len(opinions), len(opinions[0]), self.usual_LE.shape[1]))
        x_NTE[0] = self.usual_LE[layer]
        for x_TE, told_TM, lift_M in zip(x_NTE[1:], opinions, self.lift_NM[layer][nearest:], strict=True):
            x_TE[:] = lift_M[-1]
            # From the last rank to the first, which stays where an id was named twice.
            np.put_along_axis(x_TE, told_TM[:, ::-1].astype(np.int64), lift_M[-2::-1], axis=1)
        return x_NTE

    def cost(self) -> Cost:
        """D gates, where the recording holds them, and a product over their opinions."""
        N, E = max(len(lift) for lift in self.lift_NM), self.usual_LE.shape[1]
        learned = [*self.lift_NM, *self.exponent_N.values(), self.usual_LE]
        return Cost(flops=self.gate_flops + 2 * N * E, parameters=sum(a.size for a in learned))


def _lookahead(table: TokenTable, router: RouterSpec, name: str) -> Ids:
    """[T, L, D, M] the recorded ids. Raises InputError where M < K."""
    ahead = table.lookahead_ids
    assert ahead is not None, "what a predictor needs is there"
    if ahead.shape[3] < router.top_k:
        raise InputError(
            f"predictor {name!r} reads the first {router.top_k} experts of later gates, and this recording has "
            f"{ahead.shape[3]}: record it again"
        )
    return ahead


def _told(seen: Seen, source: int, layer: int) -> Ids | None:
    """[T, M] what the input of layer `source` says of `layer`; None where it was not asked."""
    if source < 0 or layer <= source:
        return None
    ahead = seen.routed[source].lookahead
    return None if ahead is None or layer - source > ahead.shape[1] else ahead[:, layer - source - 1].astype(np.int64)


def _hits(told_TM: Ids, chosen_TK: Ids) -> NDArray[np.int64]:
    """[M] tokens that chose what was told in each rank."""
    return np.asarray((told_TM[:, :, None] == chosen_TK[:, None, :]).any(axis=2).sum(axis=0))


def _lift(told_TM: Ids, chosen_TK: Ids, num_experts: int) -> Floats:
    """[M + 1] log of P(chosen | rank) / P(chosen), the last for experts beyond rank M; one choice at the mean chance is
    added to each. An id that was named twice counts in its first rank."""
    T, K = chosen_TK.shape
    again_TM = np.tril(told_TM[:, :, None] == told_TM[:, None, :], -1).any(axis=2)
    hits_M = _hits(np.where(again_TM, -1, told_TM.astype(np.int64)), chosen_TK)
    asked_M = T - again_TM.sum(axis=0)
    chosen = np.append(hits_M, T * K - hits_M.sum())
    asked = np.append(asked_M, T * num_experts - asked_M.sum())
    return np.asarray(np.log((chosen + 1) / (asked * K / num_experts + 1)))


def _likeliest(x_NTE: Floats, chosen_TK: NDArray[np.int64]) -> Floats:
    """[N] exponents of factors, whose logarithms are `x_NTE`, under which the chosen experts are likeliest; a unit
    ridge around 1, naive Bayes, keeps them finite where opinions are never wrong."""
    chosen_NTK = np.take_along_axis(x_NTE, chosen_TK[None], axis=2)

    def loss(w_N: Floats) -> tuple[float, Floats]:
        log_p_TE = log_softmax(np.tensordot(w_N, x_NTE, axes=1), axis=1)
        value = ((w_N - 1) ** 2).sum() / 2 - np.take_along_axis(log_p_TE, chosen_TK, axis=1).sum()
        expected_N = chosen_TK.shape[1] * (x_NTE * np.exp(log_p_TE)).sum(axis=(1, 2))
        return float(value), w_N - 1 + expected_N - chosen_NTK.sum(axis=(1, 2))

    return np.asarray(minimize(loss, np.ones(len(x_NTE)), jac=True, method="L-BFGS-B").x)


def _gate_flops(router: RouterSpec) -> float:
    """Arithmetic of one gate on one token; 0 where the recording has no gates to tell its width."""
    return 0.0 if router.gates is None else 2.0 * router.gates.weight[0].size
