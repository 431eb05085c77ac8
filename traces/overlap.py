"""How much one choice says of the next: tokens that follow each other, layers that follow each other.

Taken from a stream: the last token of each request is remembered, so that steps that interleave requests (decode)
count, too. Shape letters: T tokens, L layers, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.traces.errors import InputError
from moesim.traces.tokens import TokenTable
from moesim.traces.workload import held_out

MOST_OPEN = 1 << 16
"""Requests whose last token is remembered; the ones that were seen longest ago are forgotten first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """One layer; `chance` is what the same loads would give if choices were independent."""

    layer: int
    adjacent_tokens: float
    """Share of a token's experts that the token before it in the same request also chose."""
    adjacent_chance: float
    next_layer: float | None
    """Accuracy of guessing the next layer's first expert from this one's, by the most frequent follower (fitted on one
    half of the requests, scored on the other); None for the last layer."""
    next_layer_chance: float | None
    """The same, always guessing the next layer's most frequent expert."""


class OverlapSummary:
    """Takes tokens in parts; `finish` gives the overlaps of every layer. Memory: 8 L E^2 bytes for pairs of layers."""

    def __init__(self, layers: int, experts: int) -> None:
        # 32 bits: half the memory that random increments touch, and enough for 4 billion tokens.
        self._pairs = np.zeros((2, layers - 1, experts, experts), np.uint32)
        self._same_L = np.zeros(layers, np.int64)
        self._last_LE = np.full((layers, experts), -2, np.int64)
        self._followed = self._tokens = self._top_k = 0
        self._open: dict[int, tuple[int, NDArray[np.integer]]] = {}

    def add(self, part: TokenTable) -> None:
        """The next tokens of the recording."""
        from moesim.traces.kernels import follow  # compiled: only who counts pays for it

        if not len(part):
            return
        order = np.lexsort((part.position, part.request))
        if (np.diff(order) != 1).any():
            part = part.take(order)
        ids = np.ascontiguousarray(part.topk_ids)
        begins_T = np.append(True, part.request[1:] != part.request[:-1])
        follows_T = np.append(False, ~begins_T[1:] & (np.diff(part.position) == 1))
        half_T = held_out(part.request).astype(np.int64)
        self._followed += follow(ids, follows_T, half_T, self._last_LE, self._tokens, self._same_L, self._pairs)
        self._join(part, ids, np.flatnonzero(begins_T))
        self._tokens += len(part)
        self._top_k = ids.shape[2]

    def finish(self, load_LE: NDArray[np.integer]) -> list[Overlap]:
        """The overlaps of every layer; `load_LE` is the load of the recording, for what chance would give. Raises
        InputError where no two tokens are adjacent."""
        if not self._followed:
            raise InputError("no two tokens of a request are adjacent: there is no overlap to measure")
        return [self._layer(layer, load_E / load_E.sum()) for layer, load_E in enumerate(load_LE)]

    def _join(self, part: TokenTable, ids: NDArray[np.integer], first_R: NDArray[np.intp]) -> None:
        """Compare each request's first token here with its last one before, and remember its last one here."""
        last_R = np.append(first_R[1:], len(part)) - 1
        for first, last in zip(first_R.tolist(), last_R.tolist(), strict=True):
            request = int(part.request[first])
            before = self._open.pop(request, None)
            if before is not None and part.position[first] == before[0] + 1:
                self._same_L += (ids[first][:, :, None] == before[1][:, None, :]).any(axis=2).sum(axis=1)
                self._followed += 1
            self._open[request] = int(part.position[last]), ids[last].copy()
        while len(self._open) > MOST_OPEN:
            self._open.pop(next(iter(self._open)))

    def _layer(self, layer: int, share_E: NDArray[np.float64]) -> Overlap:
        """A token has K experts: one of the next token's is among them with probability K x share, about."""
        ahead = (None, None) if layer == self._pairs.shape[1] else _follower_accuracy(*self._pairs[:, layer])
        return Overlap(
            layer=layer,
            adjacent_tokens=float(self._same_L[layer] / (self._followed * self._top_k)),
            adjacent_chance=float((share_E**2).sum() * self._top_k),
            next_layer=ahead[0],
            next_layer_chance=ahead[1],
        )


def _follower_accuracy(fit_EE: NDArray[np.uint32], score_EE: NDArray[np.uint32]) -> tuple[float | None, float | None]:
    """(accuracy of the most frequent follower, of the most frequent expert), fitted and scored on other requests."""
    scored = int(score_EE.sum())
    if not fit_EE.any() or not scored:
        return None, None
    favourite = int(fit_EE.sum(axis=0).argmax())
    follower_E = np.where(fit_EE.any(axis=1), fit_EE.argmax(axis=1), favourite)
    right = int(score_EE[np.arange(len(score_EE)), follower_E].sum())
    return right / scored, float(score_EE[:, favourite].sum() / scored)
