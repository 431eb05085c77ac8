"""Expert popularity by path: what tokens chose that came the same way.

Shape letters: T tokens, L layers, E experts, K experts per token, P paths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from moesim.predictors.base import Cost, Floats, Forecast, Ids, Need, RouterSpec, Seen, from_probabilities, learnable
from moesim.predictors.counting import Frequency
from moesim.predictors.markov2 import indicator
from moesim.traces import LoadTable, TokenTable

REACH = 3
"""Layers ahead that are counted; beyond it a forecast is the frequency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathTable:
    """Choices in one layer of the fitted tokens, by their path."""

    path_P: NDArray[np.int64]
    """[P] ascending."""
    count: csr_array
    """[P, E]."""


class Paths:
    """P(expert | experts of the last `length` layers), each layer standing for its heaviest expert.

    Paths that fewer than `min_seen` tokens took do not count. What is counted for a path is smoothed by the forecast of
    the path that is shorter by one layer, worth `strength` tokens, down to the frequency: an unseen path is its longest
    seen end. Source: Lina (ATC'23), popularity estimation by path. Deviations: Lina reads one path length and the next
    layer only; here lengths are tried from `length` down, with tables for the next three layers. Needs no gate weights:
    without them the first id counts as the heaviest.
    """

    name = "path"
    needs: tuple[Need, ...] = ("tokens",)

    def __init__(self, length: int = 3, min_seen: int = 4, strength: float = 8.0) -> None:
        self.length = length
        self.min_seen = min_seen
        self.strength = strength
        self._prior = Frequency()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Count, per layer that has just routed, every path that ends there with the choices after it."""
        self._prior.fit(table, router)
        table = learnable(table, router, self)
        L, E = table.num_layers, router.num_experts
        top_LT = [
            _heaviest(table.topk_ids[:, i], None if table.topk_weights is None else table.topk_weights[:, i])
            for i in range(L)
        ]
        self.tables: dict[tuple[int, int, int], PathTable] = {}
        """(last routed layer, path length, distance) to counts."""
        for last in range(L - 1):
            for length in range(1, min(self.length, last + 1) + 1):
                path_P, row_T, seen_P = np.unique(
                    _path(top_LT[: last + 1], length, E), return_inverse=True, return_counts=True
                )
                often_P = seen_P >= self.min_seen
                ways = indicator(row_T[:, None], len(path_P)).T[often_P]
                for distance in range(1, min(REACH, L - 1 - last) + 1):
                    chosen = indicator(table.topk_ids[:, last + distance].astype(np.int64), E)
                    counted = PathTable(path_P=path_P[often_P], count=csr_array(ways @ chosen))
                    self.tables[last, length, distance] = counted

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """The longest path of each token that was seen often enough, smoothed by its ends."""
        last = len(seen.routed) - 1
        distance = layer - last
        if queued or last < 0 or not 1 <= distance <= REACH:
            return self._prior.forecast(seen, layer, queued=queued)
        top_LT = [_heaviest(routed.ids, routed.weights) for routed in seen.routed[-self.length :]]
        share_E = self._prior.share_LE[layer]
        p_TE = np.tile(share_E, (len(top_LT[-1]), 1))
        for length in range(1, len(top_LT) + 1):
            table = self.tables[last, length, distance]
            self._refine(p_TE, table, _path(top_LT, length, len(share_E)))
        return from_probabilities(p_TE, self._prior.top_k)

    def _refine(self, p_TE: Floats, table: PathTable, path_T: NDArray[np.int64]) -> None:
        """Move the rows of tokens whose path is in the table towards what is counted there."""
        row_T = np.searchsorted(table.path_P, path_T)
        known = np.flatnonzero(np.isin(path_T, table.path_P))
        count_TE = table.count[row_T[known]].toarray()
        strength = self.strength * self._prior.top_k
        p_TE[known] = (count_TE + strength * p_TE[known]) / (count_TE.sum(axis=1, keepdims=True) + strength)

    def cost(self) -> Cost:
        """A row of E is added for each length."""
        counts = self._prior.share_LE.size + sum(table.count.nnz for table in self.tables.values())
        return Cost(flops=self.length * self._prior.share_LE.shape[1], parameters=counts)


def _heaviest(ids_TK: Ids, weights_TK: NDArray[np.floating] | None) -> NDArray[np.int64]:
    """[T] each token's expert of the highest gate weight; the first without weights."""
    if weights_TK is None:
        return np.asarray(ids_TK[:, 0].astype(np.int64))
    return np.asarray(np.take_along_axis(ids_TK, weights_TK.argmax(axis=1)[:, None], axis=1)[:, 0].astype(np.int64))


def _path(top_LT: list[NDArray[np.int64]], length: int, num_experts: int) -> NDArray[np.int64]:
    """[T] the experts of the last `length` layers as one number."""
    path_T = np.zeros_like(top_LT[-1])
    for top_T in top_LT[-length:]:
        path_T = path_T * num_experts + top_T
    return path_T
