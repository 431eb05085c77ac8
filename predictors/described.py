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


def described_width(experts: int, *, weighted: bool, numbers: int = 3) -> int:
    """F."""
    return numbers * experts + 1 if weighted else experts


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

    def read(self, rows: slice) -> tuple[NDArray[np.intp], NDArray[np.integer], Half, Half]:
        """What these tokens read, as the kernel `add_linear` takes it."""
        return self.row_T[rows], self.ids, self.values_NKC, self.own_N


@dataclass(frozen=True, slots=True, kw_only=True)
class Describer:
    """Of the layers that one predictor reads, which is named in errors."""

    predictor: str
    experts: int
    top_k: int
    weighted: bool
    numbers: int = 3
    """C, with gate weights; the first two of these or all."""

    def __call__(self, routed: RoutedLayer, spare: int = 0) -> Described:
        """1 for a chosen expert and, with gate weights, their logarithm and that over the weight of an average expert
        that was not chosen; the layer's own number is how much weight those have. `spare` rows behind them are empty.

        Raises InputError where there have to be gate weights and are none.
        """
        T, K = routed.ids.shape
        ids, own_N = routed.ids, np.zeros(T + spare, np.float32)
        if spare:
            ids = np.empty((T + spare, K), routed.ids.dtype)
            ids[:T] = routed.ids
        if not self.weighted:
            ones_NKC = np.ones((T + spare, K, 1), np.float32)
            return Described(ids=ids, values_NKC=ones_NKC, own_N=own_N, row_T=np.arange(T))
        if routed.weights is None:
            raise InputError(f"predictor {self.predictor!r} was fitted with gate weights, and here there are none")
        from moesim.predictors.kernels import described

        bits_TK = np.ascontiguousarray(routed.weights, np.float16).view(np.uint16)
        values_NKC = np.empty((T + spare, K, self.numbers), np.float32)
        described(bits_TK, np.float32(max(self.experts - self.top_k, 1)), values_NKC[:T], own_N[:T])
        return Described(ids=ids, values_NKC=values_NKC, own_N=own_N, row_T=np.arange(T))

    @property
    def width(self) -> int:
        """F."""
        return described_width(self.experts, weighted=self.weighted, numbers=self.numbers)

    def dense(self, one: Described) -> Half:
        """[T, F] the layer's description, zeros written out."""
        T, read_R, C = len(one.row_T), np.flatnonzero(one.row_T >= 0), one.values_NKC.shape[2]
        row_R, found_TF = one.row_T[read_R], np.zeros((T, self.width), np.float32)
        found_TEC = found_TF[:, : self.experts * C].reshape(T, self.experts, C)
        found_TEC[read_R[:, None], one.ids[row_R].astype(np.int64)] = one.values_NKC[row_R]
        if self.weighted:
            found_TF[read_R, -1] = one.own_N[row_R]
        return found_TF
