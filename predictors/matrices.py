"""Nearest expert activation matrix: what the most similar request of the past went on to do.

Shape letters: T tokens, R requests of a step, L layers, E experts, K experts per token, N matrices kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.base import (
    Cost,
    Floats,
    Forecast,
    Need,
    RouterSpec,
    Seen,
    from_inclusion,
    inclusion_of,
    learnable,
    tokens_of,
)
from moesim.predictors.counting import Frequency
from moesim.traces import LoadTable, StepTokens, TokenTable, load_LE


@dataclass(slots=True, kw_only=True)
class SoFar:
    """What the requests of a step have done so far; grows as layers route."""

    row_T: NDArray[np.intp]
    """[T] each token's request, as a row of the following."""
    count_RLE: NDArray[np.float32]
    alike_LRN: NDArray[np.float32]
    """Cosine between request and kept matrix in each layer; 0 where the request has no tokens in it."""
    layers: int = 0
    """Layers of the running step that are in it."""


class NearestMatrix:
    """Each request's row of the kept activation matrix that is most similar to what the request did so far.

    A matrix [L, E] counts a fitted request's tokens per expert. At most `capacity` are kept: when there is no room, a
    new one takes the place of the most similar. Similarity is the mean over layers of the cosine of the two rows; rows
    that the request has no tokens in are left out, so a prefill step compares the layers that have routed, a decode
    step all. The row is smoothed by the frequency, worth `strength` tokens; requests of which nothing is known get the
    frequency. Source: MoE-Infinity (arXiv 2401.14361), activation-aware prefetching. Deviations: the collection is
    fitted once and does not take in the requests that are run; prefetch priorities (layer decay) are a rule's business.
    """

    name = "nearest-matrix"
    needs: tuple[Need, ...] = ("tokens",)

    def __init__(self, capacity: int = 128, strength: float = 8.0) -> None:
        self.capacity = capacity
        self.strength = strength
        self._prior = Frequency()

    def fit(self, table: TokenTable | LoadTable, router: RouterSpec) -> None:
        """Collect the matrices of the fitted requests, in the order of their arrival."""
        self._prior.fit(table, router)
        table = learnable(table, router, self)
        kept: list[Floats] = []
        unit: list[Floats] = []
        _, first, request_T = np.unique(table.request, return_index=True, return_inverse=True)
        order = np.argsort(request_T, kind="stable")
        rows_R = np.split(order, np.cumsum(np.bincount(request_T))[:-1])
        for request in np.argsort(first):
            matrix_LE = load_LE(table.topk_ids[rows_R[request]], router.num_experts).astype(np.float64)
            unit_LE = _unit(matrix_LE)
            if len(kept) < self.capacity:
                kept.append(matrix_LE)
                unit.append(unit_LE)
            else:
                nearest = int(np.argmax([np.vdot(unit_LE, other) for other in unit]))
                kept[nearest], unit[nearest] = matrix_LE, unit_LE
        self.unit_NLE = np.array(unit, np.float32)
        smooth_NLE = np.array(kept) + self.strength * router.top_k * self._prior.share_LE
        self.share_NLE = (smooth_NLE / smooth_NLE.sum(axis=2, keepdims=True)).astype(np.float32)

    def forecast(self, seen: Seen, layer: int, *, queued: bool = False) -> Forecast:
        """Tokens of a request share a forecast: the nearest matrix's row of `layer`."""
        so_far = self._so_far(seen, queued)
        alike_RN = so_far.alike_LRN.sum(axis=0)
        known_R = so_far.count_RLE.sum(axis=(1, 2)) > 0
        p_RE = np.where(known_R[:, None], self.share_NLE[alike_RN.argmax(axis=1), layer], self._prior.share_LE[layer])
        top_k = self._prior.top_k
        inclusion_RE = inclusion_of(p_RE / p_RE.sum(axis=1, keepdims=True), top_k)
        return from_inclusion(inclusion_RE[so_far.row_T], top_k)

    def _so_far(self, seen: Seen, queued: bool) -> SoFar:
        """The matrices of the step's requests, with the layers that have routed since the last call added."""
        key = (self, queued)
        if key not in seen.memo:
            seen.memo[key] = self._from_past(tokens_of(seen, queued), seen)
        so_far: SoFar = seen.memo[key]
        for layer in range(so_far.layers, 0 if queued else len(seen.routed)):
            ids_TK = seen.routed[layer].ids
            E = so_far.count_RLE.shape[2]
            cell_TK = so_far.row_T[:, None] * E + ids_TK
            new_RE = np.bincount(cell_TK.ravel(), minlength=len(so_far.count_RLE) * E).reshape(-1, E)
            so_far.count_RLE[:, layer] += new_RE
            so_far.alike_LRN[layer] = self._alike(so_far.count_RLE[:, layer], layer)
            so_far.layers = layer + 1
        return so_far

    def _from_past(self, tokens: StepTokens, seen: Seen) -> SoFar:
        """What earlier steps say of the requests that `tokens` belong to."""
        request_R, row_T = np.unique(tokens.request, return_inverse=True)
        R, (_, L, E) = len(request_R), self.unit_NLE.shape
        cells = [np.zeros(0, np.int64)]
        for step in seen.past:
            rows = np.flatnonzero(np.isin(step.tokens.request, request_R))
            own_T11 = np.searchsorted(request_R, step.tokens.request[rows])[:, None, None]
            cells.append(((own_T11 * L + np.arange(L)[:, None]) * E + step.topk_ids[rows]).ravel())
        count_RLE = np.bincount(np.concatenate(cells), minlength=R * L * E).reshape(R, L, E).astype(np.float32)
        alike_LRN = np.stack([self._alike(count_RLE[:, layer], layer) for layer in range(L)])
        return SoFar(row_T=row_T, count_RLE=count_RLE, alike_LRN=alike_LRN)

    def _alike(self, count_RE: NDArray[np.float32], layer: int) -> NDArray[np.float32]:
        """[R, N] cosines in one layer."""
        return np.asarray(_unit(count_RE) @ self.unit_NLE[:, layer].T)

    def cost(self) -> Cost:
        """Of a request rather than of a token: one layer is compared with every matrix."""
        N, _, E = self.unit_NLE.shape
        return Cost(flops=2 * N * E, parameters=self.unit_NLE.size + self.share_NLE.size)


def _unit(count: NDArray[Any]) -> NDArray[Any]:
    """Rows of length 1; those of zeros stay."""
    return np.asarray(count / np.maximum(np.linalg.norm(count, axis=-1, keepdims=True), 1e-30).astype(count.dtype))
