"""Second-order Markov: what a token chose in the last two layers, by counting, backed off to the last one.

Shape letters: T tokens, E experts, K experts per token, P pairs of experts (E x E).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from moesim.predictors.base import Cost, Floats, Forecast, Ids, Need, RouterSpec, Seen, from_probabilities, learnable
from moesim.predictors.counting import Markov
from moesim.traces import LoadTable, TokenTable


class Markov2:
    """P(expert of layer l | experts of layers l-2 and l-1), by counting pairs; K > 1 averages over the K x K pairs.

    A pair seen n times gives (count + strength * p1) / (n + strength), p1 being the first order, which also answers
    alone where one layer has routed, and chains over the layers between. Source: Lina (ATC'23), a path of two layers;
    the interpolation is the usual one of language models (Jelinek and Mercer; MacKay and Peto's Dirichlet prior).
    """

    name = "markov-2"
    needs: tuple[Need, ...] = ("tokens",)

    def __init__(self, strength: float = 10.0) -> None:
        self.strength = strength
        self._first = Markov()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Count triples of experts in adjacent layers: count_PE[l] is of layer l+2, given the pairs of l and l+1."""
        self._first.fit(table, router)
        E, self.top_k = router.num_experts, router.top_k
        ids = learnable(table, router, self).topk_ids.astype(np.int64)
        self.count_PE = [
            csr_array(indicator(_pairs(ids[:, i], ids[:, i + 1], E), E * E).T @ indicator(ids[:, i + 2], E))
            for i in range(ids.shape[1] - 2)
        ]
        self.total_P = [count.sum(axis=1) for count in self.count_PE]

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """Second order into the layer that routes next, first order from there to `layer`."""
        routed = len(seen.routed)
        if queued or routed < 2 or layer < routed:
            return self._first.forecast(seen, layer, queued=queued)
        key = (self, routed)
        if key not in seen.memo:
            seen.memo[key] = self._next(
                seen.routed[-2].ids.astype(np.int64), seen.routed[-1].ids.astype(np.int64), routed
            )
        p_TE = seen.memo[key]
        for between in range(routed, layer):
            p_TE = p_TE @ self._first.step_LEE[between]
        return from_probabilities(p_TE, self.top_k)

    def _next(self, before_TK: Ids, last_TK: Ids, layer: int) -> Floats:
        """[T, E] probabilities in `layer` given both layers before it."""
        (T, K), first_EE = last_TK.shape, self._first.step_LEE[layer - 1]
        pair_TP = _pairs(before_TK, last_TK, len(first_EE))
        weight_TP = 1 / (K * K * (self.total_P[layer - 2][pair_TP] + self.strength))
        counted_TE = (indicator(pair_TP, len(first_EE) ** 2, weight_TP) @ self.count_PE[layer - 2]).toarray()
        rest_TK = self.strength * weight_TP.reshape(T, K, K).sum(axis=1)
        return np.asarray(counted_TE + np.einsum("tk,tke->te", rest_TK, first_EE[last_TK]))

    def cost(self) -> Cost:
        """K x K rows of pairs and K of the first order are added."""
        first = self._first.cost()
        pairs = sum(count.nnz for count in self.count_PE)
        return Cost(flops=first.flops * (1 + self.top_k), parameters=first.parameters + pairs)


def indicator(ids_TN: Ids, columns: int, weight_TN: NDArray[np.floating] | None = None) -> csr_array:
    """[T, columns] sparse: row t has `weight_TN` (1 without) in the columns `ids_TN`."""
    T, N = ids_TN.shape
    values = np.ones(T * N) if weight_TN is None else weight_TN.ravel()
    return csr_array((values, ids_TN.ravel(), np.arange(0, T * N + 1, N)), shape=(T, columns))


def _pairs(before_TK: Ids, last_TK: Ids, num_experts: int) -> NDArray[np.int64]:
    """[T, K x K] every pair of an expert of one layer and one of the next, as one number; the latter varies fastest."""
    T, K = last_TK.shape
    return np.asarray(before_TK[:, :, None] * num_experts + last_TK[:, None, :]).reshape(T, K * K)
