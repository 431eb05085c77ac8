"""What `ridge`, `neighbours` and the routing net read of a routed layer: chosen experts and, if recorded, gate weights.

Shape letters: T tokens, E experts, K experts per token, C numbers that describe a chosen expert, F = E C numbers of a
layer, and one more with gate weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.base import RoutedLayer
from moesim.traces import InputError

Half = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """One routed layer, only of chosen experts."""

    ids: NDArray[np.integer]
    """[T, K]."""
    values_TKC: Half
    own_T: Half
    """A number of the layer's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Describer:
    """Of the layers that one predictor reads, which is named in errors."""

    predictor: str
    experts: int
    top_k: int
    weighted: bool

    def __call__(self, routed: RoutedLayer) -> Described:
        """1 for a chosen expert and, with gate weights, their logarithm and that over the weight of an average expert
        that was not chosen; the layer's own number is how much weight those have.

        Raises InputError where there have to be gate weights and are none.
        """
        ids = np.ascontiguousarray(routed.ids)
        if not self.weighted:
            ones_TKC = np.ones((*ids.shape, 1), np.float32)
            return Described(ids=ids, values_TKC=ones_TKC, own_T=np.zeros(len(ids), np.float32))
        if routed.weights is None:
            raise InputError(f"predictor {self.predictor!r} was fitted with gate weights, and here there are none")
        from moesim.predictors.kernels import described

        w_TK = np.ascontiguousarray(routed.weights, np.float32)
        values_TKC, own_T = np.empty((*w_TK.shape, 3), np.float32), np.empty(len(w_TK), np.float32)
        described(w_TK, np.float32(max(self.experts - self.top_k, 1)), values_TKC, own_T)
        return Described(ids=ids, values_TKC=values_TKC, own_T=own_T)

    def dense(self, one: Described) -> Half:
        """[T, F] the layer's description, zeros written out."""
        T, _, C = one.values_TKC.shape
        found_TEC = np.zeros((T, self.experts, C), np.float32)
        found_TEC[np.arange(T)[:, None], one.ids.astype(np.int64)] = one.values_TKC
        flat_TX = found_TEC.reshape(T, -1)
        return np.concatenate([flat_TX, one.own_T[:, None]], axis=1) if self.weighted else flat_TX
