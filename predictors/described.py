"""What `ridge`, `neighbours` and the routing net read of a routed layer: chosen experts and, if recorded, gate weights.

Shape letters: T tokens, N rows that they read, E experts, K experts per token, C numbers that describe a chosen expert,
F = E C numbers of a layer, and one more with gate weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.base import RoutedLayer
from moesim.traces import InputError

Half = NDArray[np.float32]
EVERY = slice(None)
"""All rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """One routed layer, only of chosen experts."""

    ids: NDArray[np.integer]
    """[N, K]."""
    values_NKC: Half
    own_N: Half
    """A number of the layer's own."""
    row_T: NDArray[np.intp]
    """Which of the N each token reads; below 0 nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Describer:
    """Of the layers that one predictor reads, which is named in errors."""

    predictor: str
    experts: int
    top_k: int
    weighted: bool

    def __call__(self, routed: RoutedLayer, rows: slice = EVERY) -> Described:
        """1 for a chosen expert and, with gate weights, their logarithm and that over the weight of an average expert
        that was not chosen; the layer's own number is how much weight those have. Of `rows` and the one before them;
        the numbers of others are not filled in.

        Raises InputError where there have to be gate weights and are none.
        """
        ids, row_T = np.ascontiguousarray(routed.ids), np.arange(len(routed.ids))[rows]
        if not self.weighted:
            ones_NKC = np.ones((*ids.shape, 1), np.float32)
            return Described(ids=ids, values_NKC=ones_NKC, own_N=np.zeros(len(ids), np.float32), row_T=row_T)
        if routed.weights is None:
            raise InputError(f"predictor {self.predictor!r} was fitted with gate weights, and here there are none")
        from moesim.predictors.kernels import described

        read = slice(max((rows.start or 0) - 1, 0), rows.stop)
        w_NK = np.ascontiguousarray(routed.weights[read], np.float32)
        values_NKC, own_N = np.empty((*ids.shape, 3), np.float32), np.empty(len(ids), np.float32)
        described(w_NK, np.float32(max(self.experts - self.top_k, 1)), values_NKC[read], own_N[read])
        return Described(ids=ids, values_NKC=values_NKC, own_N=own_N, row_T=row_T)

    def dense(self, one: Described) -> Half:
        """[T, F] the layer's description, zeros written out."""
        T, read_R, C = len(one.row_T), np.flatnonzero(one.row_T >= 0), one.values_NKC.shape[2]
        row_R, found_TF = one.row_T[read_R], np.zeros((T, self.experts * C + self.weighted), np.float32)
        found_TEC = found_TF[:, : self.experts * C].reshape(T, self.experts, C)
        found_TEC[read_R[:, None], one.ids[row_R].astype(np.int64)] = one.values_NKC[row_R]
        if self.weighted:
            found_TF[read_R, -1] = one.own_N[row_R]
        return found_TF
